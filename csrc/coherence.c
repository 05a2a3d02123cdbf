/* coherence.c - which blocks of a device the page cache may hold: a bit for each. */
#define _GNU_SOURCE
#include "coherence.h"

#include <errno.h>
#include <sys/mman.h>

enum { WORD_BITS = 64 };

int db_coherence_open(uint64_t size_bytes, struct db_coherence *out)
{
    uint64_t blocks = (size_bytes + DB_BLOCK_BYTES - 1) / DB_BLOCK_BYTES;
    out->length = (size_t)(blocks / WORD_BITS + 1) * sizeof(out->words[0]);
    /* Not taken before it is written to: a drive of terabytes has megabytes of these. */
    void *memory = mmap(NULL, out->length, PROT_READ | PROT_WRITE,
                        MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    out->words = memory == MAP_FAILED ? NULL : memory;
    return out->words ? 0 : -ENOMEM;
}

void db_coherence_close(struct db_coherence *coherence)
{
    if (coherence->words)
        munmap((void *)coherence->words, coherence->length);
    coherence->words = NULL;
}

/* The bits of one word for blocks from `first` up to `end`. */
static uint64_t bits_of(uint64_t first, uint64_t end)
{
    uint64_t low = first % WORD_BITS;
    uint64_t count = end - first;
    if (count >= WORD_BITS - low)
        return UINT64_MAX << low;
    return ((UINT64_C(1) << count) - 1) << low;
}

static uint64_t next_word(uint64_t block, uint64_t end)
{
    uint64_t next = (block / WORD_BITS + 1) * WORD_BITS;
    return next < end ? next : end;
}

static uint64_t block_after(uint64_t offset)
{
    return (offset + DB_BLOCK_BYTES - 1) / DB_BLOCK_BYTES;
}

/* The first block from here on that is not noted, or end. */
static uint64_t first_unknown(const struct db_coherence *coherence, uint64_t block, uint64_t end)
{
    for (; block < end; block = next_word(block, end)) {
        uint64_t word = atomic_load_explicit(&coherence->words[block / WORD_BITS],
                                             memory_order_relaxed);
        uint64_t unknown = ~word & bits_of(block, end);
        if (unknown)
            return block / WORD_BITS * WORD_BITS + (uint64_t)__builtin_ctzll(unknown);
    }
    return end;
}

/* Notes blocks from here on, up to the first that was noted before, and returns that one. */
static uint64_t note_run(struct db_coherence *coherence, uint64_t block, uint64_t end)
{
    while (block < end) {
        _Atomic uint64_t *word = &coherence->words[block / WORD_BITS];
        uint64_t known = atomic_load_explicit(word, memory_order_relaxed) & bits_of(block, end);
        uint64_t stop = next_word(block, end);
        if (known)
            stop = block / WORD_BITS * WORD_BITS + (uint64_t)__builtin_ctzll(known);
        if (stop == block)
            break;
        atomic_fetch_or(word, bits_of(block, stop));
        block = stop;
    }
    return block;
}

bool db_coherence_note(struct db_coherence *coherence, struct db_run *rest, struct db_run *run)
{
    uint64_t rest_end = rest->offset + rest->length;
    uint64_t end = block_after(rest_end);
    uint64_t first = first_unknown(coherence, rest->offset / DB_BLOCK_BYTES, end);
    if (first == end || rest->length == 0)
        return false;
    uint64_t stop = note_run(coherence, first, end);
    *run = (struct db_run){first * DB_BLOCK_BYTES, (stop - first) * DB_BLOCK_BYTES};
    rest->offset = stop * DB_BLOCK_BYTES;
    rest->length = rest_end > rest->offset ? rest_end - rest->offset : 0;
    return true;
}

void db_coherence_forget(struct db_coherence *coherence, uint64_t offset, uint64_t length)
{
    uint64_t block = block_after(offset);
    uint64_t end = (offset + length) / DB_BLOCK_BYTES;
    for (; block < end; block = next_word(block, end)) {
        _Atomic uint64_t *word = &coherence->words[block / WORD_BITS];
        if (atomic_load_explicit(word, memory_order_relaxed)) /* else its page stays untouched */
            atomic_fetch_and(word, ~bits_of(block, end));
    }
}

bool db_coherence_has(const struct db_coherence *coherence, uint64_t offset, uint64_t length)
{
    uint64_t block = offset / DB_BLOCK_BYTES;
    uint64_t end = block_after(offset + length);
    for (; block < end; block = next_word(block, end))
        if (atomic_load(&coherence->words[block / WORD_BITS]) & bits_of(block, end))
            return true;
    return false;
}

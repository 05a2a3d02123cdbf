/* coherence.h - which blocks of a device the page cache may hold.
 *
 * NVMe commands go past the page cache without its knowledge: it would keep what they have changed,
 * and they would miss what it has not written yet. So blocks that are reached through it are noted,
 * and until they have been dropped from it, direct I/O on them goes by the block device, where the
 * kernel sees to that. A bit for each DB_BLOCK_BYTES; safe to use from any thread. */
#ifndef DUALBLADE_COHERENCE_H
#define DUALBLADE_COHERENCE_H

#include "dualblade.h"

#include <stdatomic.h>

struct db_coherence {
    _Atomic uint64_t *words;
    size_t length; /* of the memory that they are in */
};

/* Nothing is noted. -ENOMEM. */
int db_coherence_open(uint64_t size_bytes, struct db_coherence *out);
void db_coherence_close(struct db_coherence *coherence);

/* Notes the first run of a range's blocks that were not noted yet: false if there is none. *rest is
 * the range, and then what of it comes behind that run. */
struct db_run {
    uint64_t offset, length;
};
bool db_coherence_note(struct db_coherence *coherence, struct db_run *rest, struct db_run *run);
/* Forgets the blocks that lie wholly in a range. */
void db_coherence_forget(struct db_coherence *coherence, uint64_t offset, uint64_t length);
/* Whether any block of a range is noted. */
bool db_coherence_has(const struct db_coherence *coherence, uint64_t offset, uint64_t length);

#endif

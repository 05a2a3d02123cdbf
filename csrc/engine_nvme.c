/* engine_nvme.c - NVMe commands by io_uring, past the block layer: IORING_OP_URING_CMD.
 *
 * Nothing splits a command on its way to the drive, so a request that is longer than the drive, the
 * driver or the request's memory allow is sent as several commands at once, and is done when all of
 * them are. A drive answers with a status, which is positive and no errno.
 *
 * Requests on blocks that the page cache may hold go by the block device, in the same ring. */
#define _GNU_SOURCE
#include "engine.h"

#include <errno.h>
#include <stdlib.h>

#ifdef DUALBLADE_NO_URING

const struct db_engine_ops db_engine_nvme = {.name = "nvme", .open = db_engine_absent};

#else

#include "ring.h"

#include <linux/nvme_ioctl.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#ifndef NVME_URING_CMD_IO
#error "the kernel's headers are older than Linux 5.19: install newer ones (linux-libc-dev)"
#endif

enum {
    OPCODE_WRITE = 0x01,
    OPCODE_READ = 0x02,
    PLACED = 2 << 20, /* in a write: the handle that it names is one of data placement */
    COMMANDS_EACH = 4, /* of one request at a time, on average; the ring holds no more */
    COMMANDS_MAX = 16384,
    REGION_BYTES = 1 << 30, /* the kernel takes at most so much at once */
};

/* One command, or one request of the block device. */
struct command {
    struct command *next;        /* of those that are free, returned or refused */
    struct command *next_staged; /* its own: the kernel may complete it while it is staged still */
    struct db_request *request;
    uint32_t at, length; /* the part of the request */
    bool is_block;       /* by the block device */
    int32_t result;      /* of one that the kernel would not take */
};

/* Of commands with the same memory. Where that lies in huge pages, which nobody tells us, they may
 * be longer than as many pages as the driver takes runs. */
struct lengths {
    _Atomic uint32_t most_bytes;   /* the longest that is tried: less, when one is refused */
    _Atomic uint32_t proven_bytes; /* the longest that it has taken */
};

struct db_engine {
    struct db_ring ring;
    uint32_t fd_count;
    struct db_nvme_namespace spaces[DB_MEMBERS_MAX];
    uint64_t region_bytes; /* registered memory is registered in pieces of so much */
    uint32_t drive_bytes;  /* the longest command that every drive takes */
    /* With memory that is not registered, and behind it with each that is. */
    struct lengths lengths[1 + DB_REGIONS_MAX];

    /* Under the queue's lock. */
    struct db_request *waiting, **waiting_end; /* not all of their commands were made yet */
    struct command *staged, **staged_end; /* in the submission ring, not yet taken */
    uint32_t staged_count;
    struct command *free_commands;
    int refusal; /* not 0: the kernel no longer takes requests, and this is what it said */

    /* From reap() to commit(), which run beside each other. */
    _Atomic(struct command *) returned;
    _Atomic(struct command *) refused; /* and the other way */
    struct command commands[];
};

static void push(_Atomic(struct command *) *stack, struct command *first, struct command *last)
{
    last->next = *stack;
    while (!atomic_compare_exchange_weak(stack, &last->next, first))
        ;
}

/* ---- commands (lock held) -------------------------------------------------------------------- */

static void prepare_passthrough(struct db_engine *engine, const struct command *command,
                                struct io_uring_sqe *sqe)
{
    const struct db_request *request = command->request;
    const struct db_nvme_namespace *space = &engine->spaces[request->file];
    uint64_t offset = request->offset + command->at;
    uint64_t first = offset >> space->lba_shift;
    uint32_t blocks = command->length >> space->lba_shift;
    struct nvme_uring_cmd *nvme = (struct nvme_uring_cmd *)sqe->cmd;
    sqe->opcode = IORING_OP_URING_CMD;
    sqe->fd = engine->ring.has_files ? (int)request->file : space->fd;
    sqe->cmd_op = NVME_URING_CMD_IO;
    if (request->slot != DB_REGION_NONE) {
        sqe->uring_cmd_flags = IORING_URING_CMD_FIXED;
        sqe->buf_index = (uint16_t)request->slot;
    }
    nvme->opcode = request->direction == DB_READ ? OPCODE_READ : OPCODE_WRITE;
    nvme->nsid = space->nsid;
    nvme->addr = (uint64_t)(uintptr_t)request->buffer + command->at;
    nvme->data_len = command->length;
    nvme->cdw10 = (uint32_t)first;
    nvme->cdw11 = (uint32_t)(first >> 32);
    nvme->cdw12 = blocks - 1; /* counted from zero */
    if (request->direction == DB_WRITE && space->has_placement) {
        nvme->cdw12 |= PLACED;
        nvme->cdw13 = (uint32_t)(request->is_tail ? space->tail_handle : space->run_handle) << 16;
    }
    /* Nobody below compares these: the drive would go on behind the memory's end. */
    assert(blocks > 0 && blocks <= 1 << 16);
    assert(((nvme->cdw12 & 0xffff) + 1) << space->lba_shift == nvme->data_len);
    assert(first << space->lba_shift == offset);
    assert(command->at + command->length <= request->length);
}

static void prepare_block(struct db_engine *engine, const struct command *command,
                          struct io_uring_sqe *sqe)
{
    const struct db_request *request = command->request;
    bool reads = request->direction == DB_READ;
    bool has_files = engine->ring.has_files;
    int fd = has_files ? (int)(engine->fd_count + request->file) : request->fd;
    assert(command->at == 0 && command->length == request->length);
    io_uring_prep_rw(reads ? IORING_OP_READ : IORING_OP_WRITE, sqe, fd, request->buffer,
                     request->length, request->offset);
}

static void prepare_entry(struct db_engine *engine, struct command *command)
{
    struct io_uring_sqe *sqe = io_uring_get_sqe(&engine->ring.ring);
    assert(sqe); /* the ring has an entry for every command of the pool */
    memset(sqe, 0, 2 * sizeof(*sqe));
    if (command->is_block)
        prepare_block(engine, command, sqe);
    else
        prepare_passthrough(engine, command, sqe);
    if (engine->ring.has_files)
        sqe->flags |= IOSQE_FIXED_FILE;
    io_uring_sqe_set_data(sqe, command);
}

static struct lengths *lengths_of(struct db_engine *engine, const struct db_request *request)
{
    return &engine->lengths[request->slot - DB_REGION_NONE];
}

/* How long the next command of a request is. */
static uint32_t next_length(struct db_engine *engine, const struct db_request *request)
{
    const struct db_nvme_namespace *space = &engine->spaces[request->file];
    uint32_t length = request->length - request->sent_bytes;
    if (request->by_block_device)
        return length;
    uint32_t most = lengths_of(engine, request)->most_bytes;
    bool is_aligned = ((uintptr_t)request->buffer + request->sent_bytes) % DB_BLOCK_BYTES == 0;
    if (!is_aligned && most > space->transfer_bytes)
        most = space->transfer_bytes;
    if (space->boundary_bytes > 0) {
        uint64_t offset = request->offset + request->sent_bytes;
        uint32_t left = space->boundary_bytes - (uint32_t)(offset % space->boundary_bytes);
        most = most < left ? most : left;
    }
    return length < most ? length : most;
}

static void take_returned(struct db_engine *engine)
{
    struct command *first = atomic_exchange(&engine->returned, NULL);
    if (!first)
        return;
    struct command *last = first;
    while (last->next)
        last = last->next;
    last->next = engine->free_commands;
    engine->free_commands = first;
}

/* Commands for the requests that wait, as far as there are any. */
static void make_commands(struct db_engine *engine)
{
    while (engine->waiting) {
        if (!engine->free_commands)
            take_returned(engine);
        if (!engine->free_commands)
            break;
        struct db_request *request = engine->waiting;
        struct command *command = engine->free_commands;
        engine->free_commands = command->next;
        *command = (struct command){.request = request,
                                    .at = request->sent_bytes,
                                    .length = next_length(engine, request),
                                    .is_block = request->by_block_device};
        request->sent_bytes += command->length;
        if (request->sent_bytes == request->length) {
            engine->waiting = request->next;
            if (!engine->waiting)
                engine->waiting_end = &engine->waiting;
        }
        if (engine->refusal) {
            command->result = engine->refusal;
            push(&engine->refused, command, command);
            continue;
        }
        prepare_entry(engine, command);
        *engine->staged_end = command;
        engine->staged_end = &command->next_staged;
        engine->staged_count++;
    }
}

static void nvme_queue(struct db_engine *engine, struct db_request *request)
{
    request->sent_bytes = 0;
    request->left_bytes = request->length;
    request->result = 0;
    request->error_at = 0;
    request->nvme_status = 0;
    request->next = NULL;
    *engine->waiting_end = request;
    engine->waiting_end = &request->next;
}

/* The first `count` staged commands are no longer ours to hand over. */
static void forget_staged(struct db_engine *engine, uint32_t count)
{
    assert(count <= engine->staged_count);
    engine->staged_count -= count;
    while (count-- > 0)
        engine->staged = engine->staged->next_staged;
    if (!engine->staged)
        engine->staged_end = &engine->staged;
}

/* The kernel will never take them (a filter put in place after open() forbids it), so each fails
 * with what it said. Their entries stay in the ring, which is not submitted again. */
static void refuse_staged(struct db_engine *engine, int error)
{
    engine->refusal = error;
    for (struct command *command = engine->staged, *next; command; command = next) {
        next = command->next_staged;
        command->result = error;
        push(&engine->refused, command, command);
    }
    engine->staged = NULL;
    engine->staged_end = &engine->staged;
    engine->staged_count = 0;
}

static uint32_t nvme_commit(struct db_engine *engine)
{
    uint32_t crossings = 0;
    make_commands(engine);
    while (engine->staged_count > 0) {
        int rc = db_ring_submit(&engine->ring, engine->staged_count);
        crossings++;
        if (rc > 0) {
            forget_staged(engine, (uint32_t)rc);
            continue;
        }
        enum db_ring_answer answer = db_ring_after(&engine->ring, rc);
        if (answer == DB_RING_REFUSED)
            refuse_staged(engine, rc);
        else if (answer == DB_RING_LATER)
            break;
    }
    return crossings;
}

/* ---- completion (one thread at a time, without the lock) ------------------------------------- */

/* EINVAL, or of registered memory ENOMEM: the kernel could not lay the command out over so much
 * memory, and it is sent again in smaller ones. If it could before, then that is not why: a drive
 * that several ways lead to has none at the moment, because its controller is reset. The block
 * layer waits for it, and knows when there is nothing to wait for. */
static void make_smaller(struct db_engine *engine, const struct command *command)
{
    struct db_request *request = command->request;
    struct lengths *lengths = lengths_of(engine, request);
    uint32_t least = engine->spaces[request->file].lba_bytes;
    if (command->length <= lengths->proven_bytes || command->length <= least) {
        request->by_block_device = true;
        return;
    }
    uint32_t shorter = least;
    while (shorter * 2 <= command->length / 2)
        shorter *= 2;
    if (shorter < lengths->most_bytes)
        lengths->most_bytes = shorter;
}

static void note_failure(struct db_request *request, const struct command *command, int32_t result)
{
    bool is_first = request->result == 0 && request->nvme_status == 0;
    if (!is_first && request->error_at < command->at)
        return; /* what is reported is where the trouble begins */
    request->error_at = command->at;
    request->nvme_status = result > 0 ? (uint16_t)result : 0;
    request->result = result > 0 ? -EIO : result;
}

/* The request, if all of it is done now; else NULL. */
static struct db_request *finish_command(struct db_engine *engine, struct command *command,
                                         int32_t result)
{
    struct db_request *request = command->request;
    assert(request->left_bytes >= command->length);
    request->left_bytes -= command->length;
    if (command->is_block) {
        request->result = result;
    } else if (result == -EINVAL || result == -ENOMEM) {
        make_smaller(engine, command);
        note_failure(request, command, -EAGAIN);
    } else if (result != 0) {
        note_failure(request, command, result);
    } else {
        struct lengths *lengths = lengths_of(engine, request);
        if (command->length > lengths->proven_bytes)
            lengths->proven_bytes = command->length;
    }
    if (request->left_bytes > 0)
        return NULL;
    if (!command->is_block && request->result == 0)
        request->result = request->length;
    return request;
}

static int reap_refused(struct db_engine *engine, struct db_request **done, uint32_t max)
{
    uint32_t count = 0;
    struct command *command = atomic_exchange(&engine->refused, NULL);
    for (struct command *next; command; command = next) {
        next = command->next;
        if (count == max) {
            push(&engine->refused, command, command);
            continue;
        }
        struct db_request *request = finish_command(engine, command, command->result);
        push(&engine->returned, command, command);
        if (request)
            done[count++] = request;
    }
    return (int)count;
}

static int nvme_reap(struct db_engine *engine, struct db_request **done, uint32_t least,
                     uint32_t max, int64_t timeout_ns)
{
    struct io_uring_cqe *cqes[64];
    int refused = reap_refused(engine, done, max);
    if (refused > 0)
        return refused;
    if (max > 64)
        max = 64;
    unsigned count = io_uring_peek_batch_cqe(&engine->ring.ring, cqes, max);
    if (count == 0 && (timeout_ns != 0 || engine->ring.must_poll)) {
        db_ring_wait(&engine->ring, least, timeout_ns);
        count = io_uring_peek_batch_cqe(&engine->ring.ring, cqes, max);
    }
    atomic_fetch_sub(&engine->ring.in_kernel, count);
    int finished = 0;
    struct command *first = NULL, *last = NULL;
    for (unsigned i = 0; i < count; i++) {
        struct command *command = io_uring_cqe_get_data(cqes[i]);
        struct db_request *request = finish_command(engine, command, cqes[i]->res);
        if (request)
            done[finished++] = request;
        command->next = first;
        first = command;
        last = last ? last : command;
    }
    io_uring_cq_advance(&engine->ring.ring, count);
    if (first)
        push(&engine->returned, first, last);
    return finished;
}

/* ---- registered memory ----------------------------------------------------------------------- */

static int nvme_add_memory(struct db_engine *engine, int32_t slot, void *start, uint64_t length)
{
    if (!engine->ring.has_memory)
        return -EOPNOTSUPP;
    engine->lengths[slot - DB_REGION_NONE].most_bytes = engine->drive_bytes;
    engine->lengths[slot - DB_REGION_NONE].proven_bytes = 0;
    return db_ring_set_memory(&engine->ring, slot, start, length);
}

static void nvme_remove_memory(struct db_engine *engine, int32_t slot)
{
    /* What is in flight keeps its pages: the kernel counts their users. ENOMEM is all that could go
     * wrong, and then the slot keeps memory until something else takes its place. */
    (void)db_ring_set_memory(&engine->ring, slot, NULL, 0);
}

static uint64_t nvme_region_bytes(const struct db_engine *engine)
{
    return engine->region_bytes;
}

/* Reads a block, waits for it, and returns what became of it. */
static int32_t read_one(struct db_engine *engine, void *memory, int32_t slot)
{
    struct io_uring *ring = &engine->ring.ring;
    struct db_request request = {.buffer = memory,
                                 .slot = slot,
                                 .length = engine->spaces[0].lba_bytes};
    struct command command = {.request = &request, .length = request.length};
    struct io_uring_cqe *cqe;
    prepare_entry(engine, &command);
    int rc;
    do
        rc = io_uring_submit(ring);
    while (rc == -EINTR || rc == -EAGAIN);
    if (rc < 0)
        return rc;
    do
        rc = io_uring_wait_cqe(ring, &cqe);
    while (rc == -EINTR || rc == -EAGAIN);
    if (rc < 0)
        return rc;
    int32_t result = cqe->res;
    io_uring_cqe_seen(ring, cqe);
    return result;
}

/* Older kernels (6.1 does) count all pages of a run of registered memory, and not those of the
 * command, against what one command may have: then none works that uses a longer run. */
static int probe_regions(struct db_engine *engine)
{
    const struct db_nvme_namespace *space = &engine->spaces[0];
    uint64_t page_bytes = (uint64_t)sysconf(_SC_PAGESIZE);
    engine->region_bytes = REGION_BYTES;
    if (!engine->ring.has_memory)
        return 0;
    size_t length = (space->segments + 1) * page_bytes;
    void *memory = mmap(NULL, length, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (memory == MAP_FAILED)
        return -ENOMEM;
    (void)madvise(memory, length, MADV_NOHUGEPAGE);
    int rc = db_ring_set_memory(&engine->ring, 0, memory, length);
    if (!rc) {
        if (read_one(engine, memory, 0) == -EINVAL)
            for (engine->region_bytes = page_bytes;
                 engine->region_bytes * 2 <= space->segments * page_bytes;)
                engine->region_bytes *= 2;
        nvme_remove_memory(engine, 0);
    } else {
        engine->ring.has_memory = rc == -ENOMEM; /* RLIMIT_MEMLOCK: less may be allowed */
    }
    munmap(memory, length);
    return 0;
}

/* ---- open and close -------------------------------------------------------------------------- */

static void nvme_close(struct db_engine *engine)
{
    assert(engine->staged_count == 0 && !engine->waiting);
    db_ring_close(&engine->ring);
    free(engine);
}

static int open_ring(struct db_engine *engine, const struct db_engine_config *config,
                     uint32_t commands)
{
    static const unsigned char opcodes[] = {IORING_OP_READ, IORING_OP_WRITE, IORING_OP_URING_CMD,
                                            0};
    int fds[2 * DB_MEMBERS_MAX];
    for (uint32_t i = 0; i < config->fd_count; i++) {
        fds[i] = config->spaces[i]->fd;
        fds[config->fd_count + i] = config->fds[i];
    }
    struct db_ring_config ring = {
        .entries = commands,
        .flags = IORING_SETUP_SQE128 | IORING_SETUP_CQE32,
        .sqpoll = config->sqpoll,
        .iopoll = config->iopoll,
        .opcodes = opcodes,
        .fds = fds,
        .fd_count = 2 * config->fd_count,
    };
    return db_ring_open(&ring, &engine->ring);
}

static int nvme_open(const struct db_engine_config *config, struct db_engine **out)
{
    uint32_t commands = config->depth * COMMANDS_EACH;
    if (commands > COMMANDS_MAX)
        commands = COMMANDS_MAX;
    struct db_engine *engine =
        calloc(1, sizeof(*engine) + commands * sizeof(engine->commands[0]));
    if (!engine)
        return -ENOMEM;
    engine->fd_count = config->fd_count;
    uint32_t most_bytes = UINT32_MAX;
    engine->drive_bytes = UINT32_MAX;
    for (uint32_t i = 0; i < config->fd_count; i++) {
        engine->spaces[i] = *config->spaces[i];
        if (engine->spaces[i].most_bytes < most_bytes)
            most_bytes = engine->spaces[i].most_bytes;
        if (engine->spaces[i].drive_bytes < engine->drive_bytes)
            engine->drive_bytes = engine->spaces[i].drive_bytes;
    }
    engine->lengths[0].most_bytes = most_bytes;
    int rc = open_ring(engine, config, commands);
    if (!rc) {
        rc = probe_regions(engine);
        if (rc)
            db_ring_close(&engine->ring);
    }
    if (rc) {
        free(engine);
        return rc;
    }
    engine->waiting_end = &engine->waiting;
    engine->staged_end = &engine->staged;
    for (uint32_t i = 0; i < commands; i++) {
        engine->commands[i].next = engine->free_commands;
        engine->free_commands = &engine->commands[i];
    }
    *out = engine;
    return 0;
}

static void nvme_abandon(struct db_engine *engine)
{
    db_ring_abandon(&engine->ring);
}

const struct db_engine_ops db_engine_nvme = {
    .name = "nvme",
    .open = nvme_open,
    .queue = nvme_queue,
    .commit = nvme_commit,
    .reap = nvme_reap,
    .add_memory = nvme_add_memory,
    .remove_memory = nvme_remove_memory,
    .region_bytes = nvme_region_bytes,
    .close = nvme_close,
    .abandon = nvme_abandon,
};

#endif

/* queue.h - one path of a device: a pool of requests over one engine. */
#ifndef DUALBLADE_QUEUE_H
#define DUALBLADE_QUEUE_H

#include "coherence.h"
#include "engine.h"
#include "stripes.h"

struct db_queue_config {
    const struct db_engine_ops *engine;
    const int *fds; /* of the members; until db_queue_open() returns */
    const struct db_nvme_namespace *const *spaces; /* likewise; NULL where they are none */
    struct db_window *const *windows; /* of the members, where reads may use them; else NULL */
    const struct db_coherence *coherence;          /* of direct NVMe commands; else NULL */
    struct db_stripes stripes;
    uint32_t depth;
    uint32_t threads;
    uint32_t chunk_bytes;
    uint32_t request_bytes;      /* 0: measured */
    uint32_t lba_bytes;          /* 1 where any length and offset will do */
    uint32_t memory_align_bytes; /* 1 where any address will do */
    uint64_t staging_bytes;      /* 0 where nothing is ever staged */
    bool is_buffered;            /* reached through the page cache */
    bool sqpoll, iopoll;
};

struct db_queue;

int db_queue_open(const struct db_queue_config *config, struct db_queue **out);
/* Waits for what is in flight, then frees; frees nothing if the engine cannot be asked any more,
 * which every wait has said then. */
void db_queue_close(struct db_queue *queue);
/* In the child after a fork, where requests and threads are the parent's: closes file descriptors
 * and leaves the memory be. Async-signal-safe. */
void db_queue_abandon(struct db_queue *queue);
/* Reads the first block of every member for real and forgets it: 0, or what the kernel says to this
 * engine. */
int db_queue_probe(struct db_queue *queue);
const char *db_queue_engine_name(const struct db_queue *queue);
void db_queue_stats(struct db_queue *queue, struct db_path_stats *out);

/* Registers memory with the engine, in pieces where it is long. -EOPNOTSUPP, -ENOMEM, -EFAULT as
 * the engine says; -ENOSPC: too many; -EINVAL: empty. */
int db_queue_register(struct db_queue *queue, void *memory, uint64_t length);
/* -ENOENT if exactly this was not registered. What is in flight may go on using it. */
int db_queue_unregister(struct db_queue *queue, void *memory, uint64_t length);

void db_queue_submit(struct db_queue *queue, struct db_batch *batch);
int db_queue_wait(struct db_queue *queue, struct db_batch *batch, int64_t timeout_ns);

#endif

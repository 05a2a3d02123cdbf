/* queue_state.h - what queue.c and pieces.c share: the queue, and each other's functions. */
#ifndef DUALBLADE_QUEUE_STATE_H
#define DUALBLADE_QUEUE_STATE_H

#include "queue.h"
#include "request_size.h"

#include <pthread.h>

enum { DB_CARVE_MAX = 16 }; /* pieces prepared before the kernel is told */

struct db_queue {
    struct db_queue_config config;
    int fds[DB_MEMBERS_MAX];
    struct db_window *windows[DB_MEMBERS_MAX];
    struct db_engine *engine;
    pthread_mutex_t lock;
    pthread_cond_t changed; /* a batch is done, or there is no leader */
    bool has_leader;
    uint32_t followers; /* threads that wait while another leads */
    uint32_t in_flight;

    struct db_request *requests;
    struct db_request *free_requests;
    struct db_request *resumes; /* short transfers to be continued */
    /* Batches with pieces still to be carved. Reads go first, because somebody computes with what
     * they bring, but not for ever. */
    struct db_batch *pending[2], **pending_end[2];
    uint32_t reads_in_row;
    /* Of reads at the device that db_piece_finish() has work with, and somebody waits for. */
    uint64_t unseen_bytes;
    uint32_t unseen_count;
    uint64_t ahead_bytes; /* of reads at the device that nobody waits for */
    struct db_request_size sizes[2];

    uint8_t *staging;
    uint64_t staging_length;
    uint32_t slot_bytes;
    uint8_t **free_slots;
    uint32_t free_slot_count;
    struct db_regions regions; /* registered memory */
    uint64_t registered_bytes;

    struct db_path_stats stats;
};

/* ---- queue.c ---- */

/* The last piece of a batch is done (lock held). */
void db_queue_batch_finished(struct db_queue *queue);

/* ---- pieces.c ---- */

/* The next requests for the engine, at most DB_CARVE_MAX: what is to be resumed, then pieces of
 * batches, as far as requests and staging reach (lock held). Returns how many. */
uint32_t db_pieces_carve(struct db_queue *queue, struct db_request **out);
/* Points a request at what has not moved yet, as far as it lies side by side on one member. */
void db_piece_point_at_rest(const struct db_queue *queue, struct db_request *request);
/* Takes a write's checksums, fills its staging memory. Once, and without the lock. */
void db_piece_prepare(struct db_request *request, void *queue);
/* Copies a read out of staging, compares its checksums: -EBADMSG becomes its result. Without the
 * lock. */
void db_piece_finish(struct db_request *request, void *queue);
/* The same for a read whose bytes are in memory: copies them, and compares checksums meanwhile. */
void db_piece_copy(struct db_request *request, const void *from, void *queue);
bool db_piece_find_run(const struct db_request *request, uint64_t *start, uint64_t *end,
                       const void *queue);
/* Whether db_piece_finish() has anything to do for this request when it comes. */
bool db_piece_needs_finish(const struct db_request *request);
/* Whether it counts as unseen while it is at the device. */
bool db_piece_is_unseen(const struct db_queue *queue, const struct db_request *request);
/* Whether it counts as ahead while it is at the device. */
bool db_piece_is_ahead(const struct db_queue *queue, const struct db_request *request);

#endif

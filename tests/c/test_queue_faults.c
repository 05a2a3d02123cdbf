/* test_queue_faults.c - the queue over an engine that the test plays itself: nothing completes
 * before the test says so, and with the result that it says. */
#define _GNU_SOURCE
#include "check.h"
#include "clock.h"
#include "counters.h"
#include "queue.h"

#include <errno.h>
#include <pthread.h>
#include <stdbool.h>
#include <string.h>
#include <sys/syscall.h>
#include <unistd.h>

enum {
    BLOCK = 512,
    CHUNK = 4096,
    REQUEST = 2 * CHUNK,
    MEDIUM_BYTES = 1 << 20,
    DEPTH_MAX = 64,
    PATIENCE_S = 20, /* what a thread gets before it counts as stuck */
};

/* ---- the engine ------------------------------------------------------------------------------ */

struct db_engine {
    pthread_mutex_t lock;
    pthread_cond_t changed;
    struct db_request *staged[DEPTH_MAX], *taken[DEPTH_MAX], *done[DEPTH_MAX];
    uint32_t staged_count, taken_count, done_count;
    uint32_t commits_refused; /* so many commits take nothing */
    bool gate, at_gate;       /* a reap that does not wait stops here until the gate opens */
    bool silent;              /* completions do not wake a reap that sleeps */
    int reap_error;
    bool automatic; /* a reap completes something taken at random, see play() */
    uint64_t seed;
};

static struct db_engine *engine; /* of the queue under test */
static uint8_t medium[MEDIUM_BYTES];

static int fake_open(const struct db_engine_config *config, struct db_engine **out)
{
    CHECK(config->depth <= DEPTH_MAX);
    engine = calloc(1, sizeof(*engine));
    CHECK(engine != NULL);
    pthread_mutex_init(&engine->lock, NULL);
    pthread_condattr_t attributes;
    pthread_condattr_init(&attributes);
    pthread_condattr_setclock(&attributes, CLOCK_MONOTONIC);
    pthread_cond_init(&engine->changed, &attributes);
    pthread_condattr_destroy(&attributes);
    *out = engine;
    return 0;
}

static void fake_queue(struct db_engine *self, struct db_request *request)
{
    CHECK(self->staged_count < DEPTH_MAX);
    self->staged[self->staged_count++] = request;
}

static uint32_t fake_commit(struct db_engine *self)
{
    if (self->staged_count == 0)
        return 0;
    pthread_mutex_lock(&self->lock);
    /* As the engines do: what the kernel refuses while it has others waits for these. */
    bool refused = self->commits_refused > 0 && self->taken_count + self->done_count > 0;
    if (refused)
        self->commits_refused--;
    while (!refused && self->staged_count > 0)
        self->taken[self->taken_count++] = self->staged[--self->staged_count];
    pthread_cond_broadcast(&self->changed);
    pthread_mutex_unlock(&self->lock);
    return 1;
}

static void move_bytes(struct db_request *request, int64_t count)
{
    request->result = count;
    CHECK(request->offset + request->length <= MEDIUM_BYTES);
    if (count > 0 && request->direction == DB_READ)
        memcpy(request->buffer, medium + request->offset, (size_t)count);
    else if (count > 0)
        memcpy(medium + request->offset, request->buffer, (size_t)count);
}

/* The engine's lock is held. */
static void finish_taken(struct db_engine *self, uint32_t which, int64_t result)
{
    struct db_request *request = self->taken[which];
    self->taken[which] = self->taken[--self->taken_count];
    move_bytes(request, result);
    self->done[self->done_count++] = request;
}

/* Completes a random request, mostly in part and not always well. */
static void play(struct db_engine *self)
{
    static const int passing[] = {-EINTR, -EAGAIN, -ECANCELED};
    if (self->taken_count == 0)
        return;
    uint32_t which = (uint32_t)check_random_below(&self->seed, self->taken_count);
    int64_t result = self->taken[which]->length;
    uint64_t dice = check_random_below(&self->seed, 10);
    if (dice < 4)
        result = 1 + (int64_t)check_random_below(&self->seed, (uint64_t)result);
    else if (dice == 4)
        result = passing[check_random_below(&self->seed, 3)];
    finish_taken(self, which, result);
}

static int fake_reap(struct db_engine *self, struct db_request **done, uint32_t least,
                     uint32_t max, int64_t timeout_ns)
{
    CHECK(least >= 1 && least <= max);
    int64_t deadline_ns = timeout_ns < 0 ? INT64_MAX : db_deadline_ns(timeout_ns);
    struct timespec until = {deadline_ns / 1000000000, deadline_ns % 1000000000};
    uint32_t count = 0;
    pthread_mutex_lock(&self->lock);
    int rc = self->reap_error;
    if (self->automatic)
        play(self);
    while (timeout_ns == 0 && self->gate) {
        self->at_gate = true;
        pthread_cond_broadcast(&self->changed);
        pthread_cond_wait(&self->changed, &self->lock);
    }
    while (rc == 0 && self->done_count == 0 && timeout_ns != 0) {
        rc = pthread_cond_timedwait(&self->changed, &self->lock, &until);
        if (self->automatic)
            play(self);
    }
    while (rc >= 0 && count < max && self->done_count > 0)
        done[count++] = self->done[--self->done_count];
    pthread_mutex_unlock(&self->lock);
    return rc < 0 ? rc : (int)count;
}

static void fake_close(struct db_engine *self)
{
    CHECK(self->staged_count == 0 && self->taken_count == 0 && self->done_count == 0);
    pthread_cond_destroy(&self->changed);
    pthread_mutex_destroy(&self->lock);
    free(self);
    engine = NULL;
}

static const struct db_engine_ops fake = {
    .name = "fake",
    .open = fake_open,
    .queue = fake_queue,
    .commit = fake_commit,
    .reap = fake_reap,
    .close = fake_close,
};

/* The kernel is done with a request that it had: the `which`th of those taken. */
static void complete_one(uint32_t which, int64_t result)
{
    pthread_mutex_lock(&engine->lock);
    while (engine->taken_count <= which)
        pthread_cond_wait(&engine->changed, &engine->lock);
    finish_taken(engine, which, result);
    if (!engine->silent)
        pthread_cond_broadcast(&engine->changed);
    pthread_mutex_unlock(&engine->lock);
}

static void complete_whole(uint32_t which)
{
    pthread_mutex_lock(&engine->lock);
    while (engine->taken_count <= which)
        pthread_cond_wait(&engine->changed, &engine->lock);
    int64_t length = engine->taken[which]->length;
    pthread_mutex_unlock(&engine->lock);
    complete_one(which, length);
}

static struct db_queue *open_queue(uint32_t depth, uint32_t slots)
{
    int fd = -1;
    struct db_queue_config config = {
        .engine = &fake,
        .fds = &fd,
        .stripes = {.member_count = 1},
        .depth = depth,
        .threads = 1,
        .chunk_bytes = CHUNK,
        .request_bytes = REQUEST,
        .lba_bytes = BLOCK,
        .memory_align_bytes = BLOCK,
        .staging_bytes = (uint64_t)slots * REQUEST,
    };
    struct db_queue *queue;
    CHECK(db_queue_open(&config, &queue) == 0);
    return queue;
}

/* ---- threads that wait ----------------------------------------------------------------------- */

struct waiter {
    struct db_queue *queue;
    struct db_batch *batch;
    int64_t timeout_ns;
    bool submits;
    int rc;
    pthread_t thread;
    _Atomic long tid;
};

static void *wait_for_batch(void *argument)
{
    struct waiter *waiter = argument;
    atomic_store(&waiter->tid, syscall(SYS_gettid));
    if (waiter->submits)
        db_queue_submit(waiter->queue, waiter->batch);
    else
        waiter->rc = db_queue_wait(waiter->queue, waiter->batch, waiter->timeout_ns);
    return NULL;
}

static void start(struct waiter *waiter)
{
    waiter->rc = -1;
    CHECK(pthread_create(&waiter->thread, NULL, wait_for_batch, waiter) == 0);
}

static void join(struct waiter *waiter)
{
    struct timespec until;
    clock_gettime(CLOCK_REALTIME, &until);
    until.tv_sec += PATIENCE_S;
    CHECK_EQUAL(pthread_timedjoin_np(waiter->thread, NULL, &until), 0);
}

/* Returns when the thread sleeps in the kernel. */
static void await_sleep(struct waiter *waiter)
{
    char path[64], state = '?';
    while (atomic_load(&waiter->tid) == 0)
        sched_yield();
    snprintf(path, sizeof(path), "/proc/self/task/%ld/stat", atomic_load(&waiter->tid));
    while (state != 'S') {
        FILE *file = fopen(path, "r");
        CHECK(file != NULL && fscanf(file, "%*d %*s %c", &state) == 1);
        fclose(file);
        sched_yield();
    }
}

/* ---- tests ----------------------------------------------------------------------------------- */

/* A thread that submits collects what is done when the pool is empty; whoever begins to wait in
 * that moment follows it, and must not be left asleep when it goes. */
static void test_a_follower_of_a_submitter_wakes(void)
{
    static uint8_t memory[2][CHUNK] __attribute__((aligned(BLOCK)));
    struct db_queue *queue = open_queue(1, 1);
    struct db_io io[2] = {{.buffer = memory[0], .length = CHUNK},
                          {.offset = CHUNK, .buffer = memory[1], .length = CHUNK}};
    struct db_batch first = {.ios = &io[0], .io_count = 1};
    struct db_batch second = {.ios = &io[1], .io_count = 1};
    db_queue_submit(queue, &first);
    engine->gate = true;
    struct waiter submitter = {.queue = queue, .batch = &second, .submits = true};
    start(&submitter);
    pthread_mutex_lock(&engine->lock);
    while (!engine->at_gate)
        pthread_cond_wait(&engine->changed, &engine->lock);
    pthread_mutex_unlock(&engine->lock);

    struct waiter follower = {.queue = queue, .batch = &first, .timeout_ns = -1};
    start(&follower);
    await_sleep(&follower);
    pthread_mutex_lock(&engine->lock);
    engine->gate = false;
    pthread_cond_broadcast(&engine->changed);
    pthread_mutex_unlock(&engine->lock);
    join(&submitter);
    complete_whole(0);
    join(&follower);
    CHECK_EQUAL(follower.rc, 0);
    complete_whole(0);
    CHECK_EQUAL(db_queue_wait(queue, &second, -1), 0);
    db_queue_close(queue);
}

/* Reads with checksums leave a part of the queue for the next, which go out when the first are back
 * and before they are looked at; what is read ahead goes out whole. */
static void test_reads_that_are_looked_at_go_out_in_parts(void)
{
    enum { DEPTH = 8, COUNT = 8 };
    static uint8_t memory[COUNT * CHUNK] __attribute__((aligned(BLOCK)));
    uint64_t checksums[COUNT];
    struct db_queue *queue = open_queue(DEPTH, 1);
    struct db_io ios[COUNT];
    memset(medium, 5, sizeof(memory));
    for (uint32_t i = 0; i < COUNT; i++) {
        checksums[i] = db_checksum(medium, CHUNK);
        ios[i] = (struct db_io){.offset = i * CHUNK,
                                .buffer = memory + i * CHUNK,
                                .length = CHUNK,
                                .checksums = &checksums[i]};
    }
    for (int is_ahead = 0; is_ahead <= 1; is_ahead++) {
        struct db_batch batch = {.ios = ios, .io_count = COUNT, .is_ahead = is_ahead};
        db_queue_submit(queue, &batch);
        CHECK_EQUAL(engine->taken_count, is_ahead ? COUNT : DEPTH / 2);
        for (int i = 0; i < COUNT; i++) {
            complete_whole(0);
            (void)db_queue_wait(queue, &batch, 0);
        }
        CHECK_EQUAL(db_queue_wait(queue, &batch, 0), 0);
        for (int i = 0; i < COUNT; i++)
            CHECK_EQUAL(ios[i].error, 0);
    }
    db_queue_close(queue);
}

static enum db_direction direction_in_kernel(void)
{
    pthread_mutex_lock(&engine->lock);
    CHECK_EQUAL(engine->taken_count, 1);
    enum db_direction direction = engine->taken[0]->direction;
    pthread_mutex_unlock(&engine->lock);
    return direction;
}

/* Reads overtake writes that wait for a request, but let one of them through now and then. */
static void test_reads_go_before_writes_but_not_for_ever(void)
{
    enum { WRITES = 3, READS = 100, READS_IN_ROW_MAX = 16 };
    static uint8_t memory[(WRITES + READS) * CHUNK] __attribute__((aligned(BLOCK)));
    struct db_queue *queue = open_queue(1, 1);
    struct db_io ios[WRITES + READS];
    for (uint32_t i = 0; i < WRITES + READS; i++)
        ios[i] = (struct db_io){
            .offset = i * CHUNK, .buffer = memory + i * CHUNK, .length = CHUNK};
    struct db_batch writes = {.direction = DB_WRITE, .ios = ios, .io_count = WRITES};
    struct db_batch reads = {.direction = DB_READ, .ios = ios + WRITES, .io_count = READS};
    db_queue_submit(queue, &writes);
    CHECK_EQUAL(direction_in_kernel(), DB_WRITE);
    db_queue_submit(queue, &reads);
    uint32_t writes_seen = 1, reads_in_row = 0;
    while (writes.in_flight + reads.in_flight > 0) {
        complete_whole(0);
        (void)db_queue_wait(queue, &reads, 0);
        if (writes.in_flight + reads.in_flight == 0)
            break;
        if (direction_in_kernel() == DB_READ) {
            reads_in_row++;
            CHECK(writes_seen == WRITES || reads_in_row <= READS_IN_ROW_MAX);
        } else {
            CHECK_EQUAL(reads_in_row, READS_IN_ROW_MAX);
            reads_in_row = 0;
            writes_seen++;
        }
    }
    CHECK_EQUAL(writes_seen, WRITES);
    CHECK_EQUAL(db_queue_wait(queue, &writes, 0), 0);
    CHECK_EQUAL(db_queue_wait(queue, &reads, 0), 0);
    db_queue_close(queue);
}

/* What an engine could not hand to the kernel is found although nothing wakes who waits there. */
static void test_a_completion_without_a_wake_up_is_found(void)
{
    static uint8_t memory[CHUNK] __attribute__((aligned(BLOCK)));
    struct db_queue *queue = open_queue(2, 1);
    struct db_io io = {.buffer = memory, .length = CHUNK};
    struct db_batch batch = {.ios = &io, .io_count = 1};
    db_queue_submit(queue, &batch);
    engine->silent = true;
    struct waiter waiter = {.queue = queue, .batch = &batch, .timeout_ns = -1};
    start(&waiter);
    await_sleep(&waiter);
    complete_one(0, -EBADF);
    join(&waiter);
    CHECK_EQUAL(waiter.rc, 0);
    CHECK_EQUAL(io.error, -EBADF);
    db_queue_close(queue);
}

/* The leader's time is up while others wait: one of them leads on. */
static void test_a_leader_that_times_out_is_succeeded(void)
{
    static uint8_t memory[3][CHUNK] __attribute__((aligned(BLOCK)));
    struct db_queue *queue = open_queue(4, 1);
    struct db_io io[3];
    struct db_batch batches[3];
    struct waiter waiters[3];
    for (int i = 0; i < 3; i++) {
        io[i] = (struct db_io){
            .offset = (uint64_t)i * CHUNK, .buffer = memory[i], .length = CHUNK};
        batches[i] = (struct db_batch){.ios = &io[i], .io_count = 1};
        db_queue_submit(queue, &batches[i]);
        waiters[i] = (struct waiter){
            .queue = queue, .batch = &batches[i], .timeout_ns = i == 0 ? 30000000 : -1};
        start(&waiters[i]);
        if (i == 0)
            await_sleep(&waiters[0]); /* leads */
    }
    join(&waiters[0]);
    CHECK_EQUAL(waiters[0].rc, -ETIMEDOUT);
    for (int i = 0; i < 3; i++)
        complete_whole(0);
    join(&waiters[1]);
    join(&waiters[2]);
    CHECK_EQUAL(waiters[1].rc, 0);
    CHECK_EQUAL(waiters[2].rc, 0);
    CHECK_EQUAL(db_queue_wait(queue, &batches[0], -1), 0);
    db_queue_close(queue);
}

/* One staging slot and two batches that need it: the second waits for the first, and gets it. */
static void test_staging_is_waited_for(void)
{
    static uint8_t memory[2][3 * REQUEST + 1];
    struct db_queue *queue = open_queue(8, 1);
    struct db_io io[2] = {
        {.buffer = memory[0] + 1, .length = 3 * REQUEST},
        {.offset = 4 * REQUEST, .buffer = memory[1] + 1, .length = 3 * REQUEST - 5}};
    struct db_batch batches[2];
    for (int i = 0; i < 2; i++) {
        memset(memory[i], i + 1, sizeof(memory[i]));
        batches[i] = (struct db_batch){.direction = DB_WRITE, .ios = &io[i], .io_count = 1};
        db_queue_submit(queue, &batches[i]);
    }
    struct db_path_stats stats;
    db_queue_stats(queue, &stats);
    CHECK_EQUAL(stats.in_flight, 1);
    struct waiter waiter = {.queue = queue, .batch = &batches[1], .timeout_ns = -1};
    start(&waiter);
    for (int i = 0; i < 6; i++)
        complete_whole(0);
    join(&waiter);
    CHECK_EQUAL(waiter.rc, 0);
    CHECK_EQUAL(db_queue_wait(queue, &batches[0], 0), 0);
    CHECK(memcmp(medium, memory[0], 3 * REQUEST) == 0);
    CHECK(memcmp(medium + 4 * REQUEST, memory[1], 3 * REQUEST - 5) == 0);
    CHECK(medium[7 * REQUEST - 1] == 0);
    db_queue_stats(queue, &stats);
    CHECK_EQUAL(stats.staged_bytes, 6 * REQUEST - 5);
    db_queue_close(queue);
}

/* The kernel takes nothing for a while: what it would not take is handed over later. */
static void test_commits_that_are_refused_for_a_while(void)
{
    static uint8_t memory[8 * REQUEST] __attribute__((aligned(BLOCK)));
    struct db_queue *queue = open_queue(2, 1);
    struct db_io io = {.buffer = memory, .length = sizeof(memory)};
    struct db_batch batch = {.ios = &io, .io_count = 1};
    engine->automatic = true;
    engine->commits_refused = 5;
    db_queue_submit(queue, &batch);
    CHECK_EQUAL(db_queue_wait(queue, &batch, -1), 0);
    CHECK_EQUAL(io.error, 0);
    CHECK_EQUAL(engine->commits_refused, 0);
    CHECK(memcmp(memory, medium, sizeof(memory)) == 0);
    db_queue_close(queue);
}

/* Of many, one fails in the middle: it alone, at its place; the rest of it is not even tried. */
static void test_one_of_many_fails(void)
{
    enum { COUNT = 5 };
    static uint8_t memory[COUNT][4 * REQUEST] __attribute__((aligned(BLOCK)));
    struct db_queue *queue = open_queue(1, 1);
    struct db_io io[COUNT];
    for (int i = 0; i < COUNT; i++)
        io[i] = (struct db_io){.offset = (uint64_t)i * sizeof(memory[i]),
                               .buffer = memory[i],
                               .length = sizeof(memory[i])};
    struct db_batch batch = {.ios = io, .io_count = COUNT};
    db_queue_submit(queue, &batch);
    struct waiter waiter = {.queue = queue, .batch = &batch, .timeout_ns = -1};
    start(&waiter);
    for (int i = 0; i < COUNT; i++)
        for (int piece = 0; piece < (i == 2 ? 2 : 4); piece++)
            if (i == 2 && piece == 1) {
                complete_one(0, BLOCK + 7); /* a block of it, then the error */
                complete_one(0, -EIO);
            } else {
                complete_whole(0);
            }
    join(&waiter);
    for (int i = 0; i < COUNT; i++)
        CHECK_EQUAL(io[i].error, i == 2 ? -EIO : 0);
    CHECK_EQUAL(io[2].error_offset, 2 * sizeof(memory[2]) + REQUEST + BLOCK);
    struct db_path_stats stats;
    db_queue_stats(queue, &stats);
    CHECK_EQUAL(stats.errors, 1);
    CHECK_EQUAL(stats.reads, 4 * 4 + 1);
    CHECK_EQUAL(stats.resumed, 1);
    CHECK_EQUAL(stats.in_flight, 0);
    db_queue_close(queue);
}

/* A result that moves nothing is tried again, but not for ever. */
static void test_no_progress_is_an_error(int64_t result, int error)
{
    static uint8_t memory[CHUNK] __attribute__((aligned(BLOCK)));
    struct db_queue *queue = open_queue(1, 1);
    struct db_io io = {.offset = CHUNK, .buffer = memory, .length = CHUNK};
    struct db_batch batch = {.direction = DB_WRITE, .ios = &io, .io_count = 1};
    db_queue_submit(queue, &batch);
    struct waiter waiter = {.queue = queue, .batch = &batch, .timeout_ns = -1};
    start(&waiter);
    for (int i = 0; i < 65; i++)
        complete_one(0, result);
    join(&waiter);
    CHECK_EQUAL(waiter.rc, 0);
    CHECK_EQUAL(io.error, error);
    CHECK_EQUAL(io.error_offset, CHUNK);
    db_queue_close(queue);
}

/* An engine that cannot be asked any more: every wait says so, and close() comes back. */
static void test_an_engine_that_is_lost(void)
{
    static uint8_t memory[CHUNK] __attribute__((aligned(BLOCK)));
    struct db_counters before, after;
    db_counters(&before);
    struct db_queue *queue = open_queue(1, 1);
    struct db_io io = {.buffer = memory, .length = CHUNK};
    struct db_batch batch = {.ios = &io, .io_count = 1};
    db_queue_submit(queue, &batch);
    engine->reap_error = -EPERM;
    CHECK_EQUAL(db_queue_wait(queue, &batch, -1), -EPERM);
    CHECK_EQUAL(db_queue_wait(queue, &batch, 0), -EPERM);
    CHECK_EQUAL(db_queue_wait(queue, &batch, 1000), -EPERM);
    db_queue_close(queue);
    db_counters(&after);
    CHECK_EQUAL(after.requests, before.requests + 1); /* kept: the kernel may still write there */
    CHECK_EQUAL(after.buffers, before.buffers + 1);
    engine->reap_error = 0;
    complete_whole(0);
    db_queue_close(queue);
    db_counters(&after);
    CHECK_EQUAL(after.requests, before.requests);
    CHECK_EQUAL(after.buffers, before.buffers);
}

/* ---- everything at once ---------------------------------------------------------------------- */

struct hammerer {
    struct db_queue *queue;
    uint64_t seed, base;
    pthread_t thread;
};

enum { AREA = MEDIUM_BYTES / 4 };

static void wait_in_pieces(struct db_queue *queue, struct db_batch *batch, uint64_t *seed)
{
    static const int64_t timeouts_ns[] = {0, 1000, 100000, -1};
    int rc = -ETIMEDOUT;
    while (rc == -ETIMEDOUT)
        rc = db_queue_wait(queue, batch, timeouts_ns[check_random_below(seed, 4)]);
    CHECK_EQUAL(rc, 0);
}

static void *hammer(void *argument)
{
    struct hammerer *self = argument;
    static _Thread_local uint8_t out[2][AREA / 2 + BLOCK], in[2][AREA / 2 + BLOCK];
    static _Thread_local uint64_t checksums[2][AREA / 2 / CHUNK + 1];
    for (int round = 0; round < 60; round++) {
        struct db_io writes[2], reads[2];
        for (int i = 0; i < 2; i++) {
            uint64_t length = check_random_below(&self->seed, AREA / 2 + 1);
            uint64_t skew = check_random_below(&self->seed, 2) * 3;
            memset(out[i], (int)check_random(&self->seed), sizeof(out[i]));
            out[i][check_random_below(&self->seed, sizeof(out[i]))] ^= 0xFF;
            writes[i] = (struct db_io){.offset = self->base + (uint64_t)i * AREA / 2,
                                       .buffer = out[i] + skew,
                                       .length = length,
                                       .checksums = checksums[i]};
            reads[i] = writes[i];
            reads[i].buffer = in[i] + BLOCK - skew;
        }
        struct db_batch put = {.direction = DB_WRITE, .ios = writes, .io_count = 2};
        db_queue_submit(self->queue, &put);
        wait_in_pieces(self->queue, &put, &self->seed);
        struct db_batch get = {.direction = DB_READ, .ios = reads, .io_count = 2};
        db_queue_submit(self->queue, &get);
        wait_in_pieces(self->queue, &get, &self->seed);
        for (int i = 0; i < 2; i++) {
            CHECK_EQUAL(writes[i].error, 0);
            CHECK_EQUAL(reads[i].error, 0);
            CHECK(memcmp(writes[i].buffer, reads[i].buffer, writes[i].length) == 0);
        }
    }
    return NULL;
}

/* Short, interrupted and reordered completions, few requests, less staging, many threads. */
static void test_hammered(uint32_t depth, uint32_t slots, uint64_t *seed)
{
    struct db_queue *queue = open_queue(depth, slots);
    struct hammerer threads[4];
    engine->automatic = true;
    engine->seed = check_random(seed);
    for (int i = 0; i < 4; i++) {
        threads[i] = (struct hammerer){queue, check_random(seed), (uint64_t)i * AREA, 0};
        CHECK(pthread_create(&threads[i].thread, NULL, hammer, &threads[i]) == 0);
    }
    for (int i = 0; i < 4; i++)
        pthread_join(threads[i].thread, NULL);
    struct db_path_stats stats;
    db_queue_stats(queue, &stats);
    CHECK(stats.resumed > 0 && stats.errors == 0 && stats.in_flight == 0);
    db_queue_close(queue);
}

int main(void)
{
    uint64_t seed = check_seed("test_queue_faults");
    alarm(240); /* a hang is a failure */
    for (size_t i = 0; i < sizeof(medium); i++)
        medium[i] = (uint8_t)check_random(&seed);
    test_a_follower_of_a_submitter_wakes();
    test_reads_that_are_looked_at_go_out_in_parts();
    test_reads_go_before_writes_but_not_for_ever();
    test_a_completion_without_a_wake_up_is_found();
    test_a_leader_that_times_out_is_succeeded();
    test_staging_is_waited_for();
    test_commits_that_are_refused_for_a_while();
    test_one_of_many_fails();
    test_no_progress_is_an_error(BLOCK - 1, -EIO);
    test_no_progress_is_an_error(-EAGAIN, -EAGAIN);
    test_no_progress_is_an_error(-ECANCELED, -ECANCELED);
    test_an_engine_that_is_lost();
    test_hammered(1, 1, &seed);
    test_hammered(4, 2, &seed);
    test_hammered(DEPTH_MAX, 3, &seed);
    struct db_counters live;
    db_counters(&live);
    CHECK(live.requests == 0 && live.batches == 0 && live.buffers == 0);
    return check_report("test_queue_faults");
}

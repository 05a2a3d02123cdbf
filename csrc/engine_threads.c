/* engine_threads.c - pread and pwrite from a small pool of threads.
 *
 * Works everywhere, and serves the page-cache path: a buffered read that hits is a copy, which the
 * threads make on several cores at once. One that misses is begun and laid aside while the thread
 * goes on with the next: so a few threads copy what is there and keep the drive busy as well. */
#define _GNU_SOURCE
#include "clock.h"
#include "engine.h"

#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <signal.h>
#include <stdlib.h>
#include <sys/uio.h>
#include <time.h>
#include <unistd.h>

enum {
    /* Reads that the drive has been given and nobody waits for yet: as much as keeps it busy. */
    BEGUN_MAX = 32,
    READS_IN_ROW_MAX = 16, /* while writes wait */
    /* While reads are begun, whose pages take about as long to come as these to be copied. */
    WRITES_IN_ROW_MAX = 4,
    FORGET_TRIES = 4,
    WINDOW_LEAST_BYTES = 64 << 10, /* a copy of less is not worth three more system calls */
};

struct list {
    struct db_request *first, **end;
};

struct worker {
    pthread_t thread;
    struct db_engine *engine;
    struct db_pin pin;
};

struct db_engine {
    struct db_engine_config config;
    pthread_mutex_t lock;
    pthread_cond_t work; /* todo is not empty, or closing */
    pthread_cond_t done_some;
    struct list staged; /* queued, not yet committed; under the queue's lock */
    struct list todo[2];     /* by direction: somebody computes with what a read brings */
    struct list begun;       /* reads that missed, on their way into the page cache */
    struct list done;
    uint32_t staged_count, begun_count, done_count;
    uint32_t reads_in_row, writes_in_row;
    uint32_t wanted;         /* reap() sleeps until so many are done; 0: nobody is there */
    _Atomic bool can_begin;  /* the files' reads take RWF_NOWAIT, as far as is known */
    bool closing;
    uint32_t thread_count;
    struct worker workers[];
};

static void list_init(struct list *list)
{
    list->first = NULL;
    list->end = &list->first;
}

static void list_push(struct list *list, struct db_request *request)
{
    request->next = NULL;
    *list->end = request;
    list->end = &request->next;
}

static struct db_request *list_pop(struct list *list)
{
    struct db_request *request = list->first;
    list->first = request->next;
    if (!list->first)
        list->end = &list->first;
    return request;
}

/* Moves the rest of a request. What was moved before an error counts: the next try meets it. */
static void move_rest(struct db_request *request)
{
    uint8_t *rest = (uint8_t *)request->buffer + request->begun_bytes;
    size_t length = request->length - request->begun_bytes;
    off_t offset = (off_t)(request->offset + request->begun_bytes);
    ssize_t moved = request->direction == DB_READ ? pread(request->fd, rest, length, offset)
                                                  : pwrite(request->fd, rest, length, offset);
    if (moved >= 0)
        request->result = request->begun_bytes + moved;
    else
        request->result = request->begun_bytes > 0 ? (int64_t)request->begun_bytes : -errno;
}

/* Copies what the page cache holds of a read up to the first gap, and has the gap filled. False:
 * there is one, and the drive works on it. */
static bool read_what_is_there(struct db_engine *engine, struct db_request *request)
{
    struct iovec rest = {request->buffer, request->length};
    while (rest.iov_len > 0) {
        off_t offset = (off_t)(request->offset + request->begun_bytes);
        ssize_t moved = preadv2(request->fd, &rest, 1, offset, RWF_NOWAIT);
        if (moved < 0 && errno == EAGAIN) {
            /* That began to read the gap, but where readahead is set to 0 only a page of it, and
             * the plain read goes on page by page. This reads the range at once, and no more. */
            (void)posix_fadvise(request->fd, offset, (off_t)rest.iov_len, POSIX_FADV_WILLNEED);
            return false;
        }
        if (moved < 0 && errno == EOPNOTSUPP)
            engine->can_begin = false;
        if (moved <= 0) { /* the plain read says what it is */
            move_rest(request);
            return true;
        }
        request->begun_bytes += (uint32_t)moved;
        rest.iov_base = (uint8_t *)rest.iov_base + moved;
        rest.iov_len -= (size_t)moved;
    }
    request->result = request->begun_bytes;
    return true;
}

/* Whole pieces that are worth it. */
static bool may_use_window(const struct db_engine *engine, const struct db_request *request)
{
    struct db_window *const *windows = engine->config.windows;
    return windows && db_window_is_open(windows[request->file]) &&
           request->length >= WINDOW_LEAST_BYTES && request->begun_bytes == 0 &&
           request->length == request->user_bytes && request->buffer == request->user;
}

/* Copies a whole piece from where the page cache has it; false if it does not have all of it. */
static bool copy_from_window(struct worker *worker, struct db_request *request)
{
    const struct db_engine_config *config = &worker->engine->config;
    if (!may_use_window(worker->engine, request))
        return false;
    struct db_window *window = config->windows[request->file];
    const void *from = db_pin_take(&worker->pin, window, request->offset, request->length);
    if (!from)
        return false;
    config->copy(request, from, config->context);
    db_pin_give(&worker->pin);
    return true;
}

/* The same, once what is not there has been brought in with what is read around it. */
static enum db_fill fill_and_copy(struct worker *worker, struct db_request *request)
{
    const struct db_engine_config *config = &worker->engine->config;
    uint64_t start, end;
    if (!may_use_window(worker->engine, request) ||
        !config->find_run(request, &start, &end, config->context))
        return DB_FILL_NONE;
    enum db_fill found = db_window_fill(config->windows[request->file], request->offset,
                                        request->length, start, end);
    if (found == DB_FILL_DONE && !copy_from_window(worker, request))
        found = DB_FILL_NONE;
    return found;
}

/* The same for what is on its way. A plain read would have more read behind a piece that has come
 * by a fault, as splice() does: see db_pin_take(). */
static bool wait_and_copy(struct worker *worker, struct db_request *request)
{
    const struct db_engine_config *config = &worker->engine->config;
    if (copy_from_window(worker, request))
        return true;
    return may_use_window(worker->engine, request) &&
           db_window_await(config->windows[request->file], request->offset, request->length) &&
           copy_from_window(worker, request);
}

/* False: the request is begun, and its thread may do something else meanwhile. */
static bool begin(struct worker *worker, struct db_request *request)
{
    struct db_engine *engine = worker->engine;
    request->begun_bytes = 0;
    engine->config.before(request, engine->config.context);
    if (request->direction != DB_READ || !engine->can_begin) {
        move_rest(request);
        return true;
    }
    if (copy_from_window(worker, request))
        return true;
    enum db_fill found = fill_and_copy(worker, request);
    if (found == DB_FILL_NONE && !may_use_window(engine, request))
        return read_what_is_there(engine, request);
    if (found == DB_FILL_NONE)
        (void)posix_fadvise(request->fd, (off_t)request->offset, (off_t)request->length,
                            POSIX_FADV_WILLNEED);
    return found == DB_FILL_DONE;
}

/* A plain read. What failed around it is not its error; but as long as another thread looks at that
 * it can't be forgotten. */
static void move_for_itself(struct db_engine *engine, struct db_request *request)
{
    struct timespec pause = {.tv_nsec = 1000000};
    move_rest(request);
    for (int tries = 0; request->result == -EIO && tries < FORGET_TRIES; tries++) {
        if (!engine->config.windows ||
            !db_window_forget_failed(engine->config.windows[request->file], request->offset,
                                     request->length))
            return;
        move_rest(request);
        nanosleep(&pause, NULL);
        pause.tv_nsec *= 2;
    }
}

static bool move_bytes(struct worker *worker, struct db_request *request, bool is_begun)
{
    struct db_engine *engine = worker->engine;
    if (!is_begun && !begin(worker, request))
        return false;
    if (is_begun && !wait_and_copy(worker, request))
        move_for_itself(engine, request);
    engine->config.after(request, engine->config.context);
    return true;
}

/* The next request (lock held), and whether it was begun before; NULL when there is none. */
static struct db_request *next_request(struct db_engine *engine, bool *is_begun)
{
    struct list *reads = &engine->todo[DB_READ], *writes = &engine->todo[DB_WRITE];
    bool write_is_due =
        writes->first && (!reads->first || engine->reads_in_row >= READS_IN_ROW_MAX);
    bool begun_is_due = engine->begun.first && engine->writes_in_row >= WRITES_IN_ROW_MAX;
    *is_begun = false;
    if (write_is_due && !begun_is_due) {
        engine->reads_in_row = 0;
        engine->writes_in_row++;
        return list_pop(writes);
    }
    if (!write_is_due && reads->first && engine->begun_count < BEGUN_MAX) {
        engine->reads_in_row++;
        return list_pop(reads);
    }
    if (!engine->begun.first)
        return NULL;
    *is_begun = true;
    engine->writes_in_row = 0;
    engine->begun_count--;
    return list_pop(&engine->begun);
}

static void *work(void *argument)
{
    struct worker *worker = argument;
    struct db_engine *engine = worker->engine;
    struct db_request *request;
    bool is_begun;
    pthread_mutex_lock(&engine->lock);
    for (;;) {
        while (!(request = next_request(engine, &is_begun)) && !engine->closing)
            pthread_cond_wait(&engine->work, &engine->lock);
        if (!request)
            break;
        pthread_mutex_unlock(&engine->lock);
        bool is_done = move_bytes(worker, request, is_begun);
        pthread_mutex_lock(&engine->lock);
        if (is_done) {
            list_push(&engine->done, request);
            engine->done_count++;
            if (engine->wanted > 0 && engine->done_count >= engine->wanted)
                pthread_cond_signal(&engine->done_some);
        } else {
            list_push(&engine->begun, request);
            engine->begun_count++;
        }
    }
    pthread_mutex_unlock(&engine->lock);
    return NULL;
}

static void threads_close(struct db_engine *engine)
{
    pthread_mutex_lock(&engine->lock);
    assert(!engine->todo[DB_READ].first && !engine->todo[DB_WRITE].first && !engine->begun.first);
    engine->closing = true;
    pthread_cond_broadcast(&engine->work);
    pthread_mutex_unlock(&engine->lock);
    for (uint32_t i = 0; i < engine->thread_count; i++) {
        pthread_join(engine->workers[i].thread, NULL);
        db_pin_close(&engine->workers[i].pin);
    }
    pthread_cond_destroy(&engine->work);
    pthread_cond_destroy(&engine->done_some);
    pthread_mutex_destroy(&engine->lock);
    free(engine);
}

/* Signals are the interpreter's: none may be delivered to a worker. */
static int start_threads(struct db_engine *engine)
{
    sigset_t all, before;
    int rc = 0;
    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, &before);
    while (!rc && engine->thread_count < engine->config.threads) {
        struct worker *worker = &engine->workers[engine->thread_count];
        worker->engine = engine;
        db_pin_open(&worker->pin, engine->config.windows != NULL);
        rc = pthread_create(&worker->thread, NULL, work, worker);
        if (!rc)
            engine->thread_count++;
        else
            db_pin_close(&worker->pin);
    }
    pthread_sigmask(SIG_SETMASK, &before, NULL);
    return -rc;
}

static int threads_open(const struct db_engine_config *config, struct db_engine **out)
{
    struct db_engine *engine =
        calloc(1, sizeof(*engine) + config->threads * sizeof(engine->workers[0]));
    if (!engine)
        return -ENOMEM;
    engine->config = *config;
    engine->can_begin = config->is_buffered;
    list_init(&engine->staged);
    list_init(&engine->todo[DB_READ]);
    list_init(&engine->todo[DB_WRITE]);
    list_init(&engine->begun);
    list_init(&engine->done);
    pthread_mutex_init(&engine->lock, NULL);
    pthread_cond_init(&engine->work, NULL);
    pthread_condattr_t attributes;
    pthread_condattr_init(&attributes);
    pthread_condattr_setclock(&attributes, CLOCK_MONOTONIC);
    pthread_cond_init(&engine->done_some, &attributes);
    pthread_condattr_destroy(&attributes);
    int rc = start_threads(engine);
    if (rc) {
        threads_close(engine);
        return rc;
    }
    *out = engine;
    return 0;
}

static void threads_queue(struct db_engine *engine, struct db_request *request)
{
    list_push(&engine->staged, request);
    engine->staged_count++;
}

static uint32_t threads_commit(struct db_engine *engine)
{
    if (!engine->staged.first)
        return 0;
    pthread_mutex_lock(&engine->lock);
    while (engine->staged.first) {
        struct db_request *request = list_pop(&engine->staged);
        list_push(&engine->todo[request->direction], request);
    }
    if (engine->staged_count > 1)
        pthread_cond_broadcast(&engine->work);
    else
        pthread_cond_signal(&engine->work);
    pthread_mutex_unlock(&engine->lock);
    engine->staged_count = 0;
    return 1;
}

static int threads_reap(struct db_engine *engine, struct db_request **done, uint32_t least,
                        uint32_t max, int64_t timeout_ns)
{
    int64_t deadline_ns = timeout_ns < 0 ? INT64_MAX : db_deadline_ns(timeout_ns);
    struct timespec until = {deadline_ns / 1000000000, deadline_ns % 1000000000};
    uint32_t count = 0;
    int rc = 0;
    pthread_mutex_lock(&engine->lock);
    engine->wanted = least;
    while (engine->done_count < engine->wanted && timeout_ns != 0 && rc != ETIMEDOUT)
        rc = timeout_ns < 0 ? pthread_cond_wait(&engine->done_some, &engine->lock)
                            : pthread_cond_timedwait(&engine->done_some, &engine->lock, &until);
    engine->wanted = 0;
    while (engine->done.first && count < max)
        done[count++] = list_pop(&engine->done);
    engine->done_count -= count;
    pthread_mutex_unlock(&engine->lock);
    return (int)count;
}

static void threads_hurry(struct db_engine *engine)
{
    pthread_mutex_lock(&engine->lock);
    if (engine->wanted > 1) {
        engine->wanted = 1;
        pthread_cond_signal(&engine->done_some);
    }
    pthread_mutex_unlock(&engine->lock);
}

static void threads_abandon(struct db_engine *engine)
{
    for (uint32_t i = 0; i < engine->thread_count; i++)
        db_pin_close(&engine->workers[i].pin);
}

const struct db_engine_ops db_engine_threads = {
    .name = "threads",
    .has_threads = true,
    .open = threads_open,
    .queue = threads_queue,
    .commit = threads_commit,
    .reap = threads_reap,
    .hurry = threads_hurry,
    .close = threads_close,
    .abandon = threads_abandon,
};

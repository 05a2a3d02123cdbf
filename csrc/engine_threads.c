/* engine_threads.c - pread and pwrite from a small pool of threads.
 *
 * Works everywhere, and serves the page-cache path: a buffered read that hits is a copy, which the
 * threads make on several cores at once; one that misses blocks only its own thread. */
#define _GNU_SOURCE
#include "clock.h"
#include "engine.h"

#include <errno.h>
#include <pthread.h>
#include <signal.h>
#include <stdlib.h>
#include <unistd.h>

struct list {
    struct db_request *first, **end;
};

struct db_engine {
    struct db_engine_config config;
    pthread_mutex_t lock;
    pthread_cond_t work; /* todo is not empty, or closing */
    pthread_cond_t done_some;
    struct list staged; /* queued, not yet committed; under the queue's lock */
    struct list todo, done;
    uint32_t staged_count;
    bool closing;
    uint32_t thread_count;
    pthread_t threads[];
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

static void move_bytes(struct db_engine *engine, struct db_request *request)
{
    engine->config.before(request, engine->config.context);
    ssize_t moved = request->direction == DB_READ
                        ? pread(request->fd, request->buffer, request->length,
                                (off_t)request->offset)
                        : pwrite(request->fd, request->buffer, request->length,
                                 (off_t)request->offset);
    request->result = moved < 0 ? -errno : moved;
    engine->config.after(request, engine->config.context);
}

static void *worker(void *argument)
{
    struct db_engine *engine = argument;
    pthread_mutex_lock(&engine->lock);
    for (;;) {
        while (!engine->todo.first && !engine->closing)
            pthread_cond_wait(&engine->work, &engine->lock);
        if (!engine->todo.first)
            break;
        struct db_request *request = list_pop(&engine->todo);
        pthread_mutex_unlock(&engine->lock);
        move_bytes(engine, request);
        pthread_mutex_lock(&engine->lock);
        list_push(&engine->done, request);
        pthread_cond_signal(&engine->done_some);
    }
    pthread_mutex_unlock(&engine->lock);
    return NULL;
}

static void threads_close(struct db_engine *engine)
{
    pthread_mutex_lock(&engine->lock);
    assert(!engine->todo.first);
    engine->closing = true;
    pthread_cond_broadcast(&engine->work);
    pthread_mutex_unlock(&engine->lock);
    for (uint32_t i = 0; i < engine->thread_count; i++)
        pthread_join(engine->threads[i], NULL);
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
        rc = pthread_create(&engine->threads[engine->thread_count], NULL, worker, engine);
        if (!rc)
            engine->thread_count++;
    }
    pthread_sigmask(SIG_SETMASK, &before, NULL);
    return -rc;
}

static int threads_open(const struct db_engine_config *config, struct db_engine **out)
{
    struct db_engine *engine =
        calloc(1, sizeof(*engine) + config->threads * sizeof(engine->threads[0]));
    if (!engine)
        return -ENOMEM;
    engine->config = *config;
    list_init(&engine->staged);
    list_init(&engine->todo);
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
    *engine->todo.end = engine->staged.first;
    engine->todo.end = engine->staged.end;
    if (engine->staged_count > 1)
        pthread_cond_broadcast(&engine->work);
    else
        pthread_cond_signal(&engine->work);
    pthread_mutex_unlock(&engine->lock);
    list_init(&engine->staged);
    engine->staged_count = 0;
    return 1;
}

static int threads_reap(struct db_engine *engine, struct db_request **done, uint32_t least,
                        uint32_t max, int64_t timeout_ns)
{
    (void)least; /* what is here is finished already: collecting more would only save wake-ups */
    int64_t deadline_ns = timeout_ns < 0 ? INT64_MAX : db_deadline_ns(timeout_ns);
    struct timespec until = {deadline_ns / 1000000000, deadline_ns % 1000000000};
    uint32_t count = 0;
    int rc = 0;
    pthread_mutex_lock(&engine->lock);
    while (!engine->done.first && timeout_ns != 0 && rc != ETIMEDOUT)
        rc = timeout_ns < 0 ? pthread_cond_wait(&engine->done_some, &engine->lock)
                            : pthread_cond_timedwait(&engine->done_some, &engine->lock, &until);
    while (engine->done.first && count < max)
        done[count++] = list_pop(&engine->done);
    pthread_mutex_unlock(&engine->lock);
    return (int)count;
}

static void threads_abandon(struct db_engine *engine)
{
    (void)engine; /* no file descriptors, and the threads did not survive the fork */
}

const struct db_engine_ops db_engine_threads = {
    .name = "threads",
    .has_threads = true,
    .open = threads_open,
    .queue = threads_queue,
    .commit = threads_commit,
    .reap = threads_reap,
    .close = threads_close,
    .abandon = threads_abandon,
};

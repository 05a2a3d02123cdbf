/* refused.h - requests that the kernel would not take, on their way back to the queue.
 *
 * commit() runs under the queue's lock, reap() beside it: a stack without a lock joins them. */
#ifndef DUALBLADE_REFUSED_H
#define DUALBLADE_REFUSED_H

#include "engine.h"

#include <stdatomic.h>

struct db_refused {
    _Atomic(struct db_request *) first;
};

/* The kernel's complaint becomes the request's result. */
static inline void db_refused_push(struct db_refused *refused, struct db_request *request,
                                   int error)
{
    assert(error < 0);
    request->result = error;
    request->next = refused->first;
    while (!atomic_compare_exchange_weak(&refused->first, &request->next, request))
        ;
}

/* At most max of them; called by one thread at a time. */
static inline int db_refused_pop(struct db_refused *refused, struct db_request **done,
                                 uint32_t max)
{
    uint32_t count = 0;
    struct db_request *request = atomic_exchange(&refused->first, NULL);
    for (struct db_request *next; request; request = next) {
        next = request->next;
        if (count < max)
            done[count++] = request;
        else
            db_refused_push(refused, request, (int)request->result);
    }
    return (int)count;
}

#endif

/* mapping.h - parts of a file as memory, and the lock that lasts as long as these do.
 *
 * What is mapped must not be given to anybody else, also not after the device is closed: so the
 * file's lock has users, the device and each mapping, and the last one to go unlocks it. */
#ifndef DUALBLADE_MAPPING_H
#define DUALBLADE_MAPPING_H

#include "dualblade.h"

struct db_lock;

/* Takes over a locked descriptor, for its first user. -ENOMEM: then it has not. */
int db_lock_open(int fd, struct db_lock **out);
/* One user fewer; the last one unlocks and closes the descriptor. In the child after a fork it does
 * nothing: the lock is the parent's. */
void db_lock_close(struct db_lock *lock);
/* Whether mappings hold it too. */
bool db_lock_is_shared(const struct db_lock *lock);

/* As db_device_map(), of the lock's file. */
int db_mapping_open(struct db_lock *lock, uint64_t offset, uint64_t length,
                    struct db_mapping **out, const void **bytes);

#endif

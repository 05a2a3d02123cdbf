/* counters.h - how many objects of each kind are alive in the process, for leak accounting.
 *
 * Each is raised where its object is made and lowered where it is freed; db_counters() in
 * memory.c reads them. They are statistics: nothing may depend on the order of their changes. */
#ifndef DUALBLADE_COUNTERS_H
#define DUALBLADE_COUNTERS_H

#include <stdatomic.h>
#include <stdint.h>

extern _Atomic int64_t db_live_devices;
extern _Atomic int64_t db_live_requests;
extern _Atomic int64_t db_live_batches;
extern _Atomic int64_t db_live_buffers;
extern _Atomic int64_t db_live_extent_maps;
extern _Atomic int64_t db_live_tails;
extern _Atomic int64_t db_live_mappings;

#endif

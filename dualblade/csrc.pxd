# What _core.pyx uses of csrc/dualblade.h and of POSIX threads.

from libc.stdint cimport int64_t, uint32_t, uint64_t


cdef extern from "<pthread.h>" nogil:
    ctypedef struct pthread_mutex_t:
        pass
    ctypedef struct pthread_cond_t:
        pass
    int pthread_mutex_init(pthread_mutex_t *mutex, void *attributes) noexcept
    int pthread_mutex_lock(pthread_mutex_t *mutex) noexcept
    int pthread_mutex_unlock(pthread_mutex_t *mutex) noexcept
    int pthread_mutex_destroy(pthread_mutex_t *mutex) noexcept
    int pthread_cond_init(pthread_cond_t *cond, void *attributes) noexcept
    int pthread_cond_broadcast(pthread_cond_t *cond) noexcept
    int pthread_cond_destroy(pthread_cond_t *cond) noexcept
    struct timespec:
        int64_t tv_sec
        long tv_nsec
    int pthread_cond_timedwait(pthread_cond_t *cond, pthread_mutex_t *mutex,
                               const timespec *until) noexcept


cdef extern from "<time.h>" nogil:
    enum:
        CLOCK_REALTIME
    int clock_gettime(int clock, timespec *now) noexcept


cdef extern from "dualblade.h" nogil:
    enum:
        DB_BLOCK_BYTES
        DB_MEMBERS_MAX

    enum db_path:
        DB_PATH_DIRECT
        DB_PATH_PAGECACHE

    enum db_direction:
        DB_READ
        DB_WRITE

    enum db_engine_id:
        DB_ENGINE_AUTO
        DB_ENGINE_URING
        DB_ENGINE_AIO
        DB_ENGINE_THREADS
        DB_ENGINE_NVME

    struct db_device_options:
        db_engine_id engine
        uint32_t queue_depth
        uint32_t threads
        uint32_t chunk_bytes
        uint32_t request_bytes
        uint64_t staging_bytes
        uint64_t stripe_bytes
        bint read_only
        bint sqpoll
        bint iopoll

    struct db_geometry:
        uint64_t size_bytes
        uint32_t lba_bytes
        uint32_t physical_block_bytes
        uint32_t memory_align_bytes
        uint64_t max_transfer_bytes
        bint has_placement
        bint is_block_device
        bint has_direct
        bint can_discard

    struct db_path_stats:
        uint64_t reads, writes
        uint64_t read_bytes, write_bytes
        uint64_t staged_bytes
        uint64_t resumed
        uint64_t errors
        uint64_t checksum_mismatches
        uint64_t submits
        uint64_t registered_bytes
        uint32_t in_flight
        uint32_t read_request_bytes
        uint32_t write_request_bytes

    struct db_device:
        pass

    int db_device_open(const char *const *paths, uint32_t path_count,
                       const db_device_options *options, uint32_t *failed,
                       db_device **out) noexcept
    void db_device_close(db_device *device) noexcept
    const db_geometry *db_device_geometry(const db_device *device) noexcept
    const db_geometry *db_device_member_geometry(const db_device *device,
                                                 uint32_t member) noexcept
    const char *db_device_engine_name(const db_device *device, db_path path) noexcept
    void db_device_stats(db_device *device, db_path path, db_path_stats *out) noexcept
    int db_device_engine_refusal(const db_device *device, db_engine_id engine) noexcept
    int db_device_register(db_device *device, void *memory, uint64_t length) noexcept
    int db_device_unregister(db_device *device, void *memory, uint64_t length) noexcept
    struct db_failure:
        uint32_t member
        unsigned short nvme_status

    int db_device_flush(db_device *device, db_failure *failed) noexcept
    int db_device_discard(db_device *device, uint64_t offset, uint64_t length,
                          db_failure *failed) noexcept
    int db_device_write_back(db_device *device, uint64_t offset, uint64_t length, bint wait,
                             db_failure *failed) noexcept
    int db_device_write_back_failures(db_device *device, uint64_t *out) noexcept
    const uint64_t DB_ANY_FAILURES
    int db_device_drop_cached(db_device *device, uint64_t offset, uint64_t length,
                              uint64_t failures, db_failure *failed) noexcept
    struct db_cached:
        uint64_t resident_bytes
        uint64_t dirty_bytes
        uint64_t writeback_bytes
        uint64_t evicted_bytes
        uint64_t recently_evicted_bytes
        bint resident_only

    int db_device_cached(db_device *device, uint64_t offset, uint64_t length,
                         db_cached *out, db_failure *failed) noexcept
    int db_cached_of_path(const char *path, db_cached *out) noexcept

    struct db_mapping:
        pass

    int db_device_map(db_device *device, uint64_t offset, uint64_t length, db_mapping **out,
                      const void **bytes) noexcept
    void db_mapping_close(db_mapping *mapping) noexcept

    struct db_io:
        uint64_t offset
        void *buffer
        uint64_t length
        uint64_t *checksums
        int error
        uint64_t error_offset
        unsigned short nvme_status

    struct db_batch:
        db_device *device
        db_path path
        db_direction direction
        db_io *ios
        uint32_t io_count
        bint is_ahead
        bint is_tail

    int db_batch_submit(db_batch *batch) noexcept
    int db_batch_wait(db_batch *batch, int64_t timeout_ns) noexcept

    uint64_t db_checksum(const void *data, size_t length) noexcept
    void db_checksum_chunks(const void *data, uint64_t length, uint32_t chunk_bytes,
                            uint64_t *out) noexcept

    struct db_tail:
        pass

    struct db_tail_write:
        const void *head
        uint64_t head_offset
        uint64_t body_offset, body_start, body_bytes
        uint64_t first_chunk
        uint32_t digest_count

    int db_tail_open(uint32_t chunk_bytes, db_tail **out) noexcept
    void db_tail_close(db_tail *tail) noexcept
    void db_tail_reset(db_tail *tail, uint64_t stored, const void *chunk) noexcept
    void db_tail_append(db_tail *tail, const void *data, uint64_t length, void *copy,
                        db_tail_write *out, uint64_t *digests) noexcept
    uint64_t db_tail_stored(const db_tail *tail) noexcept
    uint32_t db_tail_held(const db_tail *tail) noexcept
    const void *db_tail_block(const db_tail *tail) noexcept
    uint64_t db_tail_digest(const db_tail *tail) noexcept

    struct db_extent_map:
        pass

    struct db_extent_stats:
        uint64_t total_bytes
        uint64_t free_bytes
        uint64_t largest_free_bytes
        uint64_t free_extents

    int db_extent_map_open(uint64_t size_bytes, uint32_t unit_bytes,
                           db_extent_map **out) noexcept
    void db_extent_map_close(db_extent_map *map) noexcept
    int db_extent_allocate(db_extent_map *map, uint64_t length, uint64_t align_bytes,
                           uint64_t *offset) noexcept
    int db_extent_reserve(db_extent_map *map, uint64_t offset, uint64_t length) noexcept
    int db_extent_free(db_extent_map *map, uint64_t offset, uint64_t length) noexcept
    void db_extent_map_stats(const db_extent_map *map, db_extent_stats *out) noexcept
    int db_extent_next_free(const db_extent_map *map, uint64_t *offset,
                            uint64_t *length) noexcept
    int db_extent_map_verify(const db_extent_map *map) noexcept

    int db_memory_map(size_t length, void **out) noexcept
    void db_memory_unmap(void *memory, size_t length) noexcept

    ctypedef struct db_counters_t "struct db_counters":
        int64_t devices, requests, batches, buffers, extent_maps, tails, mappings
    void db_counters(db_counters_t *out) noexcept
    uint64_t db_window_bytes() noexcept

    int db_nvme_sibling(uint64_t device, bint is_character, char *path,
                        size_t path_size) noexcept

    int db_find_signature(const char *path, char *name, size_t name_size) noexcept

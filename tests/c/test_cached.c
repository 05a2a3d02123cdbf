/* test_cached.c - what the page cache holds: with cachestat(2), and where it is forbidden. */
#define _GNU_SOURCE
#include "cached.h"
#include "check.h"

#include <errno.h>
#include <fcntl.h>
#include <linux/filter.h>
#include <linux/seccomp.h>
#include <stddef.h>
#include <string.h>
#include <sys/prctl.h>
#include <sys/syscall.h>
#include <unistd.h>

#ifndef SYS_cachestat
#define SYS_cachestat 451
#endif

enum { MIB = 1 << 20 };
static const uint64_t FILE_BYTES = 80 * MIB; /* several pieces of mincore()'s, and a part of one */

/* From now on cachestat(2) fails, as before Linux 6.5. */
static bool forbid_cachestat(void)
{
    struct sock_filter instructions[] = {
        BPF_STMT(BPF_LD | BPF_W | BPF_ABS, offsetof(struct seccomp_data, nr)),
        BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, SYS_cachestat, 0, 1),
        BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_ERRNO | ENOSYS),
        BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_ALLOW),
    };
    struct sock_fprog program = {sizeof(instructions) / sizeof(*instructions), instructions};
    return prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) == 0 &&
           prctl(PR_SET_SECCOMP, SECCOMP_MODE_FILTER, &program) == 0;
}

static struct db_cached count(int fd, uint64_t offset, uint64_t length)
{
    struct db_cached found;
    memset(&found, 0, sizeof(found));
    CHECK_EQUAL(db_cached_count(fd, offset, length, &found), 0);
    return found;
}

static void write_at(int fd, uint64_t offset, uint64_t length)
{
    static char data[MIB];
    CHECK_EQUAL(pwrite(fd, data, length, (off_t)offset), length);
}

static void check_residents(int fd, const char *path)
{
    struct db_cached whole;
    uint64_t page = (uint64_t)sysconf(_SC_PAGESIZE);
    CHECK_EQUAL(db_cached_of_path(path, &whole), 0);
    CHECK_EQUAL(whole.resident_bytes, 2 * MIB + page);
    CHECK_EQUAL(count(fd, 0, FILE_BYTES).resident_bytes, 2 * MIB + page);
    CHECK_EQUAL(count(fd, 32 * MIB, 32 * MIB).resident_bytes, MIB / 2);
    CHECK_EQUAL(count(fd, 32 * MIB - 1, 2).resident_bytes, 2 * page);
    CHECK_EQUAL(count(fd, 0, MIB).resident_bytes, 0);
    CHECK_EQUAL(count(fd, 1, 2 * MIB - 1).resident_bytes, MIB);
    CHECK_EQUAL(count(fd, FILE_BYTES - 1, 1).resident_bytes, page);
    CHECK_EQUAL(count(fd, FILE_BYTES, MIB).resident_bytes, 0); /* behind the end */
}

int main(void)
{
    char path[] = "/tmp/dualblade-test-cached-XXXXXX";
    int fd = mkstemp(path);
    CHECK(fd >= 0);
    CHECK_EQUAL(ftruncate(fd, (off_t)FILE_BYTES), 0);
    struct db_cached found;
    CHECK_EQUAL(db_cached_of_path(path, &found), 0);
    CHECK_EQUAL(found.resident_bytes, 0);
    write_at(fd, MIB, MIB);
    write_at(fd, 32 * MIB - MIB / 2, MIB); /* on both sides of where a piece ends */
    write_at(fd, FILE_BYTES - 100, 100);
    check_residents(fd, path);
    if (forbid_cachestat()) {
        check_residents(fd, path);
        found = count(fd, 0, FILE_BYTES);
        CHECK(found.resident_only);
        CHECK_EQUAL(found.dirty_bytes + found.writeback_bytes + found.evicted_bytes, 0);
    }
    CHECK_EQUAL(db_cached_of_path("/tmp", &found), -EISDIR);
    CHECK_EQUAL(db_cached_of_path("/dev/null", &found), -ENOTBLK);
    CHECK_EQUAL(unlink(path), 0);
    CHECK_EQUAL(db_cached_of_path(path, &found), -ENOENT);
    close(fd);
    printf("test_cached: %lu checks passed\n", checks_made);
    return 0;
}

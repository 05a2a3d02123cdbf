/* nvme.c - an NVMe namespace: its two nodes, identify, flush, deallocate. */
#define _GNU_SOURCE
#include "nvme.h"

#include "geometry.h"

#include <assert.h>
#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <linux/fs.h>
#include <linux/nvme_ioctl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/stat.h>
#include <sys/sysmacros.h>
#include <unistd.h>

enum {
    OPCODE_FLUSH = 0x00,
    OPCODE_WRITE_ZEROES = 0x08,
    OPCODE_DATASET_MANAGEMENT = 0x09,
    OPCODE_MANAGEMENT_RECEIVE = 0x12,
    OPCODE_IDENTIFY = 0x06, /* of the admin commands */
    IDENTIFY_NAMESPACE = 0,
    IDENTIFY_CONTROLLER = 1,
    IDENTIFY_BYTES = 4096,
    DEALLOCATE = 1 << 2, /* attribute of a dataset management command */
    RANGES_MAX = 256,    /* in one such command */
    CAN_DEALLOCATE = 1 << 2, /* optional commands: dataset management */
    READS_AFTER = 7,         /* of its deallocate features: what a deallocated block reads as, */
    READS_ZEROS = 1,
    READS_ONES = 2,
    ZERO_DEALLOCATES = 1 << 3, /* and that a write zeroes command may deallocate */
    DEALLOCATES = 1 << 25,     /* in such a command */
    HAS_PLACEMENT = 1 << 19,   /* attribute of a controller: flexible data placement */
    HANDLE_STATUS = 1,         /* that a management receive is for */
    HANDLES_AT = 16,           /* and the handles in its answer */
    HANDLE_BYTES = 32,
    STATUS_CODE = 0x7ff, /* with its type */
    STATUS_TYPE = 7 << 8,
    PATH_RELATED = 3 << 8,
    ABORTED = 0x07, /* of the generic type, as the next */
    QUEUE_DELETED = 0x08,
    DO_NOT_RETRY = 1 << 14,
    PATH_TRIES = 6,
    LEAST_PAGE_BYTES = 4096, /* of a controller; where its own is larger, so is its limit */
    BLOCKS_MAX = 1 << 16,    /* of one read or write: the count has 16 bits */
};

/* ---- the two nodes --------------------------------------------------------------------------- */

/* The directory in sysfs of a device by its number. */
static int find_directory(const char *kind, dev_t device, char directory[PATH_MAX])
{
    char link[64];
    snprintf(link, sizeof(link), "/sys/dev/%s/%u:%u", kind, major(device), minor(device));
    return realpath(link, directory) ? 0 : -ENODEV;
}

/* "ng0n1" or "nvme0n1": the number behind the n, which both nodes have; 0 for any other name. The
 * first number may differ, being the controller's of one and the subsystem's of the other. */
static unsigned head_of(const char *name, bool is_character)
{
    unsigned first, head = 0;
    int used = 0;
    int found = is_character ? sscanf(name, "ng%un%u%n", &first, &head, &used)
                             : sscanf(name, "nvme%un%u%n", &first, &head, &used);
    return found == 2 && name[used] == '\0' ? head : 0;
}

/* The path of a node, which has to be there, by its directory in sysfs. */
static int find_node(const char *parent, const char *name, bool is_character, char *path,
                     size_t path_size)
{
    char file_name[PATH_MAX + 300];
    unsigned device_major, device_minor;
    struct stat status;
    snprintf(file_name, sizeof(file_name), "%s/%s/dev", parent, name);
    FILE *file = fopen(file_name, "re");
    if (!file)
        return -ENODEV;
    int found = fscanf(file, "%u:%u", &device_major, &device_minor);
    fclose(file);
    if (found != 2)
        return -ENODEV;
    if ((size_t)snprintf(path, path_size, "/dev/%s", name) >= path_size)
        return -ENAMETOOLONG;
    if (stat(path, &status) < 0)
        return -errno;
    bool is_it = status.st_rdev == makedev(device_major, device_minor) &&
                 (is_character ? S_ISCHR(status.st_mode) : S_ISBLK(status.st_mode));
    return is_it ? 0 : -ENODEV;
}

int db_nvme_sibling(uint64_t device, bool is_character, char *path, size_t path_size)
{
    char parent[PATH_MAX];
    if (find_directory(is_character ? "char" : "block", device, parent) < 0)
        return -ENOTBLK;
    char *name = strrchr(parent, '/');
    *name++ = '\0';
    unsigned head = head_of(name, is_character);
    if (head == 0)
        return -ENOTBLK;
    /* Both lie in the directory of their controller, or of their subsystem. */
    DIR *entries = opendir(parent);
    if (!entries)
        return -ENODEV;
    int rc = -ENODEV;
    for (struct dirent *entry; rc == -ENODEV && (entry = readdir(entries));)
        if (head_of(entry->d_name, !is_character) == head)
            rc = find_node(parent, entry->d_name, !is_character, path, path_size);
    closedir(entries);
    return rc;
}

/* ---- what the drive says --------------------------------------------------------------------- */

static uint16_t word_at(const uint8_t *data, size_t at)
{
    return (uint16_t)(data[at] | data[at + 1] << 8);
}

static uint32_t dword_at(const uint8_t *data, size_t at)
{
    return word_at(data, at) | (uint32_t)word_at(data, at + 2) << 16;
}

static uint64_t long_at(const uint8_t *data, size_t at)
{
    uint64_t value = 0;
    for (int i = 7; i >= 0; i--)
        value = value << 8 | data[at + (size_t)i];
    return value;
}

static int identify(const struct db_nvme_namespace *space, uint32_t what, uint8_t *data)
{
    struct nvme_admin_cmd command = {
        .opcode = OPCODE_IDENTIFY,
        .nsid = what == IDENTIFY_NAMESPACE ? space->nsid : 0,
        .addr = (uint64_t)(uintptr_t)data,
        .data_len = IDENTIFY_BYTES,
        .cdw10 = what,
    };
    int rc = ioctl(space->fd, NVME_IOCTL_ADMIN_CMD, &command);
    if (rc < 0) /* EACCES: of a command, where the node could be opened */
        return errno == EACCES ? -EPERM : -errno;
    return rc > 0 ? -EREMOTEIO : 0;
}

static int read_namespace(struct db_nvme_namespace *space, uint64_t size_bytes,
                          const uint8_t *data)
{
    uint8_t formatted = data[26];
    size_t format = 128 + 4u * ((formatted & 15u) | (formatted & 0x60u) >> 1);
    if (word_at(data, format) != 0)
        return -EMEDIUMTYPE;
    uint8_t lba_shift = data[format + 2];
    if (lba_shift < 9 || (1u << lba_shift) > DB_BLOCK_BYTES)
        return -EOPNOTSUPP;
    space->lba_shift = lba_shift;
    space->lba_bytes = 1u << lba_shift;
    if (long_at(data, 0) != size_bytes >> lba_shift)
        return -ESTALE; /* the block device has another size */
    space->boundary_bytes = (uint32_t)word_at(data, 46) << lba_shift;
    if (space->boundary_bytes % DB_BLOCK_BYTES != 0)
        space->boundary_bytes = 0; /* the boundaries would lie inside our blocks */
    uint8_t reads = data[33] & READS_AFTER;
    space->forgets = reads == READS_ZEROS || reads == READS_ONES;
    space->zero_deallocates = data[33] & ZERO_DEALLOCATES;
    return 0;
}

static uint64_t least(uint64_t a, uint64_t b)
{
    return a < b ? a : b;
}

static uint32_t power_below(uint64_t value)
{
    uint32_t power = DB_BLOCK_BYTES;
    while (power * 2ull <= value)
        power *= 2;
    return power;
}

static void read_limits(struct db_nvme_namespace *space, dev_t block_device, const uint8_t *data)
{
    uint64_t value, most_bytes = (uint64_t)BLOCKS_MAX * space->lba_bytes;
    uint8_t transfer_shift = data[77];
    if (transfer_shift > 0 && transfer_shift < 16)
        most_bytes = least(most_bytes, (uint64_t)LEAST_PAGE_BYTES << transfer_shift);
    if (db_queue_attribute(block_device, "max_hw_sectors_kb", &value) == 0 && value > 0)
        most_bytes = least(most_bytes, value * 1024);
    space->segments = 32;
    if (db_queue_attribute(block_device, "max_segments", &value) == 0 && value > 1)
        space->segments = (uint32_t)least(value, 1024);
    /* Each page may lie elsewhere, and memory that begins within a page has one page more. */
    uint64_t page_bytes = (uint64_t)sysconf(_SC_PAGESIZE);
    space->drive_bytes = power_below(most_bytes);
    space->most_bytes = power_below(least(most_bytes, space->segments * page_bytes));
    space->transfer_bytes = power_below(least(most_bytes, (space->segments - 1) * page_bytes));
    if (word_at(data, 520) & CAN_DEALLOCATE &&
        db_queue_attribute(block_device, "discard_max_hw_bytes", &value) == 0)
        space->deallocate_bytes = least(value, (uint64_t)UINT32_MAX * space->lba_bytes) /
                                  space->lba_bytes * space->lba_bytes;
    /* The kernel gives 0 for drives that can't, or are known to do it badly. */
    if (!space->forgets && db_queue_attribute(block_device, "write_zeroes_max_bytes", &value) == 0)
        space->zero_bytes = (uint32_t)(least(value, (uint64_t)BLOCKS_MAX * space->lba_bytes) /
                                       space->lba_bytes * space->lba_bytes);
}

/* The handles that the namespace may place data with. The first is also that of all who name none;
 * no answer is no placement, which nobody has a right to. */
static void read_handles(struct db_nvme_namespace *space, uint8_t *data)
{
    struct nvme_passthru_cmd command = {
        .opcode = OPCODE_MANAGEMENT_RECEIVE,
        .nsid = space->nsid,
        .addr = (uint64_t)(uintptr_t)data,
        .data_len = HANDLES_AT + 2 * HANDLE_BYTES, /* of two, or some refuse to give less */
        .cdw10 = HANDLE_STATUS,
        .cdw11 = (HANDLES_AT + 2 * HANDLE_BYTES) / 4 - 1, /* counted from zero */
    };
    memset(data, 0, IDENTIFY_BYTES);
    if (ioctl(space->fd, NVME_IOCTL_IO_CMD, &command) != 0)
        return;
    space->has_placement = word_at(data, 14) >= 2;
    space->run_handle = word_at(data, HANDLES_AT);
    space->tail_handle = word_at(data, HANDLES_AT + HANDLE_BYTES);
}

/* Both nodes say which namespace they are of: by their names alone it would be a guess. */
static int check_same(struct db_nvme_namespace *space, int block_fd)
{
    int nsid = ioctl(space->fd, NVME_IOCTL_ID);
    if (nsid <= 0)
        return nsid < 0 ? -errno : -ENODEV;
    space->nsid = (uint32_t)nsid;
    return ioctl(block_fd, NVME_IOCTL_ID) == nsid ? 0 : -ESTALE;
}

static int ask(struct db_nvme_namespace *space, int block_fd, dev_t block_device)
{
    uint64_t size_bytes = 0;
    if (ioctl(block_fd, BLKGETSIZE64, &size_bytes) < 0)
        return -errno;
    uint8_t *data = aligned_alloc(IDENTIFY_BYTES, IDENTIFY_BYTES);
    if (!data)
        return -ENOMEM;
    int rc = identify(space, IDENTIFY_NAMESPACE, data);
    if (!rc)
        rc = read_namespace(space, size_bytes, data);
    if (!rc)
        rc = identify(space, IDENTIFY_CONTROLLER, data);
    if (!rc) {
        bool has_placement = dword_at(data, 96) & HAS_PLACEMENT;
        read_limits(space, block_device, data);
        if (has_placement)
            read_handles(space, data);
    }
    free(data);
    return rc;
}

int db_nvme_open(int block_fd, bool read_only, struct db_nvme_namespace *out)
{
    char path[64];
    struct stat status;
    *out = (struct db_nvme_namespace){.fd = -1};
    if (fstat(block_fd, &status) < 0 || !S_ISBLK(status.st_mode))
        return -ENODEV;
    int rc = db_nvme_sibling(status.st_rdev, false, path, sizeof(path));
    if (rc)
        return rc == -ENOTBLK ? -ENODEV : rc;
    out->fd = open(path, (read_only ? O_RDONLY : O_RDWR) | O_CLOEXEC);
    if (out->fd < 0)
        return -errno;
    rc = check_same(out, block_fd);
    if (!rc)
        rc = ask(out, block_fd, status.st_rdev);
    if (rc)
        db_nvme_close(out);
    return rc;
}

void db_nvme_close(struct db_nvme_namespace *space)
{
    if (space->fd >= 0)
        close(space->fd);
    space->fd = -1;
}

/* ---- commands that are waited for ------------------------------------------------------------ */

/* A reset did that to what was under way: by the kernel's word, or by the drive's. */
static bool was_taken_back(int status)
{
    int code = status & STATUS_CODE;
    return (code & STATUS_TYPE) == PATH_RELATED || code == ABORTED || code == QUEUE_DELETED;
}

/* -EAGAIN: the way to the drive comes and goes; the block layer waits for it, and this does not. */
static int run(const struct db_nvme_namespace *space, struct nvme_passthru_cmd *command)
{
    command->nsid = space->nsid;
    for (int tries = PATH_TRIES; tries > 0; tries--) {
        int rc = ioctl(space->fd, NVME_IOCTL_IO_CMD, command);
        if (rc < 0 && errno != EINTR) /* EINTR: no signal ends this wait, but a reset does */
            return -errno;
        if (rc >= 0 && (!was_taken_back(rc) || (rc & DO_NOT_RETRY) || tries == 1))
            return rc;
    }
    return -EAGAIN;
}

/* Not sent again when the drive fails it, which may have forgotten then what it could not write. */
int db_nvme_flush(const struct db_nvme_namespace *space)
{
    struct nvme_passthru_cmd command = {.opcode = OPCODE_FLUSH};
    return run(space, &command);
}

static int write_zeroes(const struct db_nvme_namespace *space, uint64_t offset, uint64_t length)
{
    while (length > 0) {
        uint64_t bytes = least(length, space->zero_bytes);
        uint64_t first = offset >> space->lba_shift;
        struct nvme_passthru_cmd command = {
            .opcode = OPCODE_WRITE_ZEROES,
            .cdw10 = (uint32_t)first,
            .cdw11 = (uint32_t)(first >> 32),
            .cdw12 = (uint32_t)(bytes / space->lba_bytes - 1), /* counted from zero */
        };
        if (space->zero_deallocates)
            command.cdw12 |= DEALLOCATES;
        int rc = run(space, &command);
        if (rc)
            return rc;
        offset += bytes;
        length -= bytes;
    }
    return 0;
}

static int deallocate(const struct db_nvme_namespace *space, uint64_t offset, uint64_t length)
{
    struct {
        uint32_t attributes;
        uint32_t blocks; /* a plain count */
        uint64_t first;
    } ranges[RANGES_MAX];
    while (length > 0) {
        uint32_t count = 0;
        memset(ranges, 0, sizeof(ranges));
        for (; length > 0 && count < RANGES_MAX; count++) {
            uint64_t bytes = least(length, space->deallocate_bytes);
            ranges[count].blocks = (uint32_t)(bytes / space->lba_bytes);
            ranges[count].first = offset / space->lba_bytes;
            offset += bytes;
            length -= bytes;
        }
        assert(count > 0 && ranges[count - 1].blocks > 0);
        struct nvme_passthru_cmd command = {
            .opcode = OPCODE_DATASET_MANAGEMENT,
            .addr = (uint64_t)(uintptr_t)ranges,
            .data_len = count * (uint32_t)sizeof(ranges[0]),
            .cdw10 = count - 1, /* this one counts from zero */
            .cdw11 = DEALLOCATE,
        };
        int rc = run(space, &command);
        if (rc)
            return rc;
    }
    return 0;
}

/* A drive that does not say what deallocated blocks read as may give back what they held last: then
 * that has to be zeros. */
int db_nvme_deallocate(const struct db_nvme_namespace *space, uint64_t offset, uint64_t length)
{
    if (space->deallocate_bytes == 0)
        return -EOPNOTSUPP;
    if (offset % space->lba_bytes != 0 || length % space->lba_bytes != 0)
        return -EINVAL;
    if (space->zero_bytes > 0) {
        int rc = write_zeroes(space, offset, length);
        if (rc || space->zero_deallocates)
            return rc;
    }
    return deallocate(space, offset, length);
}

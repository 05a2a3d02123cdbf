/* signature.c - whether a device or file bears the mark of somebody's data, as libblkid sees it. */

#include "dualblade.h"

#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <stdio.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

/* libblkid is loaded when it is first needed and never linked: a store in a file has no use for
 * it, so neither building nor importing may fail where it is not installed. What is used of it is
 * declared here for the same reason; the values are those of <blkid/blkid.h>, which are its ABI. */
#define LIBBLKID "libblkid.so.1"
#define SUPERBLOCKS_TYPE (1 << 5)
/* A superblock with a wrong checksum is somebody's damaged filesystem, not free space. */
#define SUPERBLOCKS_BAD_CHECKSUM (1 << 10)
/* A GPT whose protective MBR is gone is still a GPT. */
#define PARTITIONS_FORCE_GPT (1 << 1)
#define SAFEPROBE_FOUND 0
#define SAFEPROBE_NOTHING 1
#define SAFEPROBE_AMBIVALENT (-2)

struct probe; /* struct blkid_struct_probe */

static struct {
    void *handle;
    struct probe *(*new_probe)(void);
    void (*free_probe)(struct probe *probe);
    int (*set_device)(struct probe *probe, int fd, int64_t offset, int64_t size);
    int (*enable_superblocks)(struct probe *probe, int enable);
    int (*set_superblocks_flags)(struct probe *probe, int flags);
    int (*enable_partitions)(struct probe *probe, int enable);
    int (*set_partitions_flags)(struct probe *probe, int flags);
    int (*do_safeprobe)(struct probe *probe);
    int (*lookup_value)(struct probe *probe, const char *name, const char **data, size_t *length);
} blkid;

static pthread_once_t blkid_once = PTHREAD_ONCE_INIT;

static void load_blkid(void)
{
    void *library = dlopen(LIBBLKID, RTLD_NOW | RTLD_LOCAL);
    const struct {
        const char *name;
        void *function; /* where the pointer to it is kept */
    } symbols[] = {
        {"blkid_new_probe", &blkid.new_probe},
        {"blkid_free_probe", &blkid.free_probe},
        {"blkid_probe_set_device", &blkid.set_device},
        {"blkid_probe_enable_superblocks", &blkid.enable_superblocks},
        {"blkid_probe_set_superblocks_flags", &blkid.set_superblocks_flags},
        {"blkid_probe_enable_partitions", &blkid.enable_partitions},
        {"blkid_probe_set_partitions_flags", &blkid.set_partitions_flags},
        {"blkid_do_safeprobe", &blkid.do_safeprobe},
        {"blkid_probe_lookup_value", &blkid.lookup_value},
    };

    if (library == NULL)
        return;
    for (size_t i = 0; i < sizeof symbols / sizeof symbols[0]; i++) {
        void *symbol = dlsym(library, symbols[i].name);
        if (symbol == NULL) {
            dlclose(library);
            return;
        }
        memcpy(symbols[i].function, &symbol, sizeof symbol);
    }
    blkid.handle = library;
}

static int open_target(const char *path)
{
    struct stat status;
    /* O_NONBLOCK: opening a FIFO by mistake must not wait for its other end. */
    int fd = open(path, O_RDONLY | O_CLOEXEC | O_NONBLOCK);

    if (fd < 0)
        return -errno;
    int rc = fstat(fd, &status) < 0 ? -errno : 0;
    if (rc == 0 && S_ISDIR(status.st_mode))
        rc = -EISDIR;
    else if (rc == 0 && !S_ISREG(status.st_mode) && !S_ISBLK(status.st_mode))
        rc = -ENOTBLK;
    if (rc == 0)
        return fd;
    close(fd);
    return rc;
}

/* libblkid says only that something failed; errno, if it set it, says what. */
static int blkid_error(void)
{
    return errno != 0 ? -errno : -EIO;
}

static int find(struct probe *probe, int fd, const char **name)
{
    errno = 0;
    if (blkid.set_device(probe, fd, 0, 0) != 0 ||
        blkid.enable_superblocks(probe, 1) != 0 ||
        blkid.set_superblocks_flags(probe, SUPERBLOCKS_TYPE | SUPERBLOCKS_BAD_CHECKSUM) != 0 ||
        blkid.enable_partitions(probe, 1) != 0 ||
        blkid.set_partitions_flags(probe, PARTITIONS_FORCE_GPT) != 0)
        return blkid_error();

    switch (blkid.do_safeprobe(probe)) {
    case SAFEPROBE_NOTHING:
        *name = "";
        return 0;
    case SAFEPROBE_AMBIVALENT:
        *name = "several signatures";
        return 0;
    case SAFEPROBE_FOUND:
        if (blkid.lookup_value(probe, "TYPE", name, NULL) != 0 &&
            blkid.lookup_value(probe, "PTTYPE", name, NULL) != 0)
            *name = "unknown signature";
        return 0;
    default:
        return blkid_error();
    }
}

int db_find_signature(const char *path, char *name, size_t name_size)
{
    const char *found;

    if (name_size == 0)
        return -EINVAL;
    pthread_once(&blkid_once, load_blkid);
    if (blkid.handle == NULL)
        return -ENOSYS;
    int fd = open_target(path);
    if (fd < 0)
        return fd;

    struct probe *probe = blkid.new_probe();
    int rc = probe == NULL ? -ENOMEM : find(probe, fd, &found);
    if (rc == 0)
        snprintf(name, name_size, "%s", found);
    if (probe != NULL)
        blkid.free_probe(probe);
    close(fd);
    return rc;
}

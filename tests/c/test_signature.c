/* test_signature.c - what libblkid sees on files that bear the marks of filesystems and others.
 *
 * The marks are written by hand, so that nothing need be installed; where a tool is there that
 * writes the real thing, that is looked at too. */

#include "check.h"
#include "dualblade.h"

#include <errno.h>
#include <fcntl.h>
#include <stdbool.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <unistd.h>

enum { IMAGE_BYTES = 8 << 20, SECTOR = 512 };

static char directory[] = "/tmp/dualblade-test-signature-XXXXXX";
static char path[sizeof directory + 16];
static uint8_t image[IMAGE_BYTES];

static void check_name(const char *expected)
{
    char name[64] = "untouched";
    int rc = db_find_signature(path, name, sizeof name);

    CHECK_EQUAL(rc, 0);
    if (strcmp(name, expected) != 0)
        fprintf(stderr, "found \"%s\", not \"%s\"\n", name, expected);
    CHECK(strcmp(name, expected) == 0);
}

static void write_image(void)
{
    int fd = open(path, O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC, 0600);

    CHECK(fd >= 0);
    CHECK_EQUAL(write(fd, image, sizeof image), IMAGE_BYTES);
    close(fd);
}

static void check_image(const char *expected)
{
    write_image();
    check_name(expected);
    memset(image, 0, sizeof image);
}

/* Big-endian where the format is; the others are little-endian. */
static void put_big(size_t at, uint64_t value, int bytes)
{
    for (int i = 0; i < bytes; i++)
        image[at + (size_t)i] = (uint8_t)(value >> 8 * (bytes - 1 - i));
}

static void put_little(size_t at, uint64_t value, int bytes)
{
    for (int i = 0; i < bytes; i++)
        image[at + (size_t)i] = (uint8_t)(value >> 8 * i);
}

static uint32_t crc32(const uint8_t *data, size_t length)
{
    uint32_t crc = UINT32_MAX;

    for (size_t i = 0; i < length; i++) {
        crc ^= data[i];
        for (int bit = 0; bit < 8; bit++)
            crc = crc >> 1 ^ (crc & 1 ? 0xedb88320u : 0);
    }
    return ~crc;
}

/* ---- marks ----------------------------------------------------------------------------------- */

static void mark_ext4(void)
{
    put_little(1024 + 4, IMAGE_BYTES / 1024, 4); /* blocks */
    put_little(1024 + 56, 0xef53, 2);
    put_little(1024 + 76, 1, 4);     /* revision */
    put_little(1024 + 92, 0x4, 4);   /* has a journal */
    put_little(1024 + 96, 0x40, 4);  /* has extents: only ext4 knows them */
    put_little(1024 + 100, 0x1, 4);  /* sparse superblocks */
}

static void mark_swap(void)
{
    put_little(1024, 1, 4); /* version */
    put_little(1028, IMAGE_BYTES / 4096 - 1, 4);
    memcpy(image + 4086, "SWAPSPACE2", 10);
}

static void mark_xfs(void)
{
    memcpy(image, "XFSB", 4);
    put_big(4, 4096, 4);          /* block size */
    put_big(8, 4096, 8);          /* data blocks: 16 MiB */
    put_big(80, 1, 4);            /* realtime extent */
    put_big(84, 1024, 4);         /* blocks of an allocation group */
    put_big(88, 4, 4);            /* allocation groups */
    put_big(96, 512, 4);          /* log blocks */
    put_big(100, 0xb4a4, 2);      /* version 4 */
    put_big(102, SECTOR, 2);
    put_big(104, 256, 2);         /* inode size */
    put_big(106, 16, 2);          /* inodes of a block */
    image[120] = 12;              /* and the logarithms of all these */
    image[121] = 9;
    image[122] = 8;
    image[123] = 4;
    image[124] = 10;
    image[127] = 25;              /* percent of space for inodes */
}

static void mark_btrfs(void)
{
    put_little(65536 + 48, 65536, 8); /* where it is */
    memcpy(image + 65536 + 64, "_BHRfS_M", 8);
    put_little(65536 + 144, 4096, 4); /* sector size */
}

static void mark_lvm2(void)
{
    memcpy(image + SECTOR, "LABELONE", 8);
    put_little(SECTOR + 8, 1, 8);
    put_little(SECTOR + 20, 32, 4);
    memcpy(image + SECTOR + 24, "LVM2 001", 8);
    memset(image + SECTOR + 32, 'a', 32);
}

static void mark_luks(void)
{
    memcpy(image, "LUKS\xba\xbe", 6);
    put_big(6, 1, 2);
    memcpy(image + 8, "aes", 3);
    memset(image + 168, 'a', 36);
}

static void mark_dos(uint8_t type)
{
    size_t entry = 446;

    image[entry + 4] = type;
    put_little(entry + 8, type == 0xee ? 1 : 2048, 4);
    put_little(entry + 12, IMAGE_BYTES / SECTOR - (type == 0xee ? 1 : 2048), 4);
    put_little(510, 0xaa55, 2);
}

static void mark_gpt(void)
{
    const size_t header = SECTOR, entries = 2 * SECTOR, entries_bytes = 128 * 128;
    const uint64_t last = IMAGE_BYTES / SECTOR - 1;

    memset(image + entries, 0xa1, 32); /* the first partition: its type and its own name */
    put_little(entries + 32, 2048, 8);
    put_little(entries + 40, 4095, 8);
    memcpy(image + header, "EFI PART", 8);
    put_little(header + 8, 0x00010000, 4);
    put_little(header + 12, 92, 4);
    put_little(header + 24, 1, 8);
    put_little(header + 32, last, 8);
    put_little(header + 40, 34, 8);
    put_little(header + 48, last - 33, 8);
    memset(image + header + 56, 0xd1, 16);
    put_little(header + 72, 2, 8);
    put_little(header + 80, 128, 4);
    put_little(header + 84, 128, 4);
    put_little(header + 88, crc32(image + entries, entries_bytes), 4);
    put_little(header + 16, crc32(image + header, 92), 4);
}

/* ---- tests ----------------------------------------------------------------------------------- */

static void test_marks(void)
{
    check_image("");
    mark_ext4();
    check_image("ext4");
    mark_swap();
    check_image("swap");
    mark_xfs();
    check_image("xfs");
    mark_btrfs();
    check_image("btrfs");
    mark_lvm2();
    check_image("LVM2_member");
    mark_luks();
    check_image("crypto_LUKS");
    mark_dos(0x83);
    check_image("dos");
    mark_dos(0xee);
    mark_gpt();
    check_image("gpt");
    mark_gpt(); /* its protective MBR is gone */
    check_image("gpt");
    mark_btrfs();
    mark_swap();
    check_image("several signatures");
}

static void test_unmarked(void)
{
    uint64_t random = 1; /* always the same: some marks are two bytes, and chance writes them */

    for (size_t i = 0; i < sizeof image; i++)
        image[i] = (uint8_t)check_random(&random);
    check_image("");
    CHECK_EQUAL(truncate(path, 0), 0);
    check_name("");
    CHECK_EQUAL(truncate(path, 1), 0);
    check_name("");
    CHECK_EQUAL(truncate(path, 4096), 0);
    check_name("");
}

static void test_refused(void)
{
    char name[64] = "untouched";

    CHECK_EQUAL(db_find_signature("/nonexistent/device", name, sizeof name), -ENOENT);
    CHECK_EQUAL(db_find_signature(directory, name, sizeof name), -EISDIR);
    CHECK_EQUAL(db_find_signature("/dev/null", name, sizeof name), -ENOTBLK);
    CHECK_EQUAL(db_find_signature(path, name, 0), -EINVAL);
    unlink(path);
    CHECK_EQUAL(mkfifo(path, 0600), 0);
    CHECK_EQUAL(db_find_signature(path, name, sizeof name), -ENOTBLK);
    unlink(path);
    CHECK(strcmp(name, "untouched") == 0);

    mark_lvm2();
    write_image();
    memset(image, 0, sizeof image);
    CHECK_EQUAL(db_find_signature(path, name, 4), 0); /* cut to what there is room for */
    CHECK(strcmp(name, "LVM") == 0);
}

/* True if the shell command could be run; false, and said so, if its program is not installed. */
static bool run_tool(const char *command)
{
    pid_t child = fork();
    int status = 0;

    CHECK(child >= 0);
    if (child == 0) {
        setenv("PATH", "/usr/sbin:/sbin:/usr/bin:/bin", 1);
        setenv("IMAGE", path, 1);
        execl("/bin/sh", "sh", "-c", command, (char *)NULL);
        _exit(126);
    }
    CHECK_EQUAL(waitpid(child, &status, 0), child);
    CHECK(WIFEXITED(status));
    if (WEXITSTATUS(status) == 127) {
        printf("test_signature: skipped, not installed: %s\n", command);
        return false;
    }
    CHECK_EQUAL(WEXITSTATUS(status), 0);
    return true;
}

static void test_tools(void)
{
    static const struct {
        const char *command, *name;
        off_t bytes;
    } tools[] = {
        {"mkfs.ext4 -q -F \"$IMAGE\" 2>/dev/null", "ext4", 8 << 20},
        {"mkswap \"$IMAGE\" >/dev/null 2>&1", "swap", 8 << 20},
        {"mkfs.xfs -q -f \"$IMAGE\" 2>/dev/null", "xfs", 512 << 20},
        {"mkfs.btrfs -q -f \"$IMAGE\" 2>/dev/null", "btrfs", 256 << 20},
        {"echo 'label: gpt' | sfdisk -q \"$IMAGE\" 2>/dev/null", "gpt", 8 << 20},
        {"echo ,, | sfdisk -q --label dos \"$IMAGE\" 2>/dev/null", "dos", 8 << 20},
    };

    for (size_t i = 0; i < sizeof tools / sizeof tools[0]; i++) {
        unlink(path);
        int fd = open(path, O_WRONLY | O_CREAT | O_EXCL | O_CLOEXEC, 0600);
        CHECK(fd >= 0);
        CHECK_EQUAL(ftruncate(fd, tools[i].bytes), 0);
        close(fd);
        if (run_tool(tools[i].command))
            check_name(tools[i].name);
    }
}

int main(void)
{
    CHECK(mkdtemp(directory) != NULL);
    snprintf(path, sizeof path, "%s/image", directory);
    write_image();
    char name[64];
    if (db_find_signature(path, name, sizeof name) == -ENOSYS) {
        printf("test_signature: skipped: libblkid.so.1 is not installed\n");
    } else {
        test_marks();
        test_unmarked();
        test_refused();
        test_tools();
    }
    unlink(path);
    rmdir(directory);
    return check_report("test_signature");
}

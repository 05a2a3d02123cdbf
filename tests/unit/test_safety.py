"""Safety: nothing of anybody else's is ever opened for writing, on real devices where root."""

import contextlib
import errno
import os
import shutil
import socket
import struct
import subprocess

import pytest

from dualblade.errors import (
    CorruptionError,
    DeviceError,
    DeviceRefusedError,
    UnsupportedError,
)
from dualblade.header import DATA_OFFSET, HEADER_BYTES, Header
from dualblade.safety import check_target
from tests.helpers import MIB, overwrite

HEADER = Header(Header.new_store_id(), 16 * MIB, 512, 262144, DATA_OFFSET, 1_700_000_000)
OVERRULE = r"dualblade format .*format=True"


def run(*command):
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()


def needs(*programs):
    if os.geteuid() != 0:
        pytest.skip("only root can attach and mount devices")
    for program in programs:
        if shutil.which(program) is None:
            pytest.skip(f"{program} is not installed")


@contextlib.contextmanager
def mounted(device, where):
    where.mkdir()
    run("mount", device, str(where))
    try:
        yield
    finally:
        run("umount", str(where))


@pytest.fixture
def image(tmp_path):
    path = tmp_path / "kv.img"
    path.write_bytes(b"")
    os.truncate(path, 16 * MIB)
    return path


@pytest.fixture
def loop(loop_over, image):
    return loop_over(image)


def content(path):
    with open(path, "rb") as file:
        return file.read()


# ---- files --------------------------------------------------------------------------------------


def test_an_empty_file_is_free_to_use(tmp_path):
    path = tmp_path / "kv.img"
    path.touch()
    assert check_target(path, formatting=False) == (str(path), "file", 0, None)


def test_a_store_of_ours_is_opened_with_its_header(image):
    overwrite(image, 0, HEADER.pack())
    for path in (image, str(image)):
        assert check_target(path, formatting=False) == (str(path), "file", 16 * MIB, HEADER)


def test_a_link_is_followed(image, tmp_path):
    overwrite(image, 0, HEADER.pack())
    link = tmp_path / "link"
    link.symlink_to(image)
    assert check_target(link, formatting=False).header == HEADER


@pytest.mark.parametrize(
    ("data", "says"),
    [
        (b"", "looks blank"),
        (b"my thesis", "data that dualblade did not write"),
        (b"\0" * 4096 + b"x", "data that dualblade did not write"),
    ],
)
def test_any_other_file_is_refused_unless_it_is_formatted(image, data, says):
    overwrite(image, 0, data)
    before = content(image)
    with pytest.raises(DeviceRefusedError, match=f"(?s)kv.img is not a .*{says}.*{OVERRULE}"):
        check_target(image, formatting=False)
    assert check_target(image, formatting=True) == (str(image), "file", 16 * MIB, None)
    assert content(image) == before


def test_a_filesystem_image_is_named(image):
    if shutil.which("mkfs.ext4") is None:
        pytest.skip("mkfs.ext4 is not installed")
    run("mkfs.ext4", "-q", "-F", str(image))
    with pytest.raises(DeviceRefusedError, match="it holds ext4"):
        check_target(image, formatting=False)


def test_a_short_file_is_refused(tmp_path):
    path = tmp_path / "notes.txt"
    path.write_text("milk")
    with pytest.raises(DeviceRefusedError, match="did not write"):
        check_target(path, formatting=False)


def test_a_damaged_or_newer_store_is_not_taken_for_a_strange_file(image):
    block = bytearray(HEADER.pack())
    block[100] ^= 1
    overwrite(image, 0, block)
    with pytest.raises(CorruptionError, match="checksum"):
        check_target(image, formatting=False)
    block[8:12] = struct.pack("<I", 3)
    overwrite(image, 0, block)
    with pytest.raises(UnsupportedError, match="version 3"):
        check_target(image, formatting=False)
    assert check_target(image, formatting=True).header is None


# ---- what is neither file nor block device ------------------------------------------------------


def test_a_missing_path_says_how_to_create_it(tmp_path):
    with pytest.raises(DeviceError, match=r"does not exist.*size=") as caught:
        check_target(tmp_path / "no.img", formatting=True)
    assert caught.value.errno == errno.ENOENT
    assert caught.value.filename == str(tmp_path / "no.img")


def test_a_path_through_a_file_says_so(image):
    with pytest.raises(DeviceError, match="not a directory") as caught:
        check_target(image / "kv.img", formatting=False)
    assert caught.value.errno == errno.ENOTDIR


def test_a_directory_says_what_to_give_instead(tmp_path):
    with pytest.raises(DeviceError, match=r"is a directory.* file in it") as caught:
        check_target(tmp_path, formatting=False)
    assert caught.value.errno == errno.EISDIR


def test_pipes_sockets_and_terminals_are_refused(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(tmp_path / "socket"))
    for path, what in [
        (tmp_path / "pipe", "pipe"),
        (tmp_path / "socket", "socket"),
        ("/dev/null", "character device"),
    ]:
        for formatting in (False, True):
            with pytest.raises(DeviceRefusedError, match=f"is a {what}.*block device"):
                check_target(path, formatting=formatting)


@contextlib.contextmanager
def as_nobody():
    """This process without root's rights, if it has them."""
    if os.geteuid() != 0:
        yield
        return
    os.setegid(65534)
    os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(0)
        os.setegid(0)


@pytest.mark.parametrize("mode", [0o000, 0o444])
def test_a_file_without_permission_says_what_is_missing(mode, tmp_path):
    for part in [tmp_path, *tmp_path.parents][:3]:
        if part.stat().st_uid == os.geteuid():
            part.chmod(part.stat().st_mode | 0o055)
    path = tmp_path / "kv.img"
    path.write_bytes(HEADER.pack())
    path.chmod(mode)
    with as_nobody(), pytest.raises(DeviceError, match="permission") as caught:
        check_target(path, formatting=False)
    assert caught.value.errno == errno.EACCES


# ---- block devices ------------------------------------------------------------------------------


def test_a_blank_device_is_refused_unless_it_is_formatted(loop):
    with pytest.raises(DeviceRefusedError, match=f"looks blank.*{OVERRULE}"):
        check_target(loop, formatting=False)
    assert check_target(loop, formatting=True) == (loop, "block", 16 * MIB, None)


def test_a_device_with_strange_data_is_refused_unless_it_is_formatted(loop):
    overwrite(loop, MIB // 2, b"somebody's database")
    with pytest.raises(DeviceRefusedError, match=f"did not write.*{OVERRULE}"):
        check_target(loop, formatting=False)
    assert check_target(loop, formatting=True).kind == "block"


def test_a_device_of_ours_is_opened(loop):
    overwrite(loop, 0, HEADER.pack())
    assert check_target(loop, formatting=False).header == HEADER


def test_a_filesystem_is_refused_by_name_unless_it_is_formatted(loop):
    needs("mkfs.ext4")
    run("mkfs.ext4", "-q", loop)
    with pytest.raises(DeviceRefusedError, match=f"holds ext4.*{OVERRULE}"):
        check_target(loop, formatting=False)
    assert check_target(loop, formatting=True).kind == "block"


@pytest.mark.parametrize("formatting", [False, True])
def test_a_mounted_filesystem_is_refused_even_for_formatting(loop, tmp_path, formatting):
    needs("mkfs.ext4")
    run("mkfs.ext4", "-q", loop)
    with mounted(loop, tmp_path / "mount point"):
        with pytest.raises(DeviceRefusedError, match=r"mounted on .*/mount point.*umount"):
            check_target(loop, formatting=formatting)
        # In a container the mount table may not show it: the kernel itself knows.
        with pytest.raises(DeviceRefusedError, match="in use by the kernel"):
            check_target(loop, formatting=formatting, proc="/nonexistent", sys="/nonexistent")


@pytest.mark.parametrize("formatting", [False, True])
def test_the_file_behind_a_loop_device_is_refused(loop, image, formatting):
    overwrite(loop, 0, HEADER.pack())
    with pytest.raises(DeviceRefusedError, match=f"backing file of {loop}.*losetup -d"):
        check_target(image, formatting=formatting)


@pytest.mark.parametrize("formatting", [False, True])
def test_swap_space_is_refused_even_for_formatting(loop, formatting):
    needs("mkswap", "swapon")
    run("mkswap", loop)
    try:
        run("swapon", loop)
    except subprocess.CalledProcessError as error:
        pytest.skip(f"swap cannot be used here: {error.stderr.strip()}")
    try:
        with pytest.raises(DeviceRefusedError, match=r"it is swap space.*swapoff"):
            check_target(loop, formatting=formatting)
    finally:
        run("swapoff", loop)


def test_a_device_claimed_by_another_is_refused(loop):
    overwrite(loop, 0, HEADER.pack())
    holder = os.open(loop, os.O_RDWR | os.O_EXCL)
    try:
        with pytest.raises(DeviceRefusedError, match="in use"):
            check_target(loop, formatting=False)
    finally:
        os.close(holder)
    assert check_target(loop, formatting=False).header == HEADER


def test_a_partitioned_device_is_refused_and_with_a_mounted_partition_always(
    image, loop_over, tmp_path
):
    needs("mkfs.ext4", "partx")
    # One Linux partition from sector 2048 to the end, in the oldest of all partition tables.
    entry = struct.pack("<B3sB3sII", 0, b"\0\0\0", 0x83, b"\0\0\0", 2048, 32768 - 2048)
    overwrite(image, 446, entry + bytes(48) + b"\x55\xaa")
    disk = loop_over(image, "--partscan")
    partition = f"{disk}p1"
    if not os.path.exists(partition):
        # This kernel reads no such tables itself, but can be told.
        run("partx", "--add", disk)
    name = os.path.basename(partition)
    with pytest.raises(DeviceRefusedError, match=rf"partitioned \({name}\).*{OVERRULE}"):
        check_target(disk, formatting=False)
    assert check_target(disk, formatting=True).kind == "block"
    assert check_target(partition, formatting=True).size_bytes == 15 * MIB
    run("mkfs.ext4", "-q", partition)
    with mounted(partition, tmp_path / "mnt"):
        with pytest.raises(DeviceRefusedError, match=f"its partition {name} is mounted"):
            check_target(disk, formatting=True)
        with pytest.raises(DeviceRefusedError, match="it is mounted"):
            check_target(partition, formatting=True)


def test_a_loop_device_without_a_file_has_no_medium(tmp_path):
    needs("losetup")
    free = run("losetup", "--find")
    with pytest.raises(DeviceError) as caught:
        check_target(free, formatting=True)
    assert caught.value.errno in (errno.ENOMEDIUM, errno.ENXIO)


# ---- recorded trees: what this machine may not have ---------------------------------------------


@pytest.fixture
def recorded(loop, tmp_path):
    """The loop device as if it were a disk "sdx" of two partitions, with its /proc and /sys."""
    proc, sys = tmp_path / "proc", tmp_path / "sys"
    number = os.stat(loop).st_rdev
    disk = sys / "devices/sdx"
    for part, minor in (("sdx1", 1), ("sdx2", 2)):
        (disk / part / "holders").mkdir(parents=True)
        (disk / part / "partition").write_text(f"{minor}\n")
        (disk / part / "dev").write_text(f"250:{minor}\n")
    (disk / "holders").mkdir()
    (sys / "dev/block").mkdir(parents=True)
    link = sys / "dev/block" / f"{os.major(number)}:{os.minor(number)}"
    link.symlink_to("../../devices/sdx")
    (proc / "self").mkdir(parents=True)
    (proc / "self/mountinfo").write_text("1 0 8:1 / / rw - ext4 /dev/nothing rw\n")
    (proc / "swaps").write_text("Filename\tType\tSize\tUsed\tPriority\n")
    return loop, proc, sys, disk


def refusal(loop, proc, sys):
    with pytest.raises(DeviceRefusedError) as caught:
        check_target(loop, formatting=True, proc=proc, sys=sys)
    return str(caught.value)


def test_recorded_partitions_that_nobody_uses_may_be_formatted_over(recorded):
    loop, proc, sys, _ = recorded
    assert check_target(loop, formatting=True, proc=proc, sys=sys).kind == "block"
    with pytest.raises(DeviceRefusedError, match=r"partitioned \(sdx1, sdx2\)"):
        check_target(loop, formatting=False, proc=proc, sys=sys)


@pytest.mark.parametrize("node", ["", "sdx2"])
def test_a_member_of_a_raid_or_volume_group_is_refused(recorded, node):
    loop, proc, sys, disk = recorded
    (disk / node / "holders/md0").mkdir()
    assert f"{node or 'sdx'} is part of md0" in refusal(loop, proc, sys)


def test_a_mounted_partition_is_found_by_its_number(recorded):
    loop, proc, sys, _ = recorded
    with open(proc / "self/mountinfo", "a") as mountinfo:
        mountinfo.write("2 1 250:2 / /srv/my\\040data rw shared:1 - xfs /dev/sdx2 rw\n")
    assert "its partition sdx2 is mounted on /srv/my data" in refusal(loop, proc, sys)


def test_a_filesystem_with_a_number_of_its_own_is_found_by_its_source(recorded):
    loop, proc, sys, _ = recorded
    with open(proc / "self/mountinfo", "a") as mountinfo:
        mountinfo.write(f"2 1 0:55 / /pool rw - btrfs {loop} rw\n")
    assert "it is mounted on /pool" in refusal(loop, proc, sys)


def test_recorded_swap_space_is_found(recorded):
    loop, proc, sys, _ = recorded
    with open(proc / "swaps", "a") as swaps:
        swaps.write(f"{loop}\tpartition\t8388604\t0\t-2\n")
    assert "it is swap space" in refusal(loop, proc, sys)


def test_a_file_used_as_swap_is_refused(image, tmp_path):
    (tmp_path / "swaps").write_text(f"Filename Type\n{image} file 16380 0 -2\n")
    for formatting in (False, True):
        with pytest.raises(DeviceRefusedError, match="swap space"):
            check_target(image, formatting=formatting, proc=tmp_path)


def test_the_header_is_within_what_is_read(image):
    """A file of exactly one block is a store without room, not a strange file."""
    os.truncate(image, HEADER_BYTES)
    overwrite(image, 0, HEADER.pack())
    assert check_target(image, formatting=False).header == HEADER

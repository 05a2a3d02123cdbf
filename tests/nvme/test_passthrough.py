"""NVMe commands: the two nodes, transfers of any length, the page cache, deallocate, refusals."""

from __future__ import annotations

import contextlib
import fcntl
import mmap
import os
import random
import subprocess
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

import dualblade
from dualblade import _core
from dualblade.errors import DeviceRefusedError, UnsupportedError
from tests.devices import Unavailable
from tests.helpers import MIB, noise
from tests.nvme.drives import Namespace, find, is_there, kernel_target

if TYPE_CHECKING:
    from collections.abc import Iterator

BLOCK = 4096
KIB = 1 << 10
NOBODY = 65534
# Serial numbers of controllers, and the most that they take in one command.
CONTROLLERS = {"mdts4": 64 * KIB, "mdts6": 256 * KIB, "vm0": 512 * KIB, "mdts9": 2 * MIB}


def opened(namespace: Namespace, engine: str = "nvme", **options: Any) -> _core.Device:
    return _core.Device.open(namespace.character, engine, **options)


@pytest.fixture(params=CONTROLLERS)
def namespace(request: pytest.FixtureRequest) -> Iterator[Namespace]:
    found = find(request.param)
    yield found
    subprocess.run(["blkdiscard", "-f", "-z", found.block], check=True)


# ---- what it is ----------------------------------------------------------------------------------


def test_either_node_is_the_namespace_and_auto_takes_commands():
    namespace = find("vm0", 2)
    for node in (namespace.block, namespace.character):
        with _core.Device.open(node) as device:
            assert device.info.engine == "nvme"
            assert device.info.engines_refused == {}
            assert device.info.size == namespace.size_bytes
            assert device.info.lba_size == namespace.lba_bytes == 4096
            with pytest.raises(DeviceRefusedError):
                _core.Device.open(namespace.block, "uring")
        with dualblade.open(node, format=True) as store:
            assert store.stats()["engine"] == "nvme"
            assert store.stats()["fallbacks"] == []
    with pytest.raises(ValueError, match="given twice"):
        _core.Device.open([namespace.block, namespace.character])


def test_the_largest_transfer_is_what_the_drive_takes():
    for serial, most_bytes in CONTROLLERS.items():
        namespace = find(serial)
        segments = int((namespace.queue / "max_segments").read_text())
        in_pages = 1 << (segments * BLOCK).bit_length() - 1
        with opened(namespace) as device:
            assert device.info.max_transfer == min(most_bytes, in_pages)


# ---- transfers -----------------------------------------------------------------------------------


def small_pages(size: int) -> np.ndarray:
    """Memory in pages of 4 KiB that lie anywhere."""
    memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    memory.madvise(mmap.MADV_NOHUGEPAGE)
    return np.frombuffer(memory, np.uint8)


@pytest.mark.parametrize("registered", [False, True])
def test_any_length_in_any_memory(namespace: Namespace, registered: bool):
    dice = random.Random(registered)
    area = 24 * MIB
    shadow = np.zeros(area, np.uint8)
    memory = [_core.aligned_empty(9 * MIB, np.uint8), small_pages(9 * MIB)]
    sizes = [1, 511, 4097, 64 * KIB, 256 * KIB + 512, MIB, 4 * MIB, 8 * MIB + 4095]
    with opened(namespace, queue_depth=8) as device:
        if registered:
            assert device.register(memory) == 18 * MIB
        for seed, size in enumerate(sizes * 2):
            skew = dice.choice([0, 0, 512, 4096, 4099])
            offset = dice.randrange((area - size) // BLOCK) * BLOCK
            data = dice.choice(memory)[skew : skew + size]
            data[:] = noise(size, seed)
            device.write([(offset, data)]).wait()
            end = -(-(offset + size) // namespace.lba_bytes) * namespace.lba_bytes
            shadow[offset:end] = 0  # the last block is padded
            shadow[offset : offset + size] = data
            out = dice.choice(memory)[skew : skew + size]
            out[:] = 1
            device.read([(offset, out)]).wait()
            assert np.array_equal(out, shadow[offset : offset + size])
        assert device.stats()["direct"]["errors"] == 0
    assert namespace.medium(0, area) == shadow.tobytes()


def test_in_huge_pages_a_command_is_as_long_as_the_drive_takes():
    """And where the memory turns out not to be in them, as long as the kernel takes."""
    namespace = find("mdts9")
    huge, small = _core.aligned_empty(8 * MIB, np.uint8), small_pages(8 * MIB)
    huge[:] = noise(8 * MIB, 1)
    with opened(namespace) as device:
        assert device.register([huge, small]) == 16 * MIB
        _, before = namespace.command_counts()
        device.write([(0, huge)]).wait()
        _, after = namespace.command_counts()
        if os.environ["NVME_VM"] == "6.1":  # it takes registered memory in short runs alone
            assert after - before == 8 * MIB // device.info.max_transfer
        else:
            assert device.info.max_transfer < MIB
            assert after - before <= 8
        device.read([(0, small)]).wait()
        assert np.array_equal(small, huge)
        assert device.stats()["direct"]["errors"] == 0


@pytest.mark.parametrize("registered", [False, True])
def test_a_kernel_thread_sends_commands_where_it_is_asked_to(registered: bool):
    data = _core.aligned_empty(8 * MIB, np.uint8)
    out = _core.aligned_empty(8 * MIB, np.uint8)
    data[:] = noise(8 * MIB, 3)
    with opened(find("vm0", 2), sqpoll=True) as device:
        if registered:
            assert device.register([data, out]) == 16 * MIB
        for start in range(0, 8 * MIB, MIB):
            device.write([(start, data[start : start + MIB])]).wait()
        device.read([(BLOCK * i, out[BLOCK * i : BLOCK * (i + 1)]) for i in range(2048)]).wait()
        assert np.array_equal(out, data)
        assert device.stats()["direct"]["errors"] == 0


@pytest.mark.slow
def test_a_tensor_of_a_gibibyte():
    namespace = find("large")
    data = np.arange(1 << 27, dtype=np.uint64)
    with dualblade.open(namespace.character, format=True, policy="direct") as store:
        store.put("large", data)
        assert np.array_equal(store.get("large"), data)
        store.delete("large")


def test_a_store_striped_over_namespaces_with_blocks_of_both_sizes():
    namespaces = [find("vm0", 1), find("mdts6"), find("vm0", 2)]
    nodes = [namespaces[0].block, namespaces[1].character, namespaces[2].character]
    arrays = {str(seed): noise(5 * MIB + seed, seed) for seed in range(8)}
    with dualblade.open(nodes, format=True, policy="direct") as store:
        assert store.stats()["engine"] == "nvme"
        store.put_many(arrays)
        store.flush()
    with dualblade.open(nodes, policy="pagecache") as store:
        for key, array in arrays.items():
            assert np.array_equal(store.get(key), array)


def test_fio_reads_what_was_written_and_the_other_way():
    namespace = find("vm0", 1)
    common = ["fio", "--name=x", "--ioengine=io_uring_cmd", "--cmd_type=nvme", "--bs=64k"]
    common += [f"--filename={namespace.character}", "--size=4m", "--iodepth=8", "--fixedbufs"]
    common += ["--verify_state_save=0"]
    pattern = np.frombuffer(b"\xab\xcd\x12\x34" * (MIB), np.uint8)
    with opened(namespace) as device:
        device.write([(0, pattern)]).wait()
    verify = ["--verify=pattern", "--verify_pattern=0xabcd1234"]
    subprocess.run([*common, "--rw=read", *verify], check=True, capture_output=True)
    other = ["--do_verify=0", "--verify=pattern", "--verify_pattern=0x99775533"]
    subprocess.run([*common, "--rw=write", *other], check=True, capture_output=True)
    out = np.zeros(4 * MIB, np.uint8)
    with opened(namespace) as device:
        device.read([(0, out)]).wait()
    assert out.tobytes() == b"\x99\x77\x55\x33" * MIB


# ---- the page cache of the block device ----------------------------------------------------------


def test_both_paths_agree_whatever_order_they_are_used_in():
    namespace = find("vm0", 1)
    dice = random.Random(5)
    area = 4 * MIB
    shadow = noise(area, 0)
    with opened(namespace) as device:
        device.write([(0, shadow)]).wait()
        for seed in range(150):
            size = dice.randrange(1, 64 * KIB)
            offset = dice.randrange((area - size) // BLOCK) * BLOCK
            path = dice.choice(["direct", "pagecache"])
            step = dice.randrange(10)
            if step < 4:
                size = -(-size // BLOCK) * BLOCK
                data = noise(size, seed)
                device.write([(offset, data)], path=path).wait()
                shadow[offset : offset + size] = data
            elif step == 4:
                device.drop_cached(offset, size)
            elif step == 5:
                device.flush()
            else:
                out = np.zeros(size, np.uint8)
                device.read([(offset, out)], path=path).wait()
                assert np.array_equal(out, shadow[offset : offset + size]), (seed, path)
    assert namespace.medium(0, area) == shadow.tobytes()


def test_what_others_have_read_of_the_block_device_is_not_taken_for_new():
    namespace = find("vm0", 1)
    with opened(namespace) as device, open(namespace.block, "rb", buffering=0) as other:
        device.write([(0, noise(MIB, 1))]).wait()
        assert os.pread(other.fileno(), MIB, 0) == noise(MIB, 1).tobytes()
        device.write([(0, noise(MIB, 2))]).wait()
        out = np.zeros(MIB, np.uint8)
        device.read([(0, out)], path="pagecache").wait()
        assert np.array_equal(out, noise(MIB, 2))


def test_groups_change_path_while_nothing_is_lost():
    namespace = find("vm0", 1)
    dice = random.Random(11)
    with dualblade.open(namespace.character, format=True, memory="64MiB") as store:
        shadow = {}
        for seed in range(120):
            key = f"{dice.randrange(4)}/{dice.randrange(3)}"
            step = dice.randrange(3)
            if step == 0 or key not in shadow:
                shadow[key] = noise(dice.randrange(1, 600_000), seed)
                store.put(key, shadow[key])
            elif step == 1:
                store.set_path(store.info(key).group, dice.choice(["direct", "pagecache"]))
            assert np.array_equal(store.get(key), shadow[key])
        assert store.check() == []


# ---- deallocate ----------------------------------------------------------------------------------


@pytest.mark.parametrize("nsid", [1, 2])
def test_deallocate_touches_nothing_else(nsid: int):
    """Block by block, and for more blocks than 16 bits count."""
    namespace = find("vm0", nsid)
    lba = namespace.lba_bytes
    area = 70_000 * 512 + 8 * MIB
    shadow = noise(area, nsid) | 1  # no block is all zeros
    dice = random.Random(nsid)
    ranges = [(4 * MIB, 70_000 * 512 // BLOCK * BLOCK), (0, lba), (MIB + lba, 3 * lba)]
    ranges += [(dice.randrange(500) * lba, dice.randrange(1, 9) * lba) for _ in range(10)]
    with opened(namespace) as device:
        device.write([(0, shadow)]).wait()
        for offset, length in ranges:
            device.discard(offset, length)
            shadow[offset : offset + length] = 0  # as this drive gives them back
            if (offset, length) == ranges[0]:
                assert namespace_blocks(device, area, lba) == blocks(shadow, lba)
        assert namespace_blocks(device, area, lba) == blocks(shadow, lba)
        with pytest.raises(ValueError):
            device.discard(1, lba)
        device.discard(0, 0)


def namespace_blocks(device: _core.Device, area: int, lba: int) -> list[bytes]:
    out = np.empty(area, np.uint8)
    device.read([(0, out)]).wait()
    return blocks(out, lba)


def blocks(data: np.ndarray, lba: int) -> list[bytes]:
    return [data[at : at + lba].tobytes() for at in range(0, data.size, lba)]


def test_what_is_discarded_can_not_be_read_from_a_drive_that_keeps_it():
    """A drive that does not say what deallocated blocks read as, and gives back what they held.

    It is the kernel's own target, over a drive that says it does not, and does."""
    with contextlib.ExitStack() as stack:
        try:
            namespace = stack.enter_context(kernel_target(find("keeps"), "keeper"))
        except Unavailable as error:
            pytest.skip(str(error))
        shadow = noise(70_000 * 512 + MIB, 1)  # more blocks than 16 bits count
        device = stack.enter_context(opened(namespace))
        device.write([(0, shadow)]).wait()
        device.discard(512, 70_000 * 512)
        shadow[512 : 512 + 70_000 * 512] = 0
        out = np.empty_like(shadow)
        device.read([(0, out)]).wait()
        assert np.array_equal(out, shadow)
        device.close()
    # What this rests on: blocks that are deallocated alone read there as they did.
    with opened(find("keeps")) as device:
        device.discard(0, MIB)
        device.read([(0, out[:512])]).wait()
        assert np.array_equal(out[:512], shadow[:512])


# ---- where the drive puts it ---------------------------------------------------------------------


def placement_drive() -> Namespace:
    if not is_there("placement"):
        pytest.skip("QEMU 7 has no drives with data placement")
    return find("placement")


def test_prompts_and_appended_tokens_lie_apart_on_the_drive():
    namespace = placement_drive()
    with dualblade.open(namespace.character, format=True, policy="direct") as store:
        store.reserve("grows", (4096, 1024), np.uint8)
        before = namespace.room()
        store.put("whole", noise(2 * MIB, 1))
        store.append("grows", noise(MIB, 2).reshape(-1, 1024))
        runs = namespace.room()
        assert [a - b for a, b in zip(before, runs, strict=True)] == [3 * MIB // 512, 0, 0]
        for seed in range(64):  # 4 KiB at a time reach the drive
            store.append("grows", noise(1024, seed).reshape(1, 1024))
        tails = namespace.room()
        assert [a - b for a, b in zip(runs, tails, strict=True)] == [0, 64 * KIB // 512, 0]
        rows = np.concatenate([noise(MIB, 2), *[noise(1024, seed) for seed in range(64)]])
        assert np.array_equal(store.get("grows").reshape(-1), rows)


def test_placement_asked_for_where_there_is_none_changes_nothing():
    for serial, engine in (("vm0", "nvme"), ("vm0", "uring"), ("placement", "uring")):
        namespace = placement_drive() if serial == "placement" else find(serial)
        with opened(namespace, engine) as device:
            assert not device.info.placement
            device.write([(0, noise(BLOCK, 1))], tail=True).wait()
            out = np.zeros(BLOCK, np.uint8)
            device.read([(0, out)]).wait()
            assert np.array_equal(out, noise(BLOCK, 1))


# ---- what is refused -----------------------------------------------------------------------------


def test_blocks_with_metadata_are_not_for_commands():
    namespace = find("metadata")
    with pytest.raises(UnsupportedError, match="metadata"):
        opened(namespace)
    with opened(namespace, "auto") as device:
        assert device.info.engine == "uring"
        assert "metadata" in device.info.engines_refused["nvme"]


def test_a_partition_is_not_for_commands():
    namespace = find("spare")
    subprocess.run(["sfdisk", "-q", namespace.block], input=b",32M\n", check=True)
    partition = namespace.block + "p1"
    try:
        for node in (namespace.block, namespace.character):
            with pytest.raises(DeviceRefusedError, match="partition"):
                dualblade.open(node)
        with pytest.raises(UnsupportedError, match="partition"):
            _core.Device.open(partition, "nvme")
        with _core.Device.open(partition) as device:
            assert device.info.engine == "uring"
            assert device.info.engines_refused == {}
    finally:
        subprocess.run(["wipefs", "-q", "-a", namespace.block], check=True)
        subprocess.run(["blockdev", "--rereadpt", namespace.block], check=True)


def test_a_mounted_namespace_is_refused_by_either_node(tmp_path: Path):
    namespace = find("spare")
    subprocess.run(["mkfs.ext4", "-q", namespace.block], check=True)
    subprocess.run(["mount", namespace.block, str(tmp_path)], check=True)
    try:
        for node in (namespace.block, namespace.character):
            for formatting in (False, True):
                with pytest.raises(DeviceRefusedError, match="mounted"):
                    dualblade.open(node, format=formatting)
            with pytest.raises(DeviceRefusedError):
                _core.Device.open(node, "nvme")
    finally:
        subprocess.run(["umount", str(tmp_path)], check=True)
        subprocess.run(["wipefs", "-q", "-a", namespace.block], check=True)


def test_without_the_rights_the_block_device_is_used():
    namespace = find("vm0", 1)
    try:
        os.chown(namespace.block, NOBODY, NOBODY)
        assert "uring" in opened_by_nobody(namespace)
        assert "may not read and write its character device" in opened_by_nobody(namespace)
        os.chown(namespace.character, NOBODY, NOBODY)
        if os.environ["NVME_VM"] == "6.1":
            assert "CAP_SYS_ADMIN" in opened_by_nobody(namespace)
        else:
            assert opened_by_nobody(namespace) == "nvme {}"
    finally:
        for node in (namespace.block, namespace.character):
            os.chown(node, 0, 0)


def opened_by_nobody(namespace: Namespace) -> str:
    """The engine that a process without rights gets, and those that it does not."""
    readable, writable = os.pipe()
    child = os.fork()
    if child == 0:
        words = "failed"
        try:
            os.setgroups([])
            os.setresgid(NOBODY, NOBODY, NOBODY)
            os.setresuid(NOBODY, NOBODY, NOBODY)
            with _core.Device.open(namespace.block) as device:
                data = noise(MIB, 1)
                device.write([(0, data)]).wait()
                device.flush()
                device.discard(0, MIB)
                words = f"{device.info.engine} {device.info.engines_refused}"
        except BaseException as error:  # noqa: BLE001 - it is for the parent
            words = repr(error)
        finally:
            os.write(writable, words.encode())
            os._exit(0)
    os.close(writable)
    with os.fdopen(readable, "rb") as pipe:
        words = pipe.read().decode()
    os.waitpid(child, 0)
    return words


def test_a_character_device_that_is_no_namespace():
    assert _core.nvme_block_node("/dev/null") is None
    with pytest.raises(DeviceRefusedError, match="character device"):
        dualblade.open("/dev/nvme0")
    namespace = find("vm0", 1)
    assert _core.nvme_block_node(namespace.character) == namespace.block
    with open(namespace.character, "rb") as file:
        assert fcntl.ioctl(file, 0x4E40) == 1

"""Drives that fail: bad blocks, a controller that is reset or removed; and what a flush reaches."""

from __future__ import annotations

import contextlib
import os
import struct
import threading
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest

import dualblade
from dualblade import _core
from dualblade.errors import DeviceError, DualbladeError, NvmeError
from tests.helpers import MIB, noise, until
from tests.nvme.drives import Namespace, find, is_there

if TYPE_CHECKING:
    from collections.abc import Callable

BLOCK = 4096
# Where the drive of tools/nvme-vm --test has them, in bytes.
BAD_READ, BAD_WRITE = 8 * MIB, 16 * MIB


def opened(namespace: Namespace) -> _core.Device:
    return _core.Device.open(namespace.character, "nvme")


# ---- bad blocks ----------------------------------------------------------------------------------


@pytest.mark.parametrize("length", [BLOCK, 128 << 10, 4 * MIB])
def test_a_bad_block_is_an_nvme_error_at_its_offset(length: int):
    start = BAD_READ - length + BLOCK
    out = np.zeros(length, np.uint8)
    with opened(find("faults")) as device:
        with pytest.raises(NvmeError) as caught:
            device.read([(start, out)]).wait()
        error = caught.value
        assert (error.sct, error.sc, error.name) == (2, 0x81, "Unrecovered Read Error")
        assert error.errno is None
        assert error.operation == "read"
        assert start <= error.offset <= BAD_READ
        assert BAD_READ - error.offset < 512 << 10  # the command that failed, and no earlier one
        assert "delete the tensor" in str(error)
        assert device.stats()["direct"]["errors"] == 1
        assert device.stats()["direct"]["in_flight"] == 0
        device.read([(start - BLOCK, out[:BLOCK]), (BAD_READ + BLOCK, out[:BLOCK])]).wait()


def test_a_write_fault_is_an_nvme_error_and_the_next_write_is_not():
    with opened(find("faults")) as device:
        with pytest.raises(NvmeError, match="Write Fault") as caught:
            device.write([(BAD_WRITE, noise(BLOCK, 1))]).wait()
        assert (caught.value.sct, caught.value.sc) == (2, 0x80)
        assert caught.value.offset == BAD_WRITE
        device.write([(BAD_WRITE + BLOCK, noise(BLOCK, 2))]).wait()
        out = np.zeros(BLOCK, np.uint8)
        device.read([(BAD_WRITE + BLOCK, out)]).wait()
        assert np.array_equal(out, noise(BLOCK, 2))


def test_a_flush_that_fails_is_an_nvme_error_every_time():
    with opened(find("flushes")) as device:
        for seed in range(2):
            device.write([(0, noise(BLOCK, seed))]).wait()
            with pytest.raises(NvmeError, match=r"flush on /dev/ng\d+n\d+ failed"):
                device.flush()


def test_a_store_goes_on_beside_a_bad_block():
    tensors = {str(i): noise(3 * MIB, i) for i in range(4)}  # one of them on the bad block
    failed = set()
    with dualblade.open(find("faults").character, format=True, policy="direct") as store:
        for key, array in tensors.items():
            store.put(key, array)
        for key, array in tensors.items():
            try:
                assert np.array_equal(store.get(key), array)
            except NvmeError:
                failed.add(key)
        assert len(failed) == 1
        store.put("after", noise(MIB, 99))
        assert np.array_equal(store.get("after"), noise(MIB, 99))


# ---- a controller that goes away -----------------------------------------------------------------


def test_a_controller_reset_loses_nothing():
    namespace = find("spare")
    stopped = threading.Event()

    def reset() -> None:
        while not stopped.wait(0.2):
            (namespace.controller / "reset_controller").write_text("1")

    thread = threading.Thread(target=reset)
    aligned = _core.aligned_empty(2 * MIB, np.uint8)
    with opened(namespace) as device:
        device.write([(0, aligned)]).wait()
        thread.start()
        try:
            for seed in range(30):
                data, out = noise(2 * MIB, seed), np.zeros(2 * MIB, np.uint8)
                device.write([(0, data)]).wait()
                device.read([(0, out)]).wait()
                assert np.array_equal(out, data)
                if seed % 5 == 0:
                    again(device.flush)
                    again(lambda: device.discard(0, 2 * MIB))
        finally:
            stopped.set()
            thread.join()
        _, before = namespace.command_counts()
        device.write([(0, aligned)]).wait()
        _, after = namespace.command_counts()
        assert after - before == 2 * MIB // device.info.max_transfer  # as long as they were


def test_flush_and_discard_outlast_resets():
    namespace = find("spare")
    with opened(namespace) as device:
        resets = 0
        stopped = threading.Event()

        def reset() -> None:
            nonlocal resets
            while not stopped.wait(0.05):
                (namespace.controller / "reset_controller").write_text("1")
                resets += 1

        thread = threading.Thread(target=reset)
        thread.start()
        try:
            while resets < 30:
                device.write([(0, _core.aligned_empty(MIB, np.uint8))]).wait()
                again(device.flush)
                again(lambda: device.discard(0, MIB))
        finally:
            stopped.set()
            thread.join()


def again(call: Callable[[], None]) -> None:
    """What QEMU is doing when it is reset it may answer with an error, and not leave unanswered as
    drives do: of a flush that is for the caller to know, who flushes again."""
    for _ in range(5):
        with contextlib.suppress(NvmeError):
            call()
            return
    raise AssertionError("it never succeeds")


def test_a_drive_that_is_removed_gives_errors_and_never_data():
    namespace = find("spare")
    pci = (namespace.controller / "device").resolve()
    errors: list[DualbladeError] = []
    wrong: list[int] = []
    device = opened(namespace)
    device.write([(0, noise(32 * MIB, 1))]).wait()

    def work(number: int) -> None:
        dice = np.random.default_rng(number)
        expected = noise(32 * MIB, 1)
        try:
            while True:
                offset = int(dice.integers(0, 32 * MIB - MIB)) // BLOCK * BLOCK
                out = np.zeros(MIB, np.uint8)
                device.read([(offset, out)], path=("direct", "pagecache")[number % 2]).wait()
                if not np.array_equal(out, expected[offset : offset + MIB]):
                    wrong.append(offset)
        except DualbladeError as error:
            errors.append(error)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    try:
        (pci / "remove").write_text("1")
        for number, thread in enumerate(threads):
            if number % 2 == 0:
                thread.join(60)
        device.drop_cached(0, 0)
        with pytest.raises(DeviceError):
            device.write([(0, noise(BLOCK, 2))]).wait()
        with pytest.raises(DeviceError):
            device.flush()
    finally:
        device.close()
        for thread in threads:
            thread.join(60)
        Path("/sys/bus/pci/rescan").write_text("1")
        until(lambda: is_there("spare"), "the drive that was removed")
    assert wrong == []
    assert len(errors) == 4


# ---- what a flush reaches ------------------------------------------------------------------------


def test_a_flush_is_a_command_after_the_data_that_it_covers():
    """The drive's log: every write and flush that it was given, in order."""
    log = Path(os.environ["NVME_VM_STATE"], "writes.img")
    before, after = noise(MIB, 1), noise(MIB, 2)
    with opened(find("log")) as device:
        device.write([(4 * MIB, before)]).wait()
        device.write([(6 * MIB, before)], path="pagecache").wait()
        device.flush()
        device.write([(8 * MIB, after)]).wait()
        device.flush()
    entries = read_log(log)
    flushes = [i for i, entry in enumerate(entries) if entry[2] & 1]
    first = flushes[0]
    assert written(entries[:first], 4 * MIB, MIB) == before.tobytes()
    assert written(entries[:first], 6 * MIB, MIB) == before.tobytes()
    assert written(entries[:first], 8 * MIB, MIB) is None
    assert written(entries[: flushes[1]], 8 * MIB, MIB) == after.tobytes()


def read_log(path: Path) -> list[tuple[int, int, int, bytes]]:
    """(byte offset, length, flags, data) of each entry; the format is dm-log-writes'."""
    entries = []
    with path.open("rb") as file:
        magic, _, count, sector = struct.unpack("<QQQI", file.read(28))
        assert magic == 0x6A736677736872
        at = sector
        for _ in range(count):
            file.seek(at)
            first, sectors, flags, _ = struct.unpack("<QQQQ", file.read(32))
            at += sector
            file.seek(at)
            data = b"" if flags & 4 else file.read(sectors * sector)
            at += len(data)
            entries.append((first * sector, len(data), flags, data))
    return entries


def written(entries: list[tuple[int, int, int, bytes]], offset: int, length: int) -> bytes | None:
    """What the entries leave in a range; None where nothing was written."""
    found = bytearray(length)
    covered = 0
    for start, size, _, data in entries:
        low, high = max(start, offset), min(start + size, offset + length)
        if low < high:
            found[low - offset : high - offset] = data[low - start : high - start]
            covered += high - low
    return bytes(found) if covered >= length else None

"""What the page cache holds, as the kernel says: resident, dirty, being written, evicted."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from typing import TYPE_CHECKING

import numpy as np
import pytest

from dualblade import _core
from dualblade.errors import DeviceError
from tests.helpers import MIB, noise
from tests.memory_tree import run_inside

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from tests.devices import MemoryCgroup, Target

PAGE = os.sysconf("SC_PAGE_SIZE")
NOBODY = 65534
EMPTY = _core.CacheState(0, 0, 0, 0, 0)


@pytest.fixture
def device(target: Target) -> Iterator[_core.Device]:
    with _core.Device.open(target) as opened:
        state = opened.cache_state(0, MIB)
        if state.dirty_bytes is None:
            pytest.skip("cachestat(2) is missing: Linux 6.5 has it")
        opened.drop_cached(0, opened.info.size)
        yield opened


def test_what_is_written_is_dirty_until_it_is_written_back(device: _core.Device) -> None:
    assert device.cache_state(0, device.info.size) == EMPTY
    device.write([(MIB, noise(2 * MIB))], path="pagecache").wait()
    state = device.cache_state(0, 8 * MIB)
    assert state.resident_bytes == 2 * MIB
    assert state.dirty_bytes + state.writeback_bytes == 2 * MIB  # the kernel may have begun
    assert state.evicted_bytes == 0
    assert device.cached_bytes(0, 8 * MIB) == (2 * MIB, 2 * MIB)
    device.write_back(0, 8 * MIB, wait=True)
    assert device.cache_state(0, 8 * MIB) == EMPTY._replace(resident_bytes=2 * MIB)
    device.drop_cached(MIB, MIB)
    assert device.cache_state(0, 8 * MIB) == EMPTY._replace(resident_bytes=MIB)
    assert device.cache_state(0, 2 * MIB) == EMPTY


def test_what_is_read_is_there_and_no_more(device: _core.Device) -> None:
    out = np.empty(MIB // 2, np.uint8)
    device.read([(3 * MIB, out)], path="pagecache").wait()
    assert device.cache_state(0, device.info.size) == EMPTY._replace(resident_bytes=MIB // 2)
    device.read([(0, out)]).wait()  # direct
    assert device.cache_state(0, MIB) == EMPTY


def test_parts_of_pages_count_as_pages(device: _core.Device) -> None:
    device.write([(0, noise(MIB))], path="pagecache").wait()
    assert device.cache_state(0, 1).resident_bytes == PAGE
    assert device.cache_state(PAGE - 1, 2).resident_bytes == 2 * PAGE
    assert device.cache_state(5, 0) == EMPTY


EVICT = """
import json
import numpy as np
from dualblade import _core
size = 192 << 20
with _core.Device.open(sys.argv[1]) as device:
    out = np.empty(1 << 20, np.uint8)
    def read(start, stop):
        for offset in range(start, stop, len(out)):
            device.read([(offset, out)], path="pagecache").wait()
    read(0, size)
    states = [device.cache_state(0, size)]
    states += [device.cache_state(0, size // 2), device.cache_state(size // 2, size // 2)]
    read(0, 16 << 20)
    states.append(device.cache_state(0, 16 << 20))
    device.drop_cached(0, size)
    states.append(device.cache_state(0, size))
print(json.dumps(states))
"""


def test_what_reclaim_takes_is_evicted(
    tmp_path: Path, memory_cgroup: Callable[[int], MemoryCgroup]
) -> None:
    size = 192 * MIB
    path = tmp_path / "device.img"
    path.write_bytes(noise(MIB).tobytes() * (size // MIB))
    with _core.Device.open(path) as device:
        device.drop_cached(0, size)
    group = memory_cgroup(128 * MIB)
    states = [_core.CacheState(*state) for state in json.loads(run_inside(group, EVICT, path))]
    whole, early, late, again, dropped = states
    if whole.evicted_bytes is None:
        pytest.skip("cachestat(2) is missing: Linux 6.5 has it")
    # The kernel remembers some of what it took, under pressure less.
    assert 16 * MIB <= whole.evicted_bytes <= size - whole.resident_bytes
    assert whole.resident_bytes < 128 * MIB
    assert 0 <= whole.recently_evicted_bytes <= whole.evicted_bytes
    assert early.resident_bytes < late.resident_bytes  # the least recently used go first
    assert again == EMPTY._replace(resident_bytes=16 * MIB)  # back again, and no longer missing
    assert dropped == EMPTY


# ---- without cachestat(2) ------------------------------------------------------------------------

WITHOUT = """
import json, os, sys
import numpy as np
from dualblade import _core
from dualblade.errors import UnsupportedError
from tests.seccomp import forbid
targets, ranges = json.loads(sys.argv[1])
with _core.Device.open(targets) as device:
    device.drop_cached(0, device.info.size)
    device.write([(0, np.ones(3 << 20, np.uint8))], path="pagecache").wait()
    device.write([(33 << 20, np.ones(2 << 20, np.uint8))], path="pagecache").wait()
    device.drop_cached(1 << 20, 1 << 20)
    known = [device.cache_state(*each) for each in ranges]
    forbid(["cachestat"], sys.argv[2])
    found = [device.cache_state(*each) for each in ranges]
    short = device.cached_bytes(*ranges[0])
print(json.dumps([known, found, short]))
"""
RANGES = [(0, 64 << 20), (0, 1), (MIB - 1, 2), (MIB, MIB), (2 * MIB, 62 * MIB), (7, 35 << 20)]


def without_cachestat(program: str, *arguments: str) -> str:
    command = [sys.executable, "-c", program, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if "no filter on system calls" in done.stderr:
        pytest.skip("no filter on system calls can be set")
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("name_of_errno", ["ENOSYS", "EPERM"])
def test_an_older_kernel_says_what_is_resident(target: Target, name_of_errno: str) -> None:
    printed = without_cachestat(WITHOUT, json.dumps([target.path, RANGES]), name_of_errno)
    known, found, short = json.loads(printed)
    assert [state[0] for state in known] == [4 * MIB, PAGE, PAGE, 0, 3 * MIB, 4 * MIB]
    assert found == [[state[0], None, None, None, None] for state in known]
    assert short == [4 * MIB, None]


def test_an_older_kernel_counts_all_members(tmp_path: Path) -> None:
    paths = [str(tmp_path / name) for name in "ab"]
    for path in paths:
        with open(path, "wb") as file:
            file.truncate(40 * MIB)
    known, found, _ = json.loads(without_cachestat(WITHOUT, json.dumps([paths, RANGES]), "ENOSYS"))
    assert known[0][0] == 4 * MIB
    assert [state[0] for state in found] == [state[0] for state in known]


STRANGER = """
import os, sys
from dualblade import _core
from dualblade.errors import UnsupportedError
from tests.seccomp import forbid
if sys.argv[2] == "forbidden":
    forbid(["cachestat"], "ENOSYS")
os.setgroups([])
os.setresgid(65534, 65534, 65534)
os.setresuid(65534, 65534, 65534)
try:
    print(_core.cache_state_of(sys.argv[1]).resident_bytes)
except UnsupportedError as error:
    print("unsupported:", error)
"""


@pytest.mark.skipif(os.geteuid() != 0, reason="becoming another user takes root")
def test_nobody_is_told_that_all_of_anothers_file_is_resident(tmp_path: Path) -> None:
    """mincore(2) says so of every file that the caller may not write."""
    path = tmp_path / "theirs.img"
    path.write_bytes(bytes(MIB))
    with _core.Device.open(path) as device:
        device.drop_cached(0, MIB)
    for folder in (tmp_path, *tmp_path.parents[:-2]):
        folder.chmod(folder.stat().st_mode | 0o11)
    path.chmod(0o644)
    printed = without_cachestat(STRANGER, str(path), "forbidden")
    assert printed == f"unsupported: the kernel does not say what it has cached of {path}\n"
    # cachestat(2) refuses too since Linux 6.14; before that it answered.
    printed = without_cachestat(STRANGER, str(path), "allowed")
    assert printed.startswith(("unsupported:", "0\n"))
    os.chown(path, NOBODY, NOBODY)
    assert without_cachestat(STRANGER, str(path), "forbidden") == "0\n"


# ---- of a target that somebody else uses ---------------------------------------------------------


def test_a_target_in_use_is_counted(device: _core.Device, target: Target) -> None:
    before = _core.cache_state_of(target).resident_bytes
    device.write([(MIB, noise(2 * MIB))], path="pagecache").wait()
    state = _core.cache_state_of(target)
    assert state.resident_bytes == before + 2 * MIB
    assert state.dirty_bytes + state.writeback_bytes == 2 * MIB
    device.drop_cached(0, device.info.size)
    assert _core.cache_state_of(target).resident_bytes == before


def test_a_target_that_is_not_there_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(DeviceError, match="nothing"):
        _core.cache_state_of(tmp_path / "nothing")
    (tmp_path / "empty").write_bytes(b"")
    assert _core.cache_state_of(tmp_path / "empty").resident_bytes == 0
    with pytest.raises(DeviceError, match="directory"):
        _core.cache_state_of(tmp_path)

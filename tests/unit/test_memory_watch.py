"""MemoryWatch: the same files again and again, what has happened since, and real cgroups."""

from __future__ import annotations

import contextlib
import json
import os
import statistics
import time
from typing import TYPE_CHECKING

import numpy as np
import pytest

from dualblade import _core, aligned_empty
from dualblade.errors import ClosedError
from dualblade.memory import MemoryWatch, limits
from tests.memory_tree import GIB, MIB, NO_LIMIT, PAGE, V2_REST, Tree, run_inside

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from tests.devices import MemoryCgroup


@pytest.fixture
def tree(tmp_path: Path) -> Tree:
    return Tree(tmp_path)


@contextlib.contextmanager
def no_file_left_open() -> Iterator[None]:
    before = os.listdir("/proc/self/fd")
    yield
    assert os.listdir("/proc/self/fd") == before


def since(watch: MemoryWatch) -> tuple[int, int, int]:
    sample = watch.sample()
    return sample.refault_bytes, sample.reclaim_events, sample.stall_us


def test_a_sample_says_what_has_happened_since_the_one_before(tree: Tree) -> None:
    tree.write("proc/self/cgroup", "4:memory:/box\n")
    tree.psi("proc/pressure/memory", 1000)
    tree.v1("/box", GIB, rss=0, failcnt=5, workingset_refault_file=100)
    with no_file_left_open(), tree.watch() as watch:
        assert since(watch) == (0, 0, 0)
        tree.v1("/box", GIB, rss=0, failcnt=8, workingset_refault_file=107)
        tree.psi("proc/pressure/memory", 1250)
        assert since(watch) == (7 * PAGE, 3, 250)
        assert since(watch) == (0, 0, 0)
        tree.v1("/box", GIB, rss=0, failcnt=0, workingset_refault_file=0)  # somebody reset it
        assert since(watch) == (0, 0, 0)


def test_limits_that_change_are_seen_at_once(tree: Tree) -> None:
    tree.write("proc/self/cgroup", "0::/a/b\n")
    tree.v2("/a", anon=0, max="max", high="max")
    tree.v2("/a/b", anon=0, max="max", high="max")
    with tree.watch() as watch:
        assert watch.sample().free_bytes == 12 * GIB
        tree.v2("/a", anon=0, max=GIB, high="max")
        assert watch.sample()[:2] == (GIB - V2_REST, GIB)
        tree.v2("/a/b", anon=MIB, max="max", high=GIB // 2)
        assert watch.sample()[:2] == (GIB // 2 - MIB - V2_REST, GIB // 2)
        tree.v2("/a/b", anon=MIB, max="max", high="max")
        tree.v2("/a", anon=MIB, max="max", high="max")
        tree.meminfo(16 * GIB, 7 * GIB)
        assert watch.sample()[:2] == (7 * GIB, 16 * GIB)


def test_every_level_with_a_limit_counts_its_own_events(tree: Tree) -> None:
    tree.write("proc/self/cgroup", "0::/a/b\n")

    def events(above: int, own: int, *, is_bounded: bool) -> None:
        limit = GIB if is_bounded else "max"
        more = {"high": "max", "events": "max 900"}
        tree.v2("/a", anon=0, max=limit, **more, events__local=f"high 0\nmax {above}")
        tree.v2("/a/b", anon=0, max=GIB, **more, events__local=f"high {own}\nmax {own}")

    events(3, 1, is_bounded=False)
    with tree.watch() as watch:
        assert since(watch)[1] == 0
        events(3, 2, is_bounded=False)
        assert since(watch)[1] == 2
        events(3, 2, is_bounded=True)  # what was counted before is no news
        assert since(watch)[1] == 0
        events(7, 4, is_bounded=True)
        assert since(watch)[1] == 4 + 4


@pytest.mark.parametrize("suffix", ["", "_file"])
def test_where_no_cgroup_counts_the_machine_does(tree: Tree, suffix: str) -> None:
    def vmstat(refaults: int, *stalls: int) -> None:
        zones = zip(("dma32", "normal", "movable"), stalls, strict=True)
        lines = "".join(f"allocstall_{zone} {count}\n" for zone, count in zones)
        tree.write("proc/vmstat", f"nr_free 5\nworkingset_refault{suffix} {refaults}\n{lines}")

    vmstat(10, 1, 2, 3)
    with tree.watch() as watch:
        assert since(watch) == (0, 0, 0)
        vmstat(12, 1, 4, 9)
        assert since(watch) == (2 * PAGE, 8, 0)
        assert watch.sample().sources["refaults"] == f"{tree.root}/proc/vmstat"


def test_without_a_limit_to_run_into_the_machines_reclaim_counts(tree: Tree) -> None:
    tree.write("proc/self/cgroup", "4:memory:/box\n")
    tree.v1("/box", NO_LIMIT, rss=0, failcnt=5)
    tree.write("proc/vmstat", "allocstall_normal 3\n")
    with tree.watch() as watch:
        watch.sample()
        tree.write("proc/vmstat", "allocstall_normal 4\n")
        assert since(watch)[1] == 1
        tree.v1("/box", GIB, rss=0, failcnt=5)
        assert since(watch)[1] == 0
        tree.v1("/box", GIB, rss=0, failcnt=7)
        assert since(watch)[1] == 2


def test_a_version_2_cgroup_has_its_own_pressure(tree: Tree) -> None:
    tree.write("proc/self/cgroup", "0::/app\n")
    tree.psi("proc/pressure/memory", 1000)
    tree.v2("/app", anon=0, max=GIB, high="max")
    with tree.watch() as watch:
        assert watch.sample().sources["stalls"] == f"{tree.root}/proc/pressure/memory"
    tree.psi("sys/fs/cgroup/app/memory.pressure", 50)
    with tree.watch() as watch:
        assert watch.sample().sources["stalls"] == f"{tree.root}/sys/fs/cgroup/app/memory.pressure"
        tree.psi("proc/pressure/memory", 2000)
        tree.psi("sys/fs/cgroup/app/memory.pressure", 53)
        assert since(watch)[2] == 3


def test_a_file_that_opens_and_then_refuses_is_missing(tree: Tree) -> None:
    """As /proc/pressure/memory does where pressure is not measured; here it is a directory."""
    (tree.root / "proc/pressure/memory").mkdir(parents=True)
    with no_file_left_open(), tree.watch() as watch:
        sample = watch.sample()
    assert sample.stall_us == 0
    expected = f"missing: {tree.root}/proc/pressure/memory (Is a directory)"
    assert sample.sources["stalls"] == expected


# ---- moving --------------------------------------------------------------------------------------


def test_a_process_that_is_moved_is_followed(tree: Tree) -> None:
    tree.write("proc/self/cgroup", "4:memory:/old\n")
    tree.v1("/old", GIB, rss=0, failcnt=100, workingset_refault_file=5)
    tree.v1("/new", 2 * GIB, rss=MIB, failcnt=900, workingset_refault_file=700)
    with no_file_left_open(), tree.watch() as watch:
        watch.sample()
        tree.write("proc/self/cgroup", "4:memory:/new\n")
        sample = watch.sample()
        # What the new one has counted before is not ours.
        assert sample[:5] == (2 * GIB - MIB, 2 * GIB, 0, 0, 0)
        assert sample.sources["cgroup"] == f"{tree.root}/sys/fs/cgroup/memory/new"
        tree.v1("/new", 2 * GIB, rss=MIB, failcnt=901, workingset_refault_file=702)
        assert since(watch) == (2 * PAGE, 1, 0)


def test_a_level_that_comes_to_count_memory_is_found_before_long(tree: Tree) -> None:
    tree.write("proc/self/cgroup", "0::/slice/app\n")
    tree.v2("/slice", anon=0, max=4 * GIB, high="max")
    with tree.watch() as watch:
        assert watch.sample().free_bytes == 4 * GIB - V2_REST
        tree.v2("/slice/app", anon=0, max=GIB, high="max")
        assert GIB - V2_REST in {watch.sample().free_bytes for _ in range(300)}


def test_a_child_process_watches_itself() -> None:
    with MemoryWatch() as watch:
        watch.sample()
        reader, writer = os.pipe()
        child = os.fork()
        if child == 0:
            held = b"x" * (96 * MIB)
            report = watch.report()
            os.write(writer, b"%d %d" % (report.process.anon_bytes, len(held)))
            os._exit(0)
        os.close(writer)
        with os.fdopen(reader) as answer:
            anon_bytes, held_bytes = map(int, answer.read().split())
        os.waitpid(child, 0)
        assert anon_bytes > held_bytes
        # Pages that the child alone has are not ours.
        assert watch.report().process.anon_bytes < anon_bytes


def test_a_closed_watch_says_so(tree: Tree) -> None:
    with no_file_left_open():
        watch = MemoryWatch(tree.root)
        watch.close()
        watch.close()
    with pytest.raises(ClosedError, match="make a new one"):
        watch.sample()


# ---- this machine --------------------------------------------------------------------------------


def test_a_sample_is_cheap() -> None:
    """Far below what a watcher spends between two of them, also on a machine that is busy."""
    with MemoryWatch() as watch:
        times_s = []
        for _ in range(200):
            start_s = time.perf_counter()
            watch.sample()
            times_s.append(time.perf_counter() - start_s)
    assert statistics.median(times_s) < 2e-3


def test_memory_registered_with_io_uring_is_pinned(tmp_path: Path) -> None:
    path = tmp_path / "device.img"
    path.write_bytes(bytes(MIB))
    before = limits().process
    with _core.Device.open(path) as device:
        registered = device.register([aligned_empty(8 * MIB, np.uint8)])
        if device.info.engine != "uring" or not registered:
            pytest.skip("io_uring registers no memory here")
        counted = device.stats()["direct"]["registered_bytes"]
        now = limits().process
    assert (
        now.pinned_bytes + now.locked_bytes - before.pinned_bytes - before.locked_bytes >= counted
    )


MOVED = """
from dualblade.memory import MemoryWatch, limits
with MemoryWatch() as watch:
    print(watch.sample().limit_bytes)
    with open(sys.argv[1] + "/cgroup.procs", "w") as procs:
        procs.write("0")
    sample = watch.sample()
    print(sample.limit_bytes, sample.sources["cgroup"], sample.free_bytes, limits().budget_bytes)
"""


def test_a_real_process_is_followed_into_another_cgroup(
    memory_cgroup: Callable[[int], MemoryCgroup],
) -> None:
    old, new = memory_cgroup(512 * MIB), memory_cgroup(256 * MIB)
    before, after, path, free, budget = run_inside(old, MOVED, new.path).split()
    assert (int(before), int(after), path) == (512 * MIB, 256 * MIB, str(new.path))
    assert abs(int(free) - int(budget)) < MIB
    assert int(free) > 128 * MIB


THRASH = """
import os
from dualblade.memory import MemoryWatch
path = sys.argv[1]

def read_all():
    with open(path, "rb", buffering=0) as file:
        while file.read(1 << 20):
            pass

with MemoryWatch() as watch:
    watch.sample()
    for _ in range(3):
        read_all()
        sample = watch.sample()
        print(sample.refault_bytes, sample.reclaim_events, sample.free_bytes)
"""


def thrash(group: MemoryCgroup, folder: Path, size_bytes: int) -> list[list[int]]:
    """What the samples say after each of three readings of a file: refaults, events, free bytes."""
    path = folder / "scanned"
    path.write_bytes(os.urandom(MIB) * (size_bytes // MIB))
    with open(path, "rb") as file:
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    printed = run_inside(group, THRASH, path)
    return [[int(word) for word in line.split()] for line in printed.splitlines()]


def test_page_cache_that_has_to_be_read_again_is_counted(
    tmp_path: Path, memory_cgroup: Callable[[int], MemoryCgroup]
) -> None:
    limit, size = 128 * MIB, 192 * MIB
    first, *again = thrash(memory_cgroup(limit), tmp_path, size)
    assert first[0] <= 8 * MIB  # nothing was there to be taken but what the interpreter read
    for refaults, events, free in again:
        # Of a file that is half as large again, a scan finds next to nothing.
        assert refaults > size // 4
        assert events > 0
        # Its pages are in the way of nobody: they count as free.
        assert limit - 80 * MIB < free < limit


def test_page_cache_that_fits_is_not_read_again(
    tmp_path: Path, memory_cgroup: Callable[[int], MemoryCgroup]
) -> None:
    for refaults, _, free in thrash(memory_cgroup(256 * MIB), tmp_path, 64 * MIB):
        assert refaults <= MIB
        assert free > 160 * MIB


FILL = """
import json, os
import numpy as np
from dualblade import _core
from dualblade.memory import MemoryWatch
spare = 16 << 20
with _core.Device.open(sys.argv[1]) as device, MemoryWatch() as watch:
    held = np.ones(int(sys.argv[2]), np.uint8)
    out = np.empty(1 << 20, np.uint8)
    size = (watch.sample().free_bytes - spare) >> 20 << 20
    for _ in range(3):
        for offset in range(0, size, len(out)):
            device.read([(offset, out)], path="pagecache").wait()
    sample = watch.sample()
    resident = device.cached_bytes(0, size)[0]
print(json.dumps([size, resident, sample.refault_bytes, sample.free_bytes - spare - size]))
"""


@pytest.mark.parametrize("held_bytes", [0, 96 * MIB])
def test_what_is_said_to_be_free_can_be_cached(
    tmp_path: Path, memory_cgroup: Callable[[int], MemoryCgroup], held_bytes: int
) -> None:
    path = tmp_path / "device.img"
    with open(path, "wb") as file:
        file.truncate(256 * MIB)
    printed = run_inside(memory_cgroup(256 * MIB), FILL, path, held_bytes)
    size, resident, refaults, left = json.loads(printed)
    assert 128 * MIB - held_bytes < size < 256 * MIB - held_bytes
    assert resident == size
    assert refaults < 8 * MIB  # some of the interpreter's files, which other programs lost before
    # That the tensors are there now changes nothing in what they may take.
    assert abs(left) < 4 * MIB


def test_no_limit_on_the_way_up_is_no_limit() -> None:
    report = limits()
    bounded = [level for level in report.levels if level.limit_bytes is not None]
    assert len(report.bounds()) == 1 + len(bounded)
    assert all(level.limit_bytes < NO_LIMIT for level in bounded)

"""What memory there is, as machine and cgroups say: recorded trees, and this machine."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dualblade import memory
from dualblade.memory import Bound
from tests.memory_tree import GIB, MIB, NO_LIMIT, V2_REST, Tree, run_inside

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from tests.devices import MemoryCgroup


@pytest.fixture
def tree(tmp_path: Path) -> Tree:
    return Tree(tmp_path)


# ---- where the cgroups are -----------------------------------------------------------------------


def test_without_a_cgroup_the_machine_is_the_limit(tree: Tree) -> None:
    report = tree.limits()
    assert (report.total_bytes, report.available_bytes) == (16 * GIB, 12 * GIB)
    assert (report.cgroup_version, report.cgroup_path) == (0, "")
    assert report.cgroup_limit_bytes is None
    assert report.ceiling_bytes == 16 * GIB
    assert report.budget_bytes == 12 * GIB
    assert report.sources["cgroup"] == "missing: no memory cgroup can be seen"


def test_the_least_of_all_version_1_ancestors_counts(tree: Tree) -> None:
    tree.write("proc/self/cgroup", "5:cpu:/\n4:memory:/pod/box\n1:name=systemd:/x\n")
    tree.v1("", NO_LIMIT, 9 * GIB)
    tree.v1("/pod", 2 * GIB, rss=GIB, shmem=100 * MIB)
    tree.v1("/pod/box", 3 * GIB // 2, rss=200 * MIB, shmem=50 * MIB)
    report = tree.limits()
    assert report.cgroup_version == 1
    assert report.cgroup_path == str(tree.root / "sys/fs/cgroup/memory/pod/box")
    assert [level.limit_bytes for level in report.levels] == [3 * GIB // 2, 2 * GIB, None]
    assert report.cgroup_limit_bytes == report.ceiling_bytes == 3 * GIB // 2
    assert report.levels[0].unreclaimable_bytes == 250 * MIB
    assert report.levels[0].usage_bytes == 205 * MIB
    # The pod has the larger limit but its other members leave less of it.
    assert report.budget_bytes == 2 * GIB - GIB - 100 * MIB


def test_version_1_counts_whole_subtrees_and_the_kernels_memory_apart(tree: Tree) -> None:
    tree.write("proc/self/cgroup", "4:memory:/box\n")
    tree.v1(
        "/box",
        GIB,
        rss=3 * MIB,
        shmem=2 * MIB,
        kernel=7 * MIB,
        failcnt=11,
        mapped_file=6 * MIB,
        dirty=8192,
        writeback=4096,
        workingset_refault_file=5,
    )
    (level,) = tree.limits().levels
    assert level._asdict() == {
        "path": str(tree.root / "sys/fs/cgroup/memory/box"),
        "limit_bytes": GIB,
        "limit_source": "memory.limit_in_bytes",
        "usage_bytes": 8 * MIB,
        "anon_bytes": 3 * MIB,
        "shmem_bytes": 2 * MIB,
        "kernel_bytes": 7 * MIB,
        "file_bytes": 5 * MIB,
        "mapped_bytes": 6 * MIB,
        "dirty_bytes": 8192,
        "writeback_bytes": 4096,
        "refault_bytes": 5 * memory._PAGE_BYTES,
        "reclaim_events": 11,
    }


def test_on_a_hybrid_host_the_version_1_memory_controller_counts(tree: Tree) -> None:
    tree.write("proc/self/cgroup", "0::/\n4:cpu,memory:/box\n")
    tree.v1("/box", GIB, rss=MIB)
    tree.write("sys/fs/cgroup/unified/cgroup.controllers", "hugetlb\n")
    report = tree.limits()
    assert (report.cgroup_version, report.cgroup_limit_bytes) == (1, GIB)
    assert report.budget_bytes == GIB - MIB


def test_version_2_counts_max_high_and_the_kernels_own_memory(tree: Tree) -> None:
    tree.write("proc/self/cgroup", "0::/user/app\n")
    tree.write("sys/fs/cgroup/memory.stat", "anon 1\n")  # the root has no limit files
    tree.v2("/user", anon=20 * MIB, max="max", high="max", current=30 * MIB)
    tree.v2("/user/app", anon=10 * MIB, max=GIB, high=512 * MIB, current=16 * MIB)
    report = tree.limits()
    assert report.cgroup_version == 2
    assert report.cgroup_limit_bytes == 512 * MIB
    assert report.levels[0].limit_source == "memory.high"
    assert report.levels[0].usage_bytes == 16 * MIB
    assert report.levels[0].unreclaimable_bytes == 10 * MIB + V2_REST
    assert [level.limit_bytes for level in report.levels[1:]] == [None, None]
    assert report.budget_bytes == 512 * MIB - 10 * MIB - V2_REST


def test_version_2_counts_everything_that_a_new_kernel_says(tree: Tree) -> None:
    tree.write("proc/self/cgroup", "0::/app\n")
    stat = (
        f"kernel {9 * MIB}\nsock 5000\nfile_mapped 111\nfile_dirty 222\nfile_writeback 333\n"
        "workingset_refault_anon 99\nworkingset_refault_file 4\n"
    )
    tree.v2("/app", anon=MIB, max=GIB, high="max", stat=stat, events="low 1\nhigh 2\nmax 3\noom 4")
    (level,) = tree.limits().levels
    assert level.kernel_bytes == 9 * MIB - 77777 + 5000  # its sum, less what can be reclaimed
    assert (level.mapped_bytes, level.dirty_bytes, level.writeback_bytes) == (111, 222, 333)
    assert level.file_bytes == 5 * MIB - 1000
    assert level.refault_bytes == 4 * memory._PAGE_BYTES
    assert level.reclaim_events == 5
    # Those of the level itself, where they are told from those of the levels below.
    tree.write("sys/fs/cgroup/app/memory.events.local", "low 0\nhigh 1\nmax 0\n")
    assert tree.limits().levels[0].reclaim_events == 1


def test_a_container_that_sees_only_its_own_part_of_the_tree(tree: Tree) -> None:
    tree.mounted(
        "4:memory:/docker/abc",
        "/ /sys/fs/cgroup/cpu ro - cgroup cgroup rw,cpu",
        "/docker/abc /sys/fs/cgroup/my\\040memory ro - cgroup cgroup rw,memory",
    )
    tree.v1("/unused", 1, 0)
    for name, text in {
        "limit_in_bytes": GIB,
        "usage_in_bytes": MIB,
        "stat": f"total_rss {MIB}",
    }.items():
        tree.write(f"sys/fs/cgroup/my memory/memory.{name}", f"{text}\n")
    assert tree.limits().budget_bytes == GIB - MIB


def test_of_several_mounts_the_one_that_shows_the_process_counts(tree: Tree) -> None:
    """Another container's part of the tree is mounted too, and comes first."""
    tree.mounted(
        "0::/app",
        "/other /mnt/other rw - cgroup2 cgroup2 rw",
        "/ /mnt/all rw - cgroup2 cgroup2 rw",
    )
    for base, limit in (("mnt/other", 1), ("mnt/all", "max"), ("mnt/all/app", GIB)):
        tree.write(f"{base}/memory.max", f"{limit}\n")
        tree.write(f"{base}/memory.stat", f"anon {MIB}\n")
    report = tree.limits()
    assert [level.limit_bytes for level in report.levels] == [GIB, None]
    assert report.budget_bytes == GIB - MIB


@pytest.mark.parametrize("path", ["/../../host/app", "/gone/app", "/"])
def test_a_path_of_another_namespace_falls_back_to_what_is_there(tree: Tree, path: str) -> None:
    tree.write("proc/self/cgroup", f"0::{path}\n")
    tree.v2("", anon=MIB, max=GIB, current=2 * MIB)
    assert tree.limits().budget_bytes == GIB - MIB - V2_REST


def test_a_limit_above_what_a_container_sees_is_known_from_below(tree: Tree) -> None:
    tree.write("proc/self/cgroup", "4:memory:/\n")
    tree.v1("", NO_LIMIT, rss=MIB, above=GIB)
    report = tree.limits()
    assert report.levels[0].limit_source == "memory.stat (hierarchical_memory_limit)"
    assert report.ceiling_bytes == GIB
    assert report.budget_bytes == GIB - MIB
    # Where the level above can be seen, the limit is that level's.
    tree.write("proc/self/cgroup", "4:memory:/box\n")
    tree.v1("/box", NO_LIMIT, rss=MIB, above=GIB)
    assert [level.limit_bytes for level in tree.limits().levels] == [None, GIB]


# ---- what page-cached tensors may take of it -----------------------------------------------------


def test_a_limit_above_the_machines_memory_leaves_what_the_machine_has(tree: Tree) -> None:
    tree.write("proc/self/cgroup", "0::/\n")
    tree.v2("", anon=MIB, max=64 * GIB, current=2 * MIB)
    report = tree.limits()
    assert (report.ceiling_bytes, report.budget_bytes) == (16 * GIB, 12 * GIB)


def test_memory_over_the_limit_leaves_nothing_but_not_less(tree: Tree) -> None:
    tree.write("proc/self/cgroup", "0::/\n")
    tree.v2("", anon=2 * GIB, max=GIB, current=GIB)
    assert tree.limits().budget_bytes == 0


def test_the_libraries_of_programs_are_taken_and_mapped_tensors_are_not(tree: Tree) -> None:
    tree.write("proc/self/cgroup", "4:memory:/box\n")
    tree.v1("/box", GIB, rss=MIB, kernel=2 * MIB, mapped_file=100 * MIB)
    tree.meminfo(16 * GIB, 12 * GIB, mapped=300 * MIB)
    report = tree.limits()
    assert report.bounds() == [
        Bound("machine", 12 * GIB, {"mapped": 300 * MIB}),
        Bound(
            report.cgroup_path,
            GIB,
            {"anon": MIB, "shmem": 0, "kernel": 2 * MIB, "mapped": 100 * MIB},
        ),
    ]
    assert report.budget_bytes == report.free_bytes(0) == GIB - 103 * MIB
    assert report.free_bytes(views_bytes=64 * MIB) == GIB - 39 * MIB
    assert report.free_bytes(views_bytes=GIB) == GIB - 3 * MIB
    assert report.bounds(views_bytes=GIB)[0].free_bytes == 12 * GIB


def test_mapped_shared_memory_counts_once(tree: Tree) -> None:
    """A gigabyte of shared memory that somebody has mapped is in both of the kernel's numbers."""
    tree.write("proc/self/cgroup", "4:memory:/box\n")
    tree.v1("/box", 4 * GIB, rss=0, shmem=GIB, mapped_file=GIB + 100 * MIB)
    assert tree.limits().budget_bytes == 3 * GIB - 100 * MIB
    # Not mapped (files on tmpfs): what this process has mapped of its own libraries says so.
    tree.v1("/box", 4 * GIB, rss=0, shmem=GIB, mapped_file=100 * MIB)
    tree.status(file=80 * MIB)
    assert tree.limits().budget_bytes == 3 * GIB - 80 * MIB


def test_the_process_says_what_it_has(tree: Tree) -> None:
    fields = {"VmLck": 4096, "VmPin": 8 * MIB, "RssAnon": 30 * MIB, "RssShmem": MIB}
    tree.status(file=20 * MIB, **fields)
    assert tree.limits().process == (30 * MIB, 20 * MIB, MIB, 4096, 8 * MIB)


def test_the_machine_says_what_it_has(tree: Tree) -> None:
    tree.meminfo(16 * GIB, 12 * GIB, mapped=3 * MIB, shmem=2 * MIB)
    expected = (16 * GIB, 12 * GIB, 2 * MIB, 3 * MIB, 24 << 10, 8 << 10)
    assert tree.limits().machine == expected


def test_what_is_missing_is_named_and_does_not_raise(tree: Tree) -> None:
    (tree.root / "proc/meminfo").unlink()
    tree.write("proc/self/cgroup", "4:memory:/box\n")
    tree.v1("/box", GIB, rss=MIB)
    report = tree.limits()
    assert report.total_bytes > report.available_bytes > 0  # sysinfo(2) says so much
    assert report.sources == {
        "machine": f"missing: {tree.root}/proc/meminfo (No such file or directory)",
        "process": f"missing: {tree.root}/proc/self/status (No such file or directory)",
        "cgroup": f"{tree.root}/sys/fs/cgroup/memory/box",
        "cgroup memory.failcnt": f"missing: {tree.root}/sys/fs/cgroup/memory/box/memory.failcnt",
        "cgroup memory.kmem.usage_in_bytes": (
            f"missing: {tree.root}/sys/fs/cgroup/memory/box/memory.kmem.usage_in_bytes"
        ),
        "refaults": f"missing: {tree.root}/proc/vmstat (No such file or directory)",
        "reclaims": f"missing: {tree.root}/proc/vmstat (No such file or directory)",
        "stalls": f"missing: {tree.root}/proc/pressure/memory (No such file or directory)",
    }


def test_files_of_nonsense_do_not_raise(tree: Tree) -> None:
    tree.write("proc/self/cgroup", "4:memory:/box\nno colons\n\n")
    tree.v1("/box", GIB, rss=0)
    for name in ("stat", "usage_in_bytes", "failcnt"):
        tree.write(f"sys/fs/cgroup/memory/box/memory.{name}", "total_rss\nx y z\n\0")
    for name in ("self/status", "vmstat", "pressure/memory", "self/mountinfo"):
        tree.write(f"proc/{name}", "RssFile:\nsome total=\n- -\n")
    assert tree.limits().budget_bytes == GIB


SIZES = st.integers(0, 1 << 36)


@given(
    machine=st.tuples(SIZES, SIZES, SIZES),
    own_file=SIZES,
    views=SIZES,
    levels=st.lists(
        st.fixed_dictionaries(
            dict.fromkeys(("rss", "shmem", "kernel", "mapped_file"), SIZES)
            | {"limit": SIZES | st.just(NO_LIMIT)}
        ),
        max_size=4,
    ),
)
def test_what_is_free_is_the_least_of_all_levels(
    tmp_path_factory, machine, own_file, views, levels
):
    available, mapped, shmem = (size >> 10 << 10 for size in machine)
    tree = Tree(tmp_path_factory.mktemp("tree"))
    tree.meminfo(GIB, available, mapped, shmem)
    own_file = own_file >> 10 << 10
    tree.status(file=own_file)
    tree.write("proc/self/cgroup", "1:memory:" + "/x" * len(levels) + "\n")

    def of_files(mapped, shmem):
        """Between none and all of the shared memory is mapped; own_file is certainly not that."""
        return max(0, max(mapped - shmem, min(own_file, mapped)) - views)

    free = [available - of_files(mapped, shmem)]
    for depth, level in enumerate(levels):
        tree.v1("/x" * (depth + 1), **level, above=NO_LIMIT)
        if level["limit"] != NO_LIMIT:
            taken = level["rss"] + level["shmem"] + level["kernel"]
            free.append(level["limit"] - taken - of_files(level["mapped_file"], level["shmem"]))
    with tree.watch() as watch:
        sample = watch.sample(views_bytes=views)
    assert sample.free_bytes == max(0, min(free))
    bounded = [level["limit"] for level in levels if level["limit"] != NO_LIMIT]
    assert sample.limit_bytes == min([GIB, *bounded])


# ---- this machine --------------------------------------------------------------------------------


def test_this_machine_has_memory() -> None:
    report = memory.limits()
    with open("/proc/meminfo") as meminfo:
        total = int(next(line for line in meminfo if line.startswith("MemTotal:")).split()[1])
    assert report.total_bytes == total * 1024
    assert 0 < report.available_bytes <= report.total_bytes
    assert 0 <= report.budget_bytes <= report.available_bytes
    assert report.process.anon_bytes > MIB
    assert report.process.file_bytes > MIB


REPORT = """
held = bytearray(b"x") * (64 << 20)
from dualblade import memory
report = memory.limits()
level = report.levels[0]
print(level.limit_bytes, level.anon_bytes, report.budget_bytes, level.usage_bytes,
      level.unreclaimable_bytes + level.file_bytes)
"""


def test_a_real_cgroup_is_found_and_counted(
    memory_cgroup: Callable[[int], MemoryCgroup],
) -> None:
    limit, held = 256 * MIB, 64 * MIB
    printed = run_inside(memory_cgroup(limit), REPORT)
    found_limit, anon, budget, usage, parts = map(int, printed.split())
    assert found_limit == limit
    assert held <= anon < limit
    # Of the interpreter's libraries, what others have not read before is charged here.
    assert limit - anon - 64 * MIB <= budget <= limit - anon
    # The kernel charges in batches of up to 64 pages a processor.
    assert abs(usage - parts) <= 16 * MIB

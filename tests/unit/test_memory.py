"""Memory: sizes as people write them, and the limits of machine and cgroups as the kernel says."""

import contextlib
import os
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dualblade import memory

GIB = 1 << 30
MIB = 1 << 20
NO_LIMIT = 9223372036854771712


# ---- sizes --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("2GiB", 2 * GIB),
        ("512MB", 512_000_000),
        ("100KiB", 102400),
        ("100 kib", 102400),
        (" 1.5GiB ", 3 * GIB // 2),
        ("0.1KB", 100),
        ("1TiB", 1 << 40),
        ("3PB", 3 * 10**15),
        ("4096", 4096),
        ("7 bytes", 7),
        ("8B", 8),
        (4096, 4096),
        (0, 0),
    ],
)
def test_a_size_is_read(text, size):
    assert memory.parse_size(text) == size


@pytest.mark.parametrize(
    ("bad", "says"),
    [
        ("", "is not a size"),
        ("lots", "is not a size"),
        ("1e9", "is not a size"),
        ("GiB", "is not a size"),
        ("2GiB free", "is not a size"),
        ("\u0661GiB", "is not a size"),
        ("2XB", "unknown unit 'XB'"),
        ("2G", "2GiB .* 2GB"),
        ("0.1KiB", "whole number"),
        ("-1", "negative"),
        ("-2GiB", "negative"),
        (-1, "negative"),
        (1 << 63, "larger than any"),
        ("99999999PB", "larger than any"),
    ],
)
def test_a_size_that_cannot_be_is_a_value_error_that_shows_it(bad, says):
    with pytest.raises(ValueError, match=says) as caught:
        memory.parse_size(bad)
    assert repr(bad) in str(caught.value)


@pytest.mark.parametrize("bad", [1.5, True, None, b"2GiB", [1]])
def test_a_size_of_another_type_is_a_type_error(bad):
    with pytest.raises(TypeError, match="is not a size"):
        memory.parse_size(bad)


@given(st.integers(0, 2**63 - 1))
def test_a_formatted_size_reads_back_to_a_tenth_of_its_unit(size):
    text = memory.format_size(size)
    number, unit = text.split()
    assert 0 <= float(number) < 1024
    if unit != "EiB":
        one = 1 if unit.startswith("byte") else memory.parse_size(f"1{unit}")
        assert abs(round(float(number) * one) - size) <= one * 0.06


@pytest.mark.parametrize(
    ("size", "text"),
    [(0, "0 bytes"), (1, "1 byte"), (1023, "1023 bytes"), (1536, "1.5 KiB"), (GIB - 1, "1 GiB")],
)
def test_sizes_are_short(size, text):
    assert memory.format_size(size) == text


# ---- recorded trees -----------------------------------------------------------------------------


class Tree:
    """A directory that looks like / to the reader."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.meminfo(total=16 * GIB, available=12 * GIB)

    def write(self, path: str, text: str) -> None:
        target = self.root / path
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(text)

    def meminfo(self, total: int, available: int) -> None:
        self.write(
            "proc/meminfo",
            f"MemTotal:       {total // 1024} kB\nMemFree:        1000 kB\n"
            f"MemAvailable:   {available // 1024} kB\nHugePages_Total:       0\n",
        )

    def v1(self, path: str, limit: int, rss: int, shmem: int = 0) -> None:
        base = f"sys/fs/cgroup/memory{path}"
        self.write(f"{base}/memory.limit_in_bytes", f"{limit}\n")
        self.write(f"{base}/memory.usage_in_bytes", f"{rss + 5 * MIB}\n")
        self.write(
            f"{base}/memory.stat",
            f"cache 1\nrss 1\ntotal_cache {5 * MIB}\ntotal_rss {rss}\ntotal_shmem {shmem}\n"
            f"hierarchical_memory_limit {limit}\n",
        )

    def v2(self, path: str, anon: int, **files: object) -> None:
        base = f"sys/fs/cgroup{path}"
        for name, value in files.items():
            self.write(f"{base}/memory.{name}", f"{value}\n")
        self.write(
            f"{base}/memory.stat",
            f"anon {anon}\nfile {5 * MIB}\nshmem 1000\nkernel_stack 200\npagetables 30\n"
            "slab_reclaimable 77777\nslab_unreclaimable 4\n",
        )

    def limits(self) -> memory.MemoryReport:
        return memory.limits(self.root)


@pytest.fixture
def tree(tmp_path):
    return Tree(tmp_path)


V2_REST = 1000 + 200 + 30 + 4


def test_without_a_cgroup_the_machine_is_the_limit(tree):
    report = tree.limits()
    assert (report.total_bytes, report.available_bytes) == (16 * GIB, 12 * GIB)
    assert (report.cgroup_version, report.cgroup_path) == (0, "")
    assert report.cgroup_limit_bytes is None
    assert report.budget_bytes == 12 * GIB


def test_the_least_of_all_version_1_ancestors_counts(tree):
    tree.write("proc/self/cgroup", "5:cpu:/\n4:memory:/pod/box\n1:name=systemd:/x\n")
    tree.v1("", NO_LIMIT, 9 * GIB)
    tree.v1("/pod", 2 * GIB, rss=GIB, shmem=100 * MIB)
    tree.v1("/pod/box", 3 * GIB // 2, rss=200 * MIB, shmem=50 * MIB)
    report = tree.limits()
    assert report.cgroup_version == 1
    assert report.cgroup_path == str(tree.root / "sys/fs/cgroup/memory/pod/box")
    assert report.cgroup_limit_bytes == 3 * GIB // 2
    assert report.cgroup_anon_bytes == 250 * MIB
    assert report.cgroup_usage_bytes == 205 * MIB
    # The pod has the larger limit but its other members leave less of it.
    assert report.budget_bytes == 2 * GIB - GIB - 100 * MIB


def test_on_a_hybrid_host_the_version_1_memory_controller_counts(tree):
    tree.write("proc/self/cgroup", "4:cpu,memory:/box\n0::/\n")
    tree.v1("/box", GIB, rss=MIB)
    tree.write("sys/fs/cgroup/unified/cgroup.controllers", "hugetlb\n")
    report = tree.limits()
    assert (report.cgroup_version, report.cgroup_limit_bytes) == (1, GIB)
    assert report.budget_bytes == GIB - MIB


def test_version_2_counts_max_high_and_the_kernels_own_memory(tree):
    tree.write("proc/self/cgroup", "0::/user/app\n")
    tree.write("sys/fs/cgroup/memory.stat", "anon 1\n")  # the root has no limit files
    tree.v2("/user", anon=20 * MIB, max="max", high="max", current=30 * MIB)
    tree.v2("/user/app", anon=10 * MIB, max=GIB, high=512 * MIB, current=16 * MIB)
    report = tree.limits()
    assert report.cgroup_version == 2
    assert report.cgroup_limit_bytes == 512 * MIB
    assert report.cgroup_usage_bytes == 16 * MIB
    assert report.cgroup_anon_bytes == 10 * MIB + V2_REST
    assert report.budget_bytes == 512 * MIB - 10 * MIB - V2_REST


def test_a_container_that_sees_only_its_own_part_of_the_tree(tree):
    tree.write("proc/self/cgroup", "4:memory:/docker/abc\n")
    tree.write(
        "proc/self/mountinfo",
        "35 31 0:32 / /sys/fs/cgroup/cpu ro - cgroup cgroup rw,cpu\n"
        "36 31 0:33 /docker/abc /sys/fs/cgroup/my\\040memory ro - cgroup cgroup rw,memory\n",
    )
    tree.v1("/unused", 1, 0)
    for name, text in {
        "limit_in_bytes": GIB,
        "usage_in_bytes": MIB,
        "stat": f"total_rss {MIB}",
    }.items():
        tree.write(f"sys/fs/cgroup/my memory/memory.{name}", f"{text}\n")
    assert tree.limits().budget_bytes == GIB - MIB


@pytest.mark.parametrize("path", ["/../../host/app", "/gone/app", "/"])
def test_a_path_of_another_namespace_falls_back_to_what_is_there(tree, path):
    tree.write("proc/self/cgroup", f"0::{path}\n")
    tree.v2("", anon=MIB, max=GIB, current=2 * MIB)
    assert tree.limits().budget_bytes == GIB - MIB - V2_REST


def test_memory_over_the_limit_leaves_nothing_but_not_less(tree):
    tree.write("proc/self/cgroup", "0::/\n")
    tree.v2("", anon=2 * GIB, max=GIB, current=GIB)
    assert tree.limits().budget_bytes == 0


# ---- budgets ------------------------------------------------------------------------------------


def test_auto_leaves_a_quarter_and_the_staging_to_the_program(tree):
    budget = memory.page_cache_budget("auto", 4 * GIB, root=tree.root)
    assert budget.bytes == (12 - 4) * GIB * 3 // 4
    assert "8 GiB" in budget.source


def test_auto_is_never_negative(tree):
    assert memory.page_cache_budget("auto", 13 * GIB, root=tree.root).bytes == 0


def test_a_size_is_taken_as_it_is(tree):
    assert memory.page_cache_budget("13GiB", 4 * GIB, root=tree.root).bytes == 13 * GIB
    assert memory.page_cache_budget(MIB, 0, root=tree.root).bytes == MIB


def test_a_size_beyond_the_machine_or_its_cgroup_is_refused(tree):
    with pytest.raises(ValueError, match="more than there is: 16 GiB in this machine"):
        memory.page_cache_budget("17GiB", 0, root=tree.root)
    tree.write("proc/self/cgroup", "0::/\n")
    tree.v2("", anon=MIB, max=GIB, current=2 * MIB)
    with pytest.raises(ValueError, match="1 GiB limit of the cgroup"):
        memory.page_cache_budget("2GiB", 0, root=tree.root)
    assert memory.page_cache_budget("1GiB", 0, root=tree.root).bytes == GIB


@pytest.mark.parametrize("size", [0, MIB - 1, "100KiB"])
def test_a_size_too_small_for_one_transfer_is_refused(tree, size):
    with pytest.raises(ValueError, match=r"policy='direct'"):
        memory.page_cache_budget(size, 0, root=tree.root)


# ---- this machine -------------------------------------------------------------------------------


def test_this_machine_has_memory():
    report = memory.limits()
    with open("/proc/meminfo") as meminfo:
        total = int(next(line for line in meminfo if line.startswith("MemTotal:")).split()[1])
    assert report.total_bytes == total * 1024
    assert 0 < report.available_bytes <= report.total_bytes
    assert 0 <= report.budget_bytes <= report.available_bytes


REPORT_FROM_INSIDE = """
import os, sys
sys.path[:0] = {path!r}
with open({procs!r}, "w") as procs:
    procs.write(str(os.getpid()))
held = bytearray(b"x") * ({held} * 1024 * 1024)
from dualblade import memory
report = memory.limits()
print(report.cgroup_limit_bytes, report.cgroup_anon_bytes, report.budget_bytes)
"""


@contextlib.contextmanager
def real_cgroup(limit_bytes):
    """A new cgroup below the process's own, with a memory limit."""
    here = memory.limits()
    if not here.cgroup_version:
        pytest.skip("no memory cgroup is mounted here")
    path = Path(here.cgroup_path, f"dualblade-test-{os.getpid()}")
    knob = {1: "memory.limit_in_bytes", 2: "memory.max"}[here.cgroup_version]
    try:
        path.mkdir()
    except OSError as error:
        pytest.skip(f"no cgroup can be made below {path.parent}: {error}")
    try:
        try:
            (path / knob).write_text(str(limit_bytes))
        except OSError as error:
            pytest.skip(f"the memory controller is not given to {path.parent}: {error}")
        yield path
    finally:
        path.rmdir()


def test_a_real_cgroup_is_found_and_counted():
    limit, held = 256 * MIB, 64
    with real_cgroup(limit) as path:
        code = REPORT_FROM_INSIDE.format(
            path=[entry for entry in sys.path if entry], procs=str(path / "cgroup.procs"), held=held
        )
        done = subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr
    found_limit, anon, budget = map(int, done.stdout.split())
    assert found_limit == limit
    assert held * MIB <= anon < limit
    assert budget == limit - anon

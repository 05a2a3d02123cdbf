"""Recorded /proc and /sys trees for what reads memory limits, and programs in real cgroups."""

from __future__ import annotations

import contextlib
import os
import sys
from typing import TYPE_CHECKING

from dualblade import memory
from tests.helpers import MIB

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from tests.devices import MemoryCgroup

GIB = 1 << 30
PAGE = os.sysconf("SC_PAGE_SIZE")
NO_LIMIT = 9223372036854771712


class Tree:
    """A directory that looks like / to the reader."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.meminfo(total=16 * GIB, available=12 * GIB)

    def write(self, path: str, text: str) -> None:
        """The file keeps its identity, as those of the kernel do."""
        target = self.root / path
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(text)

    def meminfo(self, total: int, available: int, mapped: int = 0, shmem: int = 0) -> None:
        self.write(
            "proc/meminfo",
            f"MemTotal:       {total // 1024} kB\nMemFree:        1000 kB\n"
            f"MemAvailable:   {available // 1024} kB\nDirty:              24 kB\n"
            f"Writeback:           8 kB\nMapped:         {mapped // 1024} kB\n"
            f"Shmem:          {shmem // 1024} kB\nHugePages_Total:       0\n",
        )

    def status(self, file: int = 0, **fields: int) -> None:
        """`Name` is what a process calls itself: anything."""
        self.write(
            "proc/self/status",
            "Name:\tRssFile: 7 kB\nUmask:\t0022\n"
            + "".join(f"{name}:\t{value // 1024:8} kB\n" for name, value in fields.items())
            + f"RssFile:\t{file // 1024:8} kB\nThreads:\t1\n",
        )

    def mounted(self, cgroup: str, *mounts: str) -> None:
        """What the process is in, and what is mounted: "ROOT AT OPTIONS - KIND SOURCE OPTIONS"."""
        self.write("proc/self/cgroup", f"{cgroup}\n")
        lines = [f"{40 + i} 31 0:{40 + i} {mount}\n" for i, mount in enumerate(mounts)]
        self.write("proc/self/mountinfo", "".join(lines))

    def psi(self, path: str, total_us: int) -> None:
        self.write(
            path,
            f"some avg10=0.00 avg60=0.00 avg300=1.25 total={total_us}\n"
            "full avg10=0.00 avg60=0.00 avg300=0.00 total=9\n",
        )

    def v1(
        self, path: str, limit: int, rss: int, shmem: int = 0, above: int | None = None, **more: int
    ) -> None:
        """`above` is the least limit from here up; `more`: kernel, failcnt, and fields of
        memory.stat."""
        base = f"sys/fs/cgroup/memory{path}"
        self.write(f"{base}/memory.limit_in_bytes", f"{limit}\n")
        self.write(f"{base}/memory.usage_in_bytes", f"{rss + 5 * MIB}\n")
        for name, file in (("kernel", "kmem.usage_in_bytes"), ("failcnt", "failcnt")):
            if name in more:
                self.write(f"{base}/memory.{file}", f"{more.pop(name)}\n")
        self.write(
            f"{base}/memory.stat",
            f"cache 1\nrss 1\nshmem 2\ntotal_cache {5 * MIB + shmem}\ntotal_rss {rss}\n"
            f"total_rss_huge 7\ntotal_shmem {shmem}\n"
            + "".join(f"{name} 1\ntotal_{name} {value}\n" for name, value in more.items())
            + f"hierarchical_memory_limit {limit if above is None else above}\n",
        )

    def v2(self, path: str, anon: int, stat: str = "", **files: object) -> None:
        base = f"sys/fs/cgroup{path}"
        for name, value in files.items():
            self.write(f"{base}/memory.{name.replace('__', '.')}", f"{value}\n")
        self.write(
            f"{base}/memory.stat",
            f"anon {anon}\nfile {5 * MIB}\nshmem 1000\nkernel_stack 200\npagetables 30\n"
            f"slab_reclaimable 77777\nslab_unreclaimable 4\n{stat}",
        )

    def limits(self) -> memory.MemoryReport:
        return memory.limits(self.root)

    @contextlib.contextmanager
    def watch(self) -> Iterator[memory.MemoryWatch]:
        with memory.MemoryWatch(self.root) as opened:
            yield opened


V2_REST = 1000 + 200 + 30 + 4  # of what Tree.v2 writes, what can't be reclaimed besides anon


def run_inside(group: MemoryCgroup, program: str, *arguments: object) -> str:
    """What a Python program prints that runs in this cgroup."""
    path = f"import sys\nsys.path[:0] = {[entry for entry in sys.path if entry]!r}\n"
    done = group.run_python(path + program, *map(str, arguments))
    assert done.returncode == 0, done.stderr
    return done.stdout

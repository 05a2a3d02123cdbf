"""dualblade info --memory: what it says, for people and for scripts."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import TYPE_CHECKING

import numpy as np
import pytest

import dualblade
from dualblade import memory
from dualblade.cli import memory_info
from tests.memory_tree import GIB, MIB, NO_LIMIT, Tree

if TYPE_CHECKING:
    from pathlib import Path


def run(*arguments: object) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "dualblade.cli.admin", "info", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


@pytest.fixture
def report(tmp_path: Path) -> memory.MemoryReport:
    tree = Tree(tmp_path)
    tree.meminfo(16 * GIB, 12 * GIB, mapped=MIB)
    tree.status(file=20 * MIB, VmPin=8 * MIB)
    tree.psi("proc/pressure/memory", 1_500_000)
    tree.write("proc/self/cgroup", "4:memory:/pod/box\n")
    tree.v1("/pod", 2 * GIB, rss=GIB, failcnt=4, kernel=0)
    tree.v1("/pod/box", NO_LIMIT, rss=MIB, kernel=3 * MIB, workingset_refault_file=256)
    return tree.limits()


def test_every_part_is_said_with_its_source(report: memory.MemoryReport) -> None:
    state = dualblade._core.CacheState(2 * MIB, MIB, 0, 5 * MIB, 4096)
    told = memory_info.MemoryInfo(report, {"kv.img": state, "old.img": state._replace(**UNKNOWN)})
    text = memory_info.as_text(told)
    box, pod = (level.path for level in report.levels)
    first, *lines = (" ".join(line.split()) for line in text.splitlines())
    assert first == (
        f"page-cached tensors may take 1 GiB of the 2 GiB that a process may have here; {pod} has "
        "no more"
    )
    sections = "\n".join(lines)
    for expected in (
        f"machine, from {report.sources['machine']}:\navailable 12 GiB of 16 GiB",
        "mapped 1 MiB",
        f"cgroup (version 1) {box}:\nlimit none\nin use 6 MiB\nanonymous 1 MiB\nshared 0 bytes\n"
        "the kernel's 3 MiB",
        f"cgroup (version 1) {pod}:\nlimit 2 GiB, from memory.limit_in_bytes",
        "leaves 1 GiB",
        f"missing: {box}/memory.failcnt",
        "libraries 20 MiB",
        "pinned 8 MiB",
        f"read again 1 MiB after reclaim, from {box}/memory.stat",
        "limits run into 4 times",
        f"waited for memory 1.5 s, from {report.sources['stalls']}",
        "kv.img:\nin the page cache 2 MiB\ndirty 1 MiB\nbeing written 0 bytes\nreclaimed 5 MiB",
        "old.img:\nin the page cache 2 MiB",
    ):
        assert expected in sections
    assert sections.endswith("old.img:\nin the page cache 2 MiB")  # no kernel said more


UNKNOWN = {
    "dirty_bytes": None,
    "writeback_bytes": None,
    "evicted_bytes": None,
    "recently_evicted_bytes": None,
}


def test_what_is_missing_is_said(tmp_path: Path) -> None:
    told = memory_info.MemoryInfo(Tree(tmp_path).limits(), {"kv.img": None})
    text = memory_info.as_text(told)
    assert "cgroup: missing: no memory cgroup can be seen" in text
    assert f"not known, missing: {tmp_path}/proc/pressure/memory" in text
    assert "kernel does not say" in text


def test_scripts_get_everything(report: memory.MemoryReport) -> None:
    found = json.loads(json.dumps(memory_info.as_json(memory_info.MemoryInfo(report, {"x": None}))))
    assert found["budget_bytes"] == GIB
    assert found["bounded_by"] == report.levels[1].path
    assert [bound["free_bytes"] for bound in found["bounds"]] == [12 * GIB - MIB, GIB]
    assert [level["limit_bytes"] for level in found["cgroups"]] == [None, 2 * GIB]
    assert found["process"]["pinned_bytes"] == 8 * MIB
    assert found["targets"] == {"x": None}
    assert found["sources"] == report.sources


def test_it_works_without_a_target_and_with_one_in_use(tmp_path: Path) -> None:
    done = run("--memory")
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("page-cached tensors may take ")
    path = tmp_path / "kv.img"
    with dualblade.open(path, size="16MiB", policy="pagecache") as store:
        store.put("x", np.ones(4 * MIB, np.uint8))
        done = run("--memory", "--json", path)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert 4 * MIB <= found["targets"][str(path)]["resident_bytes"] < 8 * MIB
    assert 0 < found["budget_bytes"] <= found["ceiling_bytes"]


def test_a_missing_target_is_an_error_and_help_has_an_example(tmp_path: Path) -> None:
    done = run("--memory", tmp_path / "nothing")
    assert (done.returncode, done.stdout) == (1, "")
    assert "nothing" in done.stderr
    assert "dualblade info --memory kv.img" in run("--help").stdout
    done = run()
    assert done.returncode == 2
    assert "wants a target, or --memory" in done.stderr

"""Every benchmark runs, measures all that it says it measures, and says what it could not have."""

from __future__ import annotations

import importlib.util
import json
import mmap
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
WORKLOADS = [
    f"{blocks} {direction}"
    for blocks in ("4 MiB sequential", "256 KiB random", "64 KiB random")
    for direction in ("write", "read")
]
OURS = ["device", "calls", "store", "tickets"]
RIVALS = ["fio", "fio-plain", "lmcache", "nixl", "threads", "memmap"]


def bench(folder: Path, name: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(ROOT / "bench" / name), *arguments]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.run(
        command, cwd=folder, env=environment, capture_output=True, text=True, check=False
    )


def measure(folder: Path, name: str, *arguments: str) -> tuple[str, dict[str, Any]]:
    results = {"found.json"}
    if importlib.util.find_spec("matplotlib"):
        results.add("plot.png")
        arguments = (*arguments, "--plot", "plot.png")
    done = bench(folder, name, "--quick", "--json", "found.json", *arguments)
    assert done.returncode == 0, done.stderr
    found = json.loads((folder / "found.json").read_text())
    assert {path.name for path in folder.iterdir()} == results  # nothing else is left behind
    if "plot.png" in results:
        assert (folder / "plot.png").read_bytes().startswith(b"\x89PNG")
    assert found["machine"]["cores"] > 0
    return done.stdout, found


def assert_positive(figures: dict[str, Any]) -> None:
    assert figures["values"]
    assert 0 < figures["min"] <= figures["median"] <= figures["max"]


def assert_brief(figures: dict[str, Any]) -> None:
    """Of one figure the median is all there is, and of many there are no values."""
    if set(figures) == {"median"}:
        assert figures["median"] > 0
    else:
        assert_positive({"values": True, **figures})


def test_engine_has_a_row_for_everybody(tmp_path):
    table, found = measure(tmp_path, "engine.py")
    names = {(row["workload"], row["contender"]) for row in found["rows"]}
    assert names == {(title, name) for title in WORKLOADS for name in OURS + RIVALS}
    assert len(found["rows"]) == len(names)
    for row in found["rows"]:
        assert row["label"] in table
        if row["error"]:  # what is not installed, or not allowed here
            assert row["contender"] in {"fio", "fio-plain", "lmcache", "nixl"}
            assert row["mb_per_s"] is row["cpu_s_per_gb"] is None
        else:
            assert_positive(row["mb_per_s"])
            if not row["contender"].startswith("fio"):  # fio counts whole milliseconds: it may be 0
                assert_positive(row["cpu_s_per_gb"])


def test_engine_measures_the_rivals_that_are_named(tmp_path):
    _, found = measure(tmp_path, "engine.py", "--rivals", "threads", "--engine", "threads")
    assert {row["contender"] for row in found["rows"]} == {*OURS, "threads"}
    assert all(row["error"] is None and row["ratio_to_fio"] is None for row in found["rows"])


def test_engine_says_what_is_missing(tmp_path):
    tools = tmp_path / "tools"  # a PATH without fio
    tools.mkdir()
    command = [sys.executable, str(ROOT / "bench" / "engine.py"), "--quick", "--rivals", "fio"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "PATH": str(tools)}
    done = subprocess.run(
        command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("apt install fio") == len(WORKLOADS)


def test_engine_spares_a_file_that_is_there(tmp_path):
    precious = tmp_path / "precious"
    precious.write_text("content")
    done = bench(tmp_path, "engine.py", "--quick", "--file", str(precious))
    assert done.returncode == 1
    assert "--overwrite" in done.stderr
    assert precious.read_text() == "content"


@pytest.mark.parametrize(
    "arguments",
    [("--rivals", "nobody"), ("--size", "1MiB"), ("--in-flight", "5MiB"), ("--rounds", "0")],
)
def test_engine_refuses_wrong_options(tmp_path, arguments):
    done = bench(tmp_path, "engine.py", *arguments)
    assert done.returncode == 2
    assert arguments[0] in done.stderr
    assert list(tmp_path.iterdir()) == []


def test_ops_measures_all_of_it(tmp_path):
    table, found = measure(tmp_path, "ops.py")
    operations = {(row["operation"], row["at_once"]) for row in found["tensors"]}
    kinds = ("put, new key", "put, key there", "get")
    assert operations == {(kind, at_once) for kind in kinds for at_once in (1, 256)}
    for row in found["tensors"]:
        assert row["operation"] in table
        assert_positive(row["store_us"])
        assert_positive(row["io_us"])
    assert len(found["extents"]) == 2
    for row in found["extents"]:
        for name in ("allocate_us", "free_us", "free_new_extent_us", "bytes_per_extent"):
            assert_positive(row[name])
    assert [row["tensors"] for row in found["stores"]] == [0, 100, 1000]
    for row in found["stores"]:
        for name in ("open_ms", "close_ms", "close_after_put_ms", "save_all_ms"):
            assert_positive(row[name])


@pytest.mark.skipif(os.geteuid() != 0, reason="loop devices need root")
def test_stripes_compares_one_with_two(tmp_path):
    table, found = measure(tmp_path, "stripes.py")
    setups = {row["setup"] for row in found["rows"]}
    assert len(setups) == 2 - len(found["missing"])
    assert len(found["rows"]) == 3 * 4 * len(setups)
    for row in found["rows"]:
        assert row["label"] in table
        if row["mb_per_s"] is None:
            assert row["contender"].startswith("fio")
        else:
            assert_positive(row["mb_per_s"])
            assert (row["ratio_to_one"] is None) == row["contender"].endswith("one")


# ---- decoding under a memory limit ---------------------------------------------------------------

POLICIES = ["memmap", "fadvise", "pread", "uring", "direct", "static", "live-spread", "live-head"]


@pytest.mark.slow
def test_budget_has_a_row_for_every_policy(tmp_path, memory_cgroup):
    memory_cgroup(64 << 20)  # skips where there are none
    table, found = measure(tmp_path, "budget.py")
    assert [row["policy"] for row in found["rows"]] == POLICIES
    for row in found["rows"]:
        assert row["label"] in table
        assert row["error"] is None
        assert len(row["step_ms"]["values"]) == found["measured_steps"]
        for name in ("step_ms", "prefill_s", "stall"):
            assert_brief(row[name])
        assert 0 < row["peak_bytes"] <= row["limit_bytes"]
        if shutil.which("fio"):
            assert_brief(row["to_floor"])
    rows = {row["policy"]: row for row in found["rows"]}
    for name in ("uring", "direct"):  # past the page cache: all of it comes from the drive
        assert abs(rows[name]["hit_rate"]) < 0.05
    assert rows["memmap"]["per_step"]["limit_hits"] > 0
    assert {target["what"] for target in found["targets"]} >= {"p99 over p50"}


def test_budget_measures_what_is_named(tmp_path, memory_cgroup):
    memory_cgroup(64 << 20)
    arguments = ("--shape", "opt", "--budgets", "140,120", "--policies", "pread,direct")
    _, found = measure(tmp_path, "budget.py", *arguments)
    named = [(row["shape"], row["percent"], row["policy"]) for row in found["rows"]]
    budgets = [("opt", percent) for percent in (120, 140)]
    assert named == [(*place, policy) for place in budgets for policy in ("pread", "direct")]
    by_place = {(row["percent"], row["policy"]): row for row in found["rows"]}
    assert by_place[140, "pread"]["hit_rate"] > 0.9  # everything fits
    assert by_place[140, "direct"]["hit_rate"] < 0.05


def test_a_policy_that_is_killed_is_a_row(tmp_path, memory_cgroup):
    memory_cgroup(64 << 20)
    _, found = measure(tmp_path, "budget.py", "--budgets", "8", "--policies", "pread")
    assert "killed" in found["rows"][0]["error"]


def test_shrink_says_how_a_falling_limit_is_survived(tmp_path, memory_cgroup):
    memory_cgroup(64 << 20)
    table, found = measure(tmp_path, "shrink.py", "--policies", "live-spread,memmap")
    assert [row["policy"] for row in found["rows"]] == ["live-spread", "memmap"]
    high, low = (
        found["kv_bytes"] * percent // 100 // mmap.PAGESIZE * mmap.PAGESIZE
        for percent in found["percent"][:2]
    )
    for row in found["rows"]:
        assert row["label"] in table
        assert row["error"] is None
        limits = row["samples"]["limit_bytes"]
        assert len(limits) == len(row["samples"]["at_s"]) == len(row["samples"]["cached_bytes"])
        assert limits[0] == limits[-1] == high
        assert min(limits) == low
        assert all(row[name]["worst_ms"] > 0 for name in ("fall", "rise"))
        for phase in ("before", "low", "after"):
            assert all(ms > 0 for ms in row["steps"][phase]["ms"])
            assert len(row["steps"][phase]["limit_hits"]) == 4
    assert {target["where"] for target in found["targets"]} == {"dualblade live, spread"}


COUNTS = """
import sys
from decode import Counters
from policies import Job

job = Job("memmap", sys.argv[1], "llama", 1, 1, 1, 0, sys.argv[2])
counters = Counters(job)
found = counters.sample()
assert (found["limit_hits"], found["refault_pages"], found["direct_reclaim_pages"]) == (7, 5, 9)
assert found["stall_ms"] == 12.345, found
assert counters.unreclaimable_bytes() == 1000 + 200 + 30
"""


def test_the_counts_of_a_version_2_group_are_found(tmp_path):
    files = {
        "memory.stat": "anon 1000\nfile 400\nkernel 30\nshmem 200\nworkingset_refault_file 5\n"
        "pgscan_direct 9\n",
        "memory.events": "low 0\nhigh 3\nmax 7\noom 0\noom_kill 0\n",
        "memory.pressure": "some avg10=0.00 avg60=0.00 total=12345\nfull avg10=0.00 total=1",
        "memory.max": "1048576\n",
    }
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    command = [sys.executable, "-c", COUNTS, str(tmp_path / "memory.max"), str(tmp_path)]
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'bench'}"}
    subprocess.run(command, env=environment, check=True)


@pytest.mark.parametrize("name", ["budget.py", "shrink.py"])
def test_limited_benchmarks_refuse_wrong_options(tmp_path, name):
    wrong = [("--policies", "nobody"), ("--kv", "1MiB"), ("--kv", "0"), ("--steps", "0")]
    if name == "budget.py":
        wrong.append(("--budgets", "²"))
    for arguments in wrong:
        done = bench(tmp_path, name, *arguments)
        assert done.returncode == 2
        assert arguments[0] in done.stderr
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["engine.py", "ops.py", "stripes.py", "budget.py", "shrink.py"])
def test_help_has_examples(tmp_path, name):
    done = bench(tmp_path, name, "--help")
    assert done.returncode == 0
    assert f"python bench/{name} " in done.stdout


# ---- the pipeline's ------------------------------------------------------------------------------


def test_overlap_measures_each_alone_and_all_together(tmp_path):
    table, found = measure(tmp_path, "overlap.py", "--ratios", "0.5,0.7")
    assert [row["ratio"] for row in found["rows"]] == [0.5, 0.7]
    for row in found["rows"]:
        seconds = row["seconds"]
        assert set(seconds) == {
            "storage", "copy", "compute", "side_by_side", "adaptive", "1MiBx4"
        }  # fmt: skip
        for figures in seconds.values():
            assert_positive(figures)
        longest = max(seconds[name]["median"] for name in ("storage", "copy", "compute"))
        expected = longest / seconds["adaptive"]["median"]
        assert row["efficiency"]["adaptive"]["median"] == pytest.approx(expected)
        assert row["stats"]["direct"]["bytes"] > 0
        assert row["stats"]["pagecache"]["bytes"] > 0
    assert "side by side, unconnected" in table
    assert {"where", "what", "value", "at_least", "holds"} == set(found["targets"][0])


def test_paper_has_a_row_for_every_variant(tmp_path, memory_cgroup):
    memory_cgroup(64 << 20)  # skips where there are none
    table, found = measure(tmp_path, "paper.py", "--kv", "256MiB", "--budgets", "150")
    variants = {(row["policy"], row["is_piped"]) for row in found["rows"]}
    assert variants >= {("memmap", False), ("static", False), ("static", True), ("direct", True)}
    for row in found["rows"]:
        assert row["error"] is None, row
        assert_positive(row["prefill_s"])
        assert_positive(row["step_ms"])
    assert "The paper's own figures" in table

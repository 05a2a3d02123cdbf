"""Every benchmark runs, measures all that it says it measures, and says what it could not have."""

from __future__ import annotations

import importlib.util
import json
import os
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


@pytest.mark.parametrize("name", ["engine.py", "ops.py", "stripes.py"])
def test_help_has_examples(tmp_path, name):
    done = bench(tmp_path, name, "--help")
    assert done.returncode == 0
    assert f"python bench/{name} " in done.stdout

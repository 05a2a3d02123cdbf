"""bench/instructions.py: what one read takes, and that a count above the baseline is an error."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "bench" / "instructions.py"
# Where threads of ours run beside each other, the counts depend on who comes first.
MARGINS = {"uring": 1.1, "aio": 1.1, "threads": 1.6}


def count(folder: Path, *arguments: object) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, str(SCRIPT), *map(str, arguments)]
    return subprocess.run(
        command, cwd=folder, env=environment, capture_output=True, text=True, check=False
    )


def medians(document):
    return {
        (row["from"], row["engine"], row["batch"]): row["instructions"]["median"]
        for row in document["counts"]
        if row["error"] is None
    }


def test_the_c_core_reads_with_no_more_instructions_than_before(tmp_path):
    for tool in ("valgrind", "gcc"):
        if not shutil.which(tool):
            pytest.skip(f"{tool} is not installed")
    baseline = json.loads((ROOT / "bench/results/instructions.json").read_text())
    lowered = json.loads(json.dumps(baseline))
    for row in lowered["counts"]:
        if row["instructions"]:
            row["instructions"]["median"] /= 4
    (tmp_path / "lowered.json").write_text(json.dumps(lowered))
    options = ("--only", "c", "--quick", "--json", "found.json", "--baseline", "lowered.json")
    done = count(tmp_path, *options, "--check")
    found = json.loads((tmp_path / "found.json").read_text())
    assert {path.name for path in tmp_path.iterdir()} == {"lowered.json", "found.json"}
    counts = medians(found)
    assert ("C", "threads", 64) in counts  # uring and aio may be forbidden here
    for (_, engine, batch), instructions in counts.items():
        assert 100 < instructions < 10_000
        assert f"C, {engine}, batches of {batch}: {instructions:.0f} instructions" in done.stderr
    assert done.returncode == 1
    same = ("compiler", "valgrind")
    if any(found[name] != baseline[name] for name in same):
        pytest.skip("the baseline was recorded with other tools")
    before = medians(baseline)
    for key, instructions in counts.items():
        assert instructions < before[key] * MARGINS[key[1]], key


def test_without_valgrind_it_says_what_to_install(tmp_path):
    command = [sys.executable, str(SCRIPT)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "PATH": str(tmp_path)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert done.stderr == "instructions.py: valgrind is not installed: apt install valgrind\n"


def test_help_has_examples(tmp_path):
    done = count(tmp_path, "--help")
    assert done.returncode == 0
    assert "python bench/instructions.py --only c --check" in done.stdout

"""tools/demo.py as a command: what it prints and how it exits, on its random model."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("transformers", reason="transformers is not installed")
pytest.importorskip("rich", reason="rich is not installed")

ROOT = Path(__file__).parents[2]


def demo(folder, *arguments):
    return subprocess.run(
        [sys.executable, str(ROOT / "tools" / "demo.py"), *arguments],
        env=os.environ | {"XDG_CACHE_HOME": str(folder), "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )


def test_reports_both_runs_and_both_paths(tmp_path):
    done = demo(tmp_path, "--model=random", "--prompt-tokens=700", "--new-tokens=9", "--json")
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert report["identical"]
    assert report["logits_identical"]
    assert report["on_storage"]["ids"] == report["in_memory"]["ids"]
    assert len(report["on_storage"]["ids"]) == 9
    # 12 layers of 4 heads of 64 numbers of 2 bytes, for keys and for values.
    assert report["kv_bytes"] == 2 * 12 * 4 * 64 * 2 * (700 + 8)
    assert report["memory_budget_bytes"] < report["kv_bytes"]
    paths = report["paths"].values()
    assert [path["layers"] > 0 for path in paths] == [True, True]
    assert all(path["decode_read_bytes"] > 0 for path in paths)
    assert sum(path["write_bytes"] for path in paths) >= report["kv_bytes"] * 0.9
    assert list((tmp_path / "dualblade").iterdir()) == []


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--memory=3X"], "unknown unit"),
        (["--new-tokens=0"], "not a number from 1 on"),
        (["--model=/nowhere"], "no such folder or file"),
        (["--store=/"], "is a directory"),
    ],
)
def test_wrong_usage(tmp_path, arguments, said):
    done = demo(tmp_path, *arguments)
    assert done.returncode == 2
    assert said in done.stderr


def test_a_folder_without_a_model(tmp_path):
    done = demo(tmp_path, f"--model={tmp_path}")
    assert done.returncode == 1
    assert "The demo failed" in done.stderr

"""tools/gpu-check where there is no GPU: what it says, and the folder of libraries it prepares."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import subprocess
import sys
from importlib.machinery import SourceFileLoader
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
TOOL = ROOT / "tools/gpu-check"

# What a machine with a GPU answers when it is asked what it is.
FAKE_CUPY = """
import types
__version__ = "14.2.0"
runtime = types.SimpleNamespace(
    getDeviceCount=lambda: 1,
    getDeviceProperties=lambda index: {"name": b"Pretended"},
    memGetInfo=lambda: (1, 2),
    driverGetVersion=lambda: 13000,
    runtimeGetVersion=lambda: 12090,
)
cuda = types.SimpleNamespace(runtime=runtime)
"""


def gpu_check(*arguments, cwd=ROOT, **environment):
    return subprocess.run(
        [sys.executable, TOOL, *arguments],
        cwd=cwd,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.fixture
def pretended(tmp_path):
    """A folder whose CuPy says that there is a GPU."""
    (tmp_path / "path").mkdir()
    (tmp_path / "path/cupy.py").write_text(FAKE_CUPY)
    return str(tmp_path / "path")


@pytest.fixture
def tool():
    loader = SourceFileLoader("gpu_check", str(TOOL))
    spec = importlib.util.spec_from_loader("gpu_check", loader)
    module = importlib.util.module_from_spec(spec)
    loader.exec_module(module)
    return module


def test_help_has_examples():
    done = gpu_check("--help")
    assert done.returncode == 0
    assert "--prepare build/gpu-deps" in done.stdout
    assert "Exit status: 0" in done.stdout


def test_wrong_usage_is_2():
    assert gpu_check("--only", "build,nothing").returncode == 2
    assert gpu_check("--nothing").returncode == 2


def test_without_a_gpu_it_says_so(tmp_path):
    (tmp_path / "cupy.py").write_text("raise ImportError('no CUDA here')\n")
    done = gpu_check("--output", str(tmp_path / "out"), PYTHONPATH=str(tmp_path))
    assert done.returncode == 2
    assert "no CUDA here" in done.stderr
    assert "nvidia-smi" in done.stderr


def test_a_folder_that_was_not_prepared_is_told(tmp_path, pretended):
    done = gpu_check("--deps", str(tmp_path), "--output", str(tmp_path), PYTHONPATH=pretended)
    assert done.returncode == 2
    assert f"--prepare {tmp_path}" in done.stderr


def test_the_results_say_what_ran_and_where(tmp_path, pretended):
    out = tmp_path / "out"
    done = gpu_check("--only", "sanitizer", PYTHONPATH=pretended, PATH="/nonexistent", OUT=str(out))
    assert done.returncode == 0, done.stderr
    assert "compute-sanitizer is not installed" in done.stdout
    told = json.loads((out / "gpu-check.json").read_text())
    assert told["machine"]["gpu"] == "Pretended"
    assert told["passed"] is True
    assert told["steps"]["sanitizer"]["status"] == "skipped"


def test_a_step_that_fails_is_1_and_the_others_run(tool, tmp_path):
    steps = tool.Steps(tmp_path, dict(os.environ), 60)
    assert not steps.run("first", [sys.executable, "-c", "print('to_device: 9.5 GB/s x'); exit(3)"])
    assert steps.run("second", [sys.executable, "-c", "exit(5)"], none_found=5)
    steps.log.close()
    first, second = steps.results["first"], steps.results["second"]
    assert (first["status"], first["exit_status"]) == ("FAILED", 3)
    assert first["figures"] == ["to_device: 9.5 GB/s x"]
    assert second["status"] == "skipped"


def test_the_time_limit_ends_a_step(tool, tmp_path):
    steps = tool.Steps(tmp_path, dict(os.environ), 1)
    assert not steps.run("endless", [sys.executable, "-c", "import time; time.sleep(600)"])
    assert not steps.run("later", [sys.executable, "-c", ""])
    steps.log.close()
    assert steps.results["endless"]["status"] == "FAILED"
    assert steps.results["later"]["status"] == "skipped"


def test_a_step_that_takes_too_long_leaves_time_for_the_others(tool, tmp_path, monkeypatch):
    monkeypatch.setitem(tool.LIMITS_S, "endless", 1)
    steps = tool.Steps(tmp_path, dict(os.environ), 60)
    assert not steps.run("endless", [sys.executable, "-c", "import time; time.sleep(600)"])
    assert steps.run("later", [sys.executable, "-c", ""])
    steps.log.close()
    assert steps.results["endless"]["last_line"] == "ended after 1 s"
    assert steps.results["later"]["status"] == "passed"


def test_without_a_control_group_the_benchmark_that_needs_one_is_skipped(
    tool, tmp_path, monkeypatch
):
    steps = tool.Steps(tmp_path, dict(os.environ), 60)
    monkeypatch.setattr(tool.Steps, "no_group", lambda _: "there is no memory controller")
    assert steps.bench("paper")
    steps.log.close()
    assert steps.results["paper"] == {
        "status": "skipped",
        "seconds": 0.0,
        "why": "there is no memory controller",
    }


def test_the_benchmarks_understand_what_they_are_given(tool):
    for name, options in tool.BENCHES.items():
        done = subprocess.run(
            [sys.executable, ROOT / "bench" / f"{name}.py", *options.split(), "--help"],
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        assert {word for word in options.split() if word.startswith("--")} <= set(
            done.stdout.replace(",", " ").split()
        )


def test_libraries_are_laid_out_as_plain_files(tool, tmp_path):
    tree, deps = tmp_path / "tree", tmp_path / "deps"
    lib = tree / "usr/lib/x86_64-linux-gnu"
    lib.mkdir(parents=True)
    (tree / "usr/include/liburing").mkdir(parents=True)
    for name in ("liburing.h", "liburing/compat.h", "libaio.h", "xxhash.h", "xxh3.h"):
        (tree / "usr/include" / name).write_text(name)
    for name in ("liburing.a", "libxxhash.a", "libaio.so.1.0.1"):
        (lib / name).write_text(name)
    (lib / "libaio.so").symlink_to("/lib/x86_64-linux-gnu/libaio.so.1.0.1")
    (lib / "libaio.so.1").symlink_to("libaio.so.1.0.1")
    tool.lay_out(tree, deps)
    tool.lay_out(tree, deps)
    files = {str(path.relative_to(deps)) for path in deps.rglob("*") if path.is_file()}
    assert files == {
        *("include/liburing.h", "include/liburing/compat.h", "include/libaio.h"),
        *("include/xxhash.h", "include/xxh3.h"),
        *("lib/liburing.a", "lib/libxxhash.a", "lib/libaio.so", "lib/libaio.so.1"),
    }
    assert not any(path.is_symlink() for path in deps.rglob("*"))
    environment = tool.build_environment(deps)
    assert environment["CPATH"].split(":")[0] == str(deps / "include")
    assert environment["LD_LIBRARY_PATH"].split(":")[0] == str(deps / "lib")


@pytest.mark.skipif(shutil.which("apt-get") is None, reason="needs apt-get")
def test_a_package_archive_that_is_not_there_is_told(tool, tmp_path, monkeypatch):
    monkeypatch.setattr(tool, "PACKAGES", ("a-package-that-is-not-there",))
    with pytest.raises(tool.CannotRun, match="apt-get"):
        tool.run_apt(["download", *tool.PACKAGES], tmp_path, "amd64")

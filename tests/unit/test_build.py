"""The build: its options, its words when a library is missing, and what it ships."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

pytest.importorskip("Cython", reason="Cython is needed to build")

ROOT = Path(__file__).parents[2]


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """A copy of what the build reads."""
    for folder in ("csrc", "dualblade"):
        ignored = shutil.ignore_patterns("*.so", "__pycache__")
        shutil.copytree(ROOT / folder, tmp_path / folder, ignore=ignored)
    for name in ("setup.py", "pyproject.toml", "LICENSE", "README.md"):
        shutil.copy(ROOT / name, tmp_path)
    return tmp_path


def build(tree: Path, *command: str, **environment: str) -> subprocess.CompletedProcess:
    plain = {key: value for key, value in os.environ.items() if not key.startswith("DUALBLADE_")}
    return subprocess.run(
        [sys.executable, "setup.py", *command],
        cwd=tree,
        env=plain | environment,
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.mark.parametrize("name", ["DUALBLADE_URING", "DUALBLADE_SANITIZE"])
def test_an_unknown_option_is_an_error(tree, name):
    done = build(tree, "build_ext", "--inplace", **{name: "maybe"})
    assert done.returncode == 1
    assert f"{name}=maybe is not known" in done.stderr


def test_a_missing_header_names_its_packages(tree):
    compiler = tree / "cc"
    compiler.write_text(
        "#!/bin/sh\nfor last; do case $last in *probe.c) source=$last ;; esac; done\n"
        'if [ "$source" ] && grep -q -e liburing.h -e xxhash.h "$source"; then exit 1; fi\n'
        'exec gcc "$@"\n',
        encoding="ascii",
    )
    compiler.chmod(0o755)
    done = build(tree, "build_ext", "--inplace", CC=str(compiler))
    assert done.returncode == 1
    (message,) = [line for line in done.stderr.splitlines() if line.startswith("error:")]
    assert "liburing.h, xxhash.h not found" in message
    assert "apt install liburing-dev libxxhash-dev (Debian)" in message
    assert "dnf install liburing-devel xxhash-devel (Fedora)" in message
    assert "DUALBLADE_URING=off" in message


def test_a_missing_compiler_is_named(tree):
    done = build(tree, "build_ext", "--inplace", CC="/nowhere/gcc")
    assert done.returncode == 1
    assert "/nowhere/gcc cannot be run" in done.stderr


def test_without_liburing_it_builds_and_falls_back(tree):
    done = build(tree, "build_ext", "--inplace", DUALBLADE_URING="off")
    assert done.returncode == 0, done.stderr
    assert not list((tree / "dualblade").glob("*.c")), "generated C in the tree"
    (tree / "kv.img").write_bytes(bytes(1 << 20))
    program = (
        "import dualblade, sys\n"
        "with dualblade.Device.open('kv.img') as device: print(device.info.engine)\n"
        "try: dualblade.Device.open('kv.img', engine='uring')\n"
        "except dualblade.UnsupportedError as error: print(error)\n"
    )
    command = [sys.executable, "-W", "ignore", "-c", program]
    ran = subprocess.run(command, cwd=tree, capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr
    engine, refusal = ran.stdout.splitlines()
    assert engine in {"aio", "threads"}
    assert "uring" in refusal


def test_the_source_distribution_has_everything_that_the_build_reads(tree):
    done = build(tree, "sdist", "--dist-dir", "dist")
    assert done.returncode == 0, done.stderr
    (archive,) = (tree / "dist").glob("*.tar.gz")
    with tarfile.open(archive) as file:
        shipped = {name.split("/", 1)[1] for name in file.getnames() if "/" in name}
    patterns = ("csrc/*.[ch]", "dualblade/**/*.py", "dualblade/*.p[yx][xdi]", "dualblade/py.typed")
    wanted = {str(p.relative_to(tree)) for pattern in patterns for p in tree.glob(pattern)}
    assert wanted | {"LICENSE", "README.md", "pyproject.toml", "setup.py"} <= shipped

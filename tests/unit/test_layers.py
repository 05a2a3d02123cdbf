"""Imports point downward only: what each part of dualblade may know of the others."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "dualblade"
CSRC = ROOT / "csrc"

# From the top down. A module imports from the lines below its own, never from its own line;
# inside the packages cli and integrations, modules may import their siblings.
LAYERS = (
    {"cli", "integrations"},
    {"__init__"},
    {"kvcache", "opening"},
    {"readahead"},  # this and the next four lines are KVCache's parts
    {"kvdevice"},
    {"write_behind"},
    {"kvlayer"},
    {"buffer_pool"},
    {"store"},
    {"saving"},  # this and the next five lines are the store's parts
    {"watcher"},
    {"rebinding", "views", "parts"},
    {"transfer"},
    {"access"},
    {"index"},
    {"pipeline"},  # this and the next two lines are the pipeline's parts
    {"lanes"},
    {"staging"},
    {"residency", "catalog", "governor", "sharing", "tuning", "ticket"},
    {"doubts"},
    {"entry"},
    {"safety"},
    {"paths", "memory", "gpu", "header", "writeback"},
    {"cgroups", "gpu_cuda", "gpu_host"},
    {"gpu_cuda_streams", "gpu_host_streams"},
    {"gpu_arena", "gpu_schedule"},
    {"_core", "tensor", "kernelfile"},
    {"errors"},
    {"nvme_status"},
)
LEVEL = {name: level for level, names in enumerate(reversed(LAYERS)) for name in names}
PACKAGES = {"cli", "integrations"}
MODULES = sorted(PACKAGE.rglob("*.py"))
CYTHON = sorted([*PACKAGE.glob("*.pyx"), *PACKAGE.glob("*.pxi")])

OPTIONAL = {"torch", "transformers", "cupy", "vllm", "lmcache", "sglang", "rich", "matplotlib"}


def room(path: Path) -> str:
    """The name in the table that this file belongs to."""
    first = path.relative_to(PACKAGE).parts[0]
    return "_core" if path in CYTHON else first.removesuffix(".py")


def named(dotted: str, names: list[str]) -> set[str]:
    """The rooms meant by `from dotted import names` (or `import dotted`: no names)."""
    parts = dotted.split(".")
    if len(parts) > 1:
        return {parts[1]}
    return {name if name in LEVEL else "__init__" for name in names or ["__init__"]}


def imported(path: Path) -> set[str]:
    """The rooms that a Python file imports, also inside functions and for types only."""
    rooms = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            for alias in node.names:
                if alias.name.split(".")[0] == "dualblade":
                    rooms |= named(alias.name, [])
        elif isinstance(node, ast.ImportFrom):
            package = ["dualblade", *path.relative_to(PACKAGE).parts[:-1]]
            base = package[: len(package) - node.level + 1] if node.level else []
            dotted = ".".join(base + ([node.module] if node.module else []))
            if dotted.split(".")[0] == "dualblade":
                rooms |= named(dotted, [alias.name for alias in node.names])
    return rooms


def test_every_module_has_its_place_in_the_table():
    assert {room(path) for path in MODULES} <= set(LEVEL)


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_point_downward(path):
    here = room(path)
    own = {here} if here in PACKAGES else set()
    upward = {name for name in imported(path) - own if LEVEL.get(name, 99) >= LEVEL[here]}
    assert not upward, f"{path.name} ({here}) imports {upward}, which are not below it"


@pytest.mark.parametrize("path", CYTHON, ids=lambda path: path.name)
def test_the_binding_imports_errors_only(path):
    pattern = r"^\s*(?:from|import)\s+(dualblade[\w.]*|\.[\w.]*)\s+(?:c?import)"
    found = set(re.findall(pattern, path.read_text(encoding="utf-8"), re.MULTILINE))
    assert found <= {"dualblade.errors", "dualblade.csrc"}


def test_the_table_sees_what_it_forbids(tmp_path, monkeypatch):
    monkeypatch.setattr(sys.modules[__name__], "PACKAGE", tmp_path)
    module = tmp_path / "paths.py"
    module.write_text(
        "from .store import TensorStore\n"
        "from dualblade import errors, open\n"
        "def f():\n    import dualblade.kvcache as k\n    from . import catalog\n",
        encoding="utf-8",
    )
    assert imported(module) == {"store", "errors", "__init__", "kvcache", "catalog"}


def includes(path: Path) -> set[str]:
    return set(re.findall(r'#\s*include\s*[<"]([^>"]+)[>"]', path.read_text(encoding="utf-8")))


def test_the_c_core_knows_nothing_of_python():
    sources = sorted(CSRC.glob("*.[ch]"))
    assert sources
    assert [path.name for path in sources if "Python.h" in includes(path)] == []


def test_engines_know_nothing_of_batches_and_queues():
    own = {path.name for path in CSRC.glob("*.h")}
    engines = sorted(CSRC.glob("engine_*.c"))
    assert engines
    for path in engines:
        allowed = {"engine.h", "dualblade.h", "counters.h", "clock.h", "refused.h", "ring.h"}
        assert includes(path) & own <= allowed, path.name


def test_importing_dualblade_imports_nothing_optional():
    names = [
        ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
        for path in MODULES
        if room(path) != "integrations"
    ]
    program = (
        f"import sys, importlib\n"
        f"for name in {names}: importlib.import_module(name)\n"
        f"print(*sorted({OPTIONAL} & set(sys.modules)))"
    )
    command = [sys.executable, "-c", program]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == []

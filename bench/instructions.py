"""Counts the instructions that one 4 KiB read takes in user space, so that a change shows whatever
else the machine does.

Callgrind counts them in the C core alone, and from Python through Device.read. What starting and
ending take cancels out: a count is the difference between so many reads and twice as many. The
kernel's part is not in it.

    python bench/instructions.py
    python bench/instructions.py --only c --check       against bench/results/instructions.json
    python bench/instructions.py --record               make this machine's counts the baseline
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import machine
import report

ROOT = Path(__file__).resolve().parents[1]
BASELINE = ROOT / "bench" / "results" / "instructions.json"
ENGINES = ("uring", "aio", "threads")
BATCHES = (64, 1)
# How far a count may be above the baseline's. With threads of ours beside each other it depends on
# who comes first, and varies by a quarter.
TOLERANCE = {"uring": 0.1, "aio": 0.1, "threads": 0.6}
FILE_BYTES = 8 << 20
READS = 512
ROUNDS = 3
QUICK_READS = 128
# As setup.py builds the extension.
FLAGS = "-std=gnu11 -O3 -g -UNDEBUG -fvisibility=hidden -Wall -Wextra -pthread".split()


class CountError(Exception):
    """Something that counting needs is missing, or failed; the text says what."""


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; returns its exit status."""
    options = _parser().parse_args(arguments)
    try:
        found = measure(options)
        baseline = _baseline(options.baseline, required=options.check)
    except CountError as error:
        print(f"instructions.py: {error}", file=sys.stderr)
        return 1
    print(_table(found, baseline))
    report.write_json(options.json, found)
    if options.record:
        options.baseline.parent.mkdir(exist_ok=True)
        report.write_json(str(options.baseline), found)
    worse = regressions(found, baseline) if options.check and baseline else []
    for line in worse:
        print(f"instructions.py: {line}", file=sys.stderr)
    return 1 if worse else 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="instructions.py",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--only", choices=("c", "python"), help="the C core alone, or from Python")
    add("--quick", action="store_true", help="fewer reads: the counts are a little less exact")
    add("--folder", default=".", help="where the file that is read is made (and removed)")
    add("--json", metavar="FILE", help="write everything that was counted")
    add("--check", action="store_true", help="exit 1 if a count is over 10 %% above the baseline")
    add("--baseline", type=Path, default=BASELINE, metavar="FILE", help="default: the recorded one")
    add("--record", action="store_true", help="write the counts to the baseline")
    return parser


# ---- counting ------------------------------------------------------------------------------------


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """All counts, and where they come from. Raises CountError."""
    for tool in ("valgrind", "gcc"):
        if not shutil.which(tool):
            raise CountError(f"{tool} is not installed: apt install {tool}")
    reads = QUICK_READS if options.quick else READS
    found: dict[str, Any] = {
        "machine": machine.describe(options.folder),
        "compiler": _first_line("gcc", "--version"),
        "valgrind": _first_line("valgrind", "--version"),
        "python": platform.python_version(),
        "counts": [],
    }
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        target = Path(folder, "target.img")
        target.write_bytes(os.urandom(FILE_BYTES))
        jobs: list[tuple[str, str, list[str]]] = []
        if options.only != "python":
            program = _build(Path(folder))
            jobs += [("C", engine, [program]) for engine in ENGINES]
        if options.only != "c":
            jobs.append(("Python", "uring", [sys.executable, __file__]))
        for what, engine, program in jobs:
            for batch in BATCHES:
                report.progress(f"{what}, {engine}, batches of {batch}")
                row = {"from": what, "engine": engine, "batch": batch}
                command = [*program, str(target), engine, str(batch), str(reads), str(ROUNDS)]
                found["counts"].append(row | _count(command, reads, Path(folder)))
        report.progress("")
    return found


def _build(folder: Path) -> str:
    """Compiles the C core and the program that drives it; the program's path."""
    sources = [*sorted((ROOT / "csrc").glob("*.c")), ROOT / "bench" / "instructions.c"]

    def compile_one(source: Path) -> str:
        target = str(folder / f"{source.stem}.o")
        _command("gcc", *FLAGS, "-D_GNU_SOURCE=", f"-I{ROOT / 'csrc'}", "-c", source, "-o", target)
        return target

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        objects = list(pool.map(compile_one, sources))
    libraries = ["-luring", "-laio", "-lxxhash", "-ldl", "-lpthread"]
    _command("gcc", "-pthread", *objects, *libraries, "-o", folder / "instructions")
    return str(folder / "instructions")


def _command(*words: Any) -> str:
    done = subprocess.run([*map(str, words)], capture_output=True, text=True, check=False)
    if done.returncode:
        raise CountError(f"{words[0]} failed: {done.stderr.strip()}")
    return done.stdout


def _count(program: list[str], reads: int, folder: Path) -> dict[str, Any]:
    """Instructions per read of a program that calls getppid() between its runs; or its error."""
    for old in folder.glob("counted*"):
        old.unlink()
    command = ["valgrind", "--tool=callgrind", "--dump-before=getppid"]
    command += [f"--callgrind-out-file={folder}/counted", *program]
    done = subprocess.run(
        command,
        capture_output=True,
        text=True,
        check=False,
        env={
            **os.environ,
            "PYTHONPATH": os.pathsep.join(filter(None, sys.path)),
            "OPENBLAS_NUM_THREADS": "1",  # numpy's idle threads would be counted too
        },
    )
    if done.returncode:
        words = [line for line in done.stderr.splitlines() if not line.startswith("==")]
        return {"instructions": None, "error": words[-1] if words else f"status {done.returncode}"}
    # The first part is everything before the first mark.
    parts = [_total(folder / f"counted.{number}") for number in range(2, 2 * ROUNDS + 2)]
    pairs = zip(parts[::2], parts[1::2], strict=True)
    counts = report.spread((long - short) / reads for short, long in pairs)
    return {"instructions": counts, "error": None}


def _total(path: Path) -> int:
    match = re.search(r"^(?:summary|totals): (\d+)", path.read_text("utf-8"), re.MULTILINE)
    if match is None:
        raise CountError(f"callgrind wrote no total into {path.name}")
    return int(match[1])


def _first_line(*command: str) -> str:
    return _command(*command).splitlines()[0]


# ---- the program that is counted from Python -----------------------------------------------------


def read_from_python(path: str, engine: str, batch: int, reads: int, rounds: int) -> None:
    """What instructions.c does, through Device.read."""
    import numpy as np

    import dualblade

    with dualblade.Device.open(path, engine, 64, read_only=True) as device:
        memory = dualblade.aligned_empty(64 * 4096, np.uint8)
        memory[:] = 0
        device.register([memory])
        views = [memoryview(memory)[i * 4096 : (i + 1) * 4096] for i in range(batch)]
        places = np.random.default_rng(1).integers(0, device.info.size // 4096, 2 * reads) * 4096
        offsets = [places[i : i + batch].tolist() for i in range(0, 2 * reads, batch)]

        def read(count: int) -> None:
            for group in offsets[: count // batch]:
                device.read(zip(group, views, strict=True)).wait()

        read(reads)
        os.getppid()
        for _ in range(rounds):
            read(reads)
            os.getppid()
            read(2 * reads)
            os.getppid()


# ---- the baseline --------------------------------------------------------------------------------


def _baseline(path: Path, *, required: bool) -> dict[str, Any] | None:
    try:
        return json.loads(path.read_text("utf-8"))
    except FileNotFoundError:
        if required:
            raise CountError(f"there is no baseline {path}: --record makes one") from None
        return None


def _key(row: dict[str, Any]) -> tuple[Any, ...]:
    return row["from"], row["engine"], row["batch"]


def _medians(found: dict[str, Any] | None) -> dict[tuple[Any, ...], float]:
    rows = found["counts"] if found else []
    return {_key(row): row["instructions"]["median"] for row in rows if row["instructions"]}


def regressions(found: dict[str, Any], baseline: dict[str, Any]) -> list[str]:
    """A line for each count that is too far above the baseline's."""
    before = _medians(baseline)
    lines = []
    for key, count in _medians(found).items():
        if key in before and count > before[key] * (1 + TOLERANCE[key[1]]):
            lines.append(
                f"{key[0]}, {key[1]}, batches of {key[2]}: {count:.0f} instructions a read, "
                f"{count / before[key] - 1:.0%} above the baseline's {before[key]:.0f}"
            )
    return lines


def _table(found: dict[str, Any], baseline: dict[str, Any] | None) -> str:
    before = _medians(baseline)
    rows = []
    for row in found["counts"]:
        known = before.get(_key(row))
        counts = row["instructions"]
        rows.append([
            row["from"],
            row["engine"],
            str(row["batch"]),
            report.shown(counts, 0),
            f"{known:.0f}" if known else "-",
            f"{counts['median'] / known:.2f}" if known and counts else "-",
            row["error"] or "",
        ])  # fmt: skip
    heads = ["from", "engine", "batch", "instructions/read", "baseline", "ratio", ""]
    about = [
        machine.summary(found["machine"]),
        f"{found['compiler']}; {found['valgrind']}; Python {found['python']}; user space only, "
        f"median of {ROUNDS} [least-most]",
    ]
    if baseline and baseline["compiler"] != found["compiler"]:
        about.append(f"the baseline was made with {baseline['compiler']}")
    return "\n".join([*about, "", report.table(heads, rows, left=2)])


if __name__ == "__main__":
    if len(sys.argv) == 6 and sys.argv[2] in ENGINES:
        read_from_python(sys.argv[1], sys.argv[2], *map(int, sys.argv[3:]))
    else:
        sys.exit(main())

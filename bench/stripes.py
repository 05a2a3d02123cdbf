"""Measures one drive alone against two striped, with fio on both at once as the ceiling."""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import machine
import numpy as np
import report
import rivals

import dualblade
from dualblade.memory import format_size, parse_size

DESCRIPTION = """\
Throughput of a dualblade.Device on one loop device and striped over two, in turn, beside fio on one
and on both at once. Twice: as they are, which are often parts of one drive below, and each limited
to a bandwidth of its own by a control group (version 1), as two drives are.
"""
EXAMPLES = """\
examples:
  sudo python bench/stripes.py                               with files in this directory
  sudo python bench/stripes.py --folder /mnt/nvme --json stripes.json --plot stripes.png
  sudo python bench/stripes.py --limit 500MiB --limited-size 256MiB
  sudo python bench/stripes.py --quick                       does it run? Its figures mean little
"""
BLKIO = Path("/sys/fs/cgroup/blkio")
STRIPE_BYTES = 1 << 20
DEPTH_MAX = 128
"""Blocks in flight: with more a control group falls short of its limit, for everybody."""


class Workload(NamedTuple):
    """Blocks of one size in one order and direction."""

    block_bytes: int
    is_random: bool
    direction: str

    @property
    def title(self) -> str:
        """As tables show it."""
        order = "random" if self.is_random else "sequential"
        return f"{format_size(self.block_bytes)} {order} {self.direction}"


# Not larger: what the drive's limits split is counted twice by a control group.
WORKLOADS = (
    Workload(1 << 20, False, "write"),
    Workload(1 << 20, False, "read"),
    Workload(64 << 10, True, "read"),
)


# ---- the drives ----------------------------------------------------------------------------------


@contextlib.contextmanager
def drives(folder: str, size_bytes: int) -> Iterator[list[str]]:
    """Two loop devices with direct I/O over two files, written once all over."""
    with contextlib.ExitStack() as stack:
        inside = stack.enter_context(tempfile.TemporaryDirectory(dir=folder))
        paths = []
        for number in range(2):
            image = os.path.join(inside, f"drive{number}.img")
            report.progress(f"writing file {number + 1} of 2 once")
            piece = random.Random(number).randbytes(4 << 20)
            with open(image, "wb") as file:
                file.writelines(piece for _ in range(0, size_bytes, len(piece)))
                file.flush()
                os.fsync(file.fileno())
            command = ["losetup", "--find", "--show", "--direct-io=on", image]
            paths.append(output(command).strip())
            stack.callback(output, ["losetup", "--detach", paths[-1]])
        yield paths


@contextlib.contextmanager
def limited(paths: Sequence[str], bytes_per_s: int) -> Iterator[None]:
    """This process and its children move at most so much to and from each of these drives."""
    group = BLKIO / f"dualblade-bench-{os.getpid()}"
    group.mkdir()
    try:
        for path in paths:
            number = os.stat(path).st_rdev
            line = f"{os.major(number)}:{os.minor(number)} {bytes_per_s}"
            for direction in ("read", "write"):
                (group / f"blkio.throttle.{direction}_bps_device").write_text(line)
        (group / "cgroup.procs").write_text(str(os.getpid()))
        yield
    finally:
        (BLKIO / "cgroup.procs").write_text(str(os.getpid()))
        group.rmdir()


def output(command: Sequence[str]) -> str:
    """Of a command; OSError with what it complained of. fio's memory is in huge pages, as ours."""
    environment = {**os.environ, **rivals.Fio.environment}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    if done.returncode:
        raise OSError(f"{command[0]}: {(done.stderr + done.stdout).strip()}")
    return done.stdout


# ---- who moves the bytes: each returns the seconds that it took ----------------------------------


def run_device(
    paths: Sequence[str], workload: Workload, size_bytes: int, arena: np.ndarray[Any, Any]
) -> float:
    """A Device on these drives, with the arena's bytes in flight."""
    block = workload.block_bytes
    depth = min(len(arena) // block, DEPTH_MAX)
    offsets = list(range(0, size_bytes, block))
    if workload.is_random:
        random.Random(1).shuffle(offsets)
    requests = [
        (offset, arena[number % depth * block : (number % depth + 1) * block])
        for number, offset in enumerate(offsets)
    ]
    step = max(1, depth // 8)
    with dualblade.Device.open(list(paths), stripe_bytes=STRIPE_BYTES) as device:
        device.register([arena])
        start_one = device.write if workload.direction == "write" else device.read
        pending: deque[Any] = deque()
        begin = time.perf_counter()
        for first in range(0, len(requests), step):
            if len(pending) == depth // step:
                pending.popleft().wait()
            pending.append(start_one(requests[first : first + step]))
        while pending:
            pending.popleft().wait()
        return time.perf_counter() - begin


def run_fio(
    paths: Sequence[str], workload: Workload, size_bytes: int, arena: np.ndarray[Any, Any]
) -> float:
    """fio with a job for each drive; they share the bytes, and those in flight."""
    block = workload.block_bytes
    command = [
        "fio",
        "--ioengine=io_uring",
        "--fixedbufs=1",
        "--registerfiles=1",
        "--direct=1",
        "--scramble_buffers=0",
        "--group_reporting=1",
        "--output-format=json",
        f"--rw={'rand' if workload.is_random else ''}{workload.direction}",
        f"--bs={block}",
        f"--iodepth={max(1, min(len(arena) // block, DEPTH_MAX) // len(paths))}",
        f"--size={size_bytes // len(paths)}",
    ]
    for path in paths:
        command += [f"--name={path}", f"--filename={path}"]
    text = output(command)
    found = json.loads(text[text.index("{") :])["jobs"][0][workload.direction]
    return float(found["io_bytes"] / found["bw_bytes"])


Contender = Callable[[Sequence[str], Workload, int, Any], float]
CONTENDERS: tuple[tuple[str, str, Contender, int], ...] = (
    ("one", "Device on one", run_device, 1),
    ("striped", "Device striped over two", run_device, 2),
    ("fio-one", "fio on one", run_fio, 1),
    ("fio-both", "fio on both at once", run_fio, 2),
)
BASE = {"striped": "one", "fio-both": "fio-one"}


# ---- measuring -----------------------------------------------------------------------------------


def measure(
    setup: str, paths: Sequence[str], size_bytes: int, options: argparse.Namespace
) -> list[dict[str, Any]]:
    """All rounds of all workloads, the contenders in turn; a row for each."""
    arena = dualblade.aligned_empty(options.in_flight, np.uint8)
    arena[:] = 1
    rows = []
    for workload in WORKLOADS:
        rates: dict[str, list[float]] = {name: [] for name, *_ in CONTENDERS}
        for number in range(options.rounds):
            for name, label, run, count in CONTENDERS:
                if run is not run_fio or shutil.which("fio"):
                    report.progress(f"{setup}: {workload.title}, round {number + 1}: {label}")
                    seconds = run(paths[:count], workload, size_bytes, arena)
                    rates[name].append(size_bytes / seconds / 1e6)
        for name, label, *_ in CONTENDERS:
            base = rates.get(BASE.get(name, ""), [])
            ratios = [ours / theirs for ours, theirs in zip(rates[name], base, strict=False)]
            rows.append(
                {
                    "setup": setup,
                    "workload": workload.title,
                    "contender": name,
                    "label": label,
                    "mb_per_s": report.spread(rates[name]) if rates[name] else None,
                    "ratio_to_one": report.spread(ratios) if ratios else None,
                }
            )
    report.progress("")
    return rows


def run(options: argparse.Namespace) -> tuple[list[dict[str, Any]], list[str]]:
    """The rows, and what could not be had."""
    largest = max(options.size, options.limited_size)
    with drives(options.folder, largest) as paths:
        rows = measure("as they are", paths, options.size, options)
        if not (BLKIO / "blkio.throttle.read_bps_device").exists():
            return rows, [f"no drives with a limit: there is no control group in {BLKIO}"]
        with limited(paths, options.limit):
            setup = f"each limited to {format_size(options.limit)}/s"
            return rows + measure(setup, paths, options.limited_size, options), []


# ---- the command ---------------------------------------------------------------------------------


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The options; exits with one line if they make no sense."""
    parser = report.parser("bench/stripes.py", DESCRIPTION, EXAMPLES)
    parser.add_argument("--folder", default=".", help="where the files are made, for this run")
    parser.add_argument("--size", type=parse_size, help="bytes moved in each run (512MiB)")
    parser.add_argument(
        "--in-flight", type=parse_size, help="bytes in flight, of at most 128 blocks (32MiB)"
    )
    parser.add_argument(
        "--limit", type=parse_size, default=200 << 20, help="of each drive, a second (200MiB)"
    )
    parser.add_argument("--limited-size", type=parse_size, help="bytes moved then (256MiB)")
    report.add_options(parser, rounds=5)
    options = parser.parse_args(arguments)
    options.size = options.size or (32 << 20 if options.quick else 512 << 20)
    options.limited_size = options.limited_size or (32 << 20 if options.quick else 256 << 20)
    options.in_flight = options.in_flight or (8 << 20 if options.quick else 32 << 20)
    options.rounds = 1 if options.quick else options.rounds
    block = WORKLOADS[0].block_bytes
    for name in ("size", "limited_size", "in_flight"):
        if getattr(options, name) % (2 * block):
            parser.error(f"--{name.replace('_', '-')} is a multiple of {format_size(2 * block)}")
    if options.plot and (problem := report.plot_error()):
        parser.error(problem)
    if os.geteuid() != 0:
        parser.error("loop devices need root")
    return options


def main(arguments: Sequence[str] | None = None) -> int:
    """The command."""
    options = parse(arguments)
    where = machine.describe(options.folder)
    try:
        rows, missing = run(options)
    except OSError as error:
        raise SystemExit(f"bench/stripes.py: {error}") from error
    print(render(rows, missing, where, options))
    report.write_json(
        options.json,
        {
            "benchmark": "stripes",
            "dualblade": dualblade.__version__,
            "machine": where,
            "stripe_bytes": STRIPE_BYTES,
            "in_flight_bytes": options.in_flight,
            "rounds": options.rounds,
            "rows": rows,
            "missing": missing,
        },
    )
    if options.plot:
        panels = {}
        for row in rows:
            title = f"Two loop devices, {row['setup']}"
            panel = panels.setdefault(row["setup"], report.Panel(title, "MB/s"))
            panel.add(row["workload"], row["label"], row["mb_per_s"])
        report.plot(options.plot, machine.summary(where), list(panels.values()))
    return 0


def render(
    rows: Sequence[dict[str, Any]],
    missing: Sequence[str],
    where: dict[str, Any],
    options: argparse.Namespace,
) -> str:
    """The table."""
    lines = [
        machine.summary(where),
        f"two loop devices over files, stripes of {format_size(STRIPE_BYTES)}, "
        f"{format_size(options.in_flight)} in flight, medians of {options.rounds}",
    ]
    for setup, title in dict.fromkeys((row["setup"], row["workload"]) for row in rows):
        cells = [
            [
                row["label"],
                report.shown(row["mb_per_s"], 0),
                report.shown(row["ratio_to_one"], 2),
                "" if row["mb_per_s"] else "fio is not installed (apt install fio)",
            ]
            for row in rows
            if (row["setup"], row["workload"]) == (setup, title)
        ]
        heads = ["", "MB/s [min-max]", "to one [min-max]", ""]
        lines += ["", f"{title}, {setup}", report.table(heads, cells)]
    return "\n".join([*lines, *missing])


if __name__ == "__main__":
    sys.exit(main())

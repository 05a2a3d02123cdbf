"""Measures dualblade against fio and others: one file, one run, each in turn, several rounds."""

from __future__ import annotations

import argparse
import contextlib
import glob
import os
import random
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import machine
import numpy as np
import report
import rivals
from rivals import Contender, Job, Sample

import dualblade
from dualblade.memory import format_size, parse_size

DESCRIPTION = """\
Throughput and CPU of dualblade.Device and TensorStore beside fio, LMCache's raw block device, NIXL,
Python threads and np.memmap: 4 MiB sequential, 256 KiB random and 64 KiB random blocks.
"""
EXAMPLES = """\
examples:
  python bench/engine.py                               on a new file of 1 GiB in this directory
  python bench/engine.py --file /mnt/nvme/bench.img --size 4GiB --json engine.json
  python bench/engine.py --rivals fio,threads          beside these only
  python bench/engine.py --quick                       does it run? Its figures mean little
  python bench/engine.py --file /dev/nvme1n1 --overwrite   destroys what is on the drive

Rivals that are not installed are listed with the reason; bench/README.md says how to install them.
"""
CHECK_BYTES = 4096
STORE_OVERHEAD_BYTES = 8 << 20
"""What a store may keep for itself; no contender uses the end of the file."""


class Workload(NamedTuple):
    """Blocks of one size in one order."""

    block_bytes: int
    is_random: bool

    def title(self, direction: str) -> str:
        """As tables show it."""
        order = "random" if self.is_random else "sequential"
        return f"{format_size(self.block_bytes)} {order} {direction}"


WORKLOADS = (Workload(4 << 20, False), Workload(256 << 10, True), Workload(64 << 10, True))
DIRECTIONS = ("write", "read")


# ---- dualblade -----------------------------------------------------------------------------------


class DeviceAccess(Contender):
    """dualblade.Device with registered buffers."""

    def __init__(self, engine: str) -> None:
        self.engine = engine

    def open(self, job: Job) -> None:
        """See Contender."""
        self.job = job
        depth = min(4096, max(256, job.depth))
        self.device = dualblade.Device.open(job.path, self.engine, depth)
        known = self.device.register([job.arena])
        self.note = f"{self.device.info.engine}, {format_size(known)} registered"

    def close(self) -> None:
        """See Contender."""
        if device := self.__dict__.pop("device", None):
            device.close()


class Device(DeviceAccess, rivals.Pipelined[Any]):
    """Several batches under way."""

    name = "device"
    label = "dualblade Device"

    def prepare(self, batch: list[tuple[int, Any]]) -> Any:
        """See Pipelined."""
        return batch

    def start(self, direction: str, batch: Any) -> Any:
        """See Pipelined."""
        return (self.device.write if direction == "write" else self.device.read)(batch)

    def finish(self, handle: Any) -> None:
        """See Pipelined."""
        handle.wait()


class DeviceCalls(DeviceAccess, rivals.Timed):
    """Calls that wait, as get_many's do."""

    name = "calls"
    label = "dualblade Device, one call at a time"

    def write(self, offsets: Sequence[int]) -> Callable[[], None]:
        """See Timed."""
        return self._calls(self.device.write, offsets)

    def read(self, offsets: Sequence[int]) -> Callable[[], None]:
        """See Timed."""
        return self._calls(self.device.read, offsets)

    def _calls(self, start: Callable[[Any], Any], offsets: Sequence[int]) -> Callable[[], None]:
        batches = self.job.batches(offsets, self.job.depth)

        def transfer() -> None:
            for batch in batches:
                start(batch).wait()

        return transfer


class StoreAccess(Contender):
    """dualblade.TensorStore with a tensor for each block, past the page cache, checksums on."""

    def __init__(self, engine: str) -> None:
        self.engine = engine

    def open(self, job: Job) -> None:
        """See Contender."""
        self.job = job
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", dualblade.DualbladeWarning)
            self.store = dualblade.open(
                job.path,
                format=True,
                policy="direct",
                engine=self.engine,
                queue_depth=min(4096, max(256, job.depth)),
                verify="always",
            )

    def close(self) -> None:
        """See Contender."""
        if store := self.__dict__.pop("store", None):
            store.close()
        for left in glob.glob(glob.escape(self.job.path) + ".catalog*"):
            os.unlink(left)

    def first_bytes(self, offset: int) -> bytes:
        """Of the block that was written for this offset, wherever the store put it."""
        return self.store.get(f"block/{offset}")[:CHECK_BYTES].tobytes()


class Store(StoreAccess, rivals.Timed):
    """put_many of new tensors, get_many into memory that is there: calls that wait."""

    name = "store"
    label = "dualblade put_many, get_many"
    note = "checksums; one call for all bytes in flight, then the next"

    def _batches(self, offsets: Sequence[int]) -> list[dict[str, Any]]:
        batches = self.job.batches(offsets, self.job.depth)
        return [{f"block/{offset}": slot for offset, slot in batch} for batch in batches]

    def write(self, offsets: Sequence[int]) -> Callable[[], None]:
        """See Timed."""
        batches = self._batches(offsets)

        def transfer() -> None:
            for batch in batches:
                self.store.put_many(batch)

        return transfer

    def read(self, offsets: Sequence[int]) -> Callable[[], None]:
        """See Timed."""
        batches = [(list(batch), list(batch.values())) for batch in self._batches(offsets)]

        def transfer() -> None:
            for keys, slots in batches:
                self.store.get_many(keys, out=slots)

        return transfer


class StoreTickets(StoreAccess, rivals.Pipelined[Any]):
    """The same tensors by put_many_async and get_many_async, which do not wait."""

    name = "tickets"
    label = "dualblade put_many_async, get_many_async"
    note = "checksums; several batches under way, as with Device"

    def prepare(self, batch: list[tuple[int, Any]]) -> Any:
        """See Pipelined."""
        return {f"block/{offset}": slot for offset, slot in batch}

    def start(self, direction: str, batch: Any) -> Any:
        """See Pipelined."""
        if direction == "write":
            return self.store.put_many_async(batch)
        return self.store.get_many_async(list(batch), out=batch)

    def finish(self, handle: Any) -> None:
        """See Pipelined."""
        handle.result()


# ---- measuring -----------------------------------------------------------------------------------


@dataclass
class Row:
    """One contender at one workload in one direction."""

    workload: Workload
    direction: str
    contender: Contender
    samples: list[Sample] = field(default_factory=list)
    nbytes: int = 0
    error: str | None = None

    @property
    def mb_per_s(self) -> list[float]:
        """Of each round."""
        return [self.nbytes / sample.seconds / 1e6 for sample in self.samples]

    def figures(self, fio: Row | None) -> dict[str, Any]:
        """What the JSON says of it. `fio`: the row that the ratio is to, round by round."""
        rates = [] if self.error else self.mb_per_s
        base = fio.mb_per_s if fio and not fio.error else []
        ratios = [ours / theirs for ours, theirs in zip(rates, base, strict=False)]
        cpu = [s.cpu_seconds / (self.nbytes / 1e9) for s in self.samples] if rates else []
        return {
            "workload": self.workload.title(self.direction),
            "block_bytes": self.workload.block_bytes,
            "random": self.workload.is_random,
            "direction": self.direction,
            "contender": self.contender.name,
            "label": self.contender.label,
            "mb_per_s": report.spread(rates) if rates else None,
            "ratio_to_fio": report.spread(ratios) if ratios else None,
            "cpu_s_per_gb": report.spread(cpu) if cpu else None,
            "note": self.contender.note,
            "error": self.error,
        }


def measure(
    job: Job, contender: Contender, rows: Sequence[Row], pattern: np.ndarray[Any, Any], seed: int
) -> None:
    """Writes every block, then reads every block; adds a sample to each row, or an error."""
    chance = random.Random(seed)
    row = rows[0]
    try:
        try:
            contender.open(job)
            for row in rows:
                offsets = [number * job.block_bytes for number in range(job.blocks)]
                if job.is_random:
                    chance.shuffle(offsets)
                job.arena[:] = pattern if row.direction == "write" else 0
                forget_cached(job.path)
                row.nbytes = job.nbytes
                row.samples.append(contender.run(row.direction, offsets))
                if row.direction == "read" and contender.reads_into_slots:
                    check(job, contender, offsets)
        finally:
            contender.close()
    except Exception as error:  # noqa: BLE001  a rival's failure is a row, and ends nothing
        row.error = " ".join(f"{type(error).__name__}: {error}".split())[:200]
        for later in rows[list(rows).index(row) + 1 :]:
            later.error = later.error or f"not reached: {row.error}"


def check(job: Job, contender: Contender, offsets: Sequence[int]) -> None:
    """Raises if the last block that was read is not what the file holds."""
    offset, slot = offsets[-1], job.slot(len(offsets) - 1)
    if isinstance(contender, StoreAccess):
        expected = contender.first_bytes(offset)
    else:
        with open(job.path, "rb", buffering=0) as file:
            expected = os.pread(file.fileno(), CHECK_BYTES, offset)
    if slot[:CHECK_BYTES].tobytes() != expected:
        raise ValueError(f"the block at {offset} was not read: the memory holds something else")


def forget_cached(path: str) -> None:
    """Writes the file's dirty pages out and drops all of them from the page cache."""
    with open(path, "rb", buffering=0) as file:
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def run(path: str, options: argparse.Namespace, contenders: Sequence[Contender]) -> list[Row]:
    """All rounds of all workloads, the contenders in turn."""
    arena = dualblade.aligned_empty(options.in_flight, np.uint8)
    pattern = np.frombuffer(random.Random(1).randbytes(options.in_flight), np.uint8)
    reasons = {contender.name: contender.unavailable() for contender in contenders}
    rows = []
    for workload in WORKLOADS:
        blocks = (options.size - STORE_OVERHEAD_BYTES) // workload.block_bytes
        job = Job(path, workload.block_bytes, workload.is_random, blocks, arena)
        pairs = {
            contender.name: [
                Row(workload, direction, contender, error=reasons[contender.name])
                for direction in DIRECTIONS
            ]
            for contender in contenders
        }
        for number in range(options.rounds):
            for contender in contenders:
                found = pairs[contender.name]
                if all(row.error is None for row in found):
                    size = format_size(workload.block_bytes)
                    report.progress(f"{size}, round {number + 1}: {contender.label}")
                    measure(job, contender, found, pattern, number)
        for i, _ in enumerate(DIRECTIONS):
            rows += [pair[i] for pair in pairs.values()]
    report.progress("")
    return rows


# ---- the file ------------------------------------------------------------------------------------


@contextlib.contextmanager
def target(options: argparse.Namespace) -> Iterator[str]:
    """The file or device, written once all over. A file that was made here goes with the run."""
    path = os.path.abspath(options.file)
    exists = os.path.lexists(path)
    if exists and not options.overwrite:
        raise SystemExit(f"{path} exists and would lose its content: say --overwrite, or another")
    is_device = Path(path).is_block_device()
    flags = os.O_RDWR | (os.O_EXCL if is_device else os.O_CREAT)
    try:
        fd = os.open(path, flags | os.O_CLOEXEC, 0o600)
        with open(fd, "r+b") as file:
            if not is_device:
                file.truncate(options.size)
            elif file.seek(0, os.SEEK_END) < options.size:
                raise SystemExit(f"{path} has less than {format_size(options.size)}: give --size")
            report.progress("writing the file once")
            piece = random.Random(0).randbytes(4 << 20)
            file.seek(0)
            starts = range(0, options.size, len(piece))
            file.writelines(piece[: options.size - start] for start in starts)
            file.flush()
            os.fsync(fd)
    except OSError as error:
        raise SystemExit(f"{path} can't be prepared: {error}") from error
    else:
        yield path
    finally:
        if not exists:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(path)


# ---- the command ---------------------------------------------------------------------------------


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The options; exits with one line if they make no sense."""
    parser = report.parser("bench/engine.py", DESCRIPTION, EXAMPLES)
    parser.add_argument(
        "--file", default="dualblade-bench.img", help="a new file, or with --overwrite any"
    )
    parser.add_argument("--size", type=parse_size, help="bytes moved in each run (1GiB)")
    parser.add_argument("--in-flight", type=parse_size, help="bytes in flight (64MiB)")
    parser.add_argument("--rivals", default="all", help="all, none, or names: " + ", ".join(NAMES))
    parser.add_argument(
        "--engine",
        default="auto",
        choices=("auto", "nvme", "uring", "aio", "threads"),
        help="dualblade's",
    )
    parser.add_argument("--overwrite", action="store_true", help="the target's content may go")
    report.add_options(parser, rounds=5)
    options = parser.parse_args(arguments)
    options.size = options.size or (24 << 20 if options.quick else 1 << 30)
    options.in_flight = options.in_flight or (8 << 20 if options.quick else 64 << 20)
    options.rounds = 1 if options.quick else options.rounds
    wanted = {"all": list(NAMES), "none": []}.get(options.rivals, options.rivals.split(","))
    if unknown := [name for name in wanted if name not in NAMES]:
        parser.error(f"--rivals: {unknown[0]!r} is unknown; there are {', '.join(NAMES)}")
    largest = WORKLOADS[0].block_bytes
    if options.in_flight % largest or not options.in_flight:
        parser.error(f"--in-flight is a multiple of {format_size(largest)}")
    if options.size < options.in_flight + STORE_OVERHEAD_BYTES or options.size % 4096:
        parser.error("--size is a multiple of 4096, and more than --in-flight by 8 MiB or more")
    if options.plot and (problem := report.plot_error()):
        parser.error(problem)
    options.rivals = wanted
    return options


NAMES = {rival.name: rival for rival in rivals.RIVALS}


def main(arguments: Sequence[str] | None = None) -> int:
    """The command."""
    options = parse(arguments)
    contenders: list[Contender] = [
        NAMES[name]() for name in options.rivals if name.startswith("fio")
    ]
    contenders += [kind(options.engine) for kind in (Device, DeviceCalls, Store, StoreTickets)]
    contenders += [NAMES[name]() for name in options.rivals if not name.startswith("fio")]
    with target(options) as path, tempfile.TemporaryDirectory() as state:
        os.environ["DUALBLADE_STATE_DIR"] = state  # where a store on a device keeps its index
        where = machine.describe(path)
        rows = run(path, options, contenders)
    fio = {(row.workload, row.direction): row for row in rows if row.contender.name == "fio"}
    found = [row.figures(fio.get((row.workload, row.direction))) for row in rows]
    print(render(found, where, options))
    report.write_json(
        options.json,
        {
            "benchmark": "engine",
            "dualblade": dualblade.__version__,
            "machine": where,
            "size_bytes": options.size,
            "in_flight_bytes": options.in_flight,
            "rounds": options.rounds,
            "rows": found,
        },
    )
    if options.plot:
        draw(options.plot, found, where)
    return 0


def render(
    rows: Sequence[dict[str, Any]], where: dict[str, Any], options: argparse.Namespace
) -> str:
    """The table."""
    heads = ["", "MB/s [min-max]", "to fio", "CPU s/GB [min-max]", ""]
    lines = [
        machine.summary(where),
        f"{format_size(options.size)} a run, {format_size(options.in_flight)} in flight, "
        f"medians of {options.rounds}",
    ]
    for title in dict.fromkeys(row["workload"] for row in rows):
        cells = [
            [
                row["label"],
                report.shown(row["mb_per_s"], 0),
                f"{row['ratio_to_fio']['median']:.2f}" if row["ratio_to_fio"] else "-",
                report.shown(row["cpu_s_per_gb"], 3),
                row["error"] or row["note"],
            ]
            for row in rows
            if row["workload"] == title
        ]
        lines += ["", title, report.table(heads, cells)]
    return "\n".join(lines)


def draw(path: str, rows: Sequence[dict[str, Any]], where: dict[str, Any]) -> None:
    """The plot: throughput above, CPU below."""
    panels = [
        (report.Panel("Throughput", "MB/s"), "mb_per_s"),
        (report.Panel("CPU", "CPU-seconds per GB", logarithmic=True), "cpu_s_per_gb"),
    ]
    for panel, name in panels:
        for row in rows:
            panel.add("\n".join(row["workload"].rsplit(" ", 2)), row["label"], row[name])
    report.plot(path, machine.summary(where), [panel for panel, _ in panels])


if __name__ == "__main__":
    sys.exit(main())

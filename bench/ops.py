"""Measures what dualblade costs over the I/O itself: a tensor, an extent, opening and closing."""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import machine
import numpy as np
import report
from report import spread

import dualblade
from dualblade import _core

DESCRIPTION = """\
Three tables. Tensors: CPU of put and get of 64 KiB tensors, one at a time and 256 at once, over the
same transfers through dualblade.Device with checksums. Extent map: time of an allocation and of a
free, and memory, by free extents. Stores: time to open, save and close, by tensors.
"""
EXAMPLES = """\
examples:
  python bench/ops.py                          in this directory; takes a minute or two
  python bench/ops.py --directory /dev/shm     no drive: the I/O is a copy in memory
  python bench/ops.py --only extents           one of tensors, extents, stores
  python bench/ops.py --json ops.json --plot ops.png
  python bench/ops.py --quick                  does it run? Its figures mean little

CPU is user and system time of all threads. Times of the extent map include Python's call.
"""
TENSOR_BYTES = 64 << 10
BATCH = 256
STEADY_CALLS = 200_000
REGION_UNITS = 32
UNIT_BYTES = 4096


# ---- tensors -------------------------------------------------------------------------------------


class TensorBench:
    """A store and a bare device of the same size, and the same transfers on both."""

    def __init__(self, directory: str, count: int, batch: int) -> None:
        self.count = count
        self.batch = batch
        self.keys = [f"layer/{number}/key" for number in range(count)]
        shape = (TENSOR_BYTES // 2 // 1024, 1, 8, 128)
        self.arrays = [dualblade.aligned_empty(shape, "float16") for _ in range(batch)]
        for number, array in enumerate(self.arrays):
            array.view(np.uint16)[:] = number
        size = 3 * count * TENSOR_BYTES + (16 << 20)
        image = os.path.join(directory, "device.img")
        allocate_file(image, size)
        self.device = dualblade.Device.open(image)
        self.store = dualblade.open(
            os.path.join(directory, "store.img"), size=size, policy="direct", verify="always"
        )
        # The first write to a block of a new file costs more: once, before anything is timed.
        for first in range(0, 3 * count - batch, batch):
            self.device.write(self.requests(first)).wait()
            self.store.put_many({f"fill/{first + i}": a for i, a in enumerate(self.arrays)})
        self.store.delete_many(self.store.keys())
        self.sums = [np.zeros(1, np.uint64) for _ in range(batch)]

    def close(self) -> None:
        """Of both."""
        self.store.close()
        self.device.close()

    def requests(self, first: int) -> list[tuple[int, np.ndarray[Any, Any]]]:
        """A batch for the device, from its first-th tensor on."""
        return [((first + i) * TENSOR_BYTES, array) for i, array in enumerate(self.arrays)]

    def batches(self) -> Iterator[list[str]]:
        """Keys, as many as go at once."""
        for first in range(0, self.count, self.batch):
            yield self.keys[first : first + self.batch]

    def store_puts(self) -> Callable[[], None]:
        """Puts every key once."""
        store = self.store
        if self.batch == 1:
            calls = [(key, self.arrays[0]) for key in self.keys]
            return lambda: repeat(store.put, calls)
        many = [(dict(zip(keys, self.arrays, strict=True)),) for keys in self.batches()]
        return lambda: repeat(store.put_many, many)

    def store_gets(self) -> Callable[[], None]:
        """Gets every key once, into memory that is there."""
        store = self.store
        if self.batch == 1:
            calls = [(key, self.arrays[0]) for key in self.keys]
            return lambda: repeat(store.get, calls)
        many = [(keys, self.arrays) for keys in self.batches()]
        return lambda: repeat(store.get_many, many)

    def device_calls(self, direction: str, *, checksums: bool) -> Callable[[], None]:
        """The same transfers without a store."""
        start = self.device.write if direction == "put" else self.device.read
        sums = self.sums if checksums else None
        many = [self.requests(first) for first in range(0, self.count, self.batch)]

        def transfer() -> None:
            for requests in many:
                start(requests, checksums=sums).wait()

        return transfer

    def round(self) -> dict[str, dict[str, float]]:
        """CPU microseconds for a tensor: {operation: {what: us}}."""
        plain = {d: self.cost(self.device_calls(d, checksums=False)) for d in ("put", "get")}
        summed = {d: self.cost(self.device_calls(d, checksums=True)) for d in ("put", "get")}
        found = {}
        for operation, calls in (
            ("put, new key", self.store_puts()),
            ("put, key there", self.store_puts()),
            ("get", self.store_gets()),
        ):
            kind = operation[:3]
            cost = self.cost(calls)
            found[operation] = {
                "store_us": cost,
                "io_us": plain[kind],
                "checksum_us": summed[kind] - plain[kind],
                "over_io_us": cost - summed[kind],
            }
        self.store.delete_many(self.keys)
        return found

    def cost(self, calls: Callable[[], None]) -> float:
        """CPU microseconds of the calls for each tensor."""
        start = time.process_time()
        calls()
        return (time.process_time() - start) / self.count * 1e6


def repeat(function: Callable[..., Any], calls: Sequence[tuple[Any, ...]]) -> None:
    """Calls it with each."""
    for arguments in calls:
        function(*arguments)


def allocate_file(path: str, size_bytes: int) -> None:
    """A file with its room taken, as a store makes its own."""
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        os.posix_fallocate(fd, 0, size_bytes)
    finally:
        os.close(fd)


def measure_tensors(directory: str, options: argparse.Namespace) -> list[dict[str, Any]]:
    """Rows of the first table."""
    rows = []
    for batch in (1, BATCH):
        count = {(1, False): 1024, (1, True): 64}.get((batch, options.quick))
        count = count or BATCH * (2 if options.quick else 16)
        with tempfile.TemporaryDirectory(dir=directory) as folder:
            bench = TensorBench(folder, count, batch)
            try:
                found = []
                for number in range(options.rounds + 1):
                    report.progress(f"tensors, {batch} at once, round {number}")
                    found.append(bench.round())
            finally:
                bench.close()
        for operation in found[0]:
            figures = {
                name: spread(each[operation][name] for each in found[1:])  # the first warms up
                for name in found[0][operation]
            }
            rows.append({"operation": operation, "at_once": batch, "tensors": count, **figures})
    return rows


# ---- extent map ----------------------------------------------------------------------------------


def measure_extents(options: argparse.Namespace) -> list[dict[str, Any]]:
    """Rows of the second table; each map in a process of its own, whose memory is counted."""
    counts = (1_000, 10_000) if options.quick else (1_000_000, 10_000_000)
    rows = []
    for count in counts:
        report.progress(f"extent map, {count} extents")
        command = [sys.executable, __file__, "--one-map", str(count), str(options.rounds)]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        allocate, free, insert, size = (
            [float(figure) for figure in line.split()] for line in done.stdout.splitlines()
        )
        rows.append(
            {
                "extents": count,
                "allocate_us": spread(allocate),
                "free_us": spread(free),
                "free_new_extent_us": spread(insert),
                "bytes_per_extent": spread(size),
            }
        )
    return rows


def one_map(count: int, rounds: int) -> None:
    """Breaks a map into `count` free extents of 1 to 31 units, then allocates and frees."""
    chance = np.random.default_rng(1)
    calls = min(STEADY_CALLS, count // 2)
    lengths = chance.integers(1, REGION_UNITS, count, dtype=np.int64) * UNIT_BYTES
    order = chance.permutation(count)
    extents = _core.ExtentMap(count * REGION_UNITS * UNIT_BYTES, UNIT_BYTES)
    extents.allocate(extents.total_bytes)
    before = resident_bytes()
    insert = 0.0
    for part in np.array_split(order, max(1, count // 100_000)):
        runs = zip(
            (part * (REGION_UNITS * UNIT_BYTES)).tolist(), lengths[part].tolist(), strict=True
        )
        insert += free_all(extents, list(runs))
    size = resident_bytes() - before
    if extents.free_extents != count:
        raise RuntimeError(f"{extents.free_extents} free extents instead of {count}")
    allocated, freed = [], []
    for _ in range(rounds):
        wanted = chance.integers(1, REGION_UNITS, calls) * UNIT_BYTES
        arguments = wanted.tolist()
        start = time.thread_time()
        offsets = [extents.allocate(length) for length in arguments]
        allocated.append((time.thread_time() - start) / calls * 1e6)
        # In any order, but as new numbers one after another in memory: shuffled ones would be
        # cache misses that are not the map's.
        order = chance.permutation(calls)
        runs = zip(np.array(offsets)[order].tolist(), wanted[order].tolist(), strict=True)
        freed.append(free_all(extents, list(runs)) / calls * 1e6)
    for figures in (allocated, freed, [insert / count * 1e6], [size / count]):
        print(*figures)


def free_all(extents: _core.ExtentMap, runs: Sequence[tuple[int, int]]) -> float:
    """Seconds of CPU."""
    start = time.thread_time()
    for offset, length in runs:
        extents.free(offset, length)
    return time.thread_time() - start


def resident_bytes() -> int:
    """Memory that this process has."""
    with open("/proc/self/statm", encoding="ascii") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


# ---- opening and closing -------------------------------------------------------------------------


def measure_stores(directory: str, options: argparse.Namespace) -> list[dict[str, Any]]:
    """Rows of the third table."""
    rows = []
    for count in (0, 100, 1000) if options.quick else (0, 1_000, 100_000):
        with tempfile.TemporaryDirectory(dir=directory) as folder:
            report.progress(f"stores, {count} tensors")
            rows.append({"tensors": count, **one_store(folder, count, options.rounds)})
    return rows


def one_store(folder: str, count: int, rounds: int) -> dict[str, Any]:
    """Milliseconds to open, save and close a store of `count` tensors of 4 KiB."""
    path = os.path.join(folder, "store.img")
    array = dualblade.aligned_empty(2048, "float16")
    array[:] = 1
    saved, opened, closed, closed_changed = [], [], [], []
    store = dualblade.open(path, size=(count + 1000) * array.nbytes + (16 << 20), policy="direct")
    try:
        for first in range(0, count, 1000):
            numbers = range(first, min(first + 1000, count))
            store.put_many({f"layer/{number}/key": array for number in numbers})
        saved.append(milliseconds(store.flush))
    finally:
        store.close()
    for _ in range(rounds):
        for changes, closings in ((False, closed), (True, closed_changed)):
            start = time.perf_counter()
            store = dualblade.open(path, policy="direct")
            opened.append((time.perf_counter() - start) * 1e3)
            try:
                if len(store) < count:
                    raise RuntimeError(f"{len(store)} of {count} tensors are there")
                if changes:
                    store.put("changed", array)
            finally:
                closings.append(milliseconds(store.close))
    return {
        "open_ms": spread(opened),
        "close_ms": spread(closed),
        "close_after_put_ms": spread(closed_changed),
        "save_all_ms": spread(saved),
    }


def milliseconds(call: Callable[[], object]) -> float:
    """How long the call takes."""
    start = time.perf_counter()
    call()
    return (time.perf_counter() - start) * 1e3


# ---- the command ---------------------------------------------------------------------------------

TABLES = {
    "tensors": (
        "CPU microseconds for each tensor of 64 KiB (over I/O: over Device with checksums)",
        {
            "operation": "",
            "at_once": "at once",
            "store_us": "store",
            "io_us": "I/O",
            "checksum_us": "checksum",
            "over_io_us": "over I/O",
        },
    ),
    "extents": (
        "CPU microseconds for each call, by free extents in the map",
        {
            "extents": "extents",
            "allocate_us": "allocate",
            "free_us": "free",
            "free_new_extent_us": "free that adds an extent",
            "bytes_per_extent": "bytes an extent",
        },
    ),
    "stores": (
        "milliseconds, by tensors in the store",
        {
            "tensors": "tensors",
            "open_ms": "open",
            "close_ms": "close",
            "close_after_put_ms": "close after a put",
            "save_all_ms": "first flush of all",
        },
    ),
}


def render(tables: dict[str, list[dict[str, Any]]], where: dict[str, Any], rounds: int) -> str:
    """All tables."""
    lines = [machine.summary(where), f"medians of {rounds} [least-most]"]
    for name, rows in tables.items():
        title, columns = TABLES[name]
        cells = [
            [report.shown(v, 2) if isinstance(v := row[c], dict) else str(v) for c in columns]
            for row in rows
        ]
        lines += ["", title, report.table(list(columns.values()), cells)]
    return "\n".join(lines)


def draw(path: str, tables: dict[str, list[dict[str, Any]]], where: dict[str, Any]) -> None:
    """A panel for each table."""
    units = {"tensors": "CPU us a tensor", "extents": "CPU us a call", "stores": "ms"}
    panels = []
    for name, rows in tables.items():
        title, columns = TABLES[name]
        panel = report.Panel(title, units[name], logarithmic=name == "stores")
        for row in rows:
            group = ", ".join(str(row[c]) for c in columns if not isinstance(row[c], dict))
            for column in columns:
                if isinstance(row[column], dict) and column != "bytes_per_extent":
                    panel.add(group, columns[column], row[column])
        panels.append(panel)
    report.plot(path, machine.summary(where), panels)


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """The options; exits with one line if they make no sense."""
    parser = report.parser("bench/ops.py", DESCRIPTION, EXAMPLES)
    parser.add_argument("--directory", default=".", help="where the stores are made, and removed")
    parser.add_argument("--only", choices=tuple(TABLES), help="one of the tables")
    report.add_options(parser, rounds=5)
    options = parser.parse_args(arguments)
    options.rounds = 1 if options.quick else options.rounds
    if not os.path.isdir(options.directory):
        parser.error(f"--directory: {options.directory} is not a directory")
    if options.plot and (problem := report.plot_error()):
        parser.error(problem)
    return options


def main(arguments: Sequence[str]) -> int:
    """The command."""
    if arguments[:1] == ["--one-map"]:
        one_map(int(arguments[1]), int(arguments[2]))
        return 0
    options = parse(arguments)
    warnings.simplefilter("ignore", dualblade.DualbladeWarning)
    where = machine.describe(options.directory)
    measures: dict[str, Callable[[], list[dict[str, Any]]]] = {
        "tensors": lambda: measure_tensors(options.directory, options),
        "extents": lambda: measure_extents(options),
        "stores": lambda: measure_stores(options.directory, options),
    }
    names = [options.only] if options.only else list(TABLES)
    tables = {name: measures[name]() for name in names}
    report.progress("")
    print(render(tables, where, options.rounds))
    document = {
        "benchmark": "ops",
        "dualblade": dualblade.__version__,
        "machine": where,
        "rounds": options.rounds,
        **tables,
    }
    report.write_json(options.json, document)
    if options.plot:
        draw(options.plot, tables, where)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

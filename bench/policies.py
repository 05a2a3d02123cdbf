"""Ways to keep a decoder's keys and values on a file: dualblade's, the paper's and what others do.

Each is a Policy: it takes tokens in, and hands each layer's keys and values, all tokens so far, to
a consumer in contiguous memory. All use the same file, and so the same blocks of the drive.
"""

from __future__ import annotations

import abc
import os
import statistics
import time
import warnings
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import numpy as np

import dualblade
from dualblade.memory import BUDGET_MIN_BYTES

Array = np.ndarray[Any, Any]
Pair = tuple[Array, Array]
BLOCK_BYTES = 4096


@dataclass(frozen=True)
class Shape:
    """What a model keeps of each token in a layer: a row of keys and one of values, float16."""

    name: str
    title: str
    batch: int
    kv_heads: int
    head_dim: int
    piece_tokens: int
    """Appended to a layer at once in prefill."""

    @property
    def row_bytes(self) -> int:
        """Of a token's keys in one layer; its values take as much."""
        return self.batch * self.kv_heads * self.head_dim * 2


SHAPES = {
    shape.name: shape
    for shape in (
        Shape("llama", "Llama-3-8B: 8 KV heads x 128, batch 1, rows of 2 KiB", 1, 8, 128, 512),
        Shape("opt", "OPT-6.7B: 32 heads x 128, batch 32, rows of 256 KiB", 32, 32, 128, 8),
    )
}


@dataclass(frozen=True)
class Job:
    """What one process is to do. It travels as JSON."""

    policy: str
    path: str
    shape: str
    layers: int
    capacity: int
    """Tokens that each layer has room for."""
    prompt: int
    """Tokens of prefill."""
    limit_bytes: int
    group: str
    """Directory of the memory cgroup that the process is in."""

    @property
    def of(self) -> Shape:
        """The shape itself."""
        return SHAPES[self.shape]

    @property
    def tensor_bytes(self) -> int:
        """The keys of a layer with all the tokens that there is room for, whole blocks."""
        return -(-self.capacity * self.of.row_bytes // BLOCK_BYTES) * BLOCK_BYTES

    @property
    def layer_bytes(self) -> int:
        """Keys and values of a layer."""
        return 2 * self.tensor_bytes

    @property
    def piece_bytes(self) -> int:
        """Keys and values that are appended at once in prefill, which the model has made."""
        return 2 * self.of.piece_tokens * self.of.row_bytes

    @property
    def consumer_bytes(self) -> int:
        """What the consumer has of its own: the layer that it works on, and the new tokens."""
        return self.layer_bytes + self.piece_bytes

    @property
    def kv_bytes(self) -> int:
        """All layers, with all tokens that there is room for."""
        return self.layers * self.layer_bytes

    def offset(self, layer: int, which: int) -> int:
        """Where a tensor starts in the file. Which: 0 keys, 1 values."""
        return (2 * layer + which) * self.tensor_bytes


class Policy(abc.ABC):
    """open(), then append() and fetch() layer by layer, then close()."""

    name = ""  # as --policies takes it
    label = ""  # as tables show it
    note = ""

    def __init__(self, job: Job) -> None:
        self.job = job
        self.tokens = [0] * job.layers

    @abc.abstractmethod
    def open(self, room_bytes: int) -> None:
        """Gets ready. room_bytes: what the paper's formula leaves for page-cached tensors."""

    @abc.abstractmethod
    def append(self, layer: int, keys: Array, values: Array) -> None:
        """Adds tokens, [tokens, row_bytes] of uint8; the arrays are the caller's again after it."""

    @abc.abstractmethod
    def fetch(self, layer: int) -> Pair:
        """All tokens so far, each contiguous; valid until the next fetch()."""

    @abc.abstractmethod
    def flush(self) -> None:
        """Returns when all that was appended is on the drive."""

    def settle(self) -> None:  # noqa: B027  most have nothing to choose
        """Warm-up is over: what is chosen by trying is chosen now."""

    def stats(self) -> dict[str, Any]:
        """What it says of itself."""
        return {}

    @abc.abstractmethod
    def close(self) -> None:
        """Lets go of everything."""


# ---- page cache ----------------------------------------------------------------------------------


class Buffered(Policy):
    """Files through the page cache, and one layer of memory to read into."""

    def open(self, room_bytes: int) -> None:  # noqa: ARG002  not all keep to the paper's budget
        """See Policy."""
        job = self.job
        self.fd = os.open(job.path, os.O_RDWR | os.O_CLOEXEC)
        shape = (2, job.tensor_bytes // job.of.row_bytes, job.of.row_bytes)
        self.memory = dualblade.aligned_empty(shape, np.uint8)
        self.memory[:] = 0

    def append(self, layer: int, keys: Array, values: Array) -> None:
        """See Policy."""
        for which, rows in enumerate((keys, values)):
            place = self.job.offset(layer, which) + self.tokens[layer] * self.job.of.row_bytes
            write_all(self.fd, rows, place)
        self.tokens[layer] += len(keys)

    def flush(self) -> None:
        """See Policy."""
        os.fsync(self.fd)

    def close(self) -> None:
        """See Policy."""
        os.close(self.fd)

    def _pair(self, layer: int) -> Pair:
        keys, values = self.memory[:, : self.tokens[layer]]
        return keys, values


class Memmap(Buffered):
    """A np.memmap for each tensor, copied into the consumer's memory: FlexLLMGen's disk."""

    name = "memmap"
    label = "np.memmap"
    note = "FlexLLMGen: one map a tensor, one copy thread"

    def open(self, room_bytes: int) -> None:
        """See Policy."""
        super().open(room_bytes)
        job = self.job
        self.maps = [
            [
                np.memmap(
                    job.path,
                    np.uint8,
                    "r+",
                    job.offset(layer, which),
                    (job.capacity, job.of.row_bytes),
                )
                for which in (0, 1)
            ]
            for layer in range(job.layers)
        ]

    def append(self, layer: int, keys: Array, values: Array) -> None:
        """See Policy."""
        first = self.tokens[layer]
        for mapped, rows in zip(self.maps[layer], (keys, values), strict=True):
            mapped[first : first + len(rows)] = rows
        self.tokens[layer] += len(keys)

    def fetch(self, layer: int) -> Pair:
        """See Policy."""
        for mapped, memory in zip(self.maps[layer], self._pair(layer), strict=True):
            memory[:] = mapped[: self.tokens[layer]]
        return self._pair(layer)

    def flush(self) -> None:
        """See Policy."""
        os.fsync(self.fd)  # writes the mapped pages too, in one go

    def close(self) -> None:
        """See Policy."""
        self.maps.clear()
        super().close()


class Pread(Buffered):
    """pread into the consumer's memory, by 1 or by 4 threads: what warm-up finds faster."""

    name = "pread"
    label = "buffered pread"
    note = "1 or 4 threads, the faster in warm-up"
    counts = (1, 4)

    def open(self, room_bytes: int) -> None:
        """See Policy."""
        super().open(room_bytes)
        self.pool = ThreadPoolExecutor(max(self.counts))
        self.threads = self.counts[0]
        self._took_s: dict[int, list[float]] = {count: [] for count in self.counts}
        self._is_settled = len(self.counts) == 1

    def fetch(self, layer: int) -> Pair:
        """See Policy."""
        if not self._is_settled:
            # Each for a whole step, in turn: within one the cache would be the other's.
            if layer == 0 and any(self._took_s.values()):
                self.threads = self.counts[(self.counts.index(self.threads) + 1) % 2]
            begin = time.perf_counter()
        self._read(layer)
        if not self._is_settled:
            self._took_s[self.threads].append(time.perf_counter() - begin)
        return self._pair(layer)

    def _read(self, layer: int) -> None:
        parts = []
        for which, memory in enumerate(self._pair(layer)):
            flat = memory.reshape(-1)
            share = max(1, self.threads // 2)
            size = -(-len(flat) // share // BLOCK_BYTES) * BLOCK_BYTES
            parts += [
                (flat[first : first + size], self.job.offset(layer, which) + first)
                for first in range(0, len(flat), size)
            ]
        if self.threads == 1:
            for part, place in parts:
                read_all(self.fd, part, place)
        else:
            list(self.pool.map(lambda part: read_all(self.fd, *part), parts))

    def settle(self) -> None:
        """See Policy."""
        self._is_settled = True
        found = {n: statistics.median(took) for n, took in self._took_s.items() if took}
        if found:
            self.threads = min(found, key=lambda count: found[count])

    def stats(self) -> dict[str, Any]:
        """See Policy."""
        return {"threads": self.threads}

    def close(self) -> None:
        """See Policy."""
        self.pool.shutdown()
        super().close()


class Fadvise(Pread):
    """Buffered files; layers beyond the budget are evicted by posix_fadvise once they were read:
    the paper's CachePolicy-Only."""

    name = "fadvise"
    label = "posix_fadvise eviction"
    note = "the paper's CachePolicy-Only: head layers stay; keys and values by 2 threads"
    counts = (2,)

    def open(self, room_bytes: int) -> None:
        """See Policy."""
        super().open(room_bytes)
        self.kept = min(self.job.layers, room_bytes // self.job.layer_bytes)

    def append(self, layer: int, keys: Array, values: Array) -> None:
        """See Policy."""
        super().append(layer, keys, values)
        self._evict(layer)

    def fetch(self, layer: int) -> Pair:
        """See Policy."""
        found = super().fetch(layer)
        self._evict(layer)
        return found

    def _evict(self, layer: int) -> None:
        """Starts writing back what is dirty, and drops what is not."""
        if layer >= self.kept:
            place = self.job.offset(layer, 0)
            os.posix_fadvise(self.fd, place, self.job.layer_bytes, os.POSIX_FADV_DONTNEED)

    def stats(self) -> dict[str, Any]:
        """See Policy."""
        return {"layers_kept": self.kept}


# ---- O_DIRECT ------------------------------------------------------------------------------------


class Uring(Policy):
    """A plain O_DIRECT file over io_uring, the next two layers under way, straight into the
    consumer's memory. The queue is dualblade.Device, without a store or checksums."""

    name = "uring"
    label = "O_DIRECT io_uring"
    note = "dualblade.Device as a plain queue: 2 layers ahead, no checksums"
    ahead = 2
    writes_max = 4

    def open(self, room_bytes: int) -> None:  # noqa: ARG002  it has no use for the page cache
        """See Policy."""
        job = self.job
        self.device = dualblade.Device.open(job.path)
        slots = dualblade.aligned_empty((self.ahead + 1, 2, job.tensor_bytes), np.uint8)
        slots[:] = 0
        self.device.register([slots])
        self.free = list(slots)
        self.lent: Array | None = None
        self.tails = np.zeros((job.layers, 2, BLOCK_BYTES), np.uint8)
        block = job.piece_bytes // 2 + 2 * BLOCK_BYTES
        self.staged = dualblade.aligned_empty((self.writes_max + 1, 2, block), np.uint8)
        self.staged[:] = 0
        self.pending: deque[Any] = deque()
        self.number = 0
        self.under_way: dict[int, tuple[Any, Array]] = {}

    def append(self, layer: int, keys: Array, values: Array) -> None:
        """See Policy. What ends within a block waits in memory, and is written with the block."""
        while len(self.pending) >= self.writes_max:
            self.pending.popleft().wait()
        requests = []
        self.number = (self.number + 1) % len(self.staged)
        start = self.tokens[layer] * self.job.of.row_bytes
        for which, rows in enumerate((keys, values)):
            stage, tail = self.staged[self.number, which], self.tails[layer, which]
            held = start % BLOCK_BYTES
            end = held + rows.nbytes
            stage[:held] = tail[:held]
            stage[held:end] = rows.reshape(-1)
            whole = -(-end // BLOCK_BYTES) * BLOCK_BYTES
            stage[end:whole] = 0
            if end % BLOCK_BYTES:
                tail[:] = stage[whole - BLOCK_BYTES : whole]
            place = self.job.offset(layer, which) + start - held
            requests.append((place, stage[:whole]))
        self.pending.append(self.device.write(requests))
        self.tokens[layer] += len(keys)

    def fetch(self, layer: int) -> Pair:
        """See Policy."""
        if self.lent is not None:
            self.free.append(self.lent)
        for step in range(self.ahead + 1):
            self._start((layer + step) % self.job.layers)
        done, self.lent = self.under_way.pop(layer)
        done.wait()
        tokens, row_bytes = self.tokens[layer], self.job.of.row_bytes
        keys, values = self.lent[:, : tokens * row_bytes].reshape(2, tokens, row_bytes)
        return keys, values

    def _start(self, layer: int) -> None:
        if layer in self.under_way:
            return
        while self.pending:  # what was appended to this layer may be among it
            self.pending.popleft().wait()
        slot = self.free.pop()
        length = -(-self.tokens[layer] * self.job.of.row_bytes // BLOCK_BYTES) * BLOCK_BYTES
        requests = [(self.job.offset(layer, which), slot[which, :length]) for which in (0, 1)]
        self.under_way[layer] = (self.device.read(requests, ahead=True), slot)

    def flush(self) -> None:
        """See Policy."""
        while self.pending:
            self.pending.popleft().wait()
        self.device.flush()

    def close(self) -> None:
        """See Policy."""
        for done, _ in self.under_way.values():
            done.wait()
        self.device.close()


# ---- dualblade -----------------------------------------------------------------------------------


class Store(Policy):
    """A KVCache on a store with the defaults, checksums among them."""

    options: Mapping[str, Any] = MappingProxyType({})

    def open(self, room_bytes: int) -> None:
        """See Policy."""
        job, shape = self.job, self.job.of
        self.stack = ExitStack()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", dualblade.DualbladeWarning)
            self.store = self.stack.enter_context(
                dualblade.open(job.path, format=True, **self._options(room_bytes))
            )
        self.cache = self.stack.enter_context(
            dualblade.KVCache(
                self.store,
                job.layers,
                shape.kv_heads,
                shape.head_dim,
                "float16",
                shape.batch,
                job.capacity,
            )
        )
        self.row_shape = (shape.batch, shape.kv_heads, shape.head_dim)

    def _options(self, room_bytes: int) -> Mapping[str, Any]:  # noqa: ARG002  Static uses it
        return self.options

    def append(self, layer: int, keys: Array, values: Array) -> None:
        """See Policy."""
        shape = (-1, *self.row_shape)
        self.cache.append(
            layer,
            keys.view(np.float16).reshape(shape),
            values.view(np.float16).reshape(shape),
        )

    def fetch(self, layer: int) -> Pair:
        """See Policy."""
        keys, values = self.cache.fetch(layer)
        tokens = len(keys)
        return (
            keys.reshape(tokens, -1).view(np.uint8),
            values.reshape(tokens, -1).view(np.uint8),
        )

    def flush(self) -> None:
        """See Policy."""
        self.store.flush()

    def stats(self) -> dict[str, Any]:
        """See Policy."""
        stats = self.store.stats()
        paths = [group["path"] for group in stats["groups"].values()]
        return {
            "engine": stats["engine"],
            "groups_pagecache": paths.count("pagecache"),
            "groups_direct": paths.count("direct"),
            "memory_budget_bytes": stats["memory_budget_bytes"],
            "residency": stats.get("residency"),
            "cache": self.cache.stats(),
        }

    def close(self) -> None:
        """See Policy."""
        self.stack.close()


class Direct(Store):
    """Everything past the page cache."""

    name = "direct"
    label = "dualblade direct"
    note = 'policy="direct"'
    options = MappingProxyType({"policy": "direct"})


class Static(Store):
    """Bound once at the start, head layers first, from the paper's formula."""

    name = "static"
    label = "dualblade static"
    note = "the paper: bound at the start, head layers first"

    def _options(self, room_bytes: int) -> Mapping[str, Any]:
        memory = max(room_bytes, BUDGET_MIN_BYTES)
        return {"policy": "dual", "live": False, "binding": "head", "memory": memory}


LIVE_OPTIONS = {"policy": "dual", "live": True, "memory": "auto"}


class LiveSpread(Store):
    """What is kept follows the memory; direct layers lie between cached ones."""

    name = "live-spread"
    label = "dualblade live, spread"
    note = 'memory="auto", binding="spread"'
    options = MappingProxyType({**LIVE_OPTIONS, "binding": "spread"})


class LiveHead(Store):
    """What is kept follows the memory; the first layers are kept."""

    name = "live-head"
    label = "dualblade live, head"
    note = 'memory="auto", binding="head"'
    options = MappingProxyType({**LIVE_OPTIONS, "binding": "head"})


POLICIES: dict[str, type[Policy]] = {
    kind.name: kind
    for kind in (Memmap, Fadvise, Pread, Uring, Direct, Static, LiveSpread, LiveHead)
}
LIVE = ("live-spread", "live-head")


# ---- whole reads and writes ----------------------------------------------------------------------


def read_all(fd: int, into: Array, offset: int) -> None:
    """preadv until the memory is full."""
    _transfer(os.preadv, fd, into, offset)


def write_all(fd: int, rows: Array, offset: int) -> None:
    """pwritev until all is written."""
    _transfer(os.pwritev, fd, rows.reshape(-1), offset)


def _transfer(
    call: Callable[[int, Sequence[Any], int], int], fd: int, memory: Array, offset: int
) -> None:
    done = 0
    while done < len(memory):
        moved = call(fd, [memory[done:]], offset + done)
        if moved == 0:
            raise OSError(f"the file ends at {offset + done}")
        done += moved

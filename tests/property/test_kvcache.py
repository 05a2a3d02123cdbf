"""KVCache against numpy arrays that are concatenated, cut and permuted in memory."""

from __future__ import annotations

import gc
import tempfile
from dataclasses import dataclass, field
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

import dualblade
from dualblade import _core
from dualblade.gpu import HostDevice

BATCH_MAX = 6
DTYPES = [np.float16, np.float32, ml_dtypes.bfloat16, ml_dtypes.float8_e4m3fn, np.int16]
counts = st.one_of(st.integers(0, 3), st.integers(0, 40), st.sampled_from([64, 300]))


@dataclass
class Layer:
    """What a layer holds, as plain arrays."""

    heads: int
    dims: tuple[int, int]
    dtype: np.dtype
    window: int | None
    arrays: list[np.ndarray] = field(default_factory=list)

    def rows(self, rng: np.random.Generator, count: int, batch: int) -> list[np.ndarray]:
        """Random bytes: they have NaNs among them, which are to survive too."""
        shapes = [(count, batch, self.heads, dim) for dim in self.dims]
        return [
            np.frombuffer(rng.bytes(int(np.prod(shape)) * self.dtype.itemsize), self.dtype).reshape(
                shape
            )
            for shape in shapes
        ]


layers = st.builds(
    Layer,
    heads=st.integers(1, 3),
    dims=st.tuples(st.sampled_from([1, 8, 33, 64]), st.sampled_from([1, 8, 16])),
    dtype=st.sampled_from(DTYPES).map(np.dtype),
    window=st.sampled_from([None, None, 1, 7, 50]),
)


def same(found: np.ndarray, expected: np.ndarray) -> bool:
    return (
        found.shape == expected.shape
        and found.dtype == expected.dtype
        and found.tobytes() == expected.tobytes()
    )


class KVCacheMachine(RuleBasedStateMachine):
    """Everything that a decoder, a beam search or a server does to its cache, in any order."""

    device: HostDevice | None = None
    """That layers are fetched to."""

    def __init__(self) -> None:
        super().__init__()
        self.folder = tempfile.TemporaryDirectory()
        self.layers: list[Layer] = []
        self.held: list[tuple[np.ndarray, np.ndarray]] = []

    @initialize(
        specs=st.lists(layers, min_size=1, max_size=4),
        batch=st.integers(1, 3),
        seed=st.integers(0, 2**32),
        lookahead=st.sampled_from([None, None, 0, 1, 5]),
        policy=st.sampled_from(["dual", "direct", "pagecache"]),
        verify=st.sampled_from(["always", "never"]),
    )
    def start(
        self,
        specs: list[Layer],
        batch: int,
        seed: int,
        lookahead: int | None,
        policy: str,
        verify: str,
    ) -> None:
        self.rng = np.random.default_rng(seed)
        self.batch = batch
        path = Path(self.folder.name) / "kv.img"
        self.store = dualblade.open(path, size="48MiB", policy=policy, verify=verify)
        self.kv = dualblade.KVCache(
            self.store, layers=0, batch=batch, max_tokens=5, lookahead=lookahead
        )
        for spec in specs:
            self.add_layer(spec)

    @precondition(lambda self: len(self.layers) < 5)
    @rule(spec=layers)
    def add_layer(self, spec: Layer) -> None:
        index = self.kv.add_layer(
            spec.heads,
            spec.dims[0],
            value_dim=spec.dims[1],
            dtype=spec.dtype,
            batch=self.batch,
            window=spec.window,
        )
        assert index == len(self.layers)
        fresh = Layer(spec.heads, spec.dims, spec.dtype, spec.window)
        fresh.arrays = fresh.rows(self.rng, 0, self.batch)
        self.layers.append(fresh)

    @rule(data=st.data(), count=counts)
    def append(self, data: st.DataObject, count: int) -> None:
        self.append_to(data.draw(st.integers(0, len(self.layers) - 1)), count)

    def append_to(self, index: int, count: int) -> None:
        layer = self.layers[index]
        rows = layer.rows(self.rng, count, self.batch)
        self.kv.append(index, *rows)
        layer.arrays = [np.concatenate(pair) for pair in zip(layer.arrays, rows, strict=True)]

    @rule(steps=st.integers(1, 4), hold=st.booleans())
    def decode(self, steps: int, hold: bool) -> None:
        for _ in range(steps):
            for index in range(len(self.layers)):
                self.append_to(index, 1)
                self.fetch_from(index, hold=hold)

    @rule(data=st.data(), hold=st.booleans())
    def fetch(self, data: st.DataObject, hold: bool) -> None:
        index = data.draw(st.integers(0, len(self.layers) - 1))
        tokens = len(self.layers[index].arrays[0])
        start = data.draw(st.one_of(st.none(), st.integers(0, tokens)))
        self.fetch_from(index, start=start, hold=hold)

    def fetch_from(self, index: int, start: int | None = None, hold: bool = False) -> None:
        layer = self.layers[index]
        first = start
        if first is None:
            first = 0
            if layer.window is not None:
                first = max(0, len(layer.arrays[0]) - layer.window)
        found = self.kv.fetch(index, start=start, device=self.device)
        for array, whole in zip(found, layer.arrays, strict=True):
            assert same(array, whole[first:])
            assert array.flags.writeable
            if hold:
                self.held.append((array[::2], whole[first::2].copy()))
            else:
                array[...] = 0  # it is the caller's: nobody else may notice

    @rule()
    def let_go(self) -> None:
        self.held.clear()

    @rule(data=st.data())
    def truncate(self, data: st.DataObject) -> None:
        longest = max(len(layer.arrays[0]) for layer in self.layers)
        keep = data.draw(st.integers(0, longest + 1))
        self.kv.truncate(keep)
        for layer in self.layers:
            layer.arrays = [array[:keep] for array in layer.arrays]

    @rule()
    def reset(self) -> None:
        self.kv.reset()
        for layer in self.layers:
            layer.arrays = [array[:0] for array in layer.arrays]

    @rule(data=st.data())
    def reorder(self, data: st.DataObject) -> None:
        numbers = st.integers(0, self.batch - 1)
        index = data.draw(st.lists(numbers, min_size=self.batch, max_size=self.batch))
        self.kv.reorder(index)
        self.take(index)

    @rule(data=st.data())
    def select_batch(self, data: st.DataObject) -> None:
        index = data.draw(st.lists(st.integers(0, self.batch - 1), min_size=1, max_size=BATCH_MAX))
        self.kv.select_batch(index)
        self.take(index)

    @precondition(lambda self: self.batch <= BATCH_MAX // 2)
    @rule(times=st.integers(1, 2))
    def repeat_batch(self, times: int) -> None:
        self.kv.repeat_batch(times)
        self.take([row for row in range(self.batch) for _ in range(times)])

    def take(self, index: list[int]) -> None:
        self.batch = len(index)
        for layer in self.layers:
            layer.arrays = [array[:, index] for array in layer.arrays]

    @invariant()
    def agrees(self) -> None:
        if not self.layers:
            return
        lengths = [len(layer.arrays[0]) for layer in self.layers]
        assert [self.kv.tokens(index) for index in range(len(self.kv))] == lengths
        assert self.kv.length == min(lengths)
        assert self.kv.batch == self.batch
        assert len(self.store) == 2 * len(self.layers)
        for array, copy in self.held:
            assert same(array, copy)

    def teardown(self) -> None:
        with self.folder:
            if self.layers:
                with self.store, self.kv:
                    for index in range(len(self.layers)):
                        self.fetch_from(index, start=0)
                    self.kv.close()
                    assert len(self.store) == 0
            self.held.clear()


def test_kvcache_is_a_concatenation() -> None:
    before = _core.counters()["buffers"]
    run_state_machine_as_test(KVCacheMachine, settings=settings(stateful_step_count=25))
    gc.collect()
    assert _core.counters()["buffers"] == before


class StagedMachine(KVCacheMachine):
    """The same with layers that go to a device through staging, by copies that take their time."""

    device = HostDevice(copy_bytes_per_s=2e9)


class UnifiedMachine(KVCacheMachine):
    """The same with a device whose memory the drive reads into."""

    device = HostDevice(unified=True)


@pytest.mark.parametrize("machine", [StagedMachine, UnifiedMachine])
def test_a_device_gets_the_same(machine: type[KVCacheMachine]) -> None:
    before = _core.counters()["buffers"]
    run_state_machine_as_test(machine, settings=settings(stateful_step_count=25))
    gc.collect()
    assert _core.counters()["buffers"] == before

"""Pipelines against plain sequential copies, with failures and cancellations at random points."""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import dualblade
from dualblade.gpu import HostDevice
from dualblade.pipeline import Pipeline

MIB = 1 << 20
DTYPES = [np.uint8, np.float16, ml_dtypes.bfloat16, np.float64]


@dataclass
class Stored:
    """What is stored under a key: rows of a width, of room for more if it grows."""

    rows: int
    width: int
    dtype: Any
    grows: bool

    def array(self, seed: int) -> np.ndarray:
        data = np.random.default_rng(seed).bytes(
            self.rows * self.width * np.dtype(self.dtype).itemsize
        )
        return np.frombuffer(data, self.dtype).reshape(self.rows, self.width)


tensors = st.builds(
    Stored,
    rows=st.one_of(st.integers(0, 3), st.integers(0, 700)),
    width=st.sampled_from([1, 64, 1000, 1024]),
    dtype=st.sampled_from(DTYPES),
    grows=st.booleans(),
)
groups = st.lists(
    st.tuples(st.lists(tensors, min_size=1, max_size=4), st.sampled_from(["direct", "pagecache"])),
    min_size=1,
    max_size=7,
)


@dataclass
class Options:
    """How a pipeline is made."""

    staging_units: int
    chunk_units: int
    depth: int
    mode: str
    bandwidth: float | None
    unified: bool
    adaptive: bool

    @property
    def staging_bytes(self) -> int:
        return 4 * (self.chunk_units * self.depth + self.staging_units) * MIB

    def open(self, store: dualblade.TensorStore) -> Pipeline:
        device = HostDevice(copy_bytes_per_s=self.bandwidth, unified=self.unified)
        if self.adaptive:
            return store.pipeline(device, staging=self.staging_bytes)
        return store.pipeline(
            device,
            staging=self.staging_bytes,
            chunk_bytes=self.chunk_units * MIB,
            depth=self.depth,
            mode=self.mode,
        )


options = st.builds(
    Options,
    staging_units=st.integers(0, 2),
    chunk_units=st.integers(1, 2),
    depth=st.integers(1, 3),
    mode=st.sampled_from(["intra", "cross"]),
    bandwidth=st.sampled_from([None, 1e9, 20e9]),
    unified=st.booleans(),
    adaptive=st.booleans(),
)
orders = st.lists(st.integers(0, 1 << 30), max_size=10)


class World:
    """A store, what is in it, and a pipeline."""

    def __init__(self, folder: str, groups: list[tuple[list[Stored], str]], made: Options) -> None:
        self.path = Path(folder, "kv.img")
        self.options = made
        self.store = dualblade.open(self.path, size="96MiB", memory="48MiB", live=False)
        self.expected: dict[str, np.ndarray] = {}
        self.groups: list[list[str]] = []
        for number, (members, path) in enumerate(groups):
            keys = [f"{number}/{n}" for n in range(len(members))]
            for key, stored in zip(keys, members, strict=True):
                self.expected[key] = array = stored.array(len(self.expected))
                if stored.grows:
                    shape = (stored.rows + 5, stored.width)
                    self.store.reserve(key, shape, array.dtype, group=str(number))
                    self.store.append(key, array)
                else:
                    self.store.put(key, array, group=str(number))
            self.store.set_path(str(number), path)
            self.groups.append(keys)
        self.pipe = made.open(self.store)

    def __enter__(self) -> World:
        return self

    def __exit__(self, *error: object) -> None:
        self.pipe.close()
        self.store.close()

    def corrupt(self, key: str) -> bool:
        """Changes a byte on the device, if there is one."""
        info = self.store.info(key)
        stored_bytes = info.nbytes if info.capacity == info.shape else info.nbytes // 4096 * 4096
        if stored_bytes == 0:
            return False
        self.store.flush()
        with self.path.open("r+b") as file:
            place = info.offset + info.nbytes * 2 // 3 % stored_bytes
            file.seek(place)
            byte = file.read(1)[0]
            file.seek(place)
            file.write(bytes([byte ^ 1]))
        return True

    def check_group(self, keys: list[str], arrays: list[Any]) -> None:
        assert len(arrays) == len(keys)
        for key, array in zip(keys, arrays, strict=True):
            assert_same(array, self.expected[key])

    def check_idle(self) -> None:
        """All staging is given back, nothing is held and nothing is under way."""
        self.pipe.settle()
        stats = self.pipe.stats()
        assert stats["staging_taken_bytes"] == 0
        assert stats["staging_most_bytes"] <= stats["staging_bytes"] <= self.options.staging_bytes
        assert stats["staging_bytes"] == 0 or not stats["in_place"]
        assert [stats[lane]["under_way"] for lane in ("direct", "pagecache", "put")] == [0, 0, 0]
        assert self.store.stats()["operations_active"] == 0


def assert_same(array: np.ndarray, expected: np.ndarray) -> None:
    assert array.dtype == expected.dtype
    assert array.shape == expected.shape
    assert array.tobytes() == expected.tobytes()


def in_order(world: World, order: list[int]) -> list[list[str]]:
    """Groups, each as often as it is named."""
    if not order:
        return world.groups
    return [world.groups[number % len(world.groups)] for number in order]


@given(groups=groups, made=options, order=orders)
def test_groups_come_whole_and_in_order(groups, made, order):
    with tempfile.TemporaryDirectory() as folder, World(folder, groups, made) as world:
        wanted = in_order(world, order)
        count = 0
        for keys, arrays in zip(wanted, world.pipe.stream(wanted), strict=True):
            world.check_group(keys, arrays)
            count += 1
        assert count == len(wanted)
        world.check_idle()


@given(groups=groups, made=options, order=orders, where=st.integers(0, 1 << 30), data=st.data())
def test_ranges_of_rows_and_memory_of_the_callers(groups, made, order, where, data):
    with tempfile.TemporaryDirectory() as folder, World(folder, groups, made) as world:
        wanted, expected = [], []
        for keys in in_order(world, order):
            some = []
            for key in keys:
                rows = len(world.expected[key])
                start = data.draw(st.integers(0, rows))
                some.append((key, start, data.draw(st.integers(start, rows))))
            wanted.append(some)
            expected.append([world.expected[key][start:stop] for key, start, stop in some])
        outs = [[np.empty_like(array) for array in arrays] for arrays in expected]
        given_outs = outs if where % 2 else None
        for number, arrays in enumerate(world.pipe.stream(wanted, out=given_outs)):
            for array, out, right in zip(arrays, outs[number], expected[number], strict=True):
                assert_same(array, right)
                assert given_outs is None or array is out
        if given_outs is not None:
            for filled, right in zip(outs, expected, strict=True):
                for array, content in zip(filled, right, strict=True):
                    assert_same(array, content)
        world.check_idle()


@given(groups=groups, made=options, order=orders, where=st.integers(0, 1 << 30))
def test_what_is_corrupt_raises_in_its_turn_and_the_pipeline_goes_on(groups, made, order, where):
    with tempfile.TemporaryDirectory() as folder, World(folder, groups, made) as world:
        keys = list(world.expected)
        bad = keys[where % len(keys)]
        is_corrupt = world.corrupt(bad)
        wanted = in_order(world, order)
        turn = next((n for n, group in enumerate(wanted) if is_corrupt and bad in group), None)
        stream = world.pipe.stream(wanted)
        for group in wanted[:turn]:
            world.check_group(group, next(stream))
        if turn is not None:
            with pytest.raises(dualblade.CorruptionError, match=f"tensor {bad!r} is corrupt"):
                next(stream)
        assert next(stream, None) is None
        world.check_idle()
        healthy = [group for group in world.groups if not (is_corrupt and bad in group)]
        for group, arrays in zip(healthy, world.pipe.stream(healthy), strict=True):
            world.check_group(group, arrays)


@given(groups=groups, made=options, order=orders, stop=st.integers(0, 10), missing=st.booleans())
def test_an_iteration_that_is_given_up_leaves_nothing_behind(groups, made, order, stop, missing):
    with tempfile.TemporaryDirectory() as folder, World(folder, groups, made) as world:
        wanted = in_order(world, order)
        stop %= len(wanted)
        if missing:
            wanted = [*wanted[: stop + 1], ["nobody put this"], *wanted[stop + 1 :]]
        stream = world.pipe.stream(wanted)
        for number, arrays in enumerate(stream):
            world.check_group(wanted[number], arrays)
            if number == stop:
                break
        if missing:
            with pytest.raises(dualblade.KeyNotFoundError):
                next(stream)
        stream.close()
        world.check_idle()
        # What was held can be changed, and comes as it is then.
        for key in world.expected:
            rows = len(world.expected[key]) // 2
            world.store.truncate(key, rows)
            world.expected[key] = world.expected[key][:rows]
        for keys, arrays in zip(world.groups, world.pipe.stream(world.groups), strict=True):
            world.check_group(keys, arrays)


@given(groups=groups, made=options, order=orders)
def test_what_is_put_is_stored_while_others_are_read(groups, made, order):
    with tempfile.TemporaryDirectory() as folder, World(folder, groups, made) as world:
        wanted = in_order(world, order)
        tickets, put = [], {}
        for number, arrays in enumerate(world.pipe.stream(wanted)):
            world.check_group(wanted[number], arrays)
            copies = {f"copy/{key}": world.expected[key] for key in wanted[number]}
            tickets.append(world.pipe.put_async(copies, group="copies"))
            put |= copies
        for key, array in put.items():
            assert_same(world.store.get(key), array)
        for ticket in tickets:
            ticket.result()
        world.pipe.put({key: array[::-1].copy() for key, array in put.items()})
        for key, array in put.items():
            assert_same(world.store.get(key), array[::-1])
        world.check_idle()
        assert world.store.check() == []

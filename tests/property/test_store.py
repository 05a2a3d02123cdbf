"""TensorStore against a dict of numpy arrays, through random sequences of everything it can do."""

from __future__ import annotations

import contextlib
import math
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

import dualblade

KIB, MIB = 1 << 10, 1 << 20
STORE_BYTES = 40 * MIB
HEADER_BYTES = 1 * MIB  # of the store's size, what holds no tensors
KEYS = ("a", "a/0", "a/1", "ключ", "nul\0byte", "")
GROUPS = (None, None, "g", "h")
PATHS = ("direct", "pagecache")
LAYOUTS = ("plain", "fortran", "strided", "reversed", "misaligned", "readonly")
DTYPES = tuple(
    np.dtype(dtype)
    for dtype in (
        "u1",
        "<i2",
        ">i4",
        "f2",
        "f4",
        "c16",
        "?",
        "U3",
        "S5",
        "M8[ns]",
        ml_dtypes.bfloat16,
        ml_dtypes.float8_e4m3fn,
        {"names": ["x", "y"], "formats": ["u1", "<i8"], "offsets": [0, 8], "itemsize": 24},
    )
)
# Around the sizes at which something changes: a block, a chunk of a checksum, and what is copied
# at a time.
EDGES = (0, 1, 511, 4095, 4096, 4097, 12288, 256 * KIB - 1, 256 * KIB, 256 * KIB + 1, 300_000)
LARGE = (MIB, MIB + 7, 3 * MIB, 4 * MIB + 4096, 5_000_000)


def content(shape: tuple[int, ...], dtype: np.dtype, seed: int) -> np.ndarray:
    """An array of noise; every pattern of bits that is a value of the dtype may come up."""
    random = np.random.default_rng(seed)
    count = math.prod(shape)
    if dtype.kind == "b":
        return random.integers(0, 2, shape).astype(bool)
    if dtype.kind == "U":
        codes = random.integers(1, 0xD800, count * dtype.itemsize // 4).astype("<u4")
        return codes.view(dtype).reshape(shape)
    raw = np.frombuffer(random.bytes(count * dtype.itemsize), np.uint8).copy()
    return raw.view(dtype).reshape(shape)


def laid_out(array: np.ndarray, layout: str) -> np.ndarray:
    """The same values, placed differently in memory."""
    if layout == "fortran":
        return np.asfortranarray(array)
    if layout == "strided" and array.ndim:
        wide = np.repeat(array, 2, axis=-1)
        return wide[..., ::2]
    if layout == "reversed" and array.ndim:
        return np.ascontiguousarray(array[::-1])[::-1]
    if layout == "misaligned":
        memory = bytearray(array.nbytes + 3)
        moved = np.ndarray(array.shape, array.dtype, memory, offset=3)
        moved[...] = array
        return moved
    if layout == "readonly":
        array = array.copy()
        array.flags.writeable = False
    return array


def same(found: np.ndarray, expected: np.ndarray) -> bool:
    """Equal in dtype, shape and every bit of every value; padding is nobody's."""
    if found.dtype != expected.dtype or found.shape != expected.shape:
        return False
    if expected.dtype.names:
        return all(same(found[name], expected[name]) for name in expected.dtype.names)
    return found.tobytes() == expected.tobytes()


@dataclass
class Model:
    data: np.ndarray
    capacity: tuple[int, ...]
    group: str

    @property
    def rows(self) -> int:
        return self.data.shape[0]

    @property
    def extent_bytes(self) -> int:
        return -(-math.prod(self.capacity) * self.data.itemsize // 4096) * 4096

    @property
    def stored_bytes(self) -> int:
        return -(-self.data.nbytes // 4096) * 4096


@st.composite
def shapes(draw: st.DrawFn, dtype: np.dtype) -> tuple[int, ...]:
    kind = draw(st.sampled_from(("edge", "edge", "small", "large", "none", "zero")))
    if kind == "none":
        return ()
    if kind == "zero":
        return draw(st.sampled_from(((0,), (3, 0), (0, 5), (2, 0, 4))))
    if kind == "small":
        return tuple(draw(st.lists(st.integers(1, 9), min_size=1, max_size=4)))
    elements = draw(st.sampled_from(LARGE if kind == "large" else EDGES)) // dtype.itemsize
    columns = draw(st.sampled_from((1, 3, 64)))
    return (elements // columns, columns) if columns > 1 else (elements,)


@st.composite
def arrays(draw: st.DrawFn) -> np.ndarray:
    dtype = draw(st.sampled_from(DTYPES))
    array = content(draw(shapes(dtype)), dtype, draw(st.integers(0, 1 << 32)))
    return laid_out(array, draw(st.sampled_from(LAYOUTS)))


class StoreMachine(RuleBasedStateMachine):
    """Every rule does the same to the store and to the model; looking at the store compares."""

    def __init__(self) -> None:
        super().__init__()
        self.folder = Path(tempfile.mkdtemp(prefix="dualblade-test-"))
        self.target = str(self.folder / "kv.img")
        self.model: dict[str, Model] = {}
        self.reads: list[tuple[Any, np.ndarray]] = []
        self.writes: list[Any] = []
        self.store: dualblade.TensorStore

    @initialize(
        verify=st.sampled_from(("always", "always", "open", "never")),
        policy=st.sampled_from(("dual", "dual", "direct", "pagecache")),
        engine=st.sampled_from(("auto", "threads")),
    )
    def open(self, verify: str, policy: str, engine: str) -> None:
        self.begin(verify=verify, policy=policy, engine=engine)
        self.store = dualblade.open(self.target, size=STORE_BYTES, **self.options)

    def begin(self, **options: Any) -> None:
        self.options = {"memory": 4 * MIB, **options}

    def teardown(self) -> None:
        try:
            if hasattr(self, "store"):
                self.store.close()
                self.collect()
        finally:
            shutil.rmtree(self.folder)

    # ---- helpers ----------------------------------------------------------------------------

    def key(self, data: st.DataObject, *, axis: bool = False) -> str:
        found = [key for key in self.model if self.model[key].capacity or not axis]
        return data.draw(st.sampled_from(found))

    @contextlib.contextmanager
    def may_be_full(self, *sizes: int, one_run: bool = False) -> Any:
        """A NoSpaceError is right only if there is indeed no run for what was asked."""
        try:
            yield
        except dualblade.NoSpaceError:
            stats = self.store.stats()
            if one_run or len(sizes) == 1:
                # A large extent begins at a multiple of 64 KiB.
                assert stats["largest_free_bytes"] < sum(sizes) + 64 * KIB
            else:
                assert stats["largest_free_bytes"] < max(sizes) + sum(sizes) + 64 * KIB

    def stored(self, key: str, array: np.ndarray, group: str | None) -> None:
        if group is None:
            group = self.model[key].group if key in self.model else key
        self.model[key] = Model(np.array(array, order="C"), array.shape, group)

    def rows_for(self, data: st.DataObject, model: Model) -> np.ndarray:
        room = model.capacity[0] - model.rows
        sizes = st.sampled_from((0, 1, 2, 3, 17, 60, 700, room // 2, room, room + 1))
        shape = (min(data.draw(sizes), room + 1), *model.capacity[1:])
        if math.prod(shape) * model.data.itemsize > 8 * MIB:
            shape = (0, *shape[1:])
        seed = data.draw(st.integers(0, 1 << 32))
        layout = data.draw(st.sampled_from(LAYOUTS))
        return laid_out(content(shape, model.data.dtype, seed), layout)

    def appended(self, key: str, rows: np.ndarray) -> None:
        model = self.model[key]
        grown = np.empty((model.rows + len(rows), *model.data.shape[1:]), model.data.dtype)
        grown[: model.rows] = model.data
        grown[model.rows :] = rows
        model.data = grown

    # ---- rules ------------------------------------------------------------------------------

    @rule(key=st.sampled_from(KEYS), array=arrays(), group=st.sampled_from(GROUPS))
    def put(self, key: str, array: np.ndarray, group: str | None) -> None:
        with self.may_be_full(array.nbytes):
            self.store.put(key, array, group=group)
            self.stored(key, array, group)

    @rule(
        batch=st.dictionaries(st.sampled_from(KEYS), arrays(), max_size=4),
        group=st.sampled_from(GROUPS),
    )
    def put_many(self, batch: dict[str, np.ndarray], group: str | None) -> None:
        with self.may_be_full(*(array.nbytes for array in batch.values())):
            self.store.put_many(batch, group=group)
            for key, array in batch.items():
                self.stored(key, array, group)

    @rule(key=st.sampled_from(KEYS), array=arrays(), group=st.sampled_from(GROUPS))
    def put_async(self, key: str, array: np.ndarray, group: str | None) -> None:
        with self.may_be_full(array.nbytes):
            self.writes.append(self.store.put_async(key, array, group=group))
            self.stored(key, array, group)

    @rule(
        key=st.sampled_from(KEYS),
        dtype=st.sampled_from(DTYPES),
        rows=st.sampled_from((0, 1, 5, 200, 5000)),
        row=st.sampled_from(((), (1,), (3, 5), (100,), (341,), (0,), (64, 8, 8))),
        group=st.sampled_from(GROUPS),
    )
    def reserve(
        self, key: str, dtype: np.dtype, rows: int, row: tuple[int, ...], group: str | None
    ) -> None:
        shape = (rows, *row)
        if math.prod(shape) * dtype.itemsize > 16 * MIB:
            shape = (rows // 100, *row)
        if key in self.model:
            with pytest.raises(ValueError, match="stored already"):
                self.store.reserve(key, shape, dtype, group=group)
            return
        with self.may_be_full(math.prod(shape) * dtype.itemsize):
            self.store.reserve(key, shape, dtype, group=group)
            self.model[key] = Model(np.empty((0, *row), dtype), shape, group or key)

    @precondition(lambda self: any(model.capacity for model in self.model.values()))
    @rule(data=st.data())
    def append(self, data: st.DataObject) -> None:
        key = self.key(data, axis=True)
        rows = self.rows_for(data, self.model[key])
        if self.model[key].rows + len(rows) > self.model[key].capacity[0]:
            with pytest.raises(ValueError, match="no room"):
                self.store.append(key, rows)
        else:
            self.store.append(key, rows)
            self.appended(key, rows)

    @precondition(lambda self: any(model.capacity for model in self.model.values()))
    @rule(data=st.data(), count=st.integers(2, 40))
    def append_often(self, data: st.DataObject, count: int) -> None:
        """Single rows, as a cache grows token by token."""
        key = self.key(data, axis=True)
        model = self.model[key]
        count = min(count, model.capacity[0] - model.rows)
        rows = content((count, *model.capacity[1:]), model.data.dtype, count)
        for row in range(count):
            self.store.append(key, rows[row : row + 1])
        self.appended(key, rows)

    @precondition(lambda self: any(model.capacity for model in self.model.values()))
    @rule(data=st.data())
    def append_many(self, data: st.DataObject) -> None:
        keys = {self.key(data, axis=True) for _ in range(3)}
        rows = {key: self.rows_for(data, self.model[key]) for key in sorted(keys)}
        too_many = [
            key
            for key, array in rows.items()
            if self.model[key].rows + len(array) > self.model[key].capacity[0]
        ]
        if too_many:
            with pytest.raises(ValueError, match="no room"):
                self.store.append_many(rows)
            return
        self.store.append_many(rows)
        for key, array in rows.items():
            self.appended(key, array)

    @precondition(lambda self: self.model)
    @rule(data=st.data(), placed=st.sampled_from(("new", "aligned", "misaligned", "bytes")))
    def get(self, data: st.DataObject, placed: str) -> None:
        key = self.key(data)
        expected = self.model[key].data
        if placed == "new":
            assert same(self.store.get(key), expected)
        elif placed == "bytes":
            memory = bytearray(expected.nbytes)
            assert self.store.get(key, out=memory) is memory
            assert same(np.ndarray(expected.shape, expected.dtype, memory), expected)
        else:
            if placed == "aligned":
                out = dualblade.aligned_empty(expected.shape, expected.dtype)
            else:
                out = laid_out(np.zeros(expected.shape, expected.dtype), "misaligned")
            assert self.store.get(key, out=out) is out
            assert same(out, expected)

    @precondition(lambda self: self.model)
    @rule(data=st.data())
    def get_many(self, data: st.DataObject) -> None:
        keys = list(dict.fromkeys(self.key(data) for _ in range(4)))
        outs = {}
        for key in keys[::2]:
            outs[key] = np.zeros_like(self.model[key].data, order="C")
        found = self.store.get_many(keys, out=outs or None)
        assert list(found) == keys
        for key in keys:
            assert same(found[key], self.model[key].data)
        assert all(found[key] is out for key, out in outs.items())

    @precondition(lambda self: any(model.capacity for model in self.model.values()))
    @rule(data=st.data(), ends=st.tuples(*[st.one_of(st.none(), st.integers(-7, 6000))] * 2))
    def read(self, data: st.DataObject, ends: tuple[int | None, int | None]) -> None:
        key = self.key(data, axis=True)
        expected = self.model[key].data[slice(*ends)]
        if ends == (None, None):
            ends = (0, None)
        assert same(self.store.read(key, *ends), expected)
        out = np.zeros_like(expected, order="C")
        assert self.store.read(key, *ends, out=out) is out
        assert same(out, expected)

    @precondition(lambda self: self.model)
    @rule(data=st.data())
    def get_async(self, data: st.DataObject) -> None:
        key = self.key(data)
        self.reads.append((self.store.get_async(key), self.model[key].data))

    @rule()
    def collect(self) -> None:
        """What a read began with is what it brings, whatever was done with the key since."""
        for ticket in self.writes:
            assert ticket.result() is None
        for ticket, expected in self.reads:
            assert same(ticket.result(), expected)
        self.writes.clear()
        self.reads.clear()

    @precondition(lambda self: self.model)
    @rule(data=st.data())
    def truncate(self, data: st.DataObject) -> None:
        key = self.key(data)
        model = self.model[key]
        if not model.capacity:
            with pytest.raises(ValueError, match="axis"):
                self.store.truncate(key, 0)
            return
        rows = data.draw(st.integers(0, model.rows + 1))
        if rows > model.rows:
            with pytest.raises(ValueError, match="can't keep"):
                self.store.truncate(key, rows)
            return
        self.store.truncate(key, rows)
        model.data = model.data[:rows].copy()

    @precondition(lambda self: any(model.capacity for model in self.model.values()))
    @rule(data=st.data())
    def resize(self, data: st.DataObject) -> None:
        key = self.key(data, axis=True)
        model = self.model[key]
        rows = data.draw(st.sampled_from((0, model.rows, model.rows + 1, 2 * model.capacity[0])))
        size = rows * math.prod(model.capacity[1:]) * model.data.itemsize
        if rows < model.rows:
            with pytest.raises(ValueError, match="resized"):
                self.store.resize(key, rows)
            return
        if size > 16 * MIB:
            return
        with self.may_be_full(size, one_run=True):
            self.store.resize(key, rows)
            model.capacity = (rows, *model.capacity[1:])

    @precondition(lambda self: self.model)
    @rule(data=st.data())
    def delete(self, data: st.DataObject) -> None:
        key = self.key(data)
        self.store.delete(key)
        del self.model[key]
        assert key not in self.store
        with pytest.raises(dualblade.KeyNotFoundError):
            self.store.get(key)

    @precondition(lambda self: self.model)
    @rule(data=st.data(), path=st.sampled_from(PATHS))
    def set_path(self, data: st.DataObject, path: str) -> None:
        group = self.model[self.key(data)].group
        members = [key for key in self.model if self.model[key].group == group]
        # Of one in which nothing is stored all of it may soon be filled.
        size = sum(self.model[key].stored_bytes for key in members)
        size = size or sum(self.model[key].extent_bytes for key in members)
        before = self.store.info(members[0]).path
        try:
            self.store.set_path(group, path)
        except ValueError:
            assert path == "pagecache"
            claimed = self.store.stats()["residency"]["claimed_bytes"]
            assert claimed + size > self.store.memory_budget
            return
        for key in members:
            info = self.store.info(key)
            assert info.path == path
            if before == "pagecache" and path == "direct":
                assert self.store._device.cached_bytes(info.offset, info.extent_bytes)[0] == 0

    @rule()
    def flush(self) -> None:
        self.store.flush()

    @rule(settled=st.booleans())
    def reopen(self, settled: bool) -> None:
        order = self.store.keys() if settled else None
        self.store.close()
        self.collect()
        self.store = dualblade.open(self.target, **self.options)
        assert set(self.store.keys()) == set(self.model)
        assert order is None or self.store.keys() == order

    @rule(prefix=st.sampled_from(("", "a", "a/", "x")))
    def keys(self, prefix: str) -> None:
        found = self.store.keys(prefix)
        assert sorted(found) == sorted(key for key in self.model if key.startswith(prefix))
        assert len(self.store) == len(self.model)

    @rule()
    def compare_all(self) -> None:
        for key, model in self.model.items():
            assert key in self.store
            assert same(self.store.get(key), model.data)
            info = self.store.info(key)
            assert info.shape == model.data.shape
            assert info.capacity == model.capacity
            assert info.nbytes == model.data.nbytes
            assert info.group == model.group
            assert info.extent_bytes == model.extent_bytes
        assert self.store.check() == []

    @rule()
    def space(self) -> None:
        """What is not free is what the tensors take, and the page-cached ones keep the budget."""
        assert len(self.store.keys()) == len(self.model)  # waits for what is under way
        stats = self.store.stats()
        taken = sum(model.extent_bytes for model in self.model.values())
        assert stats["total_bytes"] == STORE_BYTES
        assert stats["free_bytes"] == STORE_BYTES - HEADER_BYTES - taken
        assert stats["largest_free_bytes"] <= stats["free_bytes"]
        sizes: dict[str, int] = {}
        stored: dict[str, int] = {}
        for model in self.model.values():
            sizes[model.group] = sizes.get(model.group, 0) + model.extent_bytes
            stored[model.group] = stored.get(model.group, 0) + model.stored_bytes
        groups = stats["groups"]
        assert {name: group["size_bytes"] for name, group in groups.items()} == sizes
        assert {name: group["stored_bytes"] for name, group in groups.items()} == stored
        cached = sum(stored[name] for name in groups if groups[name]["path"] != "direct")
        assert stats["pagecache_bytes"] == cached <= stats["residency"]["claimed_bytes"]
        if self.options["policy"] != "pagecache":
            assert cached <= stats["memory_budget_bytes"] == 4 * MIB

    @invariant()
    def nothing_is_corrupt(self) -> None:
        if hasattr(self, "store"):
            assert self.store.stats()["corruptions"] == 0


TestStore = StoreMachine.TestCase
TestStore.settings = settings(
    stateful_step_count=30,
    suppress_health_check=[HealthCheck.data_too_large, HealthCheck.too_slow],
)

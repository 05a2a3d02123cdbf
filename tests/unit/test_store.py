"""TensorStore: what is stored comes back, and the keys, groups and numbers that belong to it."""

from __future__ import annotations

import enum
from typing import TYPE_CHECKING

import ml_dtypes
import numpy as np
import pytest

import dualblade
from tests.helpers import MIB, noise

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

CHUNK = 256 << 10


@pytest.fixture
def store(path: Path) -> Iterator[dualblade.TensorStore]:
    with dualblade.open(path, size="32MiB") as opened:
        yield opened


# ---- arrays in, arrays out -----------------------------------------------------------------------


@pytest.mark.parametrize(
    "dtype", ["float16", ml_dtypes.bfloat16, ml_dtypes.float8_e5m2, ">f4", "?", "U4", "S3"]
)
def test_dtypes_come_back(store: dualblade.TensorStore, dtype: object) -> None:
    array = np.arange(24).reshape(2, 3, 4).astype(dtype)
    store.put("x", array)
    found = store.get("x")
    assert found.dtype == array.dtype
    np.testing.assert_array_equal(found, array)


def test_torch_tensors_go_in_and_are_filled(store: dualblade.TensorStore) -> None:
    torch = pytest.importorskip("torch")
    tensor = torch.arange(12).reshape(3, 4).to(torch.bfloat16)
    store.put("x", tensor.T)
    out = torch.zeros(4, 3, dtype=torch.bfloat16)
    assert store.get("x", out=out) is out
    assert torch.equal(out, tensor.T)
    store.reserve("grows", (8, 4), torch.bfloat16)
    store.append("grows", tensor)
    assert torch.equal(store.read("grows", 1, 3, out=torch.empty_like(tensor[1:])), tensor[1:])


def test_plain_buffers_go_in(store: dualblade.TensorStore) -> None:
    store.put("x", b"some bytes")
    assert store.get("x").tobytes() == b"some bytes"
    out = bytearray(10)
    store.get("x", out=out)
    assert out == b"some bytes"


def test_what_is_stored_is_a_copy(store: dualblade.TensorStore) -> None:
    array = noise(CHUNK + 5)
    expected = array.copy()
    store.put("x", array)
    array[:] = 0
    found = store.get("x")
    np.testing.assert_array_equal(found, expected)
    found[:] = 0
    np.testing.assert_array_equal(store.get("x"), expected)


@pytest.mark.parametrize(("start", "stop"), [(0, 3), (2, 99), (-2, 10), (-99, 1), (3, 1), (9, 12)])
def test_rows_are_counted_as_slices_count(
    store: dualblade.TensorStore, start: int, stop: int
) -> None:
    rows = noise(7 * 1000).reshape(7, 1000)
    store.reserve("x", (10, 1000), "uint8")
    store.append("x", rows)
    np.testing.assert_array_equal(store.read("x", start, stop), rows[start:stop])


def test_get_many_takes_memory_beside_keys_or_by_key(store: dualblade.TensorStore) -> None:
    arrays = {name: noise(1000, seed) for seed, name in enumerate("abc")}
    store.put_many(arrays)
    outs = [np.empty(1000, np.uint8) for _ in range(3)]
    found = store.get_many(list("cab"), out=outs)
    assert list(found) == ["c", "a", "b"]
    assert [found[name] is out for name, out in zip("cab", outs, strict=True)] == [True] * 3
    for name, array in arrays.items():
        np.testing.assert_array_equal(found[name], array)
    only = np.empty(1000, np.uint8)
    found = store.get_many(["a", "b"], out={"b": only})
    assert found["b"] is only
    np.testing.assert_array_equal(found["a"], arrays["a"])
    with pytest.raises(ValueError, match="2 arrays for 3 keys"):
        store.get_many(list("abc"), out=outs[:2])


def test_one_key_twice_in_a_batch(store: dualblade.TensorStore) -> None:
    store.put("x", noise(100))
    assert list(store.get_many(["x", "x"])) == ["x"]
    store.delete_many(["x", "x"])
    assert len(store) == 0


def test_empty_batches_do_nothing(store: dualblade.TensorStore) -> None:
    store.put_many({})
    store.append_many({})
    store.reserve_many({})
    store.truncate_many({})
    store.resize_many({})
    store.delete_many([])
    assert store.get_many([]) == {}
    assert store.read_many_async([]).result() == []
    assert len(store) == 0


def test_reserved_together_lies_in_one_run(store: dualblade.TensorStore) -> None:
    store.reserve_many(dict.fromkeys("kv", ((1000, 100), "float32")), group="layer 0")
    k, v = store.info("k"), store.info("v")
    assert k.group == v.group == "layer 0"
    assert v.offset == k.offset + k.extent_bytes


def test_batches_are_all_or_nothing(store: dualblade.TensorStore) -> None:
    store.reserve_many(dict.fromkeys("ab", ((4, 8), "uint8")))
    rows = noise(24).reshape(3, 8)
    store.append_many({"a": rows, "b": rows[:1]})
    free = store.stats()["free_bytes"]
    with pytest.raises(ValueError, match="no room for 2 more"):
        store.append_many({"b": rows[:2], "a": rows[:2]})
    with pytest.raises(ValueError, match="can't keep 3"):
        store.truncate_many({"a": 0, "b": 3})
    with pytest.raises(ValueError, match="can't be resized to 2"):
        store.resize_many({"b": 2, "a": 2})
    with pytest.raises(dualblade.KeyNotFoundError):
        store.delete_many(["a", "missing"])
    with pytest.raises(ValueError, match="stored already"):
        store.reserve_many({"c": ((4,), "uint8"), "a": ((4,), "uint8")})
    with pytest.raises(TypeError):
        store.put_many({"a": noise(5), "d": [1, 2]})
    assert store.keys() == ["a", "b"]
    np.testing.assert_array_equal(store.get("a"), rows)
    np.testing.assert_array_equal(store.get("b"), rows[:1])
    assert store.stats()["free_bytes"] == free


def test_rows_grow_across_blocks_and_chunks_one_by_one(path: Path) -> None:
    """Rows of 700 bytes: neither a block nor a chunk is a whole number of them."""
    rows = noise(700 * 800).reshape(800, 700)
    with dualblade.open(path, size="4MiB", memory="1MiB") as store:
        store.reserve("x", (1000, 700), "uint8")
        for row in range(400):
            store.append("x", rows[row : row + 1])
        np.testing.assert_array_equal(store.get("x"), rows[:400])
        written = sum(side["write_bytes"] for side in store.stats()["paths"].values())
        # Every block is written once: nothing is read to be modified and written back.
        assert written <= 400 * 700 + 4096
    with dualblade.open(path) as store:
        assert store.info("x").rows == 400
        for row in range(400, 800):
            store.append("x", rows[row : row + 1])
        np.testing.assert_array_equal(store.get("x"), rows)
        assert store.check() == []


def test_truncated_tensors_grow_again(store: dualblade.TensorStore) -> None:
    rows = noise(3 * CHUNK).reshape(-1, 1024)
    store.reserve("x", rows.shape, "uint8")
    store.append("x", rows)
    for keep in (len(rows) - 1, 300, 256, 255, 3, 0):
        store.truncate("x", keep)
        np.testing.assert_array_equal(store.get("x"), rows[:keep])
        store.append("x", rows[keep : keep + 2])
        np.testing.assert_array_equal(store.get("x"), rows[: keep + 2])
    assert store.check() == []


def test_resize_keeps_content_and_gives_room(store: dualblade.TensorStore) -> None:
    rows = noise(500 * 1000).reshape(500, 1000)
    store.reserve("x", (300, 1000), "uint8")
    store.append("x", rows[:300])
    with pytest.raises(ValueError, match="resize it first"):
        store.append("x", rows[300:])
    store.resize("x", 500)
    store.append("x", rows[300:])
    np.testing.assert_array_equal(store.get("x"), rows)
    free = store.stats()["free_bytes"]
    store.truncate("x", 10)
    store.resize("x", 10)
    assert store.stats()["free_bytes"] > free
    np.testing.assert_array_equal(store.get("x"), rows[:10])


# ---- keys and groups -----------------------------------------------------------------------------


def test_keys_keep_their_order_and_have_prefixes(path: Path) -> None:
    with dualblade.open(path, size="4MiB") as store:
        for name in ("b/1", "a", "b/0", "c"):
            store.put(name, noise(10))
        store.put("a", noise(20))  # replaced: stays where it is
        store.flush()
        store.delete("b/1")
        store.put("b/1", noise(10))  # stored anew: goes to the end
        order = ["a", "b/0", "c", "b/1"]
        assert store.keys() == order
        assert store.keys("b/") == ["b/0", "b/1"]
        assert store.keys("x") == []
    with dualblade.open(path) as store:
        assert store.keys() == order


class Layer(str, enum.Enum):
    FIRST = "layer 0"


@pytest.mark.parametrize(
    "key",
    ["", "a\0b", "ключ 🔑", "'; DROP TABLE tensor; --", "x" * 5000, np.str_("n"), Layer.FIRST],
)
def test_any_text_is_a_key_and_a_group(path: Path, key: str) -> None:
    with dualblade.open(path, size="4MiB") as store:
        store.put(key, noise(10), group=key)
        store.reserve("other", (3,), "uint8", group=key)
    with dualblade.open(path) as store:
        plain = str.__str__(key)
        assert store.keys() == [plain, "other"]
        assert [store.info(name).group for name in (plain, "other")] == [plain] * 2
        np.testing.assert_array_equal(store.get(key), noise(10))


def test_a_replaced_tensor_stays_in_its_group(store: dualblade.TensorStore) -> None:
    store.put("x", noise(10), group="g")
    store.put("x", noise(5000))
    assert store.info("x").group == "g"
    store.put("x", noise(10), group="h")
    assert set(store.stats()["groups"]) == {"h"}


def test_numbers_of_other_types_are_numbers(path: Path) -> None:
    with dualblade.open(path, size=np.int64(4 * MIB)) as store:
        store.reserve("x", (np.int32(5), True), np.str_("bfloat16"))
        store.append("x", np.zeros((3, 1), ml_dtypes.bfloat16))
        store.truncate("x", True)
    with dualblade.open(path) as store:
        assert store.info("x").shape == (1, 1)
        assert store.info("x").capacity == (5, 1)


def test_info_says_what_is_there(store: dualblade.TensorStore) -> None:
    store.reserve("x", (100, 3), "float32", group="g")
    store.append("x", np.ones((2, 3), np.float32))
    info = store.info("x")
    assert info.key == "x"
    assert info.shape == (2, 3)
    assert info.dtype == "float32"
    assert info.nbytes == 24
    assert info.capacity == (100, 3)
    assert info.rows == 2
    assert info.group == "g"
    assert info.path == "pagecache"
    assert info.extent_bytes == 4096


def test_stats_count_bytes_of_each_path(path: Path) -> None:
    with dualblade.open(path, size="16MiB", memory="1MiB") as store:
        before = store.stats()["paths"]
        store.put("cached", noise(MIB))
        store.put("direct", noise(2 * MIB))
        store.get("direct")
        stats = store.stats()
        for side, name, size in (
            ("pagecache", "write_bytes", MIB),
            ("direct", "write_bytes", 2 * MIB),
            ("direct", "read_bytes", 2 * MIB),
            ("pagecache", "read_bytes", 0),
        ):
            assert stats["paths"][side][name] - before[side][name] == size
        assert stats["tensors"] == 2
        assert stats["operations_active"] == 0
        assert stats["engine"] in ("uring", "aio", "threads")


# ---- tickets -------------------------------------------------------------------------------------


def test_program_order_holds_for_a_key(store: dualblade.TensorStore) -> None:
    first, second = noise(3 * MIB, 1), noise(3 * MIB, 2)
    store.put_async("x", first)
    reading = store.get_async("x")
    store.put_async("x", second)
    np.testing.assert_array_equal(store.get("x"), second)
    np.testing.assert_array_equal(reading.result(), first)
    store.put_async("x", first)
    assert "x" in store
    store.delete("x")
    assert "x" not in store
    assert store.keys() == []


def test_a_read_brings_what_was_there_when_it_began(store: dualblade.TensorStore) -> None:
    rows = noise(MIB).reshape(-1, 1024)
    store.reserve("x", rows.shape, "uint8")
    store.append("x", rows[:700])
    reading = store.read_async("x", 0, 10_000)
    several = store.read_many_async([("x", 1, 3, None), ("x", 690, 710, None)])
    store.append("x", rows[700:])
    store.truncate("x", 5)
    store.append("x", rows[:50])
    store.resize("x", 60)
    store.delete("x")
    np.testing.assert_array_equal(reading.result(), rows[:700])
    np.testing.assert_array_equal(several.result()[0], rows[1:3])
    np.testing.assert_array_equal(several.result()[1], rows[690:700])


def test_a_result_can_be_had_again(store: dualblade.TensorStore) -> None:
    ticket = store.put_async("x", noise(100))
    assert ticket.result() is None
    assert ticket.result() is None
    reading = store.get_async("x")
    assert reading.result() is reading.result()
    assert reading.done()


def test_flush_finishes_what_nobody_waited_for(store: dualblade.TensorStore) -> None:
    tickets = [store.put_async(f"x{i}", noise(MIB, i)) for i in range(4)]
    store.flush()
    assert all(ticket.done() for ticket in tickets)
    assert store.stats()["tensors"] == 4
    assert store.stats()["paths"]["direct"]["in_flight"] == 0


def test_tickets_of_batches(store: dualblade.TensorStore) -> None:
    arrays = {f"{i}": noise(100 + i, i) for i in range(200)}
    put = store.put_many_async(arrays, group="g")
    outs = {key: np.empty_like(array) for key, array in arrays.items()}
    get = store.get_many_async(arrays, out=outs)  # waits for the put: its keys are not there yet
    assert put.done()
    assert put.result() is None
    found = get.result()
    assert list(found) == list(arrays)
    for key, array in arrays.items():
        assert found[key] is outs[key]
        np.testing.assert_array_equal(found[key], array)
    assert store.info("7").group == "g"
    with pytest.raises(ValueError, match="1 arrays for 2 keys"):
        store.get_many_async(["1", "2"], out=[outs["1"]])
    with pytest.raises(dualblade.KeyNotFoundError, match="'x'"):
        store.get_many_async(["1", "x"])
    assert store.stats()["operations_active"] == 0


def test_wrong_memory_for_one_of_many_is_refused_and_the_store_goes_on(
    store: dualblade.TensorStore,
) -> None:
    arrays = {f"{i}": noise(4096, i) for i in range(200)}
    store.put_many(arrays)
    outs = [np.zeros(4096, np.uint8) for _ in range(199)]
    with pytest.raises(ValueError, match=r"\(4095,\)"):
        store.get_many(arrays, out=[*outs, np.zeros(4095, np.uint8)])
    assert store.stats()["operations_active"] == 0
    found = store.get_many(arrays, out=[*outs, np.zeros(4096, np.uint8)])
    for key, array in arrays.items():
        np.testing.assert_array_equal(found[key], array)
    store.delete_many(arrays)


def test_a_failed_async_put_says_so_at_once(store: dualblade.TensorStore) -> None:
    with pytest.raises(dualblade.NoSpaceError):
        store.put_async("x", np.zeros(64 * MIB, np.uint8))
    assert store.stats()["operations_active"] == 0

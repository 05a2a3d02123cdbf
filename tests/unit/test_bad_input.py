"""What a store is not to be given: each with the error that names it, and with nothing lost."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
import textwrap
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

import dualblade
from dualblade.errors import (
    ClosedError,
    CorruptionError,
    DeviceError,
    DeviceRefusedError,
    DualbladeWarning,
    KeyNotFoundError,
    NoSpaceError,
    UnsupportedError,
)
from tests.helpers import MIB, flip, noise, overwrite

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

CHUNK = 256 << 10


@pytest.fixture
def store(path: Path) -> Iterator[dualblade.TensorStore]:
    with dualblade.open(path, size="4MiB") as opened:
        yield opened


@pytest.fixture
def kept(store: dualblade.TensorStore) -> Iterator[dualblade.TensorStore]:
    """A store with a tensor that is still there, in a store without fault, after the test."""
    store.put("kept", noise(50_000))
    before = store.stats()
    yield store
    np.testing.assert_array_equal(store.get("kept"), noise(50_000))
    after = store.stats()
    for name in ("tensors", "free_bytes", "operations_active", "groups", "pagecache_bytes"):
        assert after[name] == before[name]
    assert store.check() == []


def python(program: str, *arguments: str, **options: Any) -> subprocess.CompletedProcess:
    command = [sys.executable, "-c", textwrap.dedent(program), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False, **options)


# ---- keys ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "use",
    [
        lambda store: store.get("x"),
        lambda store: store.get_async("x"),
        lambda store: store.get_many(["kept", "x"]),
        lambda store: store.read("x", 0, 1),
        lambda store: store.append("x", np.zeros(1)),
        lambda store: store.append_many({"kept": noise(0), "x": np.zeros(1)}),
        lambda store: store.truncate("x", 0),
        lambda store: store.resize("x", 0),
        lambda store: store.delete("x"),
        lambda store: store.info("x"),
        lambda store: store.set_path("x", "direct"),
        lambda store: store.get(7),
    ],
)
def test_an_unknown_key_is_named(
    kept: dualblade.TensorStore, use: Callable[[dualblade.TensorStore], object]
) -> None:
    with pytest.raises(KeyNotFoundError, match=r"there is no (tensor|group) ('x'|7)"):
        use(kept)
    with pytest.raises(KeyError):
        use(kept)


@pytest.mark.parametrize("key", [1, None, b"x", ("a",)])
def test_a_key_or_group_that_is_no_text_is_refused(kept: dualblade.TensorStore, key: Any) -> None:
    with pytest.raises(TypeError, match="is a str, not"):
        kept.put(key, noise(5))
    with pytest.raises(TypeError, match="is a str, not"):
        kept.put_many({"x": noise(5), key: noise(5)})
    with pytest.raises(TypeError, match="is a str, not"):
        kept.reserve(key, (5,), "uint8")
    assert key not in kept
    if key is not None:
        with pytest.raises(TypeError, match="is a str, not"):
            kept.put("x", noise(5), group=key)
        with pytest.raises(TypeError, match="is a str, not"):
            kept.reserve("x", (5,), "uint8", group=key)
    assert "x" not in kept


def test_text_that_cannot_be_stored_is_refused(kept: dualblade.TensorStore) -> None:
    for arguments in ({"key": "\ud800"}, {"key": "x", "group": "\ud800"}):
        with pytest.raises(ValueError, match="not valid Unicode"):
            kept.put(array=noise(5), **arguments)
    kept.flush()


# ---- arrays --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "array",
    [
        np.array([{}, None], object),
        np.array([[1, 2], [3]], object),
        [1, 2, 3],
        [[1, 2], [3]],
        1.5,
        "text",
        None,
        np.ma.masked_array([1, 2], [True, False]),
    ],
)
def test_what_is_no_array_is_refused(kept: dualblade.TensorStore, array: Any) -> None:
    for put in (kept.put, kept.put_async):
        with pytest.raises(TypeError):
            put("x", array)
        with pytest.raises(TypeError):
            put("kept", array)


@pytest.mark.parametrize(
    ("out", "error", "says"),
    [
        (np.zeros(49_999, np.uint8), ValueError, "shape"),
        (np.zeros((1, 50_000), np.uint8), ValueError, "shape"),
        (np.zeros(50_000, np.int8), TypeError, "dtype"),
        (np.zeros(100_000, np.uint8)[::2], ValueError, "contiguous"),
        (np.frombuffer(bytes(50_000), np.uint8), ValueError, "read-only"),
        (bytes(50_000), ValueError, "read-only"),
        (bytearray(49_999), ValueError, "bytes"),
        ([0] * 50_000, TypeError, "out="),
        (7, TypeError, "out="),
    ],
)
def test_memory_that_does_not_fit_is_refused(
    kept: dualblade.TensorStore, out: Any, error: type, says: str
) -> None:
    with pytest.raises(error, match=says):
        kept.get("kept", out=out)
    with pytest.raises(error, match=says):
        kept.get_async("kept", out=out)
    with pytest.raises(error, match=says):
        kept.get_many(["kept"], out=[out])
    with pytest.raises(error, match=says):
        kept.read("kept", 0, 50_000, out=out)


@pytest.mark.parametrize(
    ("rows", "error"),
    [
        (np.zeros((1, 4), np.float32), ValueError),
        (np.zeros(3, np.float32), ValueError),
        (np.zeros((1, 3), np.float64), TypeError),
        (np.zeros((3, 3), np.float32), ValueError),
        ([[1.0, 2.0, 3.0]], TypeError),
    ],
)
def test_rows_that_do_not_fit_are_refused(
    store: dualblade.TensorStore, rows: Any, error: type
) -> None:
    store.reserve("x", (3, 3), "float32")
    store.append("x", np.ones((1, 3), np.float32))
    with pytest.raises(error):
        store.append("x", rows)
    np.testing.assert_array_equal(store.get("x"), np.ones((1, 3)))
    store.append("x", np.ones((2, 3), np.float32))
    np.testing.assert_array_equal(store.get("x"), np.ones((3, 3)))


def test_a_single_number_has_no_rows(kept: dualblade.TensorStore) -> None:
    kept.put("scalar", np.float32(3))
    for use in (
        lambda: kept.append("scalar", np.zeros(1, np.float32)),
        lambda: kept.read("scalar", 0, 1),
        lambda: kept.truncate("scalar", 0),
        lambda: kept.resize("scalar", 5),
    ):
        with pytest.raises(ValueError, match="scalar"):
            use()
    assert kept.get("scalar") == 3
    kept.delete("scalar")


@pytest.mark.parametrize("shape", [(), (-1,), (3, -1)])
def test_a_shape_that_makes_no_sense_is_refused(
    kept: dualblade.TensorStore, shape: tuple[int, ...]
) -> None:
    with pytest.raises(ValueError, match="shape"):
        kept.reserve("x", shape, "uint8")


@pytest.mark.parametrize("shape", [(1.5,), ("3",), None])
def test_a_shape_that_is_none_is_refused(kept: dualblade.TensorStore, shape: Any) -> None:
    with pytest.raises(TypeError):
        kept.reserve("x", shape, "uint8")


@pytest.mark.parametrize("dtype", ["float17", object, None])
def test_a_dtype_that_is_none_is_refused(kept: dualblade.TensorStore, dtype: Any) -> None:
    with pytest.raises(TypeError):
        kept.reserve("x", (3,), dtype)


def test_row_counts_that_make_no_sense_are_refused(kept: dualblade.TensorStore) -> None:
    for change in (kept.truncate, kept.resize):
        with pytest.raises(ValueError, match="negative"):
            change("kept", -1)
        with pytest.raises(TypeError):
            change("kept", 1.5)


# ---- a full store --------------------------------------------------------------------------------


@pytest.mark.parametrize("rows", [5, 1 << 40, 1 << 80])
def test_a_full_store_says_so_and_goes_on(kept: dualblade.TensorStore, rows: int) -> None:
    for full in (
        lambda: kept.reserve("x", (rows, MIB), "uint8"),
        lambda: kept.resize("kept", rows * MIB),
        lambda: kept.reserve_many({"x": ((1,), "uint8"), "y": ((rows, MIB), "uint8")}),
    ):
        with pytest.raises(NoSpaceError, match="no room for .* delete tensors") as caught:
            full()
        assert caught.value.errno == errno.ENOSPC


def test_after_a_delete_there_is_room_again(kept: dualblade.TensorStore) -> None:
    big = noise(2 * MIB)
    kept.put("big", big)
    free = kept.stats()["free_bytes"]
    for put in (
        lambda: kept.put("x", big),
        lambda: kept.put("big", big + 1),
        lambda: kept.put_many({"small": noise(10), "x": big}),
        lambda: kept.put_async("x", big),
    ):
        with pytest.raises(NoSpaceError, match="the largest run is"):
            put()
    assert kept.stats()["free_bytes"] == free
    np.testing.assert_array_equal(kept.get("big"), big)
    kept.delete("big")
    kept.put("x", big)
    np.testing.assert_array_equal(kept.get("x"), big)
    kept.delete("x")


def test_every_byte_of_a_store_can_be_used(store: dualblade.TensorStore) -> None:
    names = [f"x{i}" for i in range(store.stats()["free_bytes"] // 4096)]
    store.put_many({name: noise(4096, i) for i, name in enumerate(names)})
    assert store.stats()["free_bytes"] == 0
    with pytest.raises(NoSpaceError):
        store.put("one more", noise(1))
    store.put("nothing", noise(0))
    for i, name in enumerate(names):
        np.testing.assert_array_equal(store.get(name), noise(4096, i))


# ---- options -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "error", "says"),
    [
        ({"size": -1}, ValueError, "negative"),
        ({"size": "-1GiB"}, ValueError, "negative"),
        ({"size": 0}, ValueError, "too small"),
        ({"size": "1MiB"}, ValueError, "too small"),
        ({"size": 1 << 63}, ValueError, "larger than any"),
        ({"size": "8 G"}, ValueError, "ambiguous"),
        ({"size": "eight"}, ValueError, "not a size"),
        ({"size": 4.5e6}, TypeError, "not a size"),
        ({"memory": "-1MiB"}, ValueError, "negative"),
        ({"memory": "1000KiB"}, ValueError, "too little"),
        ({"memory": 0}, ValueError, "too little"),
        ({"memory": "4PiB"}, ValueError, "more than there is"),
        ({"memory": "all"}, ValueError, "not a size"),
        ({"memory": None}, TypeError, "not a size"),
        ({"policy": "triple"}, ValueError, "policy='triple'"),
        ({"verify": "sometimes"}, ValueError, "verify='sometimes'"),
        ({"verify": True}, ValueError, "verify=True"),
        ({"engine": "steam"}, ValueError, "engine"),
        ({"engine": None}, ValueError, "engine"),
        ({"queue_depth": 0}, ValueError, "queue_depth"),
        ({"queue_depth": 1 << 20}, ValueError, "queue_depth"),
        ({"durable": True}, UnsupportedError, "durable=True"),
        ({"nonsense": 1}, TypeError, "nonsense"),
    ],
)
def test_an_option_that_makes_no_sense_leaves_no_file(
    path: Path, options: dict[str, Any], error: type, says: str
) -> None:
    with pytest.raises(error, match=says):
        dualblade.open(path, **{"size": "4MiB", **options})
    assert list(path.parent.iterdir()) == []


def test_a_size_that_the_filesystem_has_not_leaves_no_file(path: Path) -> None:
    with pytest.raises(DeviceError) as caught:
        dualblade.open(path, size="1PiB")
    assert caught.value.errno in (errno.ENOSPC, errno.EFBIG)
    assert list(path.parent.iterdir()) == []


# ---- paths ---------------------------------------------------------------------------------------


def test_a_missing_file_says_how_to_make_it(path: Path) -> None:
    for options in ({}, {"create": False, "size": "4MiB"}, {"format": True}):
        with pytest.raises(
            DeviceError, match="to create a file of that name, pass size="
        ) as caught:
            dualblade.open(path, **options)
        assert caught.value.errno == errno.ENOENT
    assert not path.exists()


def test_a_missing_folder_is_not_made(tmp_path: Path) -> None:
    with pytest.raises(DeviceError) as caught:
        dualblade.open(tmp_path / "missing" / "kv.img", size="4MiB")
    assert caught.value.errno == errno.ENOENT
    assert list(tmp_path.iterdir()) == []


def test_a_directory_says_what_to_give(tmp_path: Path) -> None:
    with pytest.raises(DeviceError, match="is a directory") as caught:
        dualblade.open(tmp_path, size="4MiB")
    assert caught.value.errno == errno.EISDIR


def test_create_wants_a_path_that_is_free(path: Path) -> None:
    path.write_bytes(b"mine")
    with pytest.raises(DeviceError, match="exists: leave create=True out") as caught:
        dualblade.open(path, size="4MiB", create=True)
    assert caught.value.errno == errno.EEXIST
    assert path.read_bytes() == b"mine"
    path.unlink()
    dualblade.open(path, size="4MiB", create=True).close()


WITHOUT_PERMISSION = """
    import os, sys
    import dualblade
    os.setgroups([])
    os.setgid(65534)
    os.setuid(65534)
    for options in ({}, {"size": "4MiB"}, {"format": True}):
        try:
            dualblade.open(sys.argv[1], **options)
        except OSError as error:
            print(type(error).__name__, error.errno, error)
"""


def let_others_in(folder: Path) -> None:
    """Into a folder of pytest's, which makes them for its own user."""
    for part in [folder, *folder.parents][:3]:
        part.chmod(part.stat().st_mode | 0o055)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become nobody")
def test_in_a_folder_that_cannot_be_entered_it_says_so(path: Path) -> None:
    let_others_in(path.parent)
    path.parent.chmod(0o700)
    dualblade.open(path, size="4MiB").close()
    lines = python(WITHOUT_PERMISSION, str(path)).stdout.splitlines()
    assert len(lines) == 3
    for line in lines:
        assert line.startswith(f"DeviceError {errno.EACCES} open on {path} failed")


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become nobody")
@pytest.mark.parametrize("mode", [0o600, 0o644])
def test_without_permission_it_says_what_is_missing(path: Path, mode: int) -> None:
    dualblade.open(path, size="4MiB").close()
    before = path.read_bytes()
    let_others_in(path.parent)
    path.chmod(mode)
    found = python(WITHOUT_PERMISSION, str(path))
    lines = found.stdout.splitlines()
    assert len(lines) == 3, found
    for line in lines:
        assert line.startswith(f"DeviceError {errno.EACCES} ")
        assert "Give this user read and write permission" in line
    assert path.read_bytes() == before
    dualblade.open(path).close()


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become nobody")
def test_in_a_folder_without_permission_it_says_what_is_missing(path: Path) -> None:
    let_others_in(path.parent)
    found = python(WITHOUT_PERMISSION, str(path))
    assert f"DeviceError {errno.EACCES} create on {path} failed: permission was denied" in (
        found.stdout
    )
    assert not path.exists()


def test_without_direct_io_it_says_so_once_and_works(
    fault_device: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("dualblade.opening._said", set())
    device = fault_device()
    device.add_rule("open_direct", "EINVAL")
    with (
        pytest.warns(DualbladeWarning, match="has no O_DIRECT") as said,
        dualblade.open(device.path, format=True, policy="direct") as store,
    ):
        assert store.stats()["direct"] is False
        assert "has no O_DIRECT" in store.stats()["fallbacks"][0]
        store.put("x", noise(MIB + 5))
        np.testing.assert_array_equal(store.get("x"), noise(MIB + 5))
    assert len(said) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with dualblade.open(device.path) as store:
            assert store.stats()["fallbacks"] != []
            np.testing.assert_array_equal(store.get("x"), noise(MIB + 5))


def test_a_warning_that_is_an_error_lets_the_device_go(
    fault_device: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("dualblade.opening._said", set())
    device = fault_device()
    device.add_rule("open_direct", "EINVAL")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(DualbladeWarning):
            dualblade.open(device.path, format=True)
    dualblade.open(device.path, format=True).close()  # nobody has it locked


# ---- what is there is not what should be ---------------------------------------------------------


@pytest.fixture
def saved(path: Path) -> Path:
    """A closed store with a tensor "x" of 3 chunks and a bit, and a small one, "y"."""
    with dualblade.open(path, size="4MiB") as store:
        store.put("x", noise(3 * CHUNK + 100))
        store.put("y", noise(100, 1))
    return path


def test_a_file_shorter_than_its_header_says_is_refused(saved: Path) -> None:
    os.truncate(saved, 3 * MIB)
    with pytest.raises(DeviceRefusedError, match="was truncated"):
        dualblade.open(saved)
    assert saved.stat().st_size == 3 * MIB


def test_a_header_of_another_version_is_refused(saved: Path) -> None:
    overwrite(saved, 8, b"\x63")
    with pytest.raises(UnsupportedError, match="format version 99"):
        dualblade.open(saved)


def test_a_damaged_header_is_refused(saved: Path) -> None:
    overwrite(saved, 100, b"\xff")
    with pytest.raises(CorruptionError, match="header"):
        dualblade.open(saved)


def test_a_missing_catalog_is_refused(saved: Path) -> None:
    catalog = Path(f"{saved}.catalog")
    data = catalog.read_bytes()
    catalog.unlink()
    with pytest.raises(DeviceRefusedError, match="its catalog .* is missing: put it back"):
        dualblade.open(saved)
    assert not catalog.exists()
    catalog.write_bytes(data)
    with dualblade.open(saved) as store:
        np.testing.assert_array_equal(store.get("y"), noise(100, 1))


def test_a_catalog_of_another_store_is_refused(saved: Path, tmp_path: Path) -> None:
    other = tmp_path / "other.img"
    dualblade.open(other, size="4MiB").close()
    Path(f"{other}.catalog").replace(f"{saved}.catalog")
    with pytest.raises(DeviceRefusedError, match="belongs to store"):
        dualblade.open(saved)


def test_a_catalog_with_a_strange_place_is_refused(saved: Path) -> None:
    """Two stores of the same id and different content: a copy of the catalog from another time."""
    from dualblade.catalog import Catalog
    from dualblade.header import Header

    store_id = Header.unpack(saved.read_bytes()[:4096]).store_id
    with Catalog.open(f"{saved}.catalog", store_id) as catalog:
        x, y = catalog.records()
        catalog.commit([y._replace(offset=x.offset + 4096)], [], clean=True)
    with pytest.raises(CorruptionError, match="another tensor's or outside the store"):
        dualblade.open(saved)
    with Catalog.open(f"{saved}.catalog", store_id) as catalog:
        catalog.commit([y._replace(offset=1 << 30)], [], clean=True)
    with pytest.raises(CorruptionError, match="another tensor's or outside the store"):
        dualblade.open(saved)
    with Catalog.open(f"{saved}.catalog", store_id) as catalog:
        catalog.commit([y._replace(rows=99)], [], clean=True)
    with pytest.raises(CorruptionError, match="contradicts itself about tensor 'y'"):
        dualblade.open(saved)


def test_a_file_that_is_not_ours_is_refused_even_with_a_size(path: Path) -> None:
    path.write_bytes(noise(4 * MIB).tobytes())
    with pytest.raises(DeviceRefusedError, match="format=True"):
        dualblade.open(path, size="4MiB")
    assert path.read_bytes() == noise(4 * MIB).tobytes()
    with dualblade.open(path, format=True) as store:
        assert store.keys() == []


def test_two_at_once_are_refused_in_this_process_and_another(
    store: dualblade.TensorStore, path: Path
) -> None:
    store.put("x", noise(100))
    for options in ({}, {"format": True}, {"format": True, "size": "8MiB"}):
        with pytest.raises(DeviceRefusedError, match="another process has it open"):
            dualblade.open(path, **options)
    program = """
        import sys, dualblade
        try:
            dualblade.open(sys.argv[1])
        except dualblade.DeviceRefusedError as error:
            print(error)
    """
    found = python(program, str(path))
    assert "One process at a time can use a store" in found.stdout, found
    np.testing.assert_array_equal(store.get("x"), noise(100))


# ---- format --------------------------------------------------------------------------------------


def test_a_store_is_opened_as_it_is_unless_it_is_formatted(saved: Path) -> None:
    with (
        pytest.warns(DualbladeWarning, match="exists with 4 MiB and is opened as it is"),
        dualblade.open(saved, size="8MiB") as store,
    ):
        assert store.keys() == ["x", "y"]
    with dualblade.open(saved, size="4MiB") as store:  # the same size: nothing to say
        assert store.keys() == ["x", "y"]
    with dualblade.open(saved, format=True) as store:
        assert store.keys() == []
        assert store.stats()["total_bytes"] == 4 * MIB


@pytest.mark.parametrize("size", [2 * MIB, 8 * MIB])
def test_formatting_gives_a_file_its_new_size(saved: Path, size: int) -> None:
    with dualblade.open(saved, format=True, size=size) as store:
        assert store.stats()["total_bytes"] == size
        store.put("z", noise(size - MIB))
    assert saved.stat().st_size == size
    with dualblade.open(saved) as store:
        np.testing.assert_array_equal(store.get("z"), noise(size - MIB))


def test_an_empty_file_wants_a_size(path: Path) -> None:
    path.touch()
    with pytest.raises(ValueError, match="give size="):
        dualblade.open(path)
    with dualblade.open(path, size="4MiB") as store:
        assert store.stats()["total_bytes"] == 4 * MIB


# ---- corruption ----------------------------------------------------------------------------------


@pytest.mark.parametrize("policy", ["direct", "pagecache"])
def test_a_corrupted_chunk_is_found_and_named(saved: Path, policy: Any) -> None:
    with dualblade.open(saved) as store:
        offset = store.info("x").offset
    flip(saved, offset + CHUNK + 5)
    with dualblade.open(saved, policy=policy) as store:
        ticket = store.get_async("x")
        for found in (
            lambda: store.get("x"),
            lambda: store.get_many(["y", "x"]),
            lambda: store.read("x", CHUNK - 1, CHUNK + 1),
            lambda: store.read("x", 2 * CHUNK - 1, 2 * CHUNK),
            ticket.result,
        ):
            with pytest.raises(CorruptionError, match="tensor 'x' is corrupt"):
                found()
        assert store.stats()["corruptions"] == 5
        # Whatever does not lie in that chunk is sound.
        np.testing.assert_array_equal(store.read("x", 0, CHUNK), noise(3 * CHUNK + 100)[:CHUNK])
        np.testing.assert_array_equal(
            store.read("x", 2 * CHUNK, 4 * CHUNK), noise(3 * CHUNK + 100)[2 * CHUNK :]
        )
        np.testing.assert_array_equal(store.get("y"), noise(100, 1))
        (problem,) = store.check()
        assert "tensor 'x' is corrupt" in problem
        with pytest.raises(CorruptionError, match="tensor 'x'"):
            store.resize("x", 4 * CHUNK)
        store.put("x", noise(10))
        np.testing.assert_array_equal(store.get("x"), noise(10))
        assert store.check() == []


def test_verify_at_open_refuses_and_never_is_taken_at_its_word(saved: Path) -> None:
    with dualblade.open(saved) as store:
        offset = store.info("x").offset
    flip(saved, offset)
    with pytest.raises(CorruptionError, match="tensor 'x' is corrupt.*verify='always'"):
        dualblade.open(saved, verify="open")
    with dualblade.open(saved, verify="never") as store:
        found = store.get("x")
        found[0] ^= 1
        np.testing.assert_array_equal(found, noise(3 * CHUNK + 100))
        assert len(store.check()) == 1


def test_a_flipped_bit_on_the_way_is_found(fault_device: Callable[..., Any]) -> None:
    device = fault_device()
    with dualblade.open(device.path, format=True) as store:
        store.put("x", noise(CHUNK))
        device.fail_nth("read", "flip", 1)
        with pytest.raises(CorruptionError, match="tensor 'x' is corrupt"):
            store.get("x")
        np.testing.assert_array_equal(store.get("x"), noise(CHUNK))


# ---- a device that fails -------------------------------------------------------------------------


@pytest.mark.parametrize("policy", ["direct", "pagecache"])
@pytest.mark.parametrize("code", ["EIO", "ENOSPC"])
def test_a_failed_write_leaves_what_was_stored(
    fault_device: Callable[..., Any], policy: Any, code: str
) -> None:
    device = fault_device()
    with dualblade.open(device.path, format=True, policy=policy) as store:
        store.put("x", noise(MIB))
        store.reserve("grows", (3 * MIB,), "uint8")
        store.append("grows", noise(CHUNK + 100))
        before = store.stats()["free_bytes"]
        device.add_rule("write", code)
        for write in (
            lambda: store.put("x", noise(MIB, 1)),
            lambda: store.put_many({"z": noise(100), "x": noise(MIB, 1)}),
            lambda: store.append("grows", noise(CHUNK)),
            lambda: store.resize("grows", 2 * MIB),
            store.put_async("x", noise(MIB, 1)).result,
        ):
            with pytest.raises(DeviceError) as caught:
                write()
            assert caught.value.errno == getattr(errno, code)
            assert caught.value.operation == "write"
            assert caught.value.offset is not None
            assert str(caught.value.offset) in str(caught.value)
        device.clear()
        assert store.stats()["free_bytes"] == before
        assert store.keys() == ["x", "grows"]
        np.testing.assert_array_equal(store.get("x"), noise(MIB))
        np.testing.assert_array_equal(store.get("grows"), noise(CHUNK + 100))
        store.append("grows", noise(CHUNK, 2))
        expected = np.concatenate([noise(CHUNK + 100), noise(CHUNK, 2)])
        np.testing.assert_array_equal(store.get("grows"), expected)
        assert store.check() == []
    with dualblade.open(device.path) as store:
        np.testing.assert_array_equal(store.get("grows"), expected)


def test_a_failed_read_is_named_and_not_for_good(fault_device: Callable[..., Any]) -> None:
    device = fault_device()
    with dualblade.open(device.path, format=True, policy="direct") as store:
        store.put("x", noise(2 * MIB))
        offset = store.info("x").offset
        device.add_rule("read", "EIO", lo=offset + MIB, hi=offset + MIB + 1)
        with pytest.raises(DeviceError, match=f"at offset {offset + MIB} on") as caught:
            store.get("x")
        assert caught.value.errno == errno.EIO
        assert caught.value.__cause__ is not caught.value
        assert len(store.check()) == 1
        device.clear()
        np.testing.assert_array_equal(store.get("x"), noise(2 * MIB))
        assert store.stats()["corruptions"] == 0


def test_a_failed_flush_can_be_done_again(fault_device: Callable[..., Any]) -> None:
    device = fault_device()
    with dualblade.open(device.path, format=True) as store:
        store.put("x", noise(MIB))
        store.put("gone", noise(10))
        store.flush()
        store.put("y", noise(MIB, 1))
        store.delete("gone")
        device.fail_nth("fsync", "EIO", 1)
        with pytest.raises(DeviceError, match="flush"):
            store.flush()
        store.flush()
    with dualblade.open(device.path) as store:
        assert store.keys() == ["x", "y"]
        np.testing.assert_array_equal(store.get("y"), noise(MIB, 1))


def test_short_and_slow_transfers_are_whole(fault_device: Callable[..., Any]) -> None:
    device = fault_device()
    with dualblade.open(device.path, format=True) as store:
        for op in ("read", "write"):
            device.add_rule(op, {"short": 4096}, times=50)
        store.put("x", noise(MIB))
        np.testing.assert_array_equal(store.get("x"), noise(MIB))
        assert sum(side["resumed"] for side in store.stats()["paths"].values()) > 0


# ---- a closed store ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "use",
    [
        lambda store: store.put("x", noise(5)),
        lambda store: store.put_many({"x": noise(5)}),
        lambda store: store.put_async("x", noise(5)),
        lambda store: store.get("kept"),
        lambda store: store.get_many(["kept"]),
        lambda store: store.get_async("kept"),
        lambda store: store.read("kept", 0, 1),
        lambda store: store.reserve("x", (5,), "uint8"),
        lambda store: store.append("kept", noise(5)),
        lambda store: store.truncate("kept", 0),
        lambda store: store.resize("kept", 10),
        lambda store: store.delete("kept"),
        lambda store: "kept" in store,
        len,
        lambda store: store.keys(),
        lambda store: store.info("kept"),
        lambda store: store.set_path("kept", "direct"),
        lambda store: store.flush(),
        lambda store: store.stats(),
        lambda store: store.check(),
        lambda store: store.__enter__(),
    ],
)
def test_a_closed_store_says_so(path: Path, use: Callable[[dualblade.TensorStore], object]) -> None:
    store = dualblade.open(path, size="4MiB")
    store.put("kept", noise(5))
    store.close()
    assert store.closed
    with pytest.raises(ClosedError):
        use(store)
    store.close()
    assert "closed" in repr(store)
    with dualblade.open(path) as again:
        np.testing.assert_array_equal(again.get("kept"), noise(5))

"""Devices striped over several files or drives: the same bytes as one, in the right places."""

from __future__ import annotations

import itertools
import os
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import dualblade
from dualblade import _core
from dualblade.errors import CorruptionError, DeviceError, DeviceRefusedError
from tests.conftest import ENGINES, Engine
from tests.helpers import MIB, overwrite

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from tests.devices import LoopDevice
    from tests.faultdev import FaultDevice

BLOCK = _core.BLOCK_BYTES
CHUNK = 16 << 10
MEMBER = 256 << 10


def files(folder: Path, sizes: Sequence[int]) -> list[str]:
    paths = [str(folder / f"member{i}.img") for i in range(len(sizes))]
    for path, size in zip(paths, sizes, strict=True):
        with open(path, "xb") as file:
            file.truncate(size)
    return paths


def open_device(paths: Sequence[str], stripe: int, **options: Any) -> _core.Device:
    options = {"chunk_bytes": CHUNK, "staging_bytes": 4 * CHUNK, **options}
    return _core.Device.open(list(paths), stripe_bytes=stripe, **options)


def unstriped(paths: Sequence[str], stripe: int, size: int) -> bytes:
    """What the members hold, put together a stripe at a time without dualblade."""
    members = [Path(path).read_bytes() for path in paths]
    units = (
        member[row : row + stripe]
        for row in range(0, min(map(len, members)), stripe)
        for member in members
    )
    return b"".join(units)[:size]


def read(device: _core.Device, offset: int, size: int, path: str = "direct") -> bytes:
    out = np.empty(size, np.uint8)
    device.read([(offset, out)], path=path).wait()
    return out.tobytes()


# ---- the same bytes as one device, in the right places -------------------------------------------


@st.composite
def transfers(draw: st.DrawFn, size: int) -> tuple[str, int, int, int]:
    """(path, offset, length, misalignment of the memory)."""
    path = draw(st.sampled_from(["direct", "pagecache"]))
    unit = BLOCK if path == "direct" else 1
    offset = draw(st.integers(0, (size - 1) // unit)) * unit
    length = draw(st.integers(1, min(size - offset, 5 * CHUNK)) | st.integers(1, size - offset))
    return path, offset, length, draw(st.sampled_from([0, 0, 1, 512]))


@settings(max_examples=25)
@given(data=st.data())
@pytest.mark.parametrize("cell", ENGINES)
def test_random_transfers_are_those_of_one_device(
    cell: str, engine_refusals: dict[str, str], data: st.DataObject
) -> None:
    if cell in engine_refusals:
        pytest.skip(engine_refusals[cell])
    engine = Engine(cell)
    stripe = data.draw(st.sampled_from([CHUNK, 2 * CHUNK, 4 * CHUNK]))
    sizes = data.draw(st.lists(st.integers(4 * CHUNK, MEMBER), min_size=2, max_size=4))
    request = data.draw(st.sampled_from([None, CHUNK, 3 * CHUNK]))
    depth = data.draw(st.sampled_from([1, 3, 64]))
    noise = np.random.default_rng(data.draw(st.integers(0, 2**32)))
    with tempfile.TemporaryDirectory() as folder:
        paths = files(Path(folder), sizes)
        with open_device(
            paths,
            stripe,
            engine=engine.name,
            **engine.options,
            request_bytes=request,
            queue_depth=depth,
        ) as device:
            size = device.info.size
            assert size == min(sizes) // stripe * stripe * len(sizes)
            model = bytearray(size)
            for _ in range(data.draw(st.integers(1, 12))):
                path, offset, length, skew = data.draw(transfers(size))
                memory = _core.aligned_empty(length + skew, np.uint8)[skew:]
                memory[:] = noise.integers(0, 256, length, np.uint8)
                sums = [np.zeros(-(-length // CHUNK), np.uint64)]
                checksums = data.draw(st.sampled_from([None, sums]))
                device.write([(offset, memory)], path=path, checksums=checksums).wait()
                end = offset + length
                model[offset:end] = memory.tobytes()
                if path == "direct":  # the last block is padded
                    padded = -(-end // device.info.lba_size) * device.info.lba_size
                    model[end:padded] = bytes(padded - end)
                memory[:] = 0
                other = (
                    data.draw(st.sampled_from([path, "direct"])) if offset % BLOCK == 0 else path
                )
                device.read([(offset, memory)], path=other, checksums=checksums).wait()
                assert memory.tobytes() == model[offset:end]
            assert read(device, 0, size) == model
            stats = device.stats()
            assert [stats[path]["resumed"] for path in stats] == [0, 0]
            device.flush()
        assert unstriped(paths, stripe, size) == model


def test_every_byte_has_the_place_that_it_is_said_to_have(tmp_path: Path) -> None:
    paths = files(tmp_path, [MEMBER] * 3)
    with open_device(paths, CHUNK) as device:
        for offset in range(0, device.info.size, 4 * BLOCK):
            device.write([(offset, np.full(1, 77, np.uint8))]).wait()
            path, place = device.info.place(offset)
            with open(path, "rb") as file:
                file.seek(place)
                assert file.read(1) == b"M"
            device.write([(offset, bytes(1))]).wait()


@pytest.mark.parametrize("begin", [0, BLOCK])
def test_a_run_is_moved_a_stripe_at_a_time(tmp_path: Path, begin: int) -> None:
    """So that the members work at the same time. A chunk with a checksum stays in one piece."""
    with open_device(files(tmp_path, [MIB] * 2), 4 * CHUNK) as device:
        memory = _core.aligned_empty(16 * CHUNK, np.uint8)
        memory[:] = 1
        device.write([(begin, memory)]).wait()
        assert device.stats()["direct"]["writes"] == 4 + (begin > 0)
        sums = [np.zeros(16, np.uint64)]
        device.read([(begin, memory)], checksums=[None]).wait()
        device.write([(begin, memory)], checksums=sums).wait()
        device.read([(begin, memory)], checksums=sums).wait()
        assert device.stats()["direct"]["reads"] == 2 * 4 + (begin > 0)


def test_registered_memory_is_used_in_parts_on_two_members(tmp_path: Path) -> None:
    """A piece that goes on on another member is still inside what was registered, and its end is
    not taken for more of it."""
    with open_device(files(tmp_path, [MEMBER] * 2), CHUNK) as device:
        arena = _core.aligned_empty(8 * CHUNK, np.uint8)
        arena[:] = np.random.default_rng(1).integers(0, 256, len(arena), np.uint8)
        half = arena[: 3 * CHUNK + BLOCK]
        device.register([half])
        for part in (half, arena):
            sums = [np.zeros(-(-len(part) // CHUNK), np.uint64)]
            device.write([(BLOCK, part)], checksums=sums).wait()
            back = _core.aligned_empty(len(part), np.uint8)
            device.read([(BLOCK, back)], checksums=sums).wait()
            assert (back == part).all()
        device.unregister([half])


def test_ranges_of_the_page_cache_are_found_on_each_member(tmp_path: Path) -> None:
    paths = files(tmp_path, [MIB] * 3)
    with open_device(paths, CHUNK) as device:
        size = device.info.size
        device.write([(0, bytes(size))], path="pagecache").wait()
        for start, stop in ((0, size), (BLOCK, 2 * BLOCK), (CHUNK - BLOCK, 7 * CHUNK + BLOCK)):
            cached, dirty = device.cached_bytes(start, stop - start)
            assert cached == stop - start
            assert dirty <= cached
        device.drop_cached(CHUNK - BLOCK, 6 * CHUNK)
        assert device.cached_bytes(0, size)[1] < size
        device.drop_cached(0, size)
        assert device.cached_bytes(0, size) == (0, 0)
        with pytest.raises(ValueError, match="has 3145728 bytes"):
            device.drop_cached(0, size + 1)


@pytest.mark.parametrize(("start", "stop"), [(0, 5), (3, 4), (7, 21), (47, 48)])
def test_a_discard_spares_its_neighbours_on_every_member(
    tmp_path: Path, start: int, stop: int
) -> None:
    paths = files(tmp_path, [MEMBER] * 3)
    with open_device(paths, CHUNK) as device:
        model = bytearray(b"x" * device.info.size)
        device.write([(0, bytes(model))]).wait()
        device.discard(start * CHUNK + BLOCK, (stop - start) * CHUNK - BLOCK)
        model[start * CHUNK + BLOCK : stop * CHUNK] = bytes((stop - start) * CHUNK - BLOCK)
        assert read(device, 0, len(model)) == model  # a hole in a file reads as zeros


# ---- real block devices --------------------------------------------------------------------------


def test_members_of_different_kinds_are_given_what_suits_all(
    tmp_path: Path, loop_device: Callable[..., LoopDevice]
) -> None:
    small = loop_device(8 * MIB, 512).path
    large = loop_device(12 * MIB, 4096).path
    image = str(tmp_path / "member.img")
    Path(image).write_bytes(bytes(10 * MIB))
    with _core.Device.open([small, large, image]) as device:
        info = device.info
        assert info.lba_size == 4096
        assert info.size == 24 * MIB
        assert info.member_sizes == (8 * MIB, 12 * MIB, 10 * MIB)
        assert not info.block_device
        noise = np.random.default_rng(2).integers(0, 256, info.size - 1, np.uint8)
        device.write([(0, noise)]).wait()
        assert read(device, 0, len(noise)) == noise.tobytes()
    with _core.Device.open([small, large]) as device:
        assert device.info.block_device


@pytest.mark.parametrize("lba", [512, 4096])
def test_a_store_on_drives_survives_its_process(
    tmp_path: Path, loop_device: Callable[..., LoopDevice], monkeypatch: Any, lba: int
) -> None:
    monkeypatch.setenv("DUALBLADE_STATE_DIR", str(tmp_path / "state"))
    drives = [loop_device(16 * MIB, lba).path for _ in range(2)]
    with pytest.raises(DeviceRefusedError, match=f"dualblade format {' '.join(drives)}"):
        dualblade.open(drives)
    arrays = {f"t{i}": np.random.default_rng(i).random(40_000 * i + 3) for i in range(8)}
    with dualblade.open(drives, format=True, stripe="512KiB", policy="direct") as store:
        store.put_many(arrays)
        store.reserve("grown", (90_000,), "float64")
        for part in np.array_split(np.arange(90_000.0), 7):
            store.append("grown", part)
        assert store.check() == []
    with dualblade.open(drives, policy="direct", verify="open") as store:
        stats = store.stats()
        assert stats["targets"] == drives
        assert stats["target"] == f"{drives[0]}, {drives[1]}"
        assert stats["stripe_bytes"] == 512 << 10
        for key, array in store.get_many(arrays).items():
            assert (array == arrays[key]).all()
        assert (store.get("grown") == np.arange(90_000.0)).all()


# ---- the store -----------------------------------------------------------------------------------


@pytest.fixture
def members(tmp_path: Path) -> list[str]:
    """Three files of a closed store that holds "kept"."""
    paths = [str(tmp_path / name) for name in ("a.img", "b.img", "c.img")]
    with dualblade.open(paths, size="24MiB", stripe="256KiB") as store:
        store.put("kept", np.arange(700_000.0))
    return paths


def test_files_that_are_created_share_the_size(members: list[str]) -> None:
    assert [os.path.getsize(path) for path in members] == [8 * MIB] * 3
    assert sorted(os.listdir(os.path.dirname(members[0]))) == [
        "a.img",
        "a.img.catalog",
        "b.img",
        "c.img",
    ]
    with dualblade.open(members, size="24MiB", stripe="256KiB") as store:
        assert store.stats()["total_bytes"] == 24 * MIB
    with pytest.warns(dualblade.DualbladeWarning, match=r"stripes of 256 KiB .* not with stripe=1"):
        dualblade.open(members, stripe="1MiB").close()


def test_no_request_of_a_tensor_is_on_two_members(tmp_path: Path) -> None:
    paths = [str(tmp_path / name) for name in ("a", "b", "c")]
    rng = np.random.default_rng(3)
    sizes = [int(size) for size in rng.integers(1, 1_500_000, 40)]
    sizes += [int(size) for size in rng.integers(1, 90_000, 100)]
    with dualblade.open(paths, size="96MiB", stripe="256KiB", policy="direct") as store:
        chunk = store._device.info.chunk_bytes
        for i, size in enumerate(sizes):
            store.put(str(i), np.zeros(size, np.uint8))
            if i % 3 == 0:
                store.delete(str(i))
        for key in store.keys():
            info = store.info(key)
            for start in range(info.offset, info.offset + info.extent_bytes, chunk):
                last = min(start + chunk, info.offset + info.extent_bytes) - 1
                first_place, last_place = map(store._device.info.place, (start, last))
                assert first_place[0] == last_place[0]


def test_a_group_that_changes_path_leaves_no_page_behind(tmp_path: Path) -> None:
    """Nor where its pages are parts of large ones, from a tensor that lay there before."""
    paths = [str(tmp_path / name) for name in ("a", "b", "c")]
    with dualblade.open(paths, size="48MiB", stripe="256KiB", memory="64MiB") as store:
        store.put("large", np.zeros(30 * MIB, np.uint8))
        store.get("large")
        store.delete("large")
        store.put_many({f"n{i}": np.full(300_000, i, np.uint8) for i in range(90)})
        device = store._device
        for key in ("n5", "n44", "n81"):
            info = store.info(key)
            cached_bytes, _ = device.cached_bytes(info.offset, info.extent_bytes)
            assert cached_bytes == info.extent_bytes
            store.set_path(key, "direct")
            assert device.cached_bytes(info.offset, info.extent_bytes) == (0, 0)
            assert (store.get(key) == int(key[1:])).all()


# ---- who is refused, by name ---------------------------------------------------------------------


def refused(paths: Sequence[str], words: str, kind: type = DeviceRefusedError, **options: Any):
    before = {path: Path(path).read_bytes() for path in paths if os.path.exists(path)}
    with pytest.raises(kind, match=words):
        dualblade.open(list(paths), **options)
    assert before == {path: Path(path).read_bytes() for path in paths if os.path.exists(path)}


@pytest.fixture
def kept(members: list[str]) -> Iterator[list[str]]:
    """The members, which are a sound store again when the test is over."""
    yield members
    with dualblade.open(members, verify="open") as store:
        assert (store.get("kept") == np.arange(700_000.0)).all()


def test_members_in_another_order_are_swapped(kept: list[str]) -> None:
    a, b, c = kept
    for order in itertools.permutations(kept):
        if order != (a, b, c):
            wrong = next(path for path, right in zip(order, kept, strict=True) if path != right)
            place = order.index(wrong)
            refused(
                order,
                rf"^{wrong} is given as member {place}, but is member {kept.index(wrong)}.*"
                rf"swapped; give \['{a}', '{b}', '{c}'\]",
            )


def test_too_few_members_and_one_alone(kept: list[str]) -> None:
    a, b, c = kept
    refused([a, c], rf"over 3, and 2 are given: member 1 is missing \({a} is member 0, {c} is")
    refused([b], rf"{b} is member 1 of a store that is striped over 3: give all of them")
    with pytest.raises(DeviceRefusedError, match="member 1 of a store"):
        dualblade.open(b)


def test_a_missing_member_is_never_made_anew(kept: list[str], tmp_path: Path) -> None:
    a, b, _ = kept
    os.rename(b, b + ".away")
    refused(kept, f"^{b} is missing: it does not exist, and {a} does", DeviceError)
    refused(kept, f"^{b} is missing", DeviceError, size="24MiB")
    assert not os.path.exists(b)
    Path(b).touch()
    refused(kept, f"^{b} is not a member of the store on {a}: it is empty")
    Path(b).write_bytes(b"somebody's" * 1000)
    refused(kept, f"^{b} is not a member of the store on {a}: it holds data that dualblade did not")
    os.replace(b + ".away", b)


def test_foreign_members(kept: list[str], tmp_path: Path) -> None:
    a, b, c = kept
    others = [str(tmp_path / name) for name in ("x.img", "y.img", "z.img")]
    dualblade.open(others, size="24MiB", stripe="256KiB").close()
    single = str(tmp_path / "single.img")
    dualblade.open(single, size="8MiB").close()
    refused([a, others[1], c], f"^{others[1]}, given as member 1, is member 1 of another store")
    refused([a, b, single], f"^{single} holds a store of its own, not striped")
    refused([a, b, c, single], f"^{single} holds a store of its own")
    copy = str(tmp_path / "copy.img")
    Path(copy).write_bytes(Path(a).read_bytes())
    refused([a, b, copy], f"^{copy} is a copy of {a}")


def test_a_member_given_twice(kept: list[str], tmp_path: Path) -> None:
    a, b, _ = kept
    link, hard = str(tmp_path / "link"), str(tmp_path / "hard")
    os.symlink(a, link)
    os.link(b, hard)
    refused([a, b, link], f"^{link} is given twice", ValueError)
    refused([a, b, hard], f"^{hard} is the same file as {b}", ValueError)
    new = str(tmp_path / "new.img")
    refused([new, new], f"^{new} is given twice", ValueError, size="8MiB")
    assert not os.path.exists(new)
    for paths in ([a, b, link], [a, b, hard]):
        for read_only in (True, False):
            with pytest.raises(ValueError, match=f"^{paths[2]} is given twice"):
                _core.Device.open(paths, read_only=read_only)


def test_a_member_that_was_resized(kept: list[str]) -> None:
    content = Path(kept[1]).read_bytes()
    os.truncate(kept[1], 6 * MIB)
    refused(kept, f"^{kept[1]} was resized: it has 6291456 bytes, but had 8388608")
    Path(kept[1]).write_bytes(content + bytes(MIB))  # a larger one holds all of it


def test_a_member_that_is_in_use(kept: list[str]) -> None:
    with _core.Device.open(kept[2]):
        refused(kept, f"open on {kept[2]} failed: another process has it open")
    with dualblade.open(kept), pytest.raises(DeviceRefusedError, match=f"open on {kept[1]} failed"):
        _core.Device.open(kept[1])


def test_what_was_created_goes_when_the_next_cannot_be(tmp_path: Path) -> None:
    paths = [str(tmp_path / "a.img"), str(tmp_path / "missing" / "b.img")]
    with pytest.raises(DeviceError, match="there is no directory"):
        dualblade.open(paths, size="8MiB")
    assert os.listdir(tmp_path) == []
    paths = [str(tmp_path / "a.img"), str(tmp_path / "b.img")]
    (tmp_path / "a.img.catalog").write_text("my notes")
    with pytest.raises(DeviceRefusedError, match="did not write"):
        dualblade.open(paths, size="8MiB")
    assert os.listdir(tmp_path) == ["a.img.catalog"]


@pytest.mark.parametrize(
    ("stripe", "words"),
    [("3MiB", "power of two"), ("128KiB", "power of two"), (0, "power of two"), ("4GiB", "1 GiB")],
)
def test_stripes_that_make_no_sense(tmp_path: Path, stripe: Any, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        dualblade.open([tmp_path / "a", tmp_path / "b"], size="64MiB", stripe=stripe)
    assert os.listdir(tmp_path) == []


def test_lists_that_make_no_sense(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="at least one"):
        dualblade.open([])
    with pytest.raises(ValueError, match="from 1 to 64 members, got 0"):
        _core.Device.open([])
    with pytest.raises(ValueError, match=r"size='2MiB' is too small: a store over 2 members"):
        dualblade.open([tmp_path / "a", tmp_path / "b"], size="2MiB")
    paths = files(tmp_path, [MEMBER, MEMBER])
    with pytest.raises(
        ValueError, match=rf"{paths[0]} cannot be opened: it is smaller than stripe"
    ):
        _core.Device.open(paths)
    for stripe in (3 * CHUNK, CHUNK // 2, 0):
        with pytest.raises(ValueError, match="power of two of at least chunk_bytes"):
            open_device(paths, stripe)


# ---- one member fails ----------------------------------------------------------------------------


@pytest.mark.parametrize("place", [0, 1, 2])
def test_a_failed_read_names_its_member_and_the_place_there(
    tmp_path: Path, fault_device: Callable[..., FaultDevice], place: int
) -> None:
    faulty = fault_device(MIB)
    paths = files(tmp_path, [MIB, MIB])
    paths.insert(place, str(faulty.path))
    with open_device(paths, 4 * CHUNK) as device:
        faulty.add_rule("read", "EIO", lo=9 * CHUNK, hi=9 * CHUNK + 1)
        for path in ("direct", "pagecache"):
            with pytest.raises(DeviceError, match=f"on {faulty.path} failed") as caught:
                read(device, 0, device.info.size, path)
            assert caught.value.device == str(faulty.path)
            assert 8 * CHUNK <= caught.value.offset <= 9 * CHUNK
        faulty.clear()
        read(device, 0, device.info.size)


def test_a_short_transfer_goes_on_on_its_own_member(
    tmp_path: Path, fault_device: Callable[..., FaultDevice]
) -> None:
    faulty = fault_device(MIB)
    paths = [str(faulty.path), *files(tmp_path, [MIB])]
    with open_device(paths, CHUNK, engine="threads") as device:
        noise = np.random.default_rng(4).integers(0, 256, 5 * CHUNK, np.uint8)
        sums = [np.zeros(5, np.uint64)]
        faulty.add_rule("write", {"short": BLOCK}, times=3)
        device.write([(BLOCK, noise)], checksums=sums).wait()
        faulty.add_rule("read", {"short": BLOCK}, times=3)
        out = np.empty_like(noise)
        device.read([(BLOCK, out)], checksums=sums).wait()
        assert (out == noise).all()
        assert device.stats()["direct"]["resumed"] >= 2
        assert device.stats()["direct"]["errors"] == 0


def test_a_failed_flush_names_its_member_and_flushes_the_others(
    fault_device: Callable[..., FaultDevice],
) -> None:
    faulty, sound = fault_device(MIB), fault_device(MIB)
    with open_device([str(faulty.path), str(sound.path)], CHUNK) as device:
        device.write([(0, bytes(4 * CHUNK))]).wait()
        faulty.add_rule("fsync", "EIO")
        with pytest.raises(DeviceError, match=f"flush on {faulty.path} failed"):
            device.flush()
        assert sound.stats()["fsync"] == 1
        with pytest.raises(DeviceError, match=f"discard on {faulty.path} failed"):
            faulty.add_rule("trim", "EIO")
            device.discard(0, 4 * CHUNK)


def test_damage_names_the_member_that_it_is_on(members: list[str]) -> None:
    with dualblade.open(members) as store:
        offset = store.info("kept").offset
        path, place = store._device.info.place(offset + 5 * (256 << 10))
    overwrite(path, place + 1000, b"damage")
    with dualblade.open(members, policy="direct") as store:
        with pytest.raises(CorruptionError, match=f"at byte {place} of {path}"):
            store.get("kept")
        assert len(store.check()) == 1


@pytest.mark.parametrize("count", [2, 4])
def test_the_size_of_huge_sparse_members_does_not_overflow(count: int) -> None:
    with tempfile.TemporaryDirectory(dir="/dev/shm") as folder:
        try:
            paths = files(Path(folder), [1 << 62] * count)
        except OSError as error:
            pytest.skip(f"no such files here: {error}")
        with open_device(paths, MIB) as device:
            row = count * MIB
            assert device.info.size == ((1 << 63) - 1) // row * row
            last = device.info.size - BLOCK
            device.write([(last, np.full(BLOCK, 7, np.uint8))]).wait()
            assert read(device, last, BLOCK) == b"\7" * BLOCK

"""Pipelines: order, failures, interruptions, and what others do to the store meanwhile."""

from __future__ import annotations

import gc
import itertools
import os
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import dualblade
from dualblade.gpu import HostDevice
from dualblade.pipeline import Pipeline
from dualblade.tuning import MODES
from tests.faultdev import FaultDevice

MIB = 1 << 20
LANES = ("direct", "pagecache", "put")
FAST = 50e9
"""Copies at a set bandwidth go through staging."""


def noise(size: int, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, size, np.uint8)


class Layers:
    """A store with groups of keys and values of a few megabytes."""

    def __init__(self, store: dualblade.TensorStore, count: int = 6, nbytes: int = 5 * MIB) -> None:
        self.store = store
        self.groups = [[f"{layer}/k", f"{layer}/v"] for layer in range(count)]
        self.expected = {
            key: noise(nbytes, number) for number, key in enumerate(itertools.chain(*self.groups))
        }
        for layer, keys in enumerate(self.groups):
            store.put_many({key: self.expected[key] for key in keys}, group=str(layer))
            store.set_path(str(layer), "direct" if layer % 3 else "pagecache")

    def check(self, keys: list[str], arrays: list[Any]) -> None:
        for key, array in zip(keys, arrays, strict=True):
            assert (array == self.expected[key]).all(), key

    def check_all(self, pipe: Pipeline) -> None:
        for keys, arrays in zip(self.groups, pipe.stream(self.groups), strict=True):
            self.check(keys, arrays)
        check_idle(pipe)


def check_idle(pipe: Pipeline) -> None:
    pipe.settle()
    stats = pipe.stats()
    assert stats["staging_taken_bytes"] == 0
    assert stats["staging_most_bytes"] <= stats["staging_bytes"]
    assert [stats[lane]["under_way"] for lane in LANES] == [0, 0, 0]


@pytest.fixture
def layers(tmp_path: Path) -> Iterator[Layers]:
    with dualblade.open(tmp_path / "kv.img", size="160MiB", memory="64MiB", live=False) as store:
        yield Layers(store)
        assert store.stats()["operations_active"] == 0


@pytest.fixture(params=["in place", "unified", "staged"])
def pipe(request: pytest.FixtureRequest, layers: Layers) -> Iterator[Pipeline]:
    options = {"in place": {}, "unified": {"unified": True}, "staged": {"copy_bytes_per_s": FAST}}
    with layers.store.pipeline(HostDevice(**options[request.param])) as made:
        yield made
        check_idle(made)


@pytest.fixture
def staged(layers: Layers) -> Iterator[Pipeline]:
    device = HostDevice(copy_bytes_per_s=FAST)
    with layers.store.pipeline(device, staging="8MiB", chunk_bytes=MIB, depth=2) as made:
        yield made
        check_idle(made)


# ---- reading -------------------------------------------------------------------------------------


def test_groups_come_in_their_order(layers: Layers, pipe: Pipeline):
    wanted = [layers.groups[n] for n in (5, 0, 0, 3, 1, 2, 4, 0)]
    for keys, arrays in zip(wanted, pipe.stream(wanted), strict=True):
        layers.check(keys, arrays)


def test_the_device_may_be_named(layers: Layers):
    with layers.store.pipeline(device="cpu") as pipe:
        layers.check_all(pipe)
        assert pipe.stats()["in_place"]


def test_nothing_and_empty_groups(layers: Layers, pipe: Pipeline):
    assert list(pipe.stream([])) == []
    layers.store.put("empty", np.empty((0, 3), np.float32))
    found = [[array.shape for array in arrays] for arrays in pipe.stream([[], ["empty"]])]
    assert found == [[], [(0, 3)]]


def test_the_groups_may_be_made_on_the_way(layers: Layers, pipe: Pipeline):
    for number, arrays in enumerate(pipe.stream(iter(keys) for keys in layers.groups)):
        layers.check(layers.groups[number], arrays)


def test_many_small_tensors_share_chunks(layers: Layers):
    keys = [f"small/{n}" for n in range(300)]
    expected = {key: noise(4096 + n, n) for n, key in enumerate(keys)}
    layers.store.put_many(expected)
    with layers.store.pipeline(HostDevice(copy_bytes_per_s=FAST)) as pipe:
        (arrays,) = pipe.stream([keys])
        for key, array in zip(keys, arrays, strict=True):
            assert (array == expected[key]).all()
        assert pipe.stats()["direct"]["chunks"] + pipe.stats()["pagecache"]["chunks"] < 10


@pytest.mark.parametrize("mode", MODES)
def test_a_mode_says_in_which_order_tensors_are_read(layers: Layers, mode: str):
    copied = []
    device = HostDevice(copy_bytes_per_s=FAST, before_copy=lambda _, size: copied.append(size))
    layers.store.put_many({"a": noise(4 * MIB, 1), "b": noise(4 * MIB - 7, 2)}, group="pair")
    with layers.store.pipeline(device, chunk_bytes=MIB, depth=1, mode=mode) as pipe:
        list(pipe.stream([["a", "b"]]))
    short = copied.index(MIB - 7)
    assert short == 7
    assert len(copied) == 8
    # b's first chunk comes second, or after all of a: told by when a's rows are complete.
    layers.store.put_many({"a": noise(MIB, 1), "b": noise(4 * MIB, 2)}, group="pair")
    copied.clear()
    with layers.store.pipeline(device, chunk_bytes=2 * MIB, depth=1, mode=mode) as pipe:
        list(pipe.stream([["b", "a"]]))
    assert copied == ([2 * MIB, MIB, 2 * MIB] if mode == "intra" else [2 * MIB, 2 * MIB, MIB])


def test_memory_is_used_again_only_after_what_the_caller_enqueued(layers: Layers, staged: Pipeline):
    """The caller runs far ahead of the stream that its kernels are in, as with a GPU."""
    wanted = layers.groups * 4
    seen: list[list[bool]] = []

    def kernel(keys: list[str], arrays: list[Any]) -> Callable[[], None]:
        return lambda: seen.append(
            [
                bool((array == layers.expected[key]).all())
                for key, array in zip(keys, arrays, strict=True)
            ]
        )

    with staged.device.stream() as stream:
        for keys, arrays in zip(wanted, staged.stream(wanted), strict=True):
            stream.launch(kernel(keys, arrays))
        stream.record().wait()
    stream.close()
    assert seen == [[True, True]] * len(wanted)
    assert staged.stats()["buffers_allocated"] <= 6


def test_memory_is_the_callers_where_it_is_given(layers: Layers, pipe: Pipeline):
    outs = [[np.empty(5 * MIB, np.uint8) for _ in keys] for keys in layers.groups]
    for out, arrays in zip(outs, pipe.stream(layers.groups, out=outs), strict=True):
        assert all(map(np.shares_memory, out, arrays))
    for keys, out in zip(layers.groups, outs, strict=True):
        layers.check(keys, out)
    assert pipe.stats()["buffers_allocated"] == 0


def test_memory_that_is_given_is_written_after_what_was_enqueued_before(
    layers: Layers, staged: Pipeline
):
    """Each group goes into the same memory, which the kernel of the one before still reads."""
    out = [np.empty(5 * MIB, np.uint8) for _ in range(2)]
    seen = []
    with staged.device.stream() as stream:
        outs = [out] * len(layers.groups)
        for number, keys in enumerate(layers.groups):
            # One at a time: what is given twice must not be under way twice.
            for _ in staged.stream([keys], out=[outs[number]]):
                stream.launch(
                    lambda keys=keys: seen.append(
                        all((a == layers.expected[k]).all() for k, a in zip(keys, out, strict=True))
                    )
                )
        stream.record().wait()
    stream.close()
    assert seen == [True] * len(layers.groups)


@pytest.mark.parametrize(
    "out",
    [
        [[np.empty(5 * MIB, np.uint8)]],
        [[np.empty(5 * MIB, np.int8), np.empty(5 * MIB, np.uint8)]],
        [[np.empty((5, MIB), np.uint8), np.empty(5 * MIB, np.uint8)]],
        [],
    ],
    ids=["too few", "dtype", "shape", "too few groups"],
)
def test_memory_that_does_not_fit_is_refused(layers: Layers, pipe: Pipeline, out: list[Any]):
    with pytest.raises(ValueError, match="out"):
        list(pipe.stream(layers.groups[:1], out=out))
    layers.check_all(pipe)


def test_a_group_is_a_list_of_keys(pipe: Pipeline):
    with pytest.raises(TypeError, match="a group is a list of keys"):
        list(pipe.stream(["0/k"]))


# ---- what goes wrong -----------------------------------------------------------------------------


def test_an_unknown_key_raises_when_its_group_is_due(layers: Layers, pipe: Pipeline):
    stream = pipe.stream([layers.groups[0], layers.groups[1], ["nobody"], layers.groups[2]])
    layers.check(layers.groups[0], next(stream))
    layers.check(layers.groups[1], next(stream))
    with pytest.raises(dualblade.KeyNotFoundError, match="nobody"):
        next(stream)
    assert next(stream, None) is None
    layers.check_all(pipe)


def test_an_iterator_of_groups_that_raises_does_so_in_its_turn(layers: Layers, pipe: Pipeline):
    def groups() -> Iterator[list[str]]:
        yield layers.groups[0]
        raise RuntimeError("no more today")

    stream = pipe.stream(groups())
    layers.check(layers.groups[0], next(stream))
    with pytest.raises(RuntimeError, match="no more today"):
        next(stream)
    layers.check_all(pipe)


@pytest.mark.parametrize("path", ["direct", "pagecache"])
@pytest.mark.parametrize("bandwidth", [None, FAST])
def test_a_read_that_fails_raises_and_the_pipeline_goes_on(
    fault_device: Callable[..., FaultDevice], path: str, bandwidth: float | None
):
    faulty = fault_device(64 * MIB)
    policy = {"direct": "direct", "pagecache": "pagecache"}[path]
    with dualblade.open(faulty.path, policy=policy, format=True, live=False) as store:
        layers = Layers.__new__(Layers)
        layers.store, layers.groups = store, [["a", "b"], ["c"], ["d"]]
        layers.expected = {key: noise(3 * MIB, ord(key)) for key in "abcd"}
        store.put_many(layers.expected)
        store.flush()
        os.posix_fadvise(os.open(faulty.path, os.O_RDONLY), 0, 0, os.POSIX_FADV_DONTNEED)
        with store.pipeline(HostDevice(copy_bytes_per_s=bandwidth), staging="8MiB") as pipe:
            info = store.info("b")
            faulty.add_rule("read", "EIO", lo=info.offset + MIB, hi=info.offset + 2 * MIB)
            for _ in range(2):
                with pytest.raises(dualblade.DeviceError) as caught:
                    layers.check_all(pipe)
                assert caught.value.errno == 5
                check_idle(pipe)
            (arrays,) = pipe.stream([["c"]])
            layers.check(["c"], arrays)
            faulty.clear()
            layers.check_all(pipe)
        assert store.stats()["operations_active"] == 0


def test_a_copy_that_fails_raises_and_the_pipeline_goes_on(layers: Layers):
    fails = threading.Event()

    def before_copy(direction: str, size: int) -> None:
        if fails.is_set():
            fails.clear()
            raise RuntimeError(f"the bus is gone: {direction}, {size}")

    device = HostDevice(copy_bytes_per_s=FAST, before_copy=before_copy)
    with layers.store.pipeline(device, staging="8MiB") as pipe:
        layers.check_all(pipe)
        for skipped in range(4):
            stream = pipe.stream(layers.groups * 3)
            for _ in range(skipped):
                next(stream)
            fails.set()
            with pytest.raises(RuntimeError, match="the bus is gone"):
                for number, arrays in enumerate(stream, skipped):
                    layers.check(layers.groups[number % 6], arrays)
            layers.check_all(pipe)
        fails.set()
        with pytest.raises(RuntimeError, match="the bus is gone: to_host"):
            pipe.put({"new": noise(3 * MIB, 1), "0/k": noise(MIB, 2)})
        assert "new" not in layers.store
        layers.check_all(pipe)
        pipe.put({"new": noise(3 * MIB, 1)})
        assert (layers.store.get("new") == noise(3 * MIB, 1)).all()
        check_idle(pipe)


@pytest.mark.parametrize("bandwidth", [None, FAST])
def test_a_write_that_fails_leaves_what_was_there(
    fault_device: Callable[..., FaultDevice], bandwidth: float | None
):
    faulty = fault_device(64 * MIB)
    with (
        dualblade.open(faulty.path, policy="direct", format=True) as store,
        store.pipeline(HostDevice(copy_bytes_per_s=bandwidth), staging="8MiB") as pipe,
    ):
        old, new = noise(3 * MIB, 1), noise(6 * MIB, 2)
        pipe.put({"a": old})
        free_bytes = store.stats()["free_bytes"]
        faulty.add_rule("write", "EIO", nth=5)
        with pytest.raises(dualblade.DeviceError):
            pipe.put({"b": new, "a": new})
        assert "b" not in store
        assert (store.get("a") == old).all()
        assert store.stats()["free_bytes"] == free_bytes
        faulty.clear()
        pipe.put({"b": new, "a": new})
        assert (store.get("a") == new).all()
        check_idle(pipe)


# ---- storing -------------------------------------------------------------------------------------


def test_what_is_put_is_stored(layers: Layers, pipe: Pipeline):
    arrays = {
        "half": noise(6 * MIB, 4).view(np.float16).reshape(3, 1024, -1),
        "scalar": np.array(3.5),
        "empty": np.empty((4, 0), np.int8),
        "0/k": noise(7 * MIB + 13, 3),
    }
    pipe.put(arrays, group="0")
    for key, array in arrays.items():
        found = layers.store.get(key)
        assert found.dtype == array.dtype
        assert np.array_equal(found, array, equal_nan=True)
    assert layers.store.check() == []
    assert layers.store.info("half").group == "0"


def test_a_put_is_seen_by_whoever_comes_after_it(layers: Layers, pipe: Pipeline):
    new = noise(5 * MIB, 77)
    ticket = pipe.put_async({"0/k": new})
    assert (layers.store.get("0/k") == new).all()
    assert ticket.done()
    ticket = pipe.put_async({"0/k": new[::-1].copy()})
    (arrays,) = pipe.stream([["0/k"]])
    assert (arrays[0] == new[::-1]).all()
    ticket.result()


def test_a_put_reads_after_what_the_caller_enqueued(layers: Layers, staged: Pipeline):
    array = np.zeros(4 * MIB, np.uint8)
    goes_on = threading.Event()
    with staged.device.stream() as stream:
        stream.launch(lambda: (goes_on.wait(), array.fill(7)))
        ticket = staged.put_async({"made": array})
        with pytest.raises(TimeoutError):
            ticket.result(timeout=0.2)
        goes_on.set()
        ticket.result()
    stream.close()
    assert (layers.store.get("made") == 7).all()


def test_what_has_no_room_is_refused(layers: Layers, pipe: Pipeline):
    with pytest.raises(dualblade.NoSpaceError):
        pipe.put({"large": np.zeros(200 * MIB, np.uint8)})
    with pytest.raises(ValueError, match="not contiguous"):
        pipe.put({"strided": np.zeros((4, 4))[:, ::2]})
    layers.check_all(pipe)


def test_both_directions_at_once(layers: Layers, pipe: Pipeline):
    tickets = []
    for number, arrays in enumerate(pipe.stream(layers.groups)):
        copies = [array.copy() for array in arrays]
        tickets.append(pipe.put_async({f"copy/{number}/{n}": c for n, c in enumerate(copies)}))
    for ticket in tickets:
        ticket.result()
    for number, keys in enumerate(layers.groups):
        layers.check(keys, [layers.store.get(f"copy/{number}/{n}") for n in range(2)])


def test_puts_keep_to_what_may_be_dirty(tmp_path: Path):
    """More at once than the page cache may have dirty, some of it put by the store itself."""
    with (
        dualblade.open(tmp_path / "kv.img", size="200MiB", policy="pagecache") as store,
        store.pipeline(HostDevice(copy_bytes_per_s=FAST), staging="16MiB") as pipe,
    ):
        expected = {f"{n}": noise(11 * MIB, n) for n in range(12)}
        tickets = []
        for number, (key, array) in enumerate(expected.items()):
            put = store.put_async if number % 3 == 2 else lambda k, a: pipe.put_async({k: a})
            tickets.append(put(key, array))
        for ticket in reversed(tickets):
            ticket.result()
        for key, array in expected.items():
            assert (store.get(key) == array).all()
        assert store.check() == []
        check_idle(pipe)


# ---- what others do meanwhile --------------------------------------------------------------------


def test_tensors_that_are_next_can_be_changed_in_between(layers: Layers, pipe: Pipeline):
    """What is read ahead is held only while it is read: nobody waits for the caller."""
    for number, keys in enumerate(layers.groups):
        stream = pipe.stream([*layers.groups[number:], *layers.groups[:number]])
        next(stream)
        for group in layers.groups:
            layers.store.truncate_many(dict.fromkeys(group, 5 * MIB - number - 1))
            layers.store.set_path(group[0].partition("/")[0], ("direct", "pagecache")[number % 2])
        new = noise(3 * MIB, number)
        layers.store.put_many({keys[0]: new}, group=str(number))
        stream.close()
        layers.store.delete(keys[1])
        layers.store.put(keys[1], layers.expected[keys[1]], group=str(number))
        layers.store.put(keys[0], layers.expected[keys[0]], group=str(number))
    for key, array in layers.expected.items():
        layers.store.put(key, array)
    layers.check_all(pipe)


def test_others_may_want_all_tensors_at_once(layers: Layers, pipe: Pipeline):
    """Who wants two tensors exclusively, of which a lane holds one and wants the other next."""
    ends = threading.Event()
    everything = list(itertools.chain(*layers.groups))

    def change() -> None:
        while not ends.is_set():
            layers.store.truncate_many(dict.fromkeys(everything, 5 * MIB))

    thread = threading.Thread(target=change)
    thread.start()
    try:
        for _ in range(5):
            layers.check_all(pipe)
    finally:
        ends.set()
        thread.join()


def test_several_iterations_at_once(layers: Layers, pipe: Pipeline):
    errors = []

    def read(order: list[int]) -> None:
        try:
            wanted = [layers.groups[n] for n in order]
            for keys, arrays in zip(wanted, pipe.stream(wanted), strict=True):
                layers.check(keys, arrays)
        except BaseException as error:  # noqa: BLE001
            errors.append(error)

    orders = [[0, 1, 2, 3, 4, 5], [5, 4, 3, 2, 1, 0], [2, 2, 2, 0]]
    threads = [threading.Thread(target=read, args=(order,)) for order in orders]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []


# ---- the end -------------------------------------------------------------------------------------


def test_close_in_the_middle_and_twice(layers: Layers):
    for bandwidth in (None, FAST):
        pipe = layers.store.pipeline(HostDevice(copy_bytes_per_s=bandwidth))
        stream = pipe.stream(layers.groups)
        first = next(stream)
        pipe.close()
        pipe.close()
        layers.check(layers.groups[0], first)
        assert pipe.closed
        with pytest.raises(dualblade.ClosedError):
            next(stream)
        with pytest.raises(dualblade.ClosedError):
            pipe.stream(layers.groups)
        with pytest.raises(dualblade.ClosedError):
            pipe.put({"a": np.zeros(3)})


def test_close_finishes_what_is_being_put(layers: Layers):
    pipe = layers.store.pipeline(HostDevice(copy_bytes_per_s=1e9))
    new = noise(16 * MIB, 5)
    ticket = pipe.put_async({"new": new})
    pipe.close()
    ticket.result()
    assert (layers.store.get("new") == new).all()


def test_the_store_may_be_closed_first(tmp_path: Path):
    for bandwidth in (None, FAST):
        path = tmp_path / f"{bandwidth}.img"
        store = dualblade.open(path, size="160MiB", memory="64MiB", live=False)
        layers = Layers(store)
        with store.pipeline(HostDevice(copy_bytes_per_s=bandwidth)) as pipe:
            stream = pipe.stream(layers.groups * 3)
            next(stream)
            store.close()
            with pytest.raises(dualblade.ClosedError):
                list(stream)


def test_one_that_nobody_closed_is_closed_and_named(layers: Layers):
    pipe = layers.store.pipeline(HostDevice(copy_bytes_per_s=FAST))
    for _ in pipe.stream(layers.groups):
        pass
    with pytest.warns(ResourceWarning, match="unclosed <dualblade.Pipeline"):
        del pipe
        gc.collect()


def test_after_a_fork_it_is_the_parents(layers: Layers, staged: Pipeline):
    stream = staged.stream(layers.groups)
    next(stream)
    child = os.fork()
    if child == 0:
        status = 1
        try:
            next(stream)
        except dualblade.ClosedError:
            staged.close()
            status = 0
        finally:
            os._exit(status)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    for keys, arrays in zip(layers.groups[1:], stream, strict=True):
        layers.check(keys, arrays)


# ---- options and stats ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"staging": "3MiB"}, "too little"),
        ({"depth": 0}, "at least one"),
        ({"chunk_bytes": MIB // 2}, "or more"),
        ({"chunk_bytes": MIB + 4096}, "a multiple of 262144"),
        ({"mode": "both"}, "there are 'cross' and 'intra'"),
        ({"staging": "8MiB", "chunk_bytes": 4 * MIB}, "do not fit"),
        ({"device": "gpu"}, "not known"),
    ],
)
def test_options_that_make_no_sense_are_refused(
    layers: Layers, options: dict[str, Any], words: str
):
    with pytest.raises(ValueError, match=words):
        layers.store.pipeline(options.pop("device", HostDevice(copy_bytes_per_s=FAST)), **options)


def test_stats_say_what_was_chosen(layers: Layers):
    device = HostDevice(copy_bytes_per_s=FAST)
    options = {"staging": "16MiB", "chunk_bytes": 2 * MIB, "depth": 2, "mode": "intra"}
    with layers.store.pipeline(device, **options) as pipe:
        layers.check_all(pipe)
        pipe.put({"new": noise(MIB, 1)})
        stats = pipe.stats()
        for lane in LANES:
            found = {name: stats[lane][name] for name in ("chunk_bytes", "depth", "mode")}
            assert found == {"chunk_bytes": 2 * MIB, "depth": 2, "mode": "intra"}
            assert stats[lane]["settled"]
        assert stats["staging_bytes"] == 16 * MIB
        assert 2 * MIB <= stats["staging_most_bytes"] <= 3 * 4 * MIB
        assert stats["groups"] == 6
        assert stats["direct"]["bytes"] == 4 * 10 * MIB
        assert stats["pagecache"]["bytes"] == 2 * 10 * MIB
        assert stats["put"]["bytes"] == MIB


def test_what_is_not_given_is_found_by_trying(layers: Layers):
    with layers.store.pipeline(HostDevice(copy_bytes_per_s=FAST), staging="16MiB") as pipe:
        tried = 0
        while not pipe.stats()["direct"]["settled"]:
            assert pipe.stats()["direct"]["why"].startswith("being tried")
            layers.check_all(pipe)
            tried += 1
            assert tried < 1000
        stats = pipe.stats()["direct"]
        assert "that were tried" in stats["why"]
        assert len(stats["tried"]) == 10
        rates = {(t["chunk_bytes"], t["depth"], t["mode"]): t["bytes_per_s"]
                 for t in stats["tried"]}  # fmt: skip
        assert rates[stats["chunk_bytes"], stats["depth"], stats["mode"]] > 0


def test_staging_is_known_to_the_kernel_while_it_is_used(layers: Layers):
    with layers.store.pipeline(HostDevice(copy_bytes_per_s=FAST), staging="8MiB") as pipe:
        assert pipe.stats()["registered_bytes"] in (0, 8 * MIB)

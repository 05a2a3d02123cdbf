"""Which group takes which path: bound by the memory budget, in order, and never beyond it."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import dualblade
from dualblade.entry import Entry, layout_of
from dualblade.index import Index
from dualblade.residency import Residency
from tests.helpers import MIB, noise

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path


def paths(store: dualblade.TensorStore) -> dict[str, str]:
    return {key: store.info(key).path for key in store.keys()}


# ---- the bookkeeping -----------------------------------------------------------------------------


@given(
    steps=st.lists(
        st.tuples(
            st.sampled_from(("add", "grow", "direct", "settle")),
            st.sampled_from("abcd"),
            st.integers(0, 60),
            st.integers(0, 4),
        ),
        max_size=40,
    ),
    policy=st.sampled_from(("dual", "direct", "pagecache")),
)
def test_the_accounts_are_right_and_the_budget_is_kept(steps: list[Any], policy: Any) -> None:
    residency = Residency(policy, 100)
    model: dict[str, list[tuple[int, int]]] = {}
    settled: set[str] = set()
    for action, group, size, quarters in steps:
        stored = size * quarters // 4
        if action == "direct" and group in model:
            residency.move(group, "direct")
        elif action == "settle" and group in model:
            residency.settle(group)
            settled.add(group)
        elif action in ("add", "grow"):
            for name in residency.crowded({group: (size, stored)}):
                residency.move(name, "direct")
            residency.add([(group, size, stored)])
            model.setdefault(group, []).append((size, stored))
        assert {name: bound.size_bytes for name, bound in residency.groups.items()} == {
            name: sum(size for size, _ in parts) for name, parts in model.items()
        }
        cached = [name for name in model if residency.path_of(name) == "pagecache"]
        stored_bytes = {name: sum(part[1] for part in parts) for name, parts in model.items()}
        assert residency.stored_bytes == sum(stored_bytes.values())
        assert residency.pagecache_bytes == sum(stored_bytes[name] for name in cached)
        claimed = sum(sum(part[name in settled] for part in model[name]) for name in cached)
        assert residency.claimed_bytes == claimed
        if policy == "dual":
            assert residency.pagecache_bytes <= claimed <= 100
        if policy == "direct":
            assert cached == []


def test_groups_that_grow_together_are_crowded_together() -> None:
    residency = Residency("dual", 100)
    for group in "abc":
        residency.add([(group, 20, 10)])
    assert residency.crowded({"a": (20, 0), "b": (20, 0)}) == []
    assert residency.crowded({"a": (30, 0), "b": (30, 0)}) == ["b"]
    assert residency.crowded({"a": (50, 0), "b": (10, 0)}) == ["a"]
    assert residency.crowded({"a": (-5, 0), "new": (500, 500)}) == []
    # Of one that counts by what is stored in it, so does what comes.
    residency.settle("a")
    assert residency.claimed_bytes == 50
    assert residency.crowded({"a": (1000, 40)}) == []
    assert residency.crowded({"a": (1000, 60)}) == ["a"]
    residency.move("a", "direct")
    assert (residency.claimed_bytes, residency.pagecache_bytes) == (40, 20)


def test_room_is_kept_for_a_group_as_long_as_it_is_filled_quickly() -> None:
    residency = Residency("dual", 1000)
    index = Index(1 << 20, 4096, 4096)
    entries = {name: Entry(name, layout_of((10, 4096), "|u1", 4096), name, 0) for name in "abcd"}
    residency.budget_bytes = 1 << 20
    index.place(list(entries.values()), residency, one_run=False)

    def look() -> list[str]:
        residency.settle_slow(list(residency.filling), 0.25)
        return [name for name, group in residency.groups.items() if group.is_promised]

    page = 4096
    index.account(entries["a"], page, residency)
    index.account(entries["b"], page, residency)
    index.account(entries["c"], 10 * page, residency)
    assert look() == list("abcd")  # seen for the first time
    index.account(entries["a"], 4 * page, residency)  # 6 are missing, 3 have come
    index.account(entries["b"], 2 * page, residency)  # 8 are missing, 1 has come
    assert look() == ["a", "d"]
    assert residency.claimed_bytes == (10 + 2 + 10 + 10) * page
    assert residency.pagecache_bytes == (4 + 2 + 10) * page
    index.account(entries["b"], 9 * page, residency)
    assert residency.claimed_bytes == (10 + 9 + 10 + 10) * page
    assert look() == ["d"]  # nothing is known of it still
    assert list(residency.filling) == []
    residency.budget_bytes = 23 * page
    assert residency.over({}, by_claim=True) == 10 * page
    assert residency.has_room(0)
    assert not residency.has_room(1)
    assert residency.over({"a": page, "b": page, "none": page}, by_claim=False) == 2 * page
    index.discard(entries.values(), residency)
    assert residency.groups == {}
    assert residency.stored_bytes == residency.claimed_bytes == residency.pagecache_bytes == 0


# ---- in a store ----------------------------------------------------------------------------------


def test_the_first_groups_that_fit_are_page_cached(path: Path) -> None:
    bound: Any = {"binding": "head", "live": False}
    with dualblade.open(path, size="32MiB", memory="4MiB", **bound) as store:
        store.put("a", noise(2 * MIB))
        store.put("too big", noise(3 * MIB))
        store.put("b", noise(MIB))
        store.put("c", noise(MIB + 1))
        store.put("d", noise(MIB))
        store.put("e", noise(1))
        expected = dict.fromkeys(["a", "b", "d"], "pagecache")
        expected |= dict.fromkeys(["too big", "c", "e"], "direct")
        assert paths(store) == expected
        stats = store.stats()
        assert stats["pagecache_bytes"] == stats["memory_budget_bytes"] == 4 * MIB
        assert store.memory_budget == 4 * MIB
        before = paths(store)
    with dualblade.open(path, memory="4MiB", **bound) as store:
        assert paths(store) == before
    with dualblade.open(path, memory="1MiB", **bound) as store:
        assert [key for key, side in paths(store).items() if side == "pagecache"] == ["b"]


@pytest.mark.parametrize("policy", ["direct", "pagecache"])
def test_a_policy_of_one_path_binds_everything_to_it(path: Path, policy: Any) -> None:
    with dualblade.open(path, size="32MiB", memory="1MiB", policy=policy) as store:
        store.put("a", noise(3 * MIB))
        store.put("b", noise(10))
        store.put("a", noise(4 * MIB))
        assert set(paths(store).values()) == {policy}


def test_a_batch_keeps_the_budget_as_a_whole(path: Path) -> None:
    with dualblade.open(path, size="32MiB", memory="4MiB") as store:
        store.put_many({f"x{i}": noise(MIB) for i in range(8)})
        assert list(paths(store).values()) == ["pagecache"] * 4 + ["direct"] * 4
        # One grows and one is new: they can't both have what is left.
        store.delete("x0")
        store.put_many({"new": noise(MIB), "x1": noise(2 * MIB)})
        assert store.stats()["pagecache_bytes"] <= 4 * MIB


@pytest.mark.parametrize("grow", ["put", "replace", "reserve", "resize"])
def test_a_group_that_outgrows_the_budget_goes_direct_whole(path: Path, grow: str) -> None:
    with dualblade.open(path, size="32MiB", memory="4MiB") as store:
        store.put("a", noise(MIB), group="g")
        store.put("b", noise(MIB, 1), group="g")
        store.put("other", noise(MIB, 2))
        if grow == "put":
            store.put("c", noise(2 * MIB), group="g")
        elif grow == "replace":
            store.put("b", noise(3 * MIB, 1))
        elif grow == "reserve":
            store.reserve("c", (2 * MIB,), "uint8", group="g")
        else:
            store.resize("b", 3 * MIB)
            assert set(paths(store).values()) == {"pagecache"}  # what is stored fits still
            store.append("b", noise(2 * MIB, 3))
        assert store.info("other").path == "pagecache"
        assert {side for key, side in paths(store).items() if key != "other"} == {"direct"}
        assert store.stats()["pagecache_bytes"] == MIB
        np.testing.assert_array_equal(store.get("a"), noise(MIB))
        np.testing.assert_array_equal(store.get("b")[: MIB // 2], noise(3 * MIB, 1)[: MIB // 2])
        for key in ("a", "b"):
            info = store.info(key)
            assert store._device.cached_bytes(info.offset, info.extent_bytes) == (0, 0)


def test_what_does_not_fit_cannot_be_moved_to_the_page_cache(path: Path) -> None:
    with dualblade.open(path, size="32MiB", memory="4MiB") as store:
        store.put("a", noise(3 * MIB))
        store.put("b", noise(2 * MIB))
        with pytest.raises(ValueError, match="2 MiB, and of the memory budget of 4 MiB .* 3 MiB"):
            store.set_path("b", "pagecache")
        assert paths(store) == {"a": "pagecache", "b": "direct"}
        store.set_path("a", "direct")
        store.set_path("b", "pagecache")
        assert paths(store) == {"a": "direct", "b": "pagecache"}
        store.set_path("b", "pagecache")
        assert store.stats()["pagecache_bytes"] == 2 * MIB


def test_room_that_a_delete_gives_back_is_given_out_again(path: Path) -> None:
    with dualblade.open(path, size="32MiB", memory="4MiB") as store:
        for i in range(5):
            store.put("a", noise(4 * MIB, i))
            assert paths(store) == {"a": "pagecache"}
            store.delete("a")
        assert store.stats()["groups"] == {}
        assert store.stats()["pagecache_bytes"] == 0


def test_an_automatic_budget_follows_the_cgroup(
    memory_cgroup: Callable[[int], Any], path: Path
) -> None:
    group = memory_cgroup(160 * MIB)
    program = (
        "import sys, dualblade\n"
        "with dualblade.open(sys.argv[1], size='4MiB') as store: print(store.memory_budget)\n"
    )
    done = group.run_python(program, str(path))
    assert done.returncode == 0, done.stderr
    assert 0 < int(done.stdout) < 160 * MIB
    assert sys.maxsize > int(done.stdout)

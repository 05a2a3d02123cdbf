"""Which group takes which path: bound by the memory budget, in order, and never beyond it."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import dualblade
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
            st.sampled_from(("add", "grow", "direct")),
            st.sampled_from("abcd"),
            st.integers(0, 60),
        ),
        max_size=40,
    ),
    policy=st.sampled_from(("dual", "direct", "pagecache")),
)
def test_the_accounts_are_right_and_the_budget_is_kept(steps: list[Any], policy: Any) -> None:
    residency = Residency(policy, 100)
    model: dict[str, list[int]] = {}
    for action, group, size in steps:
        if action == "direct" and group in model:
            residency.move(group, "direct")
        elif action in ("add", "grow"):
            for name in residency.crowded({group: size}):
                residency.move(name, "direct")
            residency.add([(group, size)])
            model.setdefault(group, []).append(size)
        assert {name: sum(sizes) for name, sizes in model.items()} == {
            name: bound.size_bytes for name, bound in residency.groups.items()
        }
        cached = sum(
            sum(sizes) for name, sizes in model.items() if residency.path_of(name) == "pagecache"
        )
        assert residency.pagecache_bytes == cached
        if policy == "dual":
            assert cached <= 100
        if policy == "direct":
            assert cached == 0


def test_groups_that_grow_together_are_crowded_together() -> None:
    residency = Residency("dual", 100)
    for group in "abc":
        residency.add([(group, 20)])
    assert residency.crowded({"a": 20, "b": 20}) == []
    assert residency.crowded({"a": 30, "b": 30}) == ["b"]
    assert residency.crowded({"a": 50, "b": 10}) == ["a"]
    assert residency.crowded({"a": -5, "new": 500}) == []


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

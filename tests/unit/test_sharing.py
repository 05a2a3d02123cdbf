"""Stores of one process share the memory that is free."""

from __future__ import annotations

import gc
from pathlib import Path

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

import dualblade
from dualblade.sharing import Sharing, fair_share
from tests.helpers import MIB, Memory, noise, until


@given(
    wants=st.lists(st.integers(0, 100), min_size=1, max_size=6),
    total=st.integers(-10, 400),
    data=st.data(),
)
def test_shares_are_fair(wants: list[int], total: int, data: st.DataObject) -> None:
    """Nobody who lacks something could get it from one who has more than it."""
    shares = fair_share(wants, total)
    assert sum(shares) <= max(0, total)
    assert sum(shares) > total - len(wants)  # of what can't be divided
    assert all(share >= 0 for share in shares)
    for want, share in zip(wants, shares, strict=True):
        if share < want:
            assert share >= max(shares) - 1
    if sum(wants) <= total:
        spare = (total - sum(wants)) // len(wants)
        assert shares == [want + spare for want in wants]
    # Whoever comes first.
    order = data.draw(st.permutations(range(len(wants))))
    again = fair_share([wants[index] for index in order], total)
    assert all(abs(again[place] - shares[index]) <= 1 for place, index in enumerate(order))


def test_one_that_is_alone_has_all_and_one_that_is_gone_nothing() -> None:
    class Owner:
        pass

    sharing, first, second = Sharing(), Owner(), Owner()
    assert sharing.share(first, 0, 100) == 100
    assert sharing.share(second, 30, 100) == 30 + 35
    assert sharing.share(first, 90, 100) == 70
    assert sharing.share(second, 90, 100) == 50
    sharing.leave(second)
    sharing.leave(second)
    assert sharing.share(first, 0, 100) == 100
    assert sharing.share(second, 90, 100) == 95
    del second
    gc.collect()
    assert sharing.share(first, 0, 100) == 100


def test_two_stores_share_what_is_free(memory: Memory, path: Path, tmp_path: Path) -> None:
    memory.free_bytes = 112 * MIB

    def cached(store: dualblade.TensorStore) -> int:
        return store.stats()["pagecache_bytes"] // MIB

    with dualblade.open(path, size="128MiB") as first:
        for i in range(20):
            first.put(f"x{i}", noise(4 * MIB, i))
        assert cached(first) == 80
        with dualblade.open(tmp_path / "other.img", size="128MiB") as second:
            for i in range(20):
                second.put(f"x{i}", noise(4 * MIB, i))
            # 56 MiB for each, of which 16 stay free.
            until(lambda: (cached(first), cached(second)) == (40, 40), "it is not shared")
            assert first.memory_budget + second.memory_budget <= 112 * MIB
            first.delete_many([f"x{i}" for i in range(5, 20)])
            until(lambda: (cached(first), cached(second)) == (20, 60), "what is left is not used")
            for store, count in ((first, 5), (second, 20)):
                for i in range(count):
                    np.testing.assert_array_equal(store.get(f"x{i}"), noise(4 * MIB, i))
        until(lambda: first.memory_budget == 96 * MIB, "one that is closed takes some still")

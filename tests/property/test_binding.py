"""Which groups are page-cached, against a plain model: never over budget, never a group lost, and
no more moves than it takes."""

from __future__ import annotations

import itertools
from typing import Any

from hypothesis import example, given
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from dualblade.residency import BINDINGS, Candidate, Moves, Residency, plan_moves, spread_order

NAMES = [f"g{i}" for i in range(12)]


@st.composite
def groups(draw: Any) -> list[Candidate]:
    return [
        Candidate(
            name,
            draw(st.integers(0, 40)),
            draw(st.sampled_from(["direct", "pagecache"])),
            is_empty=draw(st.booleans()),
            is_pinned=draw(st.integers(0, 9)) == 0,
            wish=draw(st.sampled_from([None, None, None, "direct", "pagecache"])),
        )
        for name in NAMES[: draw(st.integers(0, len(NAMES)))]
    ]


def after(candidates: list[Candidate], moves: Moves) -> list[Candidate]:
    """The groups when the moves are done; each is on the other path before its move."""
    path = {group.name: group.path for group in candidates}
    for names, to in ((moves.to_direct, "direct"), (moves.to_pagecache, "pagecache")):
        for name in names:
            assert path[name] != to
            path[name] = to
    return [group._replace(path=path[group.name]) for group in candidates]


def cached(candidates: list[Candidate]) -> int:
    return sum(group.size_bytes for group in candidates if group.path == "pagecache")


@example(  # g3 makes room for g0, and is so much larger that g2 fits as well
    candidates=[
        Candidate("g0", 5, "direct", is_empty=False, is_pinned=False, wish=None),
        Candidate("g1", 8, "pagecache", is_empty=False, is_pinned=True, wish=None),
        Candidate("g2", 5, "direct", is_empty=False, is_pinned=False, wish=None),
        Candidate("g3", 6, "pagecache", is_empty=False, is_pinned=False, wish=None),
    ],
    budget=18,
    binding="head",
    swaps=1,
)
@given(
    candidates=groups(),
    budget=st.integers(0, 200),
    binding=st.sampled_from(sorted(BINDINGS)),
    swaps=st.integers(0, 3),
)
def test_a_plan_keeps_the_budget_and_fills_it(
    candidates: list[Candidate], budget: int, binding: Any, swaps: int
) -> None:
    moves = plan_moves(candidates, budget, binding, swaps=swaps)
    then = after(candidates, moves)
    pinned = cached([group for group in candidates if group.is_pinned])
    assert cached(then) <= max(budget, pinned)
    moved = set(moves.to_direct) | set(moves.to_pagecache)
    assert len(moved) == len(moves.to_direct) + len(moves.to_pagecache)
    for before, group in zip(candidates, then, strict=True):
        if before.is_pinned:
            assert group.path == before.path
        if group.name in moves.to_pagecache:
            assert group.wish != "direct"
        # It could come in only in the place of another.
        if group.path == "direct" and not group.is_pinned and group.wish != "direct":
            assert cached(then) + group.size_bytes > budget
    # Until some budget is exceeded every move to the page cache is allowed on the way.
    taken = cached([group for group in candidates if group.name not in moves.to_direct])
    sizes = {group.name: group.size_bytes for group in candidates}
    for name in moves.to_pagecache:
        taken += sizes[name]
        assert taken <= max(budget, pinned)


@given(candidates=groups(), budget=st.integers(0, 200), binding=st.sampled_from(sorted(BINDINGS)))
def test_nothing_moves_without_need(candidates: list[Candidate], budget: int, binding: Any) -> None:
    candidates = [
        group._replace(is_empty=False, wish=None if group.path == group.wish else group.wish)
        for group in candidates
    ]
    candidates = [
        group._replace(wish=None) if group.wish == "direct" else group for group in candidates
    ]
    moves = plan_moves(candidates, budget, binding)
    if cached(candidates) <= budget:
        assert moves.to_direct == []
    then = after(candidates, moves)
    # And a plan that was carried out leaves nothing to do.
    assert plan_moves(then, budget, binding) == Moves([], [])


@given(candidates=groups(), budget=st.integers(0, 200), binding=st.sampled_from(sorted(BINDINGS)))
def test_swaps_come_to_an_end(candidates: list[Candidate], budget: int, binding: Any) -> None:
    for _ in range(200):
        moves = plan_moves(candidates, budget, binding, swaps=1)
        if moves == Moves([], []):
            break
        candidates = after(candidates, moves)
    else:
        raise AssertionError("it goes round in circles")


@given(
    count=st.integers(1, 40),
    fits=st.integers(0, 40),
    paths=st.lists(st.booleans(), min_size=40, max_size=40),
)
def test_swaps_lead_to_what_the_order_wants(count: int, fits: int, paths: list[bool]) -> None:
    """Of groups of one size, whatever was page-cached before: the first of the order."""
    candidates = [
        Candidate(f"g{i}", 10, "pagecache" if is_cached else "direct")
        for i, is_cached in zip(range(count), paths, strict=False)
    ]
    for _ in range(2 * count + 2):
        candidates = after(candidates, plan_moves(candidates, 10 * fits, "spread", swaps=1))
    found = {i for i, group in enumerate(candidates) if group.path == "pagecache"}
    assert found == set(spread_order(count)[:fits])


@given(count=st.integers(0, 300))
def test_the_spread_order_is_even_and_nested(count: int) -> None:
    order = list(spread_order(count))
    assert sorted(order) == list(range(count))
    for n in range(1, count + 1):
        # Around the circle that a decoder goes, no gap is much larger than the mean.
        chosen = sorted(order[:n])
        gaps = [b - a for a, b in itertools.pairwise([*chosen, chosen[0] + count])]
        assert max(gaps) <= 2 * -(-count // n)


@given(
    candidates=groups(),
    budgets=st.lists(st.integers(0, 200), min_size=2, max_size=2),
)
def test_empty_groups_are_bound_as_if_all_came_at_once(
    candidates: list[Candidate], budgets: list[int]
) -> None:
    fresh = [group._replace(is_empty=True, is_pinned=False, wish=None) for group in candidates]
    moved = after(fresh, plan_moves(fresh, budgets[0], "spread"))
    again = after(moved, plan_moves(moved, budgets[1], "spread"))
    at_once = after(fresh, plan_moves(fresh, budgets[1], "spread"))
    assert again == at_once


class Binding(RuleBasedStateMachine):
    """Residency with groups that come, grow, shrink and go under a changing budget, planned anew
    from time to time, against a dict of sizes and paths."""

    def __init__(self) -> None:
        super().__init__()
        self.residency = Residency("dual", 100, "spread")
        self.model: dict[str, list[int]] = {}

    @rule(name=st.sampled_from(NAMES), size=st.integers(0, 50))
    def add(self, name: str, size: int) -> None:
        for crowded in self.residency.crowded({name: size}):
            self.residency.move(crowded, "direct")
        before = {group: self.residency.path_of(group) for group in self.model}
        self.residency.add([(name, size)])
        self.model.setdefault(name, []).append(size)
        assert all(self.residency.path_of(group) == path for group, path in before.items())

    @rule(budget=st.integers(0, 200))
    def change_the_budget(self, budget: int) -> None:
        self.residency.budget_bytes = budget
        self.follow(swaps=0)

    @rule(swaps=st.integers(0, 2))
    def follow(self, swaps: int) -> None:
        residency = self.residency
        found = [
            Candidate(name, group.size_bytes, group.path, wish=group.wish)
            for name, group in residency.groups.items()
        ]
        moves = plan_moves(found, residency.budget_bytes, residency.binding, swaps=swaps)
        for name in moves.to_direct:
            residency.move(name, "direct")
        for name in moves.to_pagecache:
            assert residency.fits(residency.groups[name].size_bytes)
            residency.move(name, "pagecache")

    @precondition(lambda self: self.model)
    @rule()
    def bind_anew(self) -> None:
        self.residency.bind_anew()

    @invariant()
    def the_budget_is_kept_and_no_group_is_lost(self) -> None:
        residency = self.residency
        assert {name: sum(sizes) for name, sizes in self.model.items()} == {
            name: group.size_bytes for name, group in residency.groups.items()
        }
        taken = sum(sum(self.model[n]) for n in self.model if residency.path_of(n) == "pagecache")
        assert taken == residency.pagecache_bytes <= residency.budget_bytes


TestBinding = Binding.TestCase

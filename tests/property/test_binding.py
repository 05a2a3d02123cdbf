"""Which groups are page-cached, against a plain model: never over budget, never a group lost, and
no more moves than it takes."""

from __future__ import annotations

import itertools
from typing import Any

from hypothesis import example, given
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from dualblade.entry import Entry, layout_of
from dualblade.index import Index
from dualblade.residency import BINDINGS, Candidate, Moves, Residency, plan_moves, spread_order

PAGE = 4096
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
    spare=0,
)
@given(
    candidates=groups(),
    budget=st.integers(0, 200),
    binding=st.sampled_from(sorted(BINDINGS)),
    swaps=st.integers(0, 3),
    spare=st.sampled_from([0, 0, 5, 30]),
)
def test_a_plan_keeps_the_budget_and_fills_it(
    candidates: list[Candidate], budget: int, binding: Any, swaps: int, spare: int
) -> None:
    moves = plan_moves(candidates, budget, binding, swaps=swaps, spare_bytes=spare)
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
            assert cached(then) + group.size_bytes + spare > budget
    stays = [group for group in candidates if group.path == "pagecache"]
    if cached(candidates) <= budget and not any(group.is_empty for group in stays):
        assert moves.to_pagecache == [] or swaps or cached(then) + spare <= budget
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
    """Residency and Index with tensors that come, grow, are cut and go under a changing budget,
    planned anew from time to time, against dicts of sizes and paths.

    The model counts pages: of a tensor the capacity, and how many hold something.
    """

    def __init__(self) -> None:
        super().__init__()
        self.residency = Residency("dual", 100 * PAGE, "spread")
        self.index = Index(1 << 24, PAGE, 4096)
        self.entries: dict[str, list[Entry]] = {}
        self.pages: dict[Entry, int] = {}
        self.settled: set[str] = set()

    def sums(self, name: str) -> tuple[int, int]:
        """Of a group: the capacity and what is stored, in pages."""
        own = self.entries[name]
        return sum(each.layout.rows for each in own), sum(self.pages[each] for each in own)

    def claim(self, name: str) -> int:
        return self.sums(name)[name in self.settled]

    def cached(self) -> list[str]:
        return [name for name in self.entries if self.residency.path_of(name) == "pagecache"]

    @rule(name=st.sampled_from(NAMES), size=st.integers(0, 50), stored=st.integers(0, 50))
    def add(self, name: str, size: int, stored: int) -> None:
        stored = min(size, stored)
        for crowded in self.residency.crowded({name: (size * PAGE, stored * PAGE)}):
            self.residency.move(crowded, "direct")
        before = {group: self.residency.path_of(group) for group in self.entries}
        entry = Entry(name, layout_of((size, PAGE), "|u1", 4096), name, 0)
        entry.footprint = stored * PAGE
        taken = sum(map(self.claim, self.cached()))
        self.index.place([entry], self.residency, one_run=False)
        assert all(self.residency.path_of(group) == path for group, path in before.items())
        if name not in before:
            fits = taken + size <= self.residency.budget_bytes // PAGE
            assert self.residency.path_of(name) == ("pagecache" if fits else "direct")
        self.entries.setdefault(name, []).append(entry)
        self.pages[entry] = stored

    def drawn(self, data: Any) -> Entry:
        name = data.draw(st.sampled_from(sorted(self.entries)), "group")
        return data.draw(st.sampled_from(self.entries[name]), "tensor")

    @precondition(lambda self: self.pages)
    @rule(data=st.data())
    def append(self, data: Any) -> None:
        """As the store does it: who has no room for it has groups leave before."""
        entry = self.drawn(data)
        pages = data.draw(st.integers(self.pages[entry], entry.layout.rows), "pages")
        growth = {entry.group: (pages - self.pages[entry]) * PAGE}
        is_cached = self.residency.path_of(entry.group) == "pagecache"
        room = self.residency.budget_bytes // PAGE - sum(self.sums(n)[1] for n in self.cached())
        if is_cached:
            has_room = pages - self.pages[entry] <= room
            assert self.residency.has_room(growth[entry.group]) == has_room
            assert (self.residency.over(growth, by_claim=False) <= 0) == has_room
            if not has_room:
                self.follow_growth(growth)
        self.index.account(entry, pages * PAGE, self.residency)
        self.pages[entry] = pages

    def follow_growth(self, growth: dict[str, int]) -> None:
        residency = self.residency
        found = [
            Candidate(name, group.stored_bytes + growth.get(name, 0), group.path)
            for name, group in residency.groups.items()
        ]
        for name in plan_moves(found, residency.budget_bytes, residency.binding).to_direct:
            residency.move(name, "direct")
        assert residency.over(growth, by_claim=False) <= 0

    @precondition(lambda self: self.pages)
    @rule(data=st.data())
    def cut(self, data: Any) -> None:
        entry = self.drawn(data)
        pages = data.draw(st.integers(0, self.pages[entry]), "pages")
        self.index.account(entry, pages * PAGE, self.residency)
        self.pages[entry] = pages

    @precondition(lambda self: self.pages)
    @rule(data=st.data())
    def delete(self, data: Any) -> None:
        entry = self.drawn(data)
        self.index.discard([entry], self.residency)
        del self.pages[entry]
        self.entries[entry.group].remove(entry)
        if not self.entries[entry.group]:
            del self.entries[entry.group]
            self.settled.discard(entry.group)

    @precondition(lambda self: self.pages)
    @rule(data=st.data())
    def settle(self, data: Any) -> None:
        name = self.drawn(data).group
        self.residency.settle(name)
        self.settled.add(name)

    @rule()
    def settle_what_does_not_grow(self) -> None:
        for _ in range(2):
            self.residency.settle_slow(list(self.residency.filling), 0.01)
        self.settled |= {
            name
            for name, group in self.residency.groups.items()
            if name not in self.settled and not group.is_promised
        }
        for name in set(self.entries) - self.settled:
            # Put whole, or nothing is stored in it.
            assert name not in self.residency.filling

    @rule(budget=st.integers(0, 200))
    def change_the_budget(self, budget: int) -> None:
        self.residency.budget_bytes = budget * PAGE
        self.follow(swaps=0, spare=0)

    @rule(swaps=st.integers(0, 2), spare=st.integers(0, 20))
    def follow(self, swaps: int, spare: int) -> None:
        residency = self.residency
        found = [
            Candidate(name, group.claim_bytes, group.path, wish=group.wish)
            for name, group in residency.groups.items()
        ]
        moves = plan_moves(
            found,
            residency.budget_bytes,
            residency.binding,
            swaps=swaps,
            spare_bytes=spare * PAGE,
        )
        for name in moves.to_direct:
            residency.move(name, "direct")
        for name in moves.to_pagecache:
            assert residency.fits(residency.groups[name].claim_bytes)
            residency.move(name, "pagecache")

    @precondition(lambda self: self.pages)
    @rule()
    def bind_anew(self) -> None:
        self.settled |= {name for name in self.entries if self.sums(name)[1]}
        self.residency.bind_anew()

    @invariant()
    def the_budget_is_kept_and_no_group_is_lost(self) -> None:
        residency = self.residency
        assert {name: self.sums(name) for name in self.entries} == {
            name: (group.size_bytes // PAGE, group.stored_bytes // PAGE)
            for name, group in residency.groups.items()
        }
        stored = {name: self.sums(name)[1] * PAGE for name in self.entries}
        claimed = sum(map(self.claim, self.cached())) * PAGE
        assert residency.stored_bytes == sum(stored.values())
        assert residency.pagecache_bytes == sum(stored[name] for name in self.cached())
        assert residency.claimed_bytes == claimed
        assert residency.pagecache_bytes <= min(claimed, residency.budget_bytes)
        # What is kept for a group is within the budget as long as nobody else grows into it.
        if not self.settled:
            assert claimed <= residency.budget_bytes

    def teardown(self) -> None:
        self.index.discard(list(self.pages), self.residency)
        assert self.residency.groups == {}


TestBinding = Binding.TestCase

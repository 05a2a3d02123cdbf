"""Which path each group of tensors takes.

A group is what is read together, such as a layer's keys and values. What fits into the memory
budget is page-cached, the rest is direct: of data that is scanned from end to end again and again,
what is cached must not be displaced by what is not, or nothing is ever found in memory
(arXiv 2604.26557, Algorithm 1). A group is bound when its first tensor is stored, while there is
room; which groups should have the room is the binding's to say, and `plan_moves` tells how to get
there when the budget or the groups have changed.

Here are the bookkeeping and the plans alone: the store moves groups, and holds its lock around
every call of Residency.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

PathName = Literal["direct", "pagecache"]
Policy = Literal["dual", "direct", "pagecache"]
POLICIES: tuple[Policy, ...] = ("dual", "direct", "pagecache")
Binding = Literal["spread", "head"]


@dataclass(slots=True)
class Group:
    """What is bound together: its path, its bytes of device space, and how many tensors it has."""

    path: PathName
    size_bytes: int = 0
    tensors: int = 0
    wish: PathName | None = None
    """The path that somebody asked for by name: no plan goes against it, but for want of room."""
    stored_bytes: int = 0
    """What the page cache can hold of it: what was written or is about to be, in whole pages."""
    is_promised: bool = True
    """Its whole size is kept for it, because it may be about to be filled."""
    seen_bytes: int = -1
    """What was stored in it when `settle_slow` last looked."""

    def copy(self) -> Group:
        """Another one that says the same."""
        return Group(
            self.path,
            self.size_bytes,
            self.tensors,
            self.wish,
            self.stored_bytes,
            self.is_promised,
            self.seen_bytes,
        )

    @property
    def claim_bytes(self) -> int:
        """What of the memory budget is spoken for while it is page-cached."""
        return self.size_bytes if self.is_promised else self.stored_bytes


# ---- which groups should be page-cached ---------------------------------------------------------


def head_order(count: int) -> Sequence[int]:
    """The first groups go first, as in the paper."""
    return range(count)


@functools.lru_cache(maxsize=8)
def spread_order(count: int) -> Sequence[int]:
    """Of any number of groups that fit, evenly many in each part of the scan: while a cached group
    is copied, the drive reads the next direct one.

    They take turns by the mirrored bits of their place, halving the gaps again and again. The first
    n of the order are among the first n + 1, so a budget that changes moves only as many groups as
    it has to.
    """
    bits = max(1, (count - 1).bit_length())
    places = (int(f"{turn:0{bits}b}"[::-1], 2) for turn in range(1 << bits))
    # Each group has one or two of the places, and takes its turn at the first.
    return list(dict.fromkeys(place * count >> bits for place in places))[:count]


BINDINGS: Mapping[Binding, Callable[[int], Sequence[int]]] = {
    "spread": spread_order,
    "head": head_order,
}
"""From a number of groups, in the order of their arrival, to who should be page-cached first."""


class Candidate(NamedTuple):
    """What a plan has to know of a group."""

    name: str
    size_bytes: int
    """That it takes of the budget."""
    path: PathName
    is_empty: bool = False
    """Nothing is stored in it yet: it moves for nothing."""
    is_pinned: bool = False
    """It can't be moved now."""
    wish: PathName | None = None


class Moves(NamedTuple):
    """Names of groups to move: first all of `to_direct`, then `to_pagecache`, in this order."""

    to_direct: list[str]
    to_pagecache: list[str]


def plan_moves(
    groups: Sequence[Candidate],
    budget_bytes: int,
    binding: Binding,
    *,
    swaps: int = 0,
    spare_bytes: int = 0,
) -> Moves:
    """The fewest moves after which the page-cached groups fit into the budget and fill it.

    `groups` are in the order of their arrival. Groups with data leave the page cache only for want
    of room, the last of the binding's order first; but up to `swaps` of them also change places
    with better ones. Empty groups take the places that the order gives them. Only pinned groups
    can be more than the budget. Who comes leaves `spare_bytes` of it free, for those to grow that
    are there; nobody leaves for that.
    """
    order = [groups[index] for index in BINDINGS[binding](len(groups))]
    # Sorted by what somebody asked for, and so in the same order otherwise.
    order = sorted(order, key=lambda group: group.wish != "pagecache")
    chosen = {
        group.name: group
        for group in order
        if group.path == "pagecache"
        and (group.is_pinned or not group.is_empty)
        and (group.is_pinned or group.wish != "direct")
    }
    taken_bytes = sum(group.size_bytes for group in chosen.values())
    for group in reversed(list(chosen.values())):
        if taken_bytes <= budget_bytes:
            break
        if not group.is_pinned:
            del chosen[group.name]
            taken_bytes -= group.size_bytes
    room_bytes = _fill(order, chosen, budget_bytes - taken_bytes, spare_bytes)
    if swaps:
        # Who leaves may be larger than who comes.
        _fill(order, chosen, _swap(order, chosen, room_bytes - spare_bytes, swaps))
    return Moves(
        [
            each.name
            for each in reversed(order)
            if each.path != "direct" and each.name not in chosen
        ],
        [each.name for each in order if each.path == "direct" and each.name in chosen],
    )


def _fill(
    order: Sequence[Candidate],
    chosen: dict[str, Candidate],
    room_bytes: int,
    spare_bytes: int = 0,
) -> int:
    """Chooses every further group that fits, the first of the order first; returns what is left.
    Those that were direct leave `spare_bytes` of the room."""
    for group in order:
        if group.name in chosen or group.is_pinned or group.wish == "direct":
            continue
        spare = spare_bytes if group.path == "direct" else 0
        if group.size_bytes + spare <= room_bytes:
            chosen[group.name] = group
            room_bytes -= group.size_bytes
    return room_bytes


def _swap(
    order: Sequence[Candidate], chosen: dict[str, Candidate], spare_bytes: int, swaps: int
) -> int:
    """Lets groups that come first in the order take the places of the last ones chosen; returns
    what is left."""
    rank = {group.name: place for place, group in enumerate(order)}
    out = [group for group in order if group.name in chosen and not group.is_pinned]
    for group in order:
        if not swaps or not out or rank[out[-1].name] < rank[group.name]:
            break
        if group.name in chosen or group.is_pinned or group.wish == "direct":
            continue
        if group.size_bytes > spare_bytes:
            if group.size_bytes > spare_bytes + out[-1].size_bytes:
                continue
            spare_bytes += out[-1].size_bytes
            del chosen[out.pop().name]
            swaps -= 1
        chosen[group.name] = group
        spare_bytes -= group.size_bytes
    return spare_bytes


class Plan(NamedTuple):
    """What the groups and the sums of Residency are to be."""

    groups: dict[str, Group]
    pagecache_bytes: int
    claimed_bytes: int
    stored_bytes: int


# ---- the accounts -------------------------------------------------------------------------------


class Residency:
    """Binds groups to paths so that the page-cached ones never exceed `budget_bytes`.

    With policy "pagecache" everything is page-cached, and with "direct" nothing is, whatever the
    budget. Where that has just become less than what is page-cached, groups have to be moved.
    """

    def __init__(self, policy: Policy, budget_bytes: int, binding: Binding = "spread") -> None:
        self.policy = policy
        self.budget_bytes = budget_bytes
        self.binding = binding
        self.groups: dict[str, Group] = {}
        self.pagecache_bytes = 0
        """Stored in page-cached groups."""
        self.claimed_bytes = 0
        """By page-cached groups: the same, and what is kept for those that are being filled."""
        self.stored_bytes = 0
        """In all groups."""
        self.grown_bytes = 0
        """By how much appends have ever grown the claims of page-cached groups."""
        self.shrunk = 0
        """How often claims have become less."""
        self.filling: dict[str, None] = {}
        """The groups that something is stored in and that more is kept for, and some that were."""

    def path_of(self, group: str) -> PathName:
        """The path that a bound group takes."""
        return self.groups[group].path

    def fits(self, size_bytes: int) -> bool:
        """Whether so many more bytes may be claimed."""
        if self.policy == "pagecache":
            return True
        return self.claimed_bytes + size_bytes <= self.budget_bytes

    def has_room(self, growth_bytes: int) -> bool:
        """Whether so many more bytes may be stored in the page cache."""
        if growth_bytes <= 0 or self.policy != "dual":
            return True
        return self.pagecache_bytes + growth_bytes <= self.budget_bytes

    def over(self, growth: Mapping[str, int], *, by_claim: bool) -> int:
        """What page-cached groups claim, or have stored, beyond the budget, once these have grown
        so much; below zero: what there is room for."""
        taken_bytes = self.claimed_bytes if by_claim else self.pagecache_bytes
        for name, growth_bytes in growth.items():
            if name in self.groups and self.groups[name].path == "pagecache":
                taken_bytes += growth_bytes
        return taken_bytes - self.budget_bytes

    def crowded(self, growth: Mapping[str, tuple[int, int]]) -> list[str]:
        """The page-cached groups that have to go direct before each of these grows so much:
        `(size_bytes, stored_bytes)`."""
        found = []
        taken_bytes = 0
        for name, (size_bytes, stored_bytes) in growth.items():
            group = self.groups.get(name)
            if group is None or group.path == "direct":
                continue
            claim_bytes = size_bytes if group.is_promised else stored_bytes
            if claim_bytes > 0 and not self.fits(claim_bytes + taken_bytes):
                found.append(name)
            else:
                taken_bytes += claim_bytes
        return found

    def add(self, tensors: Iterable[tuple[str, int, int]]) -> None:
        """Accounts tensors, `(group, size_bytes, stored_bytes)`, to their groups, and binds those
        that are new.

        New groups take the room left over by the known ones, which stay on their path as they grow:
        ask `crowded` first and move those.
        """
        self.commit(self.plan(tensors))

    def plan(self, tensors: Iterable[tuple[str, int, int]]) -> Plan:
        """What `add` would make of the groups and of the sums; changes nothing yet."""
        grown: dict[str, Group] = {}
        new: list[Group] = []
        pagecache_bytes, claimed_bytes = self.pagecache_bytes, self.claimed_bytes
        all_bytes = self.stored_bytes
        for name, size_bytes, stored_bytes in tensors:
            group = grown.get(name)
            if group is None:
                known = self.groups.get(name)
                if known is None:
                    group = Group("direct")
                    new.append(group)
                else:
                    group = known.copy()
                grown[name] = group
            if group.path == "pagecache":
                pagecache_bytes += stored_bytes
                claimed_bytes += size_bytes if group.is_promised else stored_bytes
            all_bytes += stored_bytes
            group.size_bytes += size_bytes
            group.stored_bytes += stored_bytes
            group.tensors += 1
        for group in new:
            fits = self.policy == "pagecache" or (
                claimed_bytes + group.size_bytes <= self.budget_bytes
            )
            if self.policy != "direct" and fits:
                group.path = "pagecache"
                pagecache_bytes += group.stored_bytes
                claimed_bytes += group.size_bytes
        return Plan(grown, pagecache_bytes, claimed_bytes, all_bytes)

    def commit(self, plan: Plan) -> None:
        """Does what was planned. An interrupt comes before or after all of it but the groups, whose
        update is one call into C."""
        _, self.pagecache_bytes, self.claimed_bytes, self.stored_bytes = plan
        self.groups.update(plan.groups)

    def settle(self, name: str) -> None:
        """From now on a group counts by what is stored in it."""
        group = self.groups[name]
        # No call: an interrupt comes before or after all of it.
        if group.is_promised:
            if group.path == "pagecache":
                self.claimed_bytes -= group.size_bytes - group.stored_bytes
            group.is_promised = False
            self.shrunk += 1

    def settle_slow(self, names: Iterable[str], share: float) -> None:
        """Settles those of the groups of which less than this share of what is missing was stored
        since it was last called. They are of `filling`, which it keeps in order."""
        for name in names:
            group = self.groups.get(name)
            if group is None or not group.is_promised or not group.stored_bytes:
                self.filling.pop(name, None)
                continue
            seen_bytes, group.seen_bytes = group.seen_bytes, group.stored_bytes
            missing_bytes = group.size_bytes - group.stored_bytes
            if seen_bytes >= 0 and group.stored_bytes - seen_bytes <= missing_bytes * share:
                self.settle(name)
                self.filling.pop(name, None)

    def bind_anew(self) -> None:
        """Binds all groups as if nothing of them were cached yet, those with data by that."""
        for name, group in self.groups.items():
            if group.stored_bytes:
                self.settle(name)
        if self.policy != "dual":
            return
        groups = [
            Candidate(name, group.claim_bytes, group.path, is_empty=True)
            for name, group in self.groups.items()
        ]
        moves = plan_moves(groups, self.budget_bytes, self.binding)
        for name in moves.to_direct:
            self.move(name, "direct")
        for name in moves.to_pagecache:
            self.move(name, "pagecache")

    def move(self, group: str, path: PathName) -> None:
        """Rebinds a group, after the store has seen to its pages."""
        bound = self.groups[group]
        claim_bytes = bound.claim_bytes
        # No call: an interrupt comes before or after all of it.
        if bound.path == path:
            return
        sign = 1 if path == "pagecache" else -1
        self.pagecache_bytes += sign * bound.stored_bytes
        self.claimed_bytes += sign * claim_bytes
        bound.path = path

"""Which path each group of tensors takes.

A group is what is read together, such as a layer's keys and values. It is bound to a path when its
first tensor is stored; the groups that fit into the memory budget are page-cached, in the order of
their arrival, and the rest is direct: of data that is scanned from end to end again and again, what
is cached must not be displaced by what is not, or nothing is ever found in memory (the first-fit
binding of arXiv 2604.26557, Algorithm 1).

Here is the bookkeeping alone: the store moves groups, and holds its lock around every call.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Literal

PathName = Literal["direct", "pagecache"]
Policy = Literal["dual", "direct", "pagecache"]
POLICIES: tuple[Policy, ...] = ("dual", "direct", "pagecache")


@dataclass(slots=True)
class Group:
    """What is bound together: its path, its bytes of device space, and how many tensors it has."""

    path: PathName
    size_bytes: int = 0
    tensors: int = 0


class Residency:
    """Binds groups to paths so that the page-cached ones never exceed `budget_bytes`.

    With policy "pagecache" everything is page-cached, and with "direct" nothing is, whatever the
    budget.
    """

    def __init__(self, policy: Policy, budget_bytes: int) -> None:
        self.policy = policy
        self.budget_bytes = budget_bytes
        self.pagecache_bytes = 0
        self.groups: dict[str, Group] = {}

    def path_of(self, group: str) -> PathName:
        """The path that a bound group takes."""
        return self.groups[group].path

    def fits(self, size_bytes: int) -> bool:
        """Whether so many more bytes may be page-cached."""
        if self.policy == "pagecache":
            return True
        return self.pagecache_bytes + size_bytes <= self.budget_bytes

    def crowded(self, growth_bytes: Mapping[str, int]) -> list[str]:
        """The page-cached groups that have to go direct before each of these grows so much."""
        found = []
        taken_bytes = 0
        for group, size_bytes in growth_bytes.items():
            if group not in self.groups or self.groups[group].path == "direct":
                continue
            if size_bytes > 0 and not self.fits(size_bytes + taken_bytes):
                found.append(group)
            else:
                taken_bytes += size_bytes
        return found

    def add(self, tensors: Iterable[tuple[str, int]]) -> None:
        """Accounts tensors, `(group, bytes)`, to their groups, and binds those that are new.

        New groups take the room left over by the known ones, which stay on their path as they grow:
        ask `crowded` first and move those.
        """
        self.commit(*self.plan(tensors))

    def plan(self, tensors: Iterable[tuple[str, int]]) -> tuple[dict[str, Group], int]:
        """What `add` would make of the groups and of `pagecache_bytes`; changes nothing yet."""
        grown: dict[str, Group] = {}
        new: list[Group] = []
        pagecache_bytes = self.pagecache_bytes
        for name, size_bytes in tensors:
            group = grown.get(name)
            if group is None:
                known = self.groups.get(name)
                if known is None:
                    group = Group("direct")
                    new.append(group)
                else:
                    group = Group(known.path, known.size_bytes, known.tensors)
                grown[name] = group
            if group.path == "pagecache":
                pagecache_bytes += size_bytes
            group.size_bytes += size_bytes
            group.tensors += 1
        for group in new:
            fits = self.policy == "pagecache" or (
                pagecache_bytes + group.size_bytes <= self.budget_bytes
            )
            if self.policy != "direct" and fits:
                group.path = "pagecache"
                pagecache_bytes += group.size_bytes
        return grown, pagecache_bytes

    def commit(self, groups: Mapping[str, Group], pagecache_bytes: int) -> None:
        """Does what was planned. An interrupt comes before or after all of it."""
        self.pagecache_bytes = pagecache_bytes
        self.groups.update(groups)

    def move(self, group: str, path: PathName) -> None:
        """Rebinds a group, after the store has seen to its pages."""
        bound = self.groups[group]
        if bound.path == path:
            return
        self.pagecache_bytes += bound.size_bytes if path == "pagecache" else -bound.size_bytes
        bound.path = path

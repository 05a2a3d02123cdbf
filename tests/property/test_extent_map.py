"""ExtentMap against the plainest model there is: the set of units that are taken."""

from __future__ import annotations

import pytest
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, invariant, rule

from dualblade._core import ExtentMap
from dualblade.errors import NoSpaceError

UNIT = 4096
UNITS = 96

lengths = st.one_of(
    st.integers(1, 8 * UNIT), st.integers(1, 8).map(lambda units: units * UNIT)
) | st.integers(1, (UNITS + 2) * UNIT)


def runs_of(units: set[int]) -> list[tuple[int, int]]:
    """The maximal runs of consecutive numbers, as (first, count)."""
    runs: list[tuple[int, int]] = []
    for unit in sorted(units):
        if runs and sum(runs[-1]) == unit:
            runs[-1] = (runs[-1][0], runs[-1][1] + 1)
        else:
            runs.append((unit, 1))
    return runs


class ExtentMapMachine(RuleBasedStateMachine):
    """Every operation, legal and not, on a small map."""

    taken_runs = Bundle("taken_runs")

    def __init__(self) -> None:
        super().__init__()
        self.map = ExtentMap(UNITS * UNIT, UNIT)
        self.taken: set[int] = set()

    def free_runs(self) -> list[tuple[int, int]]:
        return runs_of(set(range(UNITS)) - self.taken)

    @rule(target=taken_runs, length=lengths, align=st.sampled_from([0, 1, 2, 8, 32]))
    def allocate(self, length: int, align: int) -> tuple[int, int]:
        units = -(-length // UNIT)
        step = align or 1
        fitting = [
            count
            for first, count in self.free_runs()
            if -(-first // step) * step + units <= first + count
        ]
        if not fitting:
            with pytest.raises(NoSpaceError):
                self.map.allocate(length, align * UNIT)
            return (0, 0)
        offset = self.map.allocate(length, align * UNIT)
        assert offset % (step * UNIT) == 0
        first = offset // UNIT
        wanted = set(range(first, first + units))
        assert wanted <= set(range(UNITS))
        assert not wanted & self.taken
        best = next(count for start, count in self.free_runs() if start <= first < start + count)
        assert best == min(fitting)
        self.taken |= wanted
        return first, units

    @rule(target=taken_runs, first=st.integers(0, UNITS + 1), units=st.integers(1, 20))
    def reserve(self, first: int, units: int) -> tuple[int, int]:
        wanted = set(range(first, first + units))
        if max(wanted) >= UNITS or wanted & self.taken:
            with pytest.raises(ValueError, match="taken already|outside"):
                self.map.reserve(first * UNIT, units * UNIT)
            return (0, 0)
        self.map.reserve(first * UNIT, units * UNIT)
        self.taken |= wanted
        return first, units

    @rule(run=consumes(taken_runs), data=st.data())
    def free_a_part(self, run: tuple[int, int], data: st.DataObject) -> None:
        first, units = run
        if units == 0:
            return
        skip = data.draw(st.integers(0, units - 1))
        count = data.draw(st.integers(1, units - skip))
        self.free(first + skip, count)

    @rule(first=st.integers(0, UNITS + 1), units=st.integers(1, 20))
    def free(self, first: int, units: int) -> None:
        given = set(range(first, first + units))
        if given <= self.taken:
            self.map.free(first * UNIT, units * UNIT)
            self.taken -= given
        else:
            with pytest.raises(ValueError, match="free already|outside"):
                self.map.free(first * UNIT, units * UNIT)

    @invariant()
    def agrees_with_the_model(self) -> None:
        self.map.verify()
        free = self.free_runs()
        assert list(self.map.free_runs()) == [(a * UNIT, n * UNIT) for a, n in free]
        assert self.map.free_extents == len(free)
        assert self.map.free_bytes == (UNITS - len(self.taken)) * UNIT
        largest = max((count for _, count in free), default=0)
        assert self.map.largest_free_bytes == largest * UNIT


TestExtentMap = ExtentMapMachine.TestCase

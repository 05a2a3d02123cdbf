"""What the drive may not have, against a model that knows what became of every single write."""

from __future__ import annotations

from typing import Any

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from dualblade.doubts import Doubts
from dualblade.entry import Entry, layout_of

ENTRIES = 2
STARTED, DIRTY, REFUSED = "started", "dirty", "refused"

which = st.integers(0, ENTRIES - 1)
some = st.sets(which)


class Drive:
    """What becomes of each write: those that the drive has are forgotten."""

    def __init__(self) -> None:
        self.failures = 0
        self.writes: list[dict[int, str]] = [{} for _ in range(ENTRIES)]
        self.count = 0

    def write_back_failures(self) -> int:
        return self.failures

    def start(self, at: int) -> None:
        self.count += 1
        self.writes[at][self.count] = STARTED

    def turn_into(self, at: int, before: str, after: str) -> None:
        writes = self.writes[at]
        writes.update({write: after for write, state in writes.items() if state == before})

    def has(self, at: int, state: str) -> bool:
        return state in self.writes[at].values()

    def write_back(self, at: int, *, well: bool) -> None:
        """Of what it has refused before nothing is written again: the kernel takes it for clean."""
        if not self.has(at, DIRTY):
            return
        if not well:
            self.turn_into(at, DIRTY, REFUSED)
            self.failures += 1
            return
        writes = self.writes[at]
        self.writes[at] = {write: state for write, state in writes.items() if state != DIRTY}


class DoubtsAgainstDrive(RuleBasedStateMachine):
    """Writes are started, land in the page cache, and are written back or refused, in any order
    with looks, flushes and mends."""

    def __init__(self) -> None:
        super().__init__()
        self.drive = Drive()
        device: Any = self.drive
        self.doubts = Doubts(device)
        layout = layout_of((4096,), "uint8", 4096)
        self.entries = [Entry(str(at), layout, "", 1) for at in range(ENTRIES)]
        self.flushing: tuple[list[int], int, int, int] | None = None
        self.nothing_in_doubt: int | None = None

    @rule(written=some)
    def start(self, written: set[int]) -> None:
        self.doubts.mark(self.entries[at] for at in written)
        for at in written:
            self.drive.start(at)

    @rule(at=which)
    def land(self, at: int) -> None:
        self.drive.turn_into(at, STARTED, DIRTY)

    @rule(at=which, well=st.booleans())
    def write_back(self, at: int, well: bool) -> None:
        self.drive.write_back(at, well=well)

    @rule()
    def look(self) -> None:
        assert self.doubts.look() == self.drive.failures
        for at, entry in enumerate(self.entries):
            if self.drive.has(at, REFUSED):
                assert self.doubts.has(entry)
                assert self.doubts.is_open

    @rule()
    def begin_close(self) -> None:
        failures = self.doubts.look()
        is_sure = not any(map(self.doubts.has, self.entries))
        self.nothing_in_doubt = failures if is_sure else None

    @precondition(lambda self: self.nothing_in_doubt is not None)
    @rule()
    def end_close(self) -> None:
        assert self.nothing_in_doubt is not None
        self.doubts.close(self.nothing_in_doubt)

    @rule(at=which, well=st.booleans())
    def mend(self, at: int, well: bool) -> None:
        entry, drive = self.entries[at], self.drive
        if drive.has(at, STARTED):
            return  # whoever mends holds the entry
        failures = self.doubts.look()
        if self.doubts.has(entry):
            self.doubts.mark([entry])
            drive.turn_into(at, REFUSED, DIRTY)
        drive.write_back(at, well=well)
        if self.doubts.settle([entry], entry.unsure_until, failures):
            assert not drive.writes[at]
            assert entry.unsure_since == entry.unsure_until == 0

    @precondition(lambda self: self.flushing is None)
    @rule()
    def begin_flush(self) -> None:
        failures = self.doubts.look()
        idle = [at for at in range(ENTRIES) if not self.drive.has(at, STARTED)]
        if not any(map(self.doubts.has, self.entries)):
            self.flushing = idle, self.doubts.next_turn(), failures, self.drive.count

    @precondition(lambda self: self.flushing is not None)
    @rule(refused=some)
    def end_flush(self, refused: set[int]) -> None:
        assert self.flushing is not None
        flushed, turn, failures, last = self.flushing
        self.flushing = None
        for at in range(ENTRIES):
            self.drive.write_back(at, well=at not in refused)
        has_failed = self.drive.failures != failures
        is_settled = self.doubts.settle([self.entries[at] for at in flushed], turn, failures)
        assert is_settled is not has_failed
        if is_settled:
            for at in flushed:
                assert all(write > last for write in self.drive.writes[at])

    @invariant()
    def who_is_sure_has_nothing_outstanding(self) -> None:
        for at, entry in enumerate(self.entries):
            if not entry.unsure_since:
                assert not self.drive.writes[at]
                assert not self.doubts.has(entry)


DoubtsAgainstDrive.TestCase.settings = settings(stateful_step_count=100)
TestDoubts = DoubtsAgainstDrive.TestCase


def in_doubt() -> tuple[Drive, Doubts, Entry]:
    """A tensor that was written, and landed, in the first turn."""
    drive = Drive()
    device: Any = drive
    doubts = Doubts(device)
    entry = Entry("x", layout_of((4096,), "uint8", 4096), "", 1)
    doubts.mark([entry])
    return drive, doubts, entry


def test_what_is_written_during_a_flush_may_be_refused_after_it() -> None:
    drive, doubts, entry = in_doubt()
    failures, turn = doubts.look(), doubts.next_turn()
    doubts.mark([entry])
    assert doubts.settle([entry], turn, failures)
    drive.failures += 1
    doubts.look()
    assert doubts.has(entry)


def test_doubts_that_came_meanwhile_are_not_closed() -> None:
    drive, doubts, entry = in_doubt()
    before = doubts.look()
    drive.failures += 1
    doubts.look()
    doubts.close(before)
    assert doubts.is_open
    assert doubts.has(entry)

"""Which chunk size, depth and overlap mode a pipeline uses: measured while it runs.

Pure: no clock, no thread, no I/O. Whoever moves chunks says how many bytes moved in how much time,
and asks before each chunk what it is to be like.
"""

from __future__ import annotations

import random
import statistics
from collections import deque
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

Mode = Literal["intra", "cross"]
MODES: tuple[Mode, ...] = ("cross", "intra")

CHUNK_MIN_BYTES = 1 << 20
CHUNKS_BYTES = (1 << 20, 2 << 20, 4 << 20, 8 << 20)
DEPTHS = (2, 4, 8, 16)
IN_FLIGHT_MIN_BYTES = 4 << 20
"""Less does not keep a fast drive busy: not worth trying where there is room for more."""

STEP_LEAST_BYTES = 32 << 20
STEP_FLIGHTS = 4
"""A candidate is measured over so many times what it has in flight: bytes come in bursts."""
ROUNDS = 13
"""Each candidate has one step in a round. They are compared within each round, and by the median
of their rounds: of a drive that changes meanwhile each has seen the same."""
KEPT = {2: 0.8, 3: 0.9, 5: 0.93, 9: 0.95}
"""After so many rounds, who has less than this of the best is not tried any more. Those that stay
to the end are about as fast as the best one, so that trying them costs nothing."""
HYSTERESIS = 1.03
"""So much faster another one has to be to take the place of the one in use."""
CHANGED = 0.15
"""Rates that differ by more from what they were are a reason to try again."""
RECENT_STEPS = 32
"""A drive that others use as well is slower for moments: the median of about a second counts."""
RETRY_S = 600.0
"""Of moving bytes, after which everything is tried again anyway."""
PATIENCE = 8
PATIENCE_MAX = 128
"""So many times the steps of a trial go by before changed rates are a reason for another: what is
tried is slower than what is used. Doubled whenever trying again has changed nothing."""


class Choice(NamedTuple):
    """How bytes are moved.

    mode "intra": the tensors of a group take turns, so that their I/O goes on side by side;
    "cross": one after the other, so that the I/O of one goes on under the copying of the other.
    """

    chunk_bytes: int
    depth: int
    """Chunks between the storage and the device at once."""
    mode: Mode

    @property
    def flight_bytes(self) -> int:
        """Between the storage and the device at once."""
        return self.chunk_bytes * self.depth

    def __str__(self) -> str:
        return f"{self.depth} x {self.chunk_bytes >> 10} KiB, {self.mode}"


def candidates(
    room_bytes: int,
    *,
    chunk_bytes: int | None = None,
    depth: int | None = None,
    mode: Mode | None = None,
) -> list[Choice]:
    """All worth trying within so much staging; what is given is taken as it is.

    Raises ValueError if there is no room for what is given.
    """
    chunks = CHUNKS_BYTES if chunk_bytes is None else (chunk_bytes,)
    depths = DEPTHS if depth is None else (depth,)
    modes = MODES if mode is None else (mode,)
    every = [Choice(chunk, count, way) for chunk in chunks for count in depths for way in modes]
    fitting = [choice for choice in every if choice.flight_bytes <= room_bytes]
    if not fitting and depth is None and chunks[0] <= room_bytes:
        fitting = [Choice(chunks[0], 1, way) for way in modes]
    if not fitting:
        raise ValueError(
            f"{depth or 1} chunks of {chunks[0]} bytes do not fit into the {room_bytes} bytes of "
            "staging that there are for them: give more staging, or smaller chunks, or fewer"
        )
    least = min(IN_FLIGHT_MIN_BYTES, max(choice.flight_bytes for choice in fitting))
    return [choice for choice in fitting if choice.flight_bytes >= least]


class Tuner:
    """Tries candidates in turn, a step of some megabytes each, and stays with the fastest."""

    def __init__(self, tried: Sequence[Choice]) -> None:
        self._candidates = list(tried)
        self.choice = max(self._candidates, key=_middling)
        """What the next chunk is to be like."""
        self._settled: Choice | None = None
        self._before: Choice | None = None
        """What was used before everything is tried again."""
        self._remaining: list[Choice] = []
        self._rates: dict[Choice, list[float]] = {}
        self._shares: dict[Choice, list[float]] = {}
        """Of each candidate's rates, what they were of the median of their rounds."""
        self._order = random.Random(0)
        self._round = 0
        self._at = 0
        self._run_in_bytes = 0
        self._step_bytes = 0
        self._step_s = 0.0
        self._recent: deque[float] = deque(maxlen=RECENT_STEPS)
        self._reference = 0.0
        self._settled_steps = 0
        self._settled_s = 0.0
        self._patience = PATIENCE
        self._trial_steps = 0
        self.trials = 0
        """How often everything was tried."""
        self._why = "the only one there is to choose"
        if len(self._candidates) > 1:
            self._try("nothing is known yet")
        else:
            self._settled = self.choice

    @property
    def is_settled(self) -> bool:
        """Whether nothing is being tried now."""
        return self._settled is not None

    def moved(self, nbytes: int, seconds: float) -> None:
        """So many bytes arrived, in so much time since the bytes before them, the time left out in
        which there was nothing to move."""
        if len(self._candidates) == 1:
            return
        if self._run_in_bytes > 0:  # these were begun with the choice before
            self._run_in_bytes -= nbytes
            return
        self._step_bytes += nbytes
        self._step_s += seconds
        if self._step_bytes < max(STEP_LEAST_BYTES, STEP_FLIGHTS * self.choice.flight_bytes):
            return
        rate = self._step_bytes / self._step_s if self._step_s > 0 else 0.0
        taken_s, self._step_bytes, self._step_s = self._step_s, 0, 0.0
        if rate == 0.0:
            return
        if self._settled is None:
            self._tried(rate)
        else:
            self._watch(rate, taken_s)

    # ---- trying ------------------------------------------------------------------------------

    def _try(self, why: str) -> None:
        self.trials += 1
        self._why = why
        self._before, self._settled = self._settled, None
        self._remaining = list(self._candidates)
        self._rates = {choice: [] for choice in self._candidates}
        self._shares = {choice: [] for choice in self._candidates}
        self._round = self._at = self._trial_steps = 0
        self._use(self._remaining[0])

    def _use(self, choice: Choice) -> None:
        if choice != self.choice:
            self._run_in_bytes = max(choice.flight_bytes, self.choice.flight_bytes)
        self.choice = choice

    def _tried(self, rate: float) -> None:
        self._trial_steps += 1
        self._rates[self.choice].append(rate)
        self._at += 1
        if self._at == len(self._remaining):
            self._end_round()
            if self._round == ROUNDS or len(self._remaining) == 1:
                self._settle()
                return
            # Whose turn it is while the drive is slow, or after whom, is left to chance.
            self._order.shuffle(self._remaining)
        self._use(self._remaining[self._at])

    def _end_round(self) -> None:
        self._round += 1
        self._at = 0
        middle = statistics.median(self._rates[choice][-1] for choice in self._remaining)
        for choice in self._remaining:
            self._shares[choice].append(self._rates[choice][-1] / middle)
        share = KEPT.get(self._round)
        if share is None:
            return
        least = share * max(map(self._share, self._remaining))
        self._remaining = [
            choice
            for choice in self._remaining
            if self._share(choice) >= least or choice == self._before
        ]

    def _share(self, choice: Choice) -> float:
        return statistics.median(self._shares[choice])

    def _settle(self) -> None:
        best = max(self._remaining, key=self._share)
        before, found = self._before, f"{statistics.median(self._rates[best]) / 1e6:.0f} MB/s"
        if before is not None and self._share(best) <= HYSTERESIS * self._share(before):
            best = before
            self._why = f"kept: of {len(self._candidates)} tried none is over 3 % faster ({found})"
        else:
            self._why = f"the fastest of {len(self._candidates)} that were tried, with {found}"
        is_other = before is not None and best != before
        if before is not None:
            self._patience = min(self._patience * 2, PATIENCE_MAX)
        if is_other:
            self._patience = PATIENCE
        self._settled = best
        self._recent.clear()
        self._reference = 0.0
        self._settled_steps, self._settled_s = 0, 0.0
        self._use(best)

    # ---- watching ----------------------------------------------------------------------------

    def _watch(self, rate: float, seconds: float) -> None:
        self._recent.append(rate)
        self._settled_steps += 1
        self._settled_s += seconds
        if len(self._recent) < RECENT_STEPS:
            return
        recent = statistics.median(self._recent)
        if not self._reference:
            self._reference = recent
        if self._settled_s >= RETRY_S:
            self._try(f"tried again after {RETRY_S:.0f} s")
            return
        is_patient = self._settled_steps < self._patience * self._trial_steps
        if not is_patient and abs(recent / self._reference - 1) > CHANGED:
            self._try(
                f"tried again: {self._reference / 1e6:.0f} MB/s have become {recent / 1e6:.0f}"
            )

    def stats(self) -> dict[str, Any]:
        """What is used, and why; what was measured of each candidate in the last trial."""
        settled = self._settled is not None
        return {
            "chunk_bytes": self.choice.chunk_bytes,
            "depth": self.choice.depth,
            "mode": self.choice.mode,
            "settled": settled,
            "why": self._why if settled else f"being tried: {self._why}",
            "trials": self.trials,
            "tried": [
                {**choice._asdict(), "bytes_per_s": statistics.median(rates), "steps": len(rates)}
                for choice, rates in self._rates.items()
                if rates
            ],
        }


def _middling(choice: Choice) -> tuple[int, int]:
    """What to begin with: much in flight, in chunks that are not the largest."""
    return (choice.flight_bytes, -choice.chunk_bytes)

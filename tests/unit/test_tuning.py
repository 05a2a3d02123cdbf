"""The choice of chunk size, depth and mode, on simulated devices with a simulated clock."""

from __future__ import annotations

import random
from collections.abc import Callable

import pytest

from dualblade import tuning
from dualblade.tuning import Choice, Tuner, candidates

MIB = 1 << 20
Rate = Callable[[Choice, float], float]


class Simulation:
    """Moves chunks as a tuner says, at a rate that depends on the choice and the time."""

    def __init__(self, tuner: Tuner, rate: Rate, *, noise: float = 0.0, seed: int = 0) -> None:
        self.tuner = tuner
        self.rate = rate
        self.noise = noise
        self.random = random.Random(seed)
        self.now = 0.0
        self.moved_bytes = 0

    def run(self, nbytes: int) -> None:
        stop = self.moved_bytes + nbytes
        while self.moved_bytes < stop:
            self.chunk()

    def chunk(self) -> None:
        choice = self.tuner.choice
        factor = self.random.lognormvariate(0, self.noise) if self.noise else 1.0
        seconds = choice.chunk_bytes / (self.rate(choice, self.now) * factor)
        self.now += seconds
        self.moved_bytes += choice.chunk_bytes
        self.tuner.moved(choice.chunk_bytes, seconds)

    def until_settled(self, limit_bytes: int = 64 << 30) -> None:
        start = self.moved_bytes
        while not self.tuner.is_settled:
            self.chunk()
            assert self.moved_bytes - start < limit_bytes


def drive(best: Choice, falloff: float = 0.9, rate: float = 2e9) -> Rate:
    """A drive that likes one choice, and others the less the farther they are from it."""

    def of(choice: Choice, now: float) -> float:
        steps = abs(choice.chunk_bytes.bit_length() - best.chunk_bytes.bit_length())
        steps += abs(choice.depth.bit_length() - best.depth.bit_length())
        steps += choice.mode != best.mode
        return rate * falloff**steps

    return of


def test_candidates_fit_into_the_staging_and_keep_a_drive_busy():
    for room in (4 * MIB, 16 * MIB, 32 * MIB, 1 << 30):
        found = candidates(room)
        assert len(set(found)) == len(found) > 1
        assert {choice.mode for choice in found} == {"intra", "cross"}
        for choice in found:
            assert tuning.IN_FLIGHT_MIN_BYTES <= choice.flight_bytes <= room


def test_with_little_staging_there_is_one_chunk_at_a_time():
    assert candidates(MIB, mode="cross") == [Choice(MIB, 1, "cross")]
    assert candidates(9 * MIB, chunk_bytes=8 * MIB, mode="intra") == [Choice(8 * MIB, 1, "intra")]


def test_what_is_given_is_taken():
    assert candidates(64 * MIB, chunk_bytes=3 * MIB, depth=5, mode="intra") == [
        Choice(3 * MIB, 5, "intra")
    ]
    assert {choice.depth for choice in candidates(8 * MIB, depth=3)} == {3}
    assert {choice.mode for choice in candidates(8 * MIB, mode="cross")} == {"cross"}


@pytest.mark.parametrize("given", [{"chunk_bytes": 16 * MIB}, {"depth": 9}, {"depth": 64}])
def test_what_does_not_fit_is_refused(given: dict[str, int]):
    with pytest.raises(ValueError, match="do not fit into the 8388608 bytes of staging"):
        candidates(8 * MIB, **given)


@pytest.mark.parametrize("best", candidates(32 * MIB), ids=str)
def test_the_fastest_is_found(best: Choice):
    tuner = Tuner(candidates(32 * MIB))
    Simulation(tuner, drive(best)).until_settled()
    assert tuner.choice == best


@pytest.mark.parametrize("seed", range(20))
def test_it_ends_within_three_percent_of_the_best_in_spite_of_noise(seed: int):
    found = candidates(32 * MIB)
    best = random.Random(seed).choice(found)
    rate = drive(best, falloff=0.94)
    tuner = Tuner(found)
    # Of the single chunk: a step of 32 MiB is 4 to 32 of these.
    Simulation(tuner, rate, noise=0.1, seed=seed).until_settled()
    assert rate(tuner.choice, 0) >= 0.97 * rate(best, 0)


def test_a_drive_that_becomes_slower_meanwhile_fools_nobody():
    best = Choice(2 * MIB, 8, "intra")
    likes = drive(best, falloff=0.93)
    tuner = Tuner(candidates(32 * MIB))
    begin_s = 2.0
    Simulation(tuner, lambda choice, now: likes(choice, now) / (1 + now / begin_s)).until_settled()
    assert likes(tuner.choice, 0) >= 0.97 * likes(best, 0)


def test_slow_candidates_are_given_up_soon():
    """What trying costs: what is much too slow is not tried to the end."""
    best = Choice(8 * MIB, 4, "cross")
    tuner = Tuner(candidates(32 * MIB))
    Simulation(tuner, drive(best, falloff=0.6)).until_settled()
    steps = {Choice(t["chunk_bytes"], t["depth"], t["mode"]): t["steps"]
             for t in tuner.stats()["tried"]}  # fmt: skip
    assert steps[Choice(MIB, 4, "intra")] == 2
    assert max(steps.values()) == steps[best]


def test_chunks_of_the_choice_before_are_not_counted():
    """They were begun as it said: here each choice's chunks come at the rate of the one before."""
    best = Choice(4 * MIB, 4, "cross")
    tuner = Tuner([best, Choice(4 * MIB, 2, "cross"), Choice(4 * MIB, 8, "cross")])
    likes = drive(best, falloff=0.7)
    flight: list[Choice] = []
    for _ in range(10_000):
        flight.append(tuner.choice)
        if len(flight) > tuner.choice.depth:
            begun = flight.pop(0)
            tuner.moved(begun.chunk_bytes, begun.chunk_bytes / likes(begun, 0))
        if tuner.is_settled:
            break
    assert tuner.choice == best
    measured = {t["depth"]: t["bytes_per_s"] for t in tuner.stats()["tried"]}
    assert measured == pytest.approx({4: 2e9, 2: 1.4e9, 8: 1.4e9})


def test_changed_rates_are_tried_again_and_another_choice_taken():
    first, second = Choice(MIB, 16, "cross"), Choice(8 * MIB, 4, "intra")
    tuner = Tuner(candidates(32 * MIB))
    simulation = Simulation(tuner, drive(first, rate=3e9))
    simulation.until_settled()
    simulation.run(4 << 30)
    assert tuner.choice == first
    assert tuner.trials == 1
    simulation.rate = drive(second, rate=1e9)
    simulation.run(96 << 30)
    simulation.until_settled()
    assert tuner.choice == second
    assert tuner.trials == 2
    assert "the fastest of 24" in tuner.stats()["why"]


def test_a_drive_that_is_slower_for_moments_is_not_a_reason_to_try_again():
    best = Choice(2 * MIB, 8, "cross")
    tuner = Tuner(candidates(32 * MIB))
    likes = drive(best, rate=2e9)
    simulation = Simulation(
        tuner, lambda choice, now: likes(choice, now) * (0.5 + (now % 2 > 0.4) / 2)
    )
    simulation.until_settled()
    simulation.run(256 << 30)
    assert tuner.trials == 1


def test_trying_again_takes_a_small_part_of_the_time():
    best = Choice(2 * MIB, 8, "cross")
    tuner = Tuner(candidates(32 * MIB))
    likes = drive(best, rate=2e9)
    simulation = Simulation(tuner, lambda choice, now: likes(choice, now) * (1 + (now // 3) % 2))
    settled = []
    for _ in range(2000):
        simulation.run(128 << 20)
        settled.append(tuner.is_settled)
    assert tuner.trials > 1
    assert settled.count(False) < len(settled) / 6


def test_small_changes_are_not_tried_again():
    best = Choice(2 * MIB, 4, "cross")
    tuner = Tuner(candidates(32 * MIB))
    simulation = Simulation(tuner, drive(best), noise=0.05)
    simulation.until_settled()
    simulation.run(8 << 30)
    simulation.rate = drive(best, rate=1.8e9)  # a tenth less
    simulation.run(32 << 30)
    assert tuner.trials == 1


def test_one_that_is_hardly_faster_does_not_take_the_place():
    kept, other = Choice(2 * MIB, 4, "cross"), Choice(4 * MIB, 4, "cross")
    tuner = Tuner([kept, other])
    simulation = Simulation(tuner, lambda choice, _: 2e9 if choice == kept else 1.9e9)
    simulation.until_settled()
    simulation.run(2 << 30)
    simulation.rate = lambda choice, _: 1e9 if choice == kept else 1.02e9
    while tuner.trials == 1:
        simulation.chunk()
    simulation.until_settled()
    assert tuner.choice == kept
    assert tuner.stats()["why"].startswith("kept")


def test_rates_that_keep_changing_are_tried_less_and_less_often():
    best = Choice(2 * MIB, 4, "cross")
    tuner = Tuner(candidates(32 * MIB))
    period_s = 10.0
    likes = drive(best)
    simulation = Simulation(
        tuner, lambda choice, now: likes(choice, now) * (1 + (now // period_s) % 2)
    )
    trials = []
    for _ in range(4):
        before = tuner.trials
        simulation.run(256 << 30)
        trials.append(tuner.trials - before)
    assert trials[0] > trials[-1]
    assert tuner.choice == best


def test_everything_is_tried_again_after_a_long_while():
    tuner = Tuner(candidates(32 * MIB))
    simulation = Simulation(tuner, drive(Choice(MIB, 4, "cross")))
    simulation.until_settled()
    simulation.run(int(tuning.RETRY_S * 2e9) - (1 << 30))
    assert tuner.trials == 1
    simulation.run(2 << 30)
    assert tuner.trials == 2


def test_a_single_candidate_is_used_and_nothing_is_measured():
    tuner = Tuner(candidates(8 * MIB, chunk_bytes=2 * MIB, depth=2, mode="intra"))
    Simulation(tuner, lambda *_: 1e9).run(1 << 30)
    stats = tuner.stats()
    assert stats["settled"]
    assert (stats["chunk_bytes"], stats["depth"], stats["mode"]) == (2 * MIB, 2, "intra")
    assert stats["tried"] == []
    assert stats["trials"] == 0


def test_stats_say_what_was_tried():
    best = Choice(2 * MIB, 4, "cross")
    tuner = Tuner(candidates(8 * MIB))
    simulation = Simulation(tuner, drive(best))
    simulation.run(64 * MIB)
    assert tuner.stats()["why"].startswith("being tried")
    simulation.until_settled()
    stats = tuner.stats()
    assert len(stats["tried"]) == len(candidates(8 * MIB))
    assert max(each["bytes_per_s"] for each in stats["tried"]) == pytest.approx(2e9)
    assert stats["why"] == "the fastest of 10 that were tried, with 2000 MB/s"

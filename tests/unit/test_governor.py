"""The budget follows the memory: down at once, up after a while, and not at every tremor."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable

from hypothesis import given
from hypothesis import strategies as st

from dualblade.governor import (
    CALM_S,
    GROW_DELAY_MAX_S,
    GROW_DELAY_S,
    MARGIN_MIN_BYTES,
    Governor,
)
from dualblade.memory import MemorySample
from tests.helpers import MIB

GIB = 1 << 30
STEP_S = 0.1
LIMIT = GIB


def sample(free_bytes: float, refault_bytes: int = 0, limit_bytes: int = LIMIT) -> MemorySample:
    return MemorySample(int(free_bytes), limit_bytes, refault_bytes, 0, 0, {})


class World:
    """A store of groups that are all wanted in memory, under a governor and a clock of its own."""

    def __init__(self, kv_bytes: int = GIB, group_bytes: int = 32 * MIB, cap: int | None = None):
        self.governor = Governor(cap)
        self.kv_bytes = kv_bytes
        self.group_bytes = group_bytes
        self.now_s = 1000.0
        self.pagecache_bytes = 0
        self.left = self.returned = 0
        self.budgets: list[int] = []

    def run(self, frees: Iterable[float], refault_bytes: int = 0, evicted_bytes: int = 0) -> None:
        for free_bytes in frees:
            budget = self.governor.update(
                self.now_s, sample(free_bytes, refault_bytes), self.pagecache_bytes, evicted_bytes
            )
            self.budgets.append(budget)
            wanted = min(self.kv_bytes, budget // self.group_bytes * self.group_bytes)
            if self.pagecache_bytes > budget:
                self.left += self.pagecache_bytes - wanted
                self.pagecache_bytes = wanted
            elif wanted > self.pagecache_bytes:
                self.returned += wanted - self.pagecache_bytes
                self.pagecache_bytes = wanted
                self.governor.came_back(self.now_s)
            assert self.pagecache_bytes <= budget
            self.now_s += STEP_S


def steady(free_bytes: float, seconds: float) -> list[float]:
    return [free_bytes] * round(seconds / STEP_S)


def test_less_memory_is_believed_at_once_and_more_after_a_while() -> None:
    world = World()
    world.run(steady(800 * MIB, 1))
    assert world.budgets[0] == world.budgets[-1] == 800 * MIB - MARGIN_MIN_BYTES
    world.run([300 * MIB])
    assert world.budgets[-1] == 300 * MIB - MARGIN_MIN_BYTES
    assert "300 MiB free" in world.governor.reason
    begin = len(world.budgets)
    world.run(steady(800 * MIB, 2))
    grown = next(i for i, budget in enumerate(world.budgets[begin:]) if budget > 700 * MIB)
    assert math.isclose(grown * STEP_S, GROW_DELAY_S, abs_tol=1.5 * STEP_S)


def test_growth_is_to_the_least_of_the_while() -> None:
    world = World()
    world.run([300 * MIB])
    world.run([900 * MIB, 500 * MIB, 900 * MIB, 900 * MIB])
    assert world.budgets[-1] == 500 * MIB - MARGIN_MIN_BYTES


def test_the_cap_holds_and_the_margin_is_never_given_away() -> None:
    world = World(cap=200 * MIB)
    world.run(steady(10 * GIB, 3))
    assert set(world.budgets) == {200 * MIB}
    world.run([210 * MIB])
    assert world.budgets[-1] == 210 * MIB - MARGIN_MIN_BYTES
    world.run([0.0])
    assert world.budgets[-1] == 0
    large = Governor()
    assert large.update(0.0, sample(64 * GIB, limit_bytes=128 * GIB), 0) == 63 * GIB


def tremor(period_s: float, seconds: float, low: float, high: float) -> list[float]:
    half = max(1, round(period_s / 2 / STEP_S))
    count = round(seconds / STEP_S)
    return [high if (i // half) % 2 else low for i in range(count)]


@given(period_s=st.sampled_from([0.2, 0.4, 1.0, 1.2, 2.0, 4.0, 10.0]))
def test_a_budget_that_trembles_causes_next_to_no_swapping(period_s: float) -> None:
    """The groups that come and go are read again each time: in ten minutes no more than would fit
    into the memory a few times."""
    world = World()
    world.run(tremor(period_s, 600, 500 * MIB, 700 * MIB))
    swing = 200 * MIB + world.group_bytes
    assert world.returned <= GIB + 7 * swing
    assert world.left <= 7 * swing
    if period_s <= 2 * GROW_DELAY_S:
        assert world.left <= swing


def test_an_up_and_down_is_forgotten_after_calm() -> None:
    world = World()
    world.run(tremor(4.0, 60, 500 * MIB, 700 * MIB))
    assert world.governor.grow_delay_s > GROW_DELAY_S
    world.run(steady(500 * MIB, CALM_S + 1))
    assert world.governor.grow_delay_s == GROW_DELAY_S
    world.run(steady(900 * MIB, 1))
    assert world.pagecache_bytes > 800 * MIB


def test_a_limit_that_falls_in_steps_delays_nothing_later() -> None:
    world = World()
    world.run(steady(GIB, 5))
    for step in range(10):
        world.run(steady(GIB - step * 60 * MIB, 0.5))
    world.run(steady(GIB, 1))
    assert world.pagecache_bytes > 900 * MIB


def test_what_the_kernel_takes_raises_the_margin_and_calm_lowers_it() -> None:
    world = World()
    world.run(steady(800 * MIB, 5))
    world.run(steady(800 * MIB, 0.1), evicted_bytes=20 * MIB)
    raised = world.governor.margin_bytes
    assert raised == MARGIN_MIN_BYTES + 20 * MIB
    assert world.budgets[-1] == 800 * MIB - raised
    world.run(steady(800 * MIB, 20), refault_bytes=100 * MIB)
    assert world.governor.margin_bytes == LIMIT // 4  # and no further
    world.run(steady(800 * MIB, 300))
    assert world.governor.margin_bytes == MARGIN_MIN_BYTES


def test_what_the_kernel_takes_when_the_limit_falls_is_no_reason_for_a_larger_margin() -> None:
    world = World()
    world.run(steady(800 * MIB, 5))
    world.run([400 * MIB], evicted_bytes=400 * MIB)
    world.run(steady(400 * MIB, 0.8), evicted_bytes=10 * MIB)
    assert world.governor.margin_bytes == MARGIN_MIN_BYTES


@given(
    trace=st.lists(
        st.tuples(st.integers(0, 2000), st.integers(0, 40), st.integers(1, 30)), max_size=40
    )
)
def test_whatever_happens_the_groups_fit(trace: list[tuple[int, int, int]]) -> None:
    """World asserts that after each sample no more is page-cached than the budget, and the budget
    leaves the margin."""
    world = World()
    for free, reclaimed, count in trace:
        for _ in range(count):
            world.run([free * MIB], refault_bytes=reclaimed * MIB)
            assert world.budgets[-1] <= max(0, free * MIB - MARGIN_MIN_BYTES)
            assert GROW_DELAY_S <= world.governor.grow_delay_s <= GROW_DELAY_MAX_S
    # And after long calm all that fits is there.
    world.run(steady(900 * MIB, 400))
    assert world.pagecache_bytes == (900 * MIB - MARGIN_MIN_BYTES) // (32 * MIB) * (32 * MIB)


def test_a_pause_of_the_process_is_no_while_of_free_memory() -> None:
    world = World()
    world.run(steady(300 * MIB, 2))
    world.now_s += 60
    world.run([900 * MIB])
    assert world.pagecache_bytes < 300 * MIB


def traces() -> dict[str, Callable[[float], float]]:
    """Free memory in MiB over seconds, as it was seen on machines at work."""
    return {
        "a model is loaded": lambda t: 1500 - min(1000.0, 250 * t),
        "a batch comes and goes": lambda t: 900 - 300 * (int(t) % 20 < 5),
        "a sawtooth of a garbage collector": lambda t: 900 - (t % 3) * 30,
    }


def test_recorded_traces_move_no_more_than_they_must() -> None:
    moved = {}
    for name, free in traces().items():
        world = World()
        world.run(free(i * STEP_S) * MIB for i in range(1200))
        moved[name] = world.left // world.group_bytes
    assert moved["a model is loaded"] <= 20
    assert moved["a batch comes and goes"] <= 6 * 10
    assert moved["a sawtooth of a garbage collector"] <= 12

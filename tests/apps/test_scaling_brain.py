"""How many devices are wanted: by examples, and against any course of a load."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from clockwork_serve.apps.scaling.brain import (
    CALM_NS,
    CHANGES,
    CHANGES_NS,
    Advice,
    ScalingBrain,
    ScalingRules,
)
from clockwork_serve.apps.scaling.future import Judged
from clockwork_serve.units import NS_PER_S

EVERY_NS = 10 * NS_PER_S
REQUESTS = 10_000


def giving(needed: int, missed: float = 0.3, tried: list[int] | None = None) -> Callable[[int], Judged]:
    """A load that so many devices can do; with one fewer that share misses, with fewer more."""

    def judge(devices: int) -> Judged:
        if tried is not None:
            tried.append(devices)
        lost = min(0.9, missed * (needed - devices)) if devices < needed else 0.0
        busy = 0.75 * needed / devices
        model, cause = ("net", "too little time on devices") if lost else ("", "")
        missing = round(lost * REQUESTS)
        return Judged(
            devices=devices, requests=REQUESTS, missed=missing, busy=min(1.0, busy), model=model, cause=cause
        )

    return judge


def decided(brain: ScalingBrain, begin_s: int, end_s: int, judge: Callable[[int], Judged]) -> list[Advice]:
    """All advice from one time until before another, for who does at once what is wanted."""
    return [brain.decide(at_s * NS_PER_S, brain.wanted or 4, judge) for at_s in range(begin_s, end_s, 10)]


def test_a_step_of_four_times_is_followed_in_one_decision() -> None:
    brain, tried = ScalingBrain(ScalingRules()), list[int]()
    decided(brain, 0, 900, giving(4))
    advice = brain.decide(900 * NS_PER_S, 4, giving(16, tried=tried))
    assert advice.wanted == 16
    assert len(tried) <= 8, "and few numbers are simulated for it"
    assert advice.cause == "load"
    assert advice.reason == (
        "with 15 devices 70.00% of requests would be in time; most that miss are for net: "
        "too little time on devices"
    )


def test_steady_loads_cost_two_simulations_a_decision() -> None:
    brain, tried = ScalingBrain(ScalingRules()), list[int]()
    decided(brain, 0, 100, giving(4))
    brain.decide(100 * NS_PER_S, 4, giving(4, tried=tried))
    assert tried == [4, 3]


def test_a_step_down_is_followed_once_and_not_before_it_was_calm() -> None:
    brain = ScalingBrain(ScalingRules())
    decided(brain, 0, 900, giving(16, tried=[]))
    found = decided(brain, 900, 2000, giving(4))
    changed = [advice for before, advice in pairwise(found) if advice.wanted != before.wanted]
    assert [advice.wanted for advice in changed] == [4]
    assert changed[0].at_ns >= 900 * NS_PER_S + CALM_NS - EVERY_NS
    assert changed[0].cause == "idle"
    assert changed[0].reason == "with 4 devices 100.00% would be in time"


def test_it_goes_down_to_the_most_that_was_needed_lately() -> None:
    brain = ScalingBrain(ScalingRules())
    decided(brain, 0, 700, giving(9))
    decided(brain, 700, 900, giving(6))
    found = decided(brain, 900, 1100, giving(2))
    assert found[-1].wanted == 6, "more than any number that was looked at by then"
    assert [advice.cause for advice in found].count("idle") == 1


def test_a_load_at_the_border_does_not_swing() -> None:
    brain = ScalingBrain(ScalingRules())
    found = [
        brain.decide(at * EVERY_NS, 4, giving(4 if at % 7 else 5, missed=0.003)) for at in range(1, 1000)
    ]
    changes = sum(one.wanted != other.wanted for one, other in pairwise(found))
    assert changes <= 1, "what fewer devices miss now and then is no reason to change all the time"


def test_what_misses_a_little_must_do_so_twice_running() -> None:
    brain = ScalingBrain(ScalingRules())
    decided(brain, 0, 900, giving(4))
    assert brain.decide(900 * NS_PER_S, 4, giving(5, missed=0.003)).wanted == 4
    assert brain.decide(910 * NS_PER_S, 4, giving(4)).wanted == 4
    assert brain.decide(920 * NS_PER_S, 4, giving(5, missed=0.003)).wanted == 4
    assert brain.decide(930 * NS_PER_S, 4, giving(5, missed=0.003)).wanted == 5


def test_what_does_not_press_changes_twice_in_ten_minutes_and_fewer_are_wanted_ten_minutes_after_more() -> (
    None
):
    brain = ScalingBrain(ScalingRules())
    decided(brain, 0, 900, giving(4))
    for begin_s, needed in ((900, 5), (1000, 6)):
        assert decided(brain, begin_s, begin_s + 100, giving(needed, missed=0.003))[-1].wanted == needed
    found = decided(brain, 1100, 2000, giving(7, missed=0.003))
    assert next(advice.at_ns for advice in found if advice.wanted == 7) == 910 * NS_PER_S + CHANGES_NS
    found = decided(brain, 2000, 4000, giving(4))
    rose_ns = 910 * NS_PER_S + CHANGES_NS
    assert next(advice.at_ns for advice in found if advice.wanted == 4) >= rose_ns + CHANGES_NS


@pytest.mark.parametrize(("needed", "wanted", "cause"), [(1, 2, "none"), (100, 8, "limit")])
def test_bounds_are_kept_and_named(needed: int, wanted: int, cause: str) -> None:
    brain = ScalingBrain(ScalingRules(least=2, most=8))
    found = decided(brain, 0, 2000, giving(needed))[-1]
    assert found.wanted == wanted
    assert found.cause == cause


class AnyLoad(RuleBasedStateMachine):
    """A load that needs now so many devices, now others, by much or by little."""

    @initialize(least=st.integers(1, 4), room=st.integers(0, 30), now=st.integers(0, 40))
    def begin(self, least: int, room: int, now: int) -> None:
        self.rules = ScalingRules(least=least, most=least + room)
        self.brain, self.twin = ScalingBrain(self.rules), ScalingBrain(self.rules)
        self.at_ns, self.now = 0, now
        self.changes: list[tuple[int, bool]] = []
        self.advice: Advice | None = None

    @rule(needed=st.integers(1, 40), missed=st.sampled_from([0.003, 0.3]), times=st.integers(1, 80))
    def load(self, needed: int, missed: float, times: int) -> None:
        within = min(self.rules.most, max(self.rules.least, needed))
        for number in range(times):
            self.at_ns += EVERY_NS
            before, judge = self.brain.wanted, giving(needed, missed)
            advice = self.brain.decide(self.at_ns, self.now, judge)
            assert advice == self.twin.decide(self.at_ns, self.now, judge)
            if before and advice.wanted != before:
                presses = advice.wanted > before and judge(before).missed > 0.01 * REQUESTS
                self.changes.append((self.at_ns, presses))
                assert advice.wanted > before or number or within <= advice.wanted
            if missed > 0.1:
                assert advice.wanted >= within, "what presses is followed at once"
            self.advice = advice
        if times * EVERY_NS >= CHANGES_NS + CALM_NS:
            assert advice.wanted >= within

    @rule(needed=st.integers(1, 40))
    def settle(self, needed: int) -> None:
        self.load(needed, 0.3, 130)
        assert self.brain.wanted == min(self.rules.most, max(self.rules.least, needed))

    @rule()
    def server_is_given_what_is_wanted(self) -> None:
        self.now = self.brain.wanted or self.now

    @invariant()
    def it_stays_within_bounds(self) -> None:
        if self.advice is not None:
            assert self.rules.least <= self.advice.wanted <= self.rules.most
            assert self.advice.reason

    @invariant()
    def what_does_not_press_changes_twice_in_ten_minutes_at_most(self) -> None:
        for at_ns, presses in self.changes:
            lately = [one for one, _ in self.changes if at_ns - CHANGES_NS < one <= at_ns]
            assert presses or len(lately) <= CHANGES


TestAnyLoad = AnyLoad.TestCase
TestAnyLoad.settings = settings(max_examples=30, stateful_step_count=12, deadline=None)

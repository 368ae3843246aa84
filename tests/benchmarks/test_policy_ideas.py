"""The variants of our policy that are measured: each lacks what it says, and no more."""

from __future__ import annotations

from dataclasses import replace

import pytest
from msgspec import structs

from benchmarks.policy_ideas.__main__ import CASES, LONGER, Case, Found, gain, in_time, judge, play, summary
from benchmarks.policy_ideas.variants import (
    IDEAS,
    NAMES,
    REJECT,
    Variant,
    alone,
    base,
    having,
    variants,
    without,
)
from clockwork_lab.reproduce.run import FigureRun
from clockwork_serve.controller.belief import Belief
from clockwork_serve.controller.config import ControllerConfig
from clockwork_serve.controller.policies import SCHEDULERS, DefaultScheduler, PaperScheduler
from clockwork_serve.workload.scenario import LoadTable, ModelSet, Scenario
from harness.report import Outcome

PLACES = {
    "measured delays": {"__init__"},
    "reject when infeasible": set(),
    "late choices": {"_load_ahead_ns", "_top_up_exec"},
    "best batch for the head": {"_best", "_fuller"},
    "least loss": {"_least_loss"},
    "no sacrifice without need": {"_fuller"},
    "full batches while time is short": {"_better"},
    "relaxed work stays short": {"_relaxed"},
    "loads by need": {"__init__", "_load_one"},
    "INFERs first": {"_infers_first"},
    "loads ahead": {"_for_others"},
    "least missed first": {"__init__", "_load"},
    "copies into idle memory": {"_find_roomy"},
    "last copies stay": {"_load"},
    "few devices where little is to do": {"_left_to_others"},
}
"""By idea, where the policy without it does otherwise."""


def scenario(run: FigureRun) -> Scenario:
    """A second in which two SLOs, cold models and more work than fits come together."""
    return Scenario(
        name="a second", seconds=1.0, models=(ModelSet(name="net", kind="resnet50_v2", copies=12),),
        loads=(
            LoadTable(name="tight", models=("net",), arrivals="poisson", rate_rps=300.0, slo_ms=10.0),
            LoadTable(name="loose", models=("net",), arrivals="poisson", rate_rps=300.0, slo_ms=60.0),
        ),
    )  # fmt: skip


SECOND = Case("second", "a second", 1, 1.0, scenario, {"% in time": in_time})


def places(scheduler: type) -> set[str]:
    """The methods that it overrides."""
    own = scheduler.__mro__[: scheduler.__mro__.index(DefaultScheduler)]
    return {name for one in own for name, value in vars(one).items() if callable(value)}


def made(variant: Variant) -> tuple[DefaultScheduler, Belief]:
    belief = Belief(ControllerConfig())
    return variant.scheduler(belief), belief  # type: ignore[return-value]


@pytest.mark.parametrize("name", NAMES)
def test_default_without_an_idea_differs_from_it_there_alone(name: str) -> None:
    variant = without(name)
    assert places(variant.scheduler) == PLACES[name]  # type: ignore[arg-type]
    scheduler, belief = made(variant)
    assert belief.measures == (name != "measured delays")
    assert scheduler._by_popularity == (name != "least missed first")
    assert variant.config.reject_infeasible == (name != REJECT)


@pytest.mark.parametrize("idea", IDEAS, ids=lambda idea: idea.name)
def test_an_idea_alone_is_all_that_is_left(idea) -> None:
    variant = alone(idea)
    kept = {idea.name, *idea.needs}
    gone = set().union(*[PLACES[name] for name in NAMES if name not in kept])
    assert places(variant.scheduler) == gone
    scheduler, belief = made(variant)
    assert belief.measures == ("measured delays" in kept)
    assert scheduler._by_popularity == ("least missed first" in kept)
    assert variant.config.reject_infeasible


@pytest.mark.slow
def test_default_without_any_idea_is_the_papers_policy() -> None:
    nothing = play(SECOND, having("nothing", {REJECT}), [1, 2])
    paper = play(SECOND, Variant("paper", PaperScheduler), [1, 2])
    ours = play(SECOND, Variant("default", DefaultScheduler), [1, 2])
    assert nothing.goods == paper.goods
    assert ours.goods["% in time"] > paper.goods["% in time"]
    assert all(cost > 0 for cost in ours.cpu_us)


@pytest.mark.slow
def test_on_a_core_that_does_loads_too_infers_first_answers_more() -> None:
    core = next(case for case in LONGER if case.name == "core")
    short = replace(core, scenario=lambda run: structs.replace(core.scenario(run), seconds=8.0))
    ours = play(short, Variant("default", DefaultScheduler), [1]).goods["% in time"]
    other = play(short, without("INFERs first"), [1]).goods["% in time"]
    assert ours[0] > other[0] + 4


@pytest.mark.slow
def test_every_variant_plays_a_second_and_leaves_the_policies_as_they_were() -> None:
    before = dict(SCHEDULERS)
    results = {variant.name: play(SECOND, variant, [1]) for variant in variants()}
    assert before == SCHEDULERS
    assert len(results) == len(variants()), "each has a name of its own"
    assert len({found.goods["% in time"][0] for found in results.values()}) > len(results) // 3
    gains = summary({"second": results}, [SECOND])
    assert gains["late choices"]["together"]["second % in time"].mean > 0


def test_every_idea_is_compared_with_a_variant_that_is_measured() -> None:
    names = {variant.name for variant in variants()}
    assert {base(idea) for idea in IDEAS} <= names
    assert {without(name).name for name in NAMES} <= names


def test_a_gain_matters_when_it_exceeds_its_spread_and_is_not_next_to_nothing() -> None:
    results = {
        "old": Found({"good": [50.0, 60.0]}, []),
        "better": Found({"good": [52.0, 63.0]}, []),
        "lucky": Found({"good": [45.0, 66.0]}, []),
        "same": Found({"good": [50.05, 60.05]}, []),
    }
    assert str(gain(results, "better", "old", "good")) == "+2.5±0.5"
    assert str(gain(results, "lucky", "old", "good")) == "(+0.5±5.5)"
    assert not gain(results, "same", "old", "good").matters


def test_default_is_held_against_paper_or_against_a_floor() -> None:
    case = Case("case", "", 1, 1.0, scenario, {"a": in_time, "b": in_time}, {"b": 10.0})
    results = {
        "paper": Found({"a": [50.0], "b": [50.0]}, []),
        "default": Found({"a": [49.0], "b": [12.0]}, []),
    }
    outcome = Outcome("test")
    judge(outcome, {"case": results}, [case])
    assert [(one.asked, one.good) for one in outcome.verdicts] == [
        (">= paper's 50.0", False),
        (">= 10.0", True),
    ]


def test_the_cases_have_names_of_their_own() -> None:
    assert len({case.name for case in (*CASES, *LONGER)}) == len(CASES) + len(LONGER)

"""The controller dies in a simulation: another takes over, nothing is loaded again, requests end once."""

from __future__ import annotations

import pytest

from clockwork_serve.fence import Fence
from clockwork_serve.messages import (
    Answer,
    Cause,
    Infer,
    Load,
    Outcome,
    Reason,
    Request,
    Result,
    RetainWeights,
    WorkerHung,
    WorkerJoined,
)
from clockwork_serve.sim import Simulation, host, read_constants
from clockwork_serve.units import NS_PER_S
from clockwork_serve.workload.tables import FaultTable as Fault
from tests.sim.worlds import Steps, played, scenario, simulation

TIMES = read_constants().faults
BACK_NS = NS_PER_S + TIMES.controller_ns


def test_the_next_controller_keeps_all_weights_and_loads_none():
    simulation, steps = played(scenario(Fault(kind="controller", at_s=1.0), rate_rps=500, slo_ms=400))

    (_, (joined_ns, joined)) = steps.seen(WorkerJoined)
    (state,) = joined.states
    assert BACK_NS <= joined_ns <= BACK_NS + TIMES.rejoin_ns
    ((kept_ns, kept),) = steps.done(RetainWeights)
    assert kept_ns == joined_ns
    assert kept.versions == tuple(one.version for one in state.weights) != ()
    assert not [now_ns for now_ns, _ in steps.done(Load) if now_ns >= NS_PER_S]
    assert [now_ns for now_ns, _ in steps.done(Infer) if now_ns >= joined_ns]
    assert simulation.faults is not None and simulation.faults.executed == {"controller": 1}


def test_what_can_wait_is_asked_again_once_and_answered():
    _, steps = played(scenario(Fault(kind="controller", at_s=1.0), rate_rps=500, slo_ms=2000))

    asked: dict[str, list[int]] = {}
    for now_ns, request in steps.seen(Request):
        asked.setdefault(request.request_id, []).append(now_ns)
    again = {one: times for one, times in asked.items() if len(times) > 1}
    outcomes = {answer.request_id: answer.outcome for _, answer in steps.done(Answer)}
    assert again, "nothing was open"
    assert all(len(times) == 2 and times[0] < NS_PER_S < BACK_NS < times[1] for times in again.values())
    assert {outcomes[one] for one in again} == {Outcome.OK}


def test_who_heard_nothing_until_its_verdict_was_due_is_answered_or_told_of_a_broken_promise():
    made = scenario(Fault(kind="controller", at_s=1.0), rate_rps=2000, slo_ms=600)
    _, steps = played(made, decide_ns=0)

    again = {request.request_id for _, request in steps.seen(Request) if request.awaited}
    ends = [(end.outcome, end.reason, end.cause) for _, end in steps.done(Answer) if end.request_id in again]
    broken = (Outcome.EXPIRED, Reason.PROMISE_BROKEN, Cause.CONTROLLER_LOST)
    assert {*ends} == {(Outcome.OK, Reason.NONE, Cause.NONE), broken}
    assert ends.count(broken) < len(ends) / 2


def test_what_comes_meanwhile_and_what_cannot_wait_is_told_at_once():
    simulation, steps = played(scenario(Fault(kind="controller", at_s=1.0), rate_rps=500, slo_ms=50))

    total = simulation.tally.total()
    assert total.others[f"rejected/{Reason.NOT_SERVING}"] >= 500 * (TIMES.controller_ns / NS_PER_S) * 0.8
    seen = [request.request_id for _, request in steps.seen(Request)]
    assert len(seen) == len(set(seen)), "asked again, and it could not wait"


def test_results_of_the_dead_controllers_actions_come_to_the_next_and_answer_nobody():
    _, steps = played(scenario(Fault(kind="controller", at_s=1.0, for_s=0.001), rate_rps=1000, slo_ms=2000))

    joined_ns = steps.seen(WorkerJoined)[1][0]
    sent = {action.action_id: now_ns for now_ns, action in [*steps.done(Infer), *steps.done(Load)]}
    old = [
        one for now_ns, one in steps.seen(Result) if now_ns >= joined_ns and sent[one.action_id] < NS_PER_S
    ]
    # Whether any ran so long is chance; each that did, and each request, ends once, or the checks fail.
    assert len(old) == len({one.action_id for one in old})
    answered = [answer.request_id for _, answer in steps.done(Answer)]
    assert len(answered) == len(set(answered))


@pytest.mark.parametrize(
    "other", ["crash", "hang", "stop", "hangs", "gateway", "loss", "drain", "cancel", "kills"]
)
@pytest.mark.parametrize("apart_s", [-0.005, 0.0, 0.005, 0.1])
def test_two_failures_at_once(other: str, apart_s: float):
    more = {
        "loss": {"factor": 1.0, "for_s": 0.01}, "cancel": {"factor": 0.5}, "hang": {"for_s": 0.2},
        "stop": {"for_s": 0.2}, "hangs": {"model": "m-0000", "for_s": 0.05},
        "kills": {"model": "m-0000", "for_s": 0.2},
    }  # fmt: skip
    fault = Fault(kind=other, at_s=1.0 + apart_s, **more.get(other, {}))  # type: ignore[arg-type]

    simulation, _ = played(
        scenario(Fault(kind="controller", at_s=1.0), fault, rate_rps=500, slo_ms=300, devices=2)
    )

    assert not simulation.open


def test_a_controller_that_dies_again_and_again():
    faults = [Fault(kind="controller", at_s=0.5 + 0.05 * at, for_s=0.02) for at in range(20)]

    simulation, steps = played(scenario(*faults, rate_rps=500, slo_ms=3000, devices=2))

    assert simulation.faults is not None and simulation.faults.executed == {"controller": 20}
    ends = [answer.outcome for now_ns, answer in steps.done(Answer) if now_ns > 2 * NS_PER_S]
    assert ends.count(Outcome.OK) > 0.9 * len(ends) > 0


def test_a_model_that_hangs_across_controllers_is_found_by_the_next_and_its_worker_ended():
    hangs = Fault(kind="hangs", at_s=0.98, for_s=0.05, model="m-0000")
    _, steps = played(
        scenario(hangs, Fault(kind="controller", at_s=1.0), seconds=4.0, rate_rps=500, slo_ms=300),
        hang_ns=NS_PER_S // 10, hang_grace_ns=NS_PER_S // 10,
    )  # fmt: skip

    hung = [(now_ns, word) for now_ns, word in steps.done(WorkerHung) if now_ns >= BACK_NS]
    assert [word.end for _, word in hung] == [False, True]
    assert "of before it joined" in hung[0][1].why
    assert [now_ns for now_ns, _ in steps.done(Infer) if now_ns > hung[1][0]], "another worker serves"


# A controller loses the lead and does not know it.


# More load than two devices can do, so that there is always something that it would do.
DEPOSED = [Fault(kind="deposed", at_s=0.4 + 0.5 * at, for_s=0.05) for at in range(6)]


def deposed(seed: int) -> tuple[Simulation, Steps]:
    made = scenario(*DEPOSED, seconds=3.5, rate_rps=2200, slo_ms=1000, devices=2)
    return simulation(made, seed=seed, pages=12)


@pytest.mark.parametrize("seed", range(4))
def test_a_controller_that_was_deposed_and_goes_on_changes_nothing(
    seed: int, monkeypatch: pytest.MonkeyPatch
):
    barred: list[int] = []
    bars = Fence.bars

    def noted(fence: Fence, epoch: int) -> bool:
        found = bars(fence, epoch)
        barred.extend([epoch] * found)
        return found

    monkeypatch.setattr(Fence, "bars", noted)
    made, steps = deposed(seed)
    made.run()

    assert made.faults is not None and made.faults.executed == {"deposed": 6}
    assert made.epoch == 7
    assert set(barred) <= set(range(1, 7)) and len(set(barred)) > 1, "nothing that it sent had to be barred"
    answered = [answer.request_id for _, answer in steps.done(Answer)]
    assert len(answered) == len(set(answered))
    assert not made.open


def test_without_fences_a_deposed_controller_is_found_out(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(Fence, "bars", lambda fence, epoch: False)
    for seed in range(4):
        with pytest.raises(AssertionError):
            deposed(seed)[0].run()


class Gate(Fence):
    """A fence that bars nobody."""

    def bars(self, epoch: int) -> bool:
        return False


def test_workers_without_fences_are_found_out(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(host, "Fence", Gate)
    found = []
    for seed in range(4):
        with pytest.raises(AssertionError) as caught:
            deposed(seed)[0].run()
        found.append(str(caught.value))
    assert any("no controller waits for it" in text for text in found), found

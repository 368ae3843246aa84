"""What is counted by what a controller saw and decided: where weights are, and who misses, when and why."""

from __future__ import annotations

from clockwork_serve.messages import (
    Answer,
    DeviceSpec,
    Extent,
    Load,
    Outcome,
    Reason,
    Request,
    Result,
    Status,
    Unload,
    Weights,
    Window,
    WorkerJoined,
    WorkerLost,
)
from clockwork_serve.sim.tally import COLD, COMPUTE, LATE, MEMORY, OTHER, MissCount, ReadyWeights
from clockwork_serve.units import MIB, NS_PER_S, ms


def joined(worker: str) -> WorkerJoined:
    """A worker with a device of its name."""
    spec = DeviceSpec(
        device=f"{worker}:0", kind="cpu", pages=8, page_bytes=MIB, workspace_bytes=0, io_bytes=0
    )
    return WorkerJoined(worker=worker, devices=(spec,))


def load(action_id: int, device: str) -> Load:
    return Load(
        action_id=action_id, device=device, model="net/1", code_id="c", extent=Extent(0, 1), version=1,
        weights=Weights(weights_id="w", path="w", size=1), window=Window(0, 1), expected_ns=1,
    )  # fmt: skip


def ended(action: Load, status: Status = Status.OK) -> Result:
    return Result(action_id=action.action_id, device=action.device, status=status, started_ns=0, ended_ns=1)


def test_they_are_where_a_load_was_good_until_they_are_unloaded() -> None:
    weights, first, second = ReadyWeights(), load(1, "a:0"), load(2, "b:0")
    weights.on_step((joined("a"), joined("b")), (first, second))
    assert not weights.devices
    weights.on_step((ended(first), ended(second, Status.TOO_LATE)), ())
    assert weights.devices == {"net/1": {"a:0"}}
    gone = Unload(
        action_id=3, device="a:0", model="net/1", extent=Extent(0, 1), version=1, window=Window(0, 1),
    )  # fmt: skip
    weights.on_step((), (gone,))
    assert weights.devices == {"net/1": set()}


def test_a_lost_worker_takes_its_own_with_it_and_what_it_was_loading() -> None:
    weights, loads = ReadyWeights(), [load(1, "a:0"), load(2, "b:0"), load(3, "a:0")]
    weights.on_step((joined("a"), joined("b")), loads)
    weights.on_step((ended(loads[0]), ended(loads[1])), ())
    weights.on_step((WorkerLost(worker="a"),), ())
    assert weights.devices == {"net/1": {"b:0"}}
    assert not weights._loads, "it is waited for in vain"
    weights.on_step((ended(loads[2]),), ())
    assert weights.devices == {"net/1": {"b:0"}}


def request(name: str, at_s: float, slo_ms: float = 100) -> Request:
    at_ns = round(at_s * NS_PER_S)
    return Request(
        request_id=name, gateway="g", model="net/1", arrival_ns=at_ns, deadline_ns=at_ns + ms(slo_ms)
    )


def answer(name: str, outcome: Outcome = Outcome.OK, reason: Reason = Reason.NONE, batch: int = 0) -> Answer:
    return Answer(request_id=name, gateway="g", outcome=outcome, reason=reason, batch=batch)


def test_requests_count_in_the_minute_in_which_they_came() -> None:
    count = MissCount(NS_PER_S, 3, hop_ns=ms(1))
    for at_s in (0.9, 1, 60.9, 61, 121, 190.9):
        sent = request(str(at_s), at_s)
        count.on_step(sent.arrival_ns, (sent,), ())
        count.on_step(sent.arrival_ns + ms(99), (), (answer(str(at_s), batch=1),))
    assert (count.ended, count.in_time, count.missed) == ([2, 1, 2], [2, 1, 2], {})


def test_who_misses_does_so_for_a_cause() -> None:
    count, first = MissCount(0, 1, hop_ns=ms(1)), load(1, "a:0")

    def miss(took_ms: float = 1, outcome: Outcome = Outcome.REJECTED, **fields: object) -> None:
        sent = request("r", 1)
        count.on_step(sent.arrival_ns, (sent,), ())
        count.on_step(sent.arrival_ns + ms(took_ms), (), (answer("r", outcome, **fields),))  # type: ignore[arg-type]

    miss()
    count.on_step(0, (joined("a"),), (first,))
    count.on_step(0, (ended(first),), ())
    miss()
    miss(99.5, Outcome.OK, batch=1)
    miss(outcome=Outcome.FAILED)
    miss(reason=Reason.TENANT_QUOTA)
    count.on_step(0, (WorkerLost(worker="a"),), ())
    miss()
    causes = [(why, times) for (why, model), times in count.missed.items() if model == "net/1"]
    assert causes == [(COLD, 1), (COMPUTE, 1), (LATE, 1), (OTHER, 1), (MEMORY, 1)]
    assert (count.ended, count.in_time, count.quota) == ([5], [0], 1)
    count.add_unseen(2)
    assert (count.ended, count.missed[OTHER, "?"]) == ([7], 2)


def test_it_is_hopeless_once_a_minute_is_over_that_missed_more_than_it_may() -> None:
    count = MissCount(0, 3, hop_ns=0, allowed=(1, 1, 1))
    for at_s, hopeless in ((61, False), (62, False), (63, False), (119, False), (121, True)):
        sent = request(str(at_s), at_s)
        count.on_step(sent.arrival_ns, (sent,), (answer(str(at_s), Outcome.REJECTED),))
        assert count.hopeless == hopeless, at_s


def test_who_has_no_slo_is_not_counted() -> None:
    count, sent = MissCount(0, 1, hop_ns=0), request("r", 1, slo_ms=24 * 3600 * 1000)
    count.on_step(0, (sent,), (answer("r", Outcome.REJECTED),))
    assert count.ended == [0]

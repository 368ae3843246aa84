"""Fig 9 in real time, in its short form: whatever happens, each request is counted once, by our own clock."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import uvloop

from clockwork_lab.reproduce.fig9_real import (
    REQUESTS_LEAST,
    TimeBucket,
    claims,
    cores_used,
    fig9_real,
    panels,
)
from clockwork_lab.reproduce.figure import PaperClaim
from clockwork_lab.reproduce.real_requests import Accounting, Requests
from clockwork_lab.reproduce.run import FigureRun
from clockwork_serve.messages import Answer, Delivered, Frame, Outcome, Request
from clockwork_serve.units import NS_PER_S, ms
from clockwork_serve.workload.scenario import LoadTable, ModelSet, Scenario
from clockwork_serve.workload.stream import Workload, build


def counted(**counts: int) -> TimeBucket:
    return TimeBucket(2.0, Accounting(**counts), (1.0, 0.5, 0.25, 0.5))


def ours(found: list[PaperClaim]) -> dict[str, tuple[float | None, bool]]:
    return {claim.name.split(";")[0].split(":")[0]: (claim.ours, claim.met) for claim in found}


def test_what_is_asked_is_none_late_none_broken_and_five_lost():
    good = ours(claims([counted(offered=100, good=100, cold=2)] * 2))
    assert good["late by the clock here, good by the controller's"] == (0, True)
    assert good["lost"] == (0, True)
    assert good["promised, but not served"] == (0, True)
    assert good["without an answer, or with two"] == (0, True)
    assert good["requests"] == (200, False)
    assert good["cold starts, share"] == (pytest.approx(0.02), True)
    assert cores_used([counted()]) == "controller 0.50, worker 0 0.25, worker 1 0.12, generator 0.25"

    bad = counted(offered=100, good=94, late=3, overdue=2, rejected=2, broken=1, unanswered=1, twice=1)
    found = ours(claims([bad]))
    assert found["late by the clock here, good by the controller's"] == (2, False)
    assert found["lost"] == (6, False)
    assert found["promised, but not served"] == (1, False)
    assert found["without an answer, or with two"] == (2, False)
    assert ours(claims([counted(offered=REQUESTS_LEAST)]))["requests"][1]


def test_curves_have_a_point_for_each_stretch_at_its_end():
    good, lost, _, cpu = panels([counted(offered=100, good=90, late=10), counted(offered=50, good=50)])
    assert [[point.y for point in series.points] for series in good.series] == [[50, 25], [45, 25]]
    assert [point.x for point in good.series[0].points] == [2 / 60, 4 / 60]
    assert [point.y for point in lost.series[0].points] == [10, 0]
    assert [series.points[0].y for series in cpu.series] == [0.5, 0.375, 0.25]


class Told:
    """A controller that answers a request at once, late, or with what ``outcomes`` say."""

    def __init__(self, requests: Requests, outcomes: Iterator[tuple[Outcome, bool, float]]) -> None:
        self.requests, self.outcomes = requests, outcomes
        self.sent: list[Request] = []
        self.delivered = self.reported = Delivered()

    def hear(self, frame: Frame) -> None:
        assert isinstance(frame, Delivered)
        known = self.delivered
        self.delivered = Delivered(in_time=known.in_time + frame.in_time, late=known.late + frame.late)

    def submit(self, request: Request) -> None:
        self.sent.append(request)
        outcome, promised, after_s = next(self.outcomes)
        answer = Answer(request_id=request.request_id, gateway="g", outcome=outcome, promised=promised)
        asyncio.get_running_loop().call_later(after_s, self.requests._on_answer, answer)


def a_moment() -> Workload:
    models = (ModelSet(name="a", kind="resnet50_v2", copies=2),)
    load = LoadTable(name="calls", models=("a",), arrivals="poisson", rate_rps=100, slo_ms=50)
    return build(Scenario(name="moment", seconds=0.4, warmup_s=0, models=models, loads=(load,)), 1)


def test_each_request_is_sent_in_time_and_counted_in_the_stretch_in_which_it_came(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    kinds = [
        (Outcome.OK, True, 0.0), (Outcome.OK, True, 0.1), (Outcome.EXPIRED, True, 0.0),
        (Outcome.EXPIRED, False, 0.0), (Outcome.REJECTED, False, 0.0), (Outcome.FAILED, False, 0.0),
    ]  # fmt: skip

    async def follow() -> tuple[list[Accounting], Told, list[int]]:
        requests = Requests(tmp_path / "none", ["a-1/1", "a-2/1"], ms(50))
        told = Told(requests, iter(kinds + [(Outcome.OK, False, 0.0)] * 1000))
        monkeypatch.setattr(requests._link, "submit", told.submit)
        monkeypatch.setattr(requests._link, "send", told.hear)
        began: list[int] = []
        try:
            found = await requests.follow(a_moment(), NS_PER_S // 10, began.append)
            await asyncio.sleep(0)
            told.reported = told.delivered  # before the link is closed
            return found, told, began
        finally:
            await requests.close()

    started_ns = time.monotonic_ns()
    found, told, began = uvloop.run(follow())
    assert began == list(range(len(found))) == [0, 1, 2, 3]
    times_ns = [time_ns for block in a_moment().open() for time_ns in block.times_ns]
    lags = {request.arrival_ns - time_ns for request, time_ns in zip(told.sent, times_ns, strict=True)}
    assert len(lags) == 1
    assert min(lags) >= started_ns
    bounds = [(at * NS_PER_S // 10, (at + 1) * NS_PER_S // 10) for at in range(4)]
    assert [each.offered for each in found] == [
        sum(first <= time_ns < end for time_ns in times_ns) for first, end in bounds
    ]
    first = found[0]
    assert first.offered >= len(kinds)
    assert (first.late, first.overdue, first.rejected, first.failed, first.broken) == (3, 1, 1, 1, 1)
    assert all(each.balanced for each in found)
    assert told.sent[1].request_id in told.reported.late
    ids = [*told.reported.in_time, *told.reported.late]
    assert sorted(ids) == sorted(request.request_id for request in told.sent), "the controller forgets them"


@pytest.mark.system
def test_a_short_run_makes_the_whole_figure():
    figure = fig9_real(FigureRun(seed=1, short=True))

    assert figure.figure == "fig9_real"
    assert figure.to_json()
    found = ours(list(figure.claims))
    assert found["without an answer, or with two"] == (0, True)
    requests, _ = found["requests"]
    assert requests is not None
    assert requests > 100
    offered = figure.panels[0].series[0]
    assert sum(point.y or 0.0 for point in offered.points) == requests

"""Durations as the controller sees them of an INFER on another machine."""

from __future__ import annotations

from clockwork_serve.messages import Extent, Infer, Result, Status, Window
from clockwork_serve.serve.remote.bridge_peers import LaneTiming, not_after
from clockwork_serve.units import ms

KEY = ("code", 1, 1000)


def result(lane_ms: float, status: Status = Status.OK) -> Result:
    """On a clock of its own."""
    return Result(
        action_id=1, device="d", status=status, started_ns=10**15, ended_ns=10**15 + ms(lane_ms),
        run_ns=ms(lane_ms),
    )  # fmt: skip


def infer() -> Infer:
    return Infer(
        action_id=1, device="d", model="m/1", code_id="code", extent=Extent(0, 1), version=1, batch=1,
        calls=(), window=Window(0, ms(50)), expected_ns=ms(1),
    )  # fmt: skip


def test_the_way_there_and_back_counts_where_the_lane_was_idle() -> None:
    found = LaneTiming().ended(result(2), KEY, ms(100), ms(110), 1000)
    assert (found.started_ns, found.ended_ns) == (ms(100), ms(110))
    assert found.input_ns + found.run_ns + found.output_ns == ms(10)
    assert found.input_ns == found.output_ns == ms(4), "as much there as back"


def test_what_came_while_another_one_ran_took_only_the_rest() -> None:
    timing = LaneTiming()
    timing.ended(result(2), KEY, ms(100), ms(110), 1000)
    found = timing.ended(result(2), KEY, ms(101), ms(113), 1000)
    assert found.lane_ns == ms(3)


def test_no_duration_is_shorter_than_the_lane_was_taken() -> None:
    timing = LaneTiming()
    timing.ended(result(2), KEY, ms(100), ms(110), 1000)
    found = timing.ended(result(5), KEY, ms(101), ms(112), 1000)
    assert found.lane_ns == ms(5)
    assert found.ended_ns == ms(112)


def test_a_window_there_ends_later_by_the_way_to_it() -> None:
    timing = LaneTiming()
    assert timing.ordered(infer(), KEY) == infer()
    timing.ended(result(2), KEY, ms(100), ms(110), 1000)
    assert timing.ordered(infer(), KEY).window == Window(0, ms(54))
    assert timing.ordered(infer(), ("code", 2, 1000)) == infer(), "nothing is known of another size"


def test_a_refusal_takes_no_time() -> None:
    found = LaneTiming().ended(result(2, Status.TOO_LATE), KEY, ms(100), ms(110), 0)
    assert (found.started_ns, found.ended_ns) == (ms(110), ms(110))


def test_nothing_ends_in_the_future() -> None:
    assert not_after(result(2), 10**15).ended_ns == 10**15
    assert not_after(result(2), 10**15).lane_ns == ms(2)
    assert not_after(result(2), 10**16) == result(2)

"""A worker on another machine as the bridge represents it."""

from __future__ import annotations

import pytest
from msgspec import structs

from clockwork_serve.errors import TransportError
from clockwork_serve.messages import Call, Extent, Infer, Result, Status, TensorRef, Tensors, Window
from clockwork_serve.serve.remote.bridge_peers import Actions, not_after
from clockwork_serve.serve.remote.tensor_link import encode, outputs_there
from clockwork_serve.serve.remote.tensors import DELAY_NS, LaneTiming
from clockwork_serve.units import ms
from tests.worker.actions import GPU, infer, load

# INFERs as the bridge passes them on: their tensors are described, and are not here.


def tensor(nbytes: int, name: str = "x") -> TensorRef:
    return TensorRef(name=name, datatype="FP32", shape=(1, nbytes // 4), offset=0, nbytes=nbytes)


def over(action: Infer, *sizes: int) -> Infer:
    """The INFER of as many calls, each with inputs of that size at some gateway."""
    calls = []
    for at, nbytes in enumerate(sizes):
        there = Tensors(region="", epoch=7, header_offset=0, refs=(tensor(nbytes),), server="10.0.0.9:7001")
        calls.append(Call(request_id=f"r{at}", rows=1, tensors=encode(there)))
    return structs.replace(action, calls=tuple(calls), batch=max(1, len(calls)))


def ended(action_id: int, *outputs: bytes, status: Status = Status.OK, device: str = GPU) -> Result:
    return Result(
        action_id=action_id, device=device, status=status, started_ns=50, ended_ns=60, outputs=outputs
    )


def y(nbytes: int = 16) -> bytes:
    return outputs_there((tensor(nbytes, "y"),))


def test_an_infer_and_its_result_pass_as_they_are_but_for_the_time() -> None:
    actions, sent = Actions(), over(infer(1, "a", 0), 16, 600)
    assert actions.send(sent, 100) == sent
    result = actions.end(ended(1, y(), y()), 1000)
    assert (100 <= result.started_ns < result.ended_ns <= 1000, result.outputs) == (True, (y(), y()))
    assert len(actions) == 0


def test_the_window_of_the_next_one_is_longer_by_the_way_of_its_inputs() -> None:
    actions = Actions()
    actions.send(over(infer(1, "a", 0), 1_000_000), 0)
    actions.end(ended(1, y()), ms(10))
    like = over(infer(2, "a", 0), 1_000_000)
    sent, other = actions.send(like, ms(20)), actions.send(over(infer(3, "a", 0), 16), ms(20))
    assert sent.window.latest_ns - like.window.latest_ns == pytest.approx(ms(10), rel=0.01)
    assert other.window == like.window, "nothing is known of another size"


def test_tensors_that_cannot_be_read_are_for_the_worker_to_refuse() -> None:
    actions = Actions()
    bad = structs.replace(infer(1, "a", 0), calls=(Call(request_id="r", rows=1, tensors=b"\xc1"),))
    assert actions.send(bad, 100) == bad
    assert actions.end(ended(1, status=Status.BAD_ACTION), 200).status is Status.BAD_ACTION


@pytest.mark.parametrize(
    "outputs",
    [
        (b"\xc1",),
        (),
        (y(), y()),
        (y().replace(b"\xa1y", b"\xa1\xff"),),
        (encode(Tensors(region="1:2:4096", epoch=7, header_offset=0, refs=(tensor(16, "y"),))),),
        (y(-16),),
    ],
    ids=["no message", "too few", "too many", "no text", "memory of another process", "less than none"],
)
def test_outputs_that_are_not_in_their_room_are_a_fault_of_the_device(outputs: tuple[bytes, ...]) -> None:
    actions = Actions()
    actions.send(over(infer(1, "a", 0), 16), 100)
    found = actions.end(ended(1, *outputs), 1000)
    assert (found.status, found.outputs) == (Status.DEVICE_FAULT, ())
    assert found.message.startswith("outputs: ")


def test_a_result_of_another_device_or_action_is_not_believed() -> None:
    actions = Actions()
    actions.send(load(1, "a", 0), 100)
    with pytest.raises(TransportError, match="which it was not given"):
        actions.end(ended(1, device="gpu:1"), 1000)
    with pytest.raises(TransportError, match="which it was not given"):
        actions.end(ended(2), 1000)


# Durations as the controller sees them of an INFER on another machine.


KEY = ("code", 1, 1000)


def result(lane_ms: float, status: Status = Status.OK) -> Result:
    """On a clock of its own."""
    return Result(
        action_id=1, device="d", status=status, started_ns=10**15, ended_ns=10**15 + ms(lane_ms),
        run_ns=ms(lane_ms),
    )  # fmt: skip


def timed_infer() -> Infer:
    return Infer(
        action_id=1, device="d", model="m/1", code_id="code", extent=Extent(0, 1), version=1, batch=1,
        calls=(), window=Window(0, ms(50)), expected_ns=ms(1),
    )  # fmt: skip


def test_the_way_there_and_back_counts_where_the_lane_was_idle() -> None:
    found = LaneTiming().ended(result(2), KEY, ms(100), ms(110), 1000)
    assert (found.started_ns, found.ended_ns) == (ms(100) + DELAY_NS // 2, ms(110) - DELAY_NS // 2)
    assert found.input_ns + found.run_ns + found.output_ns == ms(10) - DELAY_NS
    assert found.input_ns == found.output_ns == ms(4) - DELAY_NS // 2, "as much there as back"


def test_what_came_while_another_one_ran_took_only_the_rest() -> None:
    timing = LaneTiming()
    timing.ended(result(2), KEY, ms(100), ms(110), 1000)
    found = timing.ended(result(2), KEY, ms(101), ms(115), 1000)
    assert found.lane_ns == ms(5) - DELAY_NS


def test_a_short_way_is_a_delay_and_no_time_of_the_lane() -> None:
    found = LaneTiming().ended(result(2), KEY, ms(100), ms(103), 1000)
    assert (found.started_ns, found.ended_ns) == (ms(100.5), ms(102.5))
    assert (found.input_ns, found.run_ns, found.output_ns) == (0, ms(2), 0)


def test_no_duration_is_shorter_than_the_lane_was_taken() -> None:
    timing = LaneTiming()
    timing.ended(result(2), KEY, ms(100), ms(110), 1000)
    found = timing.ended(result(5), KEY, ms(101), ms(112), 1000)
    assert found.lane_ns == ms(5)
    assert found.ended_ns == ms(112)


def test_a_window_there_ends_later_by_the_way_to_it() -> None:
    timing = LaneTiming()
    assert timing.ordered(timed_infer(), KEY) == timed_infer()
    timing.ended(result(2), KEY, ms(100), ms(110), 1000)
    assert timing.ordered(timed_infer(), KEY).window == Window(0, ms(54))
    assert timing.ordered(timed_infer(), ("code", 2, 1000)) == timed_infer(), (
        "nothing is known of another size"
    )


def test_a_refusal_takes_no_time() -> None:
    found = LaneTiming().ended(result(2, Status.TOO_LATE), KEY, ms(100), ms(110), 0)
    assert (found.started_ns, found.ended_ns) == (ms(110), ms(110))


def test_nothing_ends_in_the_future() -> None:
    assert not_after(result(2), 10**15).ended_ns == 10**15
    assert not_after(result(2), 10**15).lane_ns == ms(2)
    assert not_after(result(2), 10**16) == result(2)

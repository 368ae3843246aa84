"""A worker on another machine as the bridge represents it."""

from __future__ import annotations

import pytest
from msgspec import structs

from clockwork_serve.errors import TransportError
from clockwork_serve.messages import Call, Infer, Result, Status, TensorRef, Tensors
from clockwork_serve.serve.remote.bridge_peers import Actions, between
from clockwork_serve.serve.remote.tensor_link import encode, outputs_there
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


def test_the_result_of_an_infer_passes_as_it_is_unless_it_ends_in_the_future() -> None:
    actions = Actions()
    for now_ns, ended_ns in ((1000, 60), (59, 59)):
        actions.sent(over(infer(1, "a", 0), 16, 600), 40)
        result = actions.end(ended(1, y(), y()), now_ns)
        assert (result.ended_ns, result.lane_ns, result.outputs) == (ended_ns, 10, (y(), y()))
        assert len(actions) == 0


def test_no_result_begins_before_its_action_was_sent() -> None:
    actions = Actions()
    actions.sent(over(infer(1, "a", 0), 16), 70)
    assert actions.end(ended(1, y()), 1000).started_ns == 70


def test_tensors_that_cannot_be_read_are_for_the_worker_to_refuse() -> None:
    actions = Actions()
    bad = structs.replace(infer(1, "a", 0), calls=(Call(request_id="r", rows=1, tensors=b"\xc1"),))
    actions.sent(bad, 100)
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
    actions.sent(over(infer(1, "a", 0), 16), 100)
    found = actions.end(ended(1, *outputs), 1000)
    assert (found.status, found.outputs) == (Status.DEVICE_FAULT, ())
    assert found.message.startswith("outputs: ")


def test_a_result_of_another_device_or_action_is_not_believed() -> None:
    actions = Actions()
    actions.sent(load(1, "a", 0), 100)
    with pytest.raises(TransportError, match="which it was not given"):
        actions.end(ended(1, device="gpu:1"), 1000)
    with pytest.raises(TransportError, match="which it was not given"):
        actions.end(ended(2), 1000)


def test_what_messages_take_is_learned_where_the_lane_was_idle_and_added_to_all() -> None:
    actions = Actions()

    def took(action_id: int, now_ns: int) -> tuple[int, int]:
        told = structs.replace(ended(action_id, y()), transfer_in_ns=300, transfer_out_ns=100)
        found = actions.end(told, now_ns)
        return found.transfer_in_ns, found.transfer_out_ns

    actions.sent(load(9, "b", 4), 0)
    for action_id in (1, 2):
        actions.sent(over(infer(action_id, "a", 0), 16), 1000)
    assert took(1, 1000 + 300 + 10 + 100 + 50) == (325, 125)
    assert took(2, 9000) == (325, 125), "it waited for the one before it"
    actions.sent(over(infer(3, "a", 0), 16), 10_000)
    assert took(3, 10_000 + 300 + 10 + 100 + 9000) == (325, 125), "one that was stopped changes nothing"
    actions.sent(over(infer(4, "a", 0), 16), 20_000)
    actions.sent(over(infer(5, "a", 0), 16), 20_000)
    assert took(4, 20_005) == (5 + 25, 5 + 25), "none took longer than there was"


@pytest.mark.parametrize(
    ("sent_ns", "now_ns", "started_ns"),
    [(0, 60, 50), (50, 60, 50), (0, 55, 45), (53, 99, 53), (53, 62, 52), (58, 58, 48)],
)
def test_nothing_ends_in_the_future_or_begins_before_it_was_sent(
    sent_ns: int, now_ns: int, started_ns: int
) -> None:
    moved = structs.replace(ended(1), started_ns=started_ns, ended_ns=started_ns + 10)
    assert between(ended(1), sent_ns, now_ns) == moved

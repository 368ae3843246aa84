"""Where weights are, by what a controller saw and decided: loaded, unloaded, lost with their worker."""

from __future__ import annotations

from clockwork_serve.messages import (
    DeviceSpec,
    Extent,
    Load,
    Result,
    Status,
    Unload,
    Weights,
    Window,
    WorkerJoined,
    WorkerLost,
)
from clockwork_serve.sim.tally import ReadyWeights
from clockwork_serve.units import MIB


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

"""What a device tells a controller that is new to it: codes, weights, what runs, durations."""

from __future__ import annotations

from clockwork_serve.messages import DeviceState, Lane, Measured, Resident, Running, Unload
from clockwork_serve.worker.codes import CodeState
from clockwork_serve.worker.device import DeviceWorker
from clockwork_serve.worker.events import Prepare, Retire
from clockwork_serve.worker.lanes import LaneQueue
from clockwork_serve.worker.pages import WEIGHTS_LOADING, WEIGHTS_READY


def state_of(device: DeviceWorker, now_ns: int) -> DeviceState:
    """All of it; but weights on their way out are not told of: a controller is to believe them gone."""
    return DeviceState(
        device=device.name,
        codes=tuple([code_id for code_id, code in device.codes.items() if code.state is CodeState.READY]),
        weights=tuple(
            [
                Resident(
                    model=held.model, code_id=held.code_id, weights=held.weights, extent=held.extent,
                    version=held.version, ready=held.state is WEIGHTS_READY,
                )
                for held in device.pages.all()
                if not held.stale and held.weights and held.state in (WEIGHTS_LOADING, WEIGHTS_READY)
            ]
        ),
        running=tuple(
            [one for name, lane in device.lanes.items() if (one := _running(name, lane, now_ns)) is not None]
        ),
        measured=tuple(
            [
                Measured(code_id=code_id, batch=batch, signature=signature, lasted_ns=tuple(recent))
                for code_id, code in device.codes.items()
                for (batch, signature), recent in code.recent.items()
            ]
        ),
    )  # fmt: skip


def _running(name: Lane, lane: LaneQueue, now_ns: int) -> Running | None:
    """The action that a lane is at; its chores are told of by no result."""
    job = lane.running
    if job is None or isinstance(job.work, Prepare | Retire | Unload):
        return None
    action = job.work
    left_ns = lane.started_ns + action.expected_ns - now_ns
    return Running(
        action_id=action.action_id, lane=name, version=action.version, left_ns=max(0, left_ns),
        expected_ns=action.expected_ns,
    )  # fmt: skip

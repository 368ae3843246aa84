"""When a request could end on each device, as believed at an instant, and what it would wait for there.

For explanations: nothing changes, and nobody decides by it. It says in full what ``feasibility`` bounds.
"""

from __future__ import annotations

from bisect import bisect_right
from typing import NamedTuple

from clockwork_serve.controller.belief import Belief
from clockwork_serve.controller.cluster import DeviceBelief, ServedModel, level
from clockwork_serve.controller.life import READY
from clockwork_serve.controller.placement import usual_cost_ns
from clockwork_serve.messages import Infer, Request


class Ahead(NamedTuple):
    """Requests of one model that go before: in a batch that was sent, or waiting and due sooner."""

    model: str
    requests: int


class Outlook(NamedTuple):
    """One device, for one request; instants on the controller's clock.

    ``weights``: ``ready``, ``loading``, ``absent``, or why it cannot serve the model. ``ready_ns``: when they
    are or could be there. ``free_ns``: when what was ``sent`` to its lane will have ended. ``before_ns`` is
    the lane time of those ``waiting`` that are due sooner. ``infer_ns``: how long the least batch takes.
    ``end_ns``: the soonest end, 0 where it cannot serve the model.
    """

    device: str
    weights: str
    ready_ns: int
    free_ns: int
    sent: tuple[Ahead, ...]
    waiting: tuple[Ahead, ...]
    before_ns: int
    infer_ns: int
    load_ns: int
    end_ns: int


def outlooks(belief: Belief, request: Request, now_ns: int) -> list[Outlook]:
    """Of all devices, for a request that came or comes; none if its model is not served."""
    model = belief.models.get(request.model)
    if model is None:
        return []
    return [_outlook(belief, device, model, request, now_ns) for device in belief.devices.values()]


def _outlook(
    belief: Belief, device: DeviceBelief, model: ServedModel, request: Request, now_ns: int
) -> Outlook:
    sent = tuple(
        [
            Ahead(one.action.model, len(one.action.calls))
            for action_id, _ in device.exec.outstanding
            if (one := belief.sent.get(action_id)) is not None and isinstance(one.action, Infer)
        ]
    )
    free_ns = device.exec.available_ns(now_ns)
    waiting, before_ns = _waiting(belief, device, request)
    code = device.code_of(model)
    why = ""
    if not device.spec.runs(model.code.backend):
        why = device.spec.misfit(model.code.backend)
    elif model.model.weights.size > device.room_bytes:
        why = "its weights are larger than the device's memory"
    elif code is None:
        why = device.failed_weights.get(model.model.weights.weights_id, "")
        why = why or device.failed_codes.get(model.code_id, "its code is not prepared there")
    if why or code is None:
        return Outlook(device.name, why, 0, free_ns, sent, waiting, before_ns, 0, 0, 0)
    size = next(size for size in model.model.batch_sizes if size >= request.rows)
    infer_ns = code.timings.infer(size, request.signature).estimate_ns
    load_ns = code.timings.load(model.model.weights.size).estimate_ns
    residency = model.residencies.get(device.name)
    if residency is None:
        weights, ready_ns = "absent", device.load.available_ns(now_ns) + load_ns
    elif residency.state == READY:
        weights, ready_ns = "ready", now_ns
    else:
        weights, ready_ns = "loading", max(now_ns, residency.ready_ns)
    end_ns = max(free_ns + before_ns, ready_ns) + infer_ns
    return Outlook(
        device.name, weights, ready_ns, free_ns, sent, waiting, before_ns, infer_ns, load_ns, end_ns
    )


def _waiting(belief: Belief, device: DeviceBelief, request: Request) -> tuple[tuple[Ahead, ...], int]:
    """Who waits for a device with their weights and is due sooner, and the lane time that they take."""
    due_ns, urgency = belief.due_ns(request), level(request.priority)
    mine = belief.waiters.get(request.request_id)
    counts: dict[str, int] = {}
    before_ns = 0
    for residency in device.pages.holders():
        if residency.state != READY:
            continue
        for queue in residency.model.queues.values():
            if queue.level > urgency:
                continue
            count = bisect_right(queue.dues, due_ns)
            if mine is not None and mine.queue is queue and count:
                count -= 1
            for strategy in queue.strategies if count else ():
                if strategy.device is device:
                    key = residency.model.key
                    counts[key] = counts.get(key, 0) + count
                    before_ns += count * usual_cost_ns(strategy.batches) // len(queue.strategies)
    most = sorted(counts.items(), key=lambda one: -one[1])
    return tuple([Ahead(model, count) for model, count in most]), before_ns

"""Devices, models and weights for tests of the controller's parts, without a controller."""

from __future__ import annotations

from clockwork_serve.controller import ControllerConfig
from clockwork_serve.controller.belief import Belief
from clockwork_serve.controller.cluster import DeviceBelief, Queue, Reservation, Residency, ServedModel
from clockwork_serve.controller.plans import enter, hold
from clockwork_serve.messages import Extent, Request
from clockwork_serve.units import ms
from tests.controller.honest import CODE, device, model, profile


def belief(*devices: str, pages: int = 16, config: ControllerConfig | None = None) -> Belief:
    """A cluster of warm devices of ``pages`` pages of 1 MiB; nothing is on them."""
    made = Belief(config or ControllerConfig())
    made.codes[CODE.code_id] = CODE
    made.estimator.learn_profile(profile())
    for name in devices:
        one = DeviceBelief(device(name, pages), name, made.next_id(), made.config)
        made.devices[name] = one
        assert not made.prepare(one, CODE.code_id)
    return made


def serve(made: Belief, name: str, mib: int = 4) -> ServedModel:
    """A model that is served."""
    served = ServedModel(model(name, mib=mib), CODE, made.next_id())
    made.models[served.key] = served
    return served


def place(made: Belief, served: ServedModel, name: str, first: int = 0) -> Residency:
    """Its weights are on a device."""
    one = made.devices[name]
    extent = Extent(first, one.spec.pages_of(served.model.weights.size))
    made.send_load(one, served, extent, ms(1), ms(1))
    residency = served.residencies[name]
    one.load.end(residency.version, ms(9))
    made.loaded(residency)
    return residency


def ask(made: Belief, served: ServedModel, slo_ms: float = 100, count: int = 1, priority: int = 0) -> Queue:
    """Requests wait for it."""
    for _ in range(count):
        request = Request(
            request_id=f"r{made.next_id()}", gateway="g", model=served.key, arrival_ns=ms(10),
            deadline_ns=ms(10 + slo_ms), priority=priority,
        )  # fmt: skip
        waiter = made.admit(request, served)
    return waiter.queue


def promise(queue: Queue, residency: Residency, margin_ns: int = 0) -> Reservation:
    """All that wait in a queue, and were not promised yet, are, as one batch."""
    reserved = Reservation(queue, residency, margin_ns)
    waiters = [waiter for waiter in queue.waiters if waiter.promised_ns < 0]
    for waiter in waiters:
        waiter.promised_ns = ms(10)
    hold(reserved, waiters)
    enter(reserved)
    residency.reserved += 1
    return reserved

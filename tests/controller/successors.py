"""A controller that takes over workers which had another one before."""

from __future__ import annotations

from clockwork_serve.controller import Controller, ControllerConfig
from clockwork_serve.messages import (
    CodeAdded,
    ControllerEffect,
    ControllerEvent,
    DeviceSpec,
    DeviceState,
    Extent,
    ModelAdded,
    Request,
    Resident,
    Result,
    Running,
    Status,
    WorkerJoined,
)
from clockwork_serve.units import MIB, ms
from tests.controller.honest import CODE, model, profile

GPU = DeviceSpec(device="gpu0", kind="emulated", pages=16, page_bytes=MIB, workspace_bytes=0, io_bytes=0)
LIFE = 1_000_000


def resident(name: str, first: int, version: int, *, ready: bool = True) -> Resident:
    return Resident(
        model=f"{name}/1", code_id="c", weights=model(name).weights, extent=Extent(first, 4), version=version,
        ready=ready,
    )  # fmt: skip


def state(*weights: Resident, running: tuple[Running, ...] = (), **fields: object) -> DeviceState:
    plain = {"device": "gpu0", "codes": ("c",), "weights": weights, "running": running}
    return DeviceState(**(plain | fields))  # type: ignore[arg-type]


class Successor:
    """A new controller that serves a and b, and is told things in ms; every step is checked."""

    def __init__(self, **settings: object) -> None:
        self.controller = Controller(ControllerConfig(first_id=LIFE, **settings))  # type: ignore[arg-type]
        self(0, CodeAdded(code=CODE, profiles=(profile(),)), ModelAdded(model=model("a")))
        self(0, ModelAdded(model=model("b")))

    def __call__(self, at_ms: float, *events: ControllerEvent) -> list[ControllerEffect]:
        for event in events:
            self.controller.observe(event, ms(at_ms))
        effects = self.controller.decide(ms(at_ms))
        self.controller.check()
        assert self.controller.decide(ms(at_ms)) == []
        return effects

    def joined(self, found: DeviceState) -> list[ControllerEffect]:
        return self(1, WorkerJoined(worker="w0", devices=(GPU,), states=(found,)))


def ask(name: str, at_ms: float = 2, slo_ms: float = 100, number: int = 1) -> Request:
    return Request(
        request_id=f"r{number}", gateway="g", model=f"{name}/1", arrival_ns=ms(at_ms),
        deadline_ns=ms(at_ms + slo_ms),
    )  # fmt: skip


def result(action_id: int, at_ms: float, status: Status = Status.OK, lasted_ms: float = 1) -> Result:
    ended_ns = ms(at_ms)
    return Result(
        action_id=action_id, device="gpu0", status=status, started_ns=ended_ns - ms(lasted_ms),
        ended_ns=ended_ns, outputs=(b"",),
    )  # fmt: skip


def only(effects: list[ControllerEffect], kind: type[ControllerEffect]) -> list[ControllerEffect]:
    return [effect for effect in effects if isinstance(effect, kind)]

"""The controller's links in the test's own process, with models and workers."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Iterable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from clockwork_serve.messages import (
    Ask,
    Beat,
    CodeAdded,
    ControllerEffect,
    ControllerEvent,
    Frame,
    ModelAdded,
    Question,
    Reply,
    Role,
    SoonestEnd,
    WorkerJoined,
)
from clockwork_serve.serve.controller.hub import Hub
from clockwork_serve.serve.transport import Link, connect, hello, listen
from clockwork_serve.telemetry import Recorder
from harness import records
from tests.serve.links import until


class Brain:
    """Records the events that it observes, and decides on the ``effects`` that the test sets."""

    def __init__(self) -> None:
        self.seen: list[ControllerEvent] = []
        self.effects: list[ControllerEffect] = []
        self.ends: dict[str, SoonestEnd] = {}

    def observe(self, event: ControllerEvent, now_ns: int) -> None:
        self.seen.append(event)

    def decide(self, now_ns: int) -> list[ControllerEffect]:
        effects, self.effects = self.effects, []
        return effects

    def next_wakeup_ns(self) -> int | None:
        return None

    def check(self) -> None:
        pass

    def snapshot(self) -> dict[str, object]:
        return {"seen": len(self.seen)}

    def soonest_ends(self, keys: Iterable[str], now_ns: int) -> dict[str, SoonestEnd]:
        return {key: self.ends[key] for key in keys if key in self.ends}

    def accounts(self) -> dict[str, dict[str, int]]:
        return {}


class Peer:
    """A process at the other end, played by the test."""

    def __init__(self) -> None:
        self.frames: list[Frame] = []
        self.is_lost = False
        self.beats = True  # whether it returns them, where it is the supervisor
        self.link: Link

    def of(self, kind: type) -> list[Any]:
        return [frame for frame in self.frames if isinstance(frame, kind)]

    def send(self, *frames: Frame) -> None:
        for frame in frames:
            self.link.send(frame)


class World:
    """A hub that listens, and its brain."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.brain = Brain()
        self.recorder = Recorder()
        self.exchange = Hub(self.brain, self.recorder)

    async def peer(self, role: Role, name: str) -> Peer:
        peer = Peer()

        def lost(link: Link) -> None:
            peer.is_lost = True

        def take(link: Link, frames: list[Frame]) -> None:
            for frame in frames:
                if role is not Role.SUPERVISOR or not isinstance(frame, Beat):
                    peer.frames.append(frame)
                elif peer.beats:
                    link.send(frame)

        peer.link = await connect(self.path, hello(role, name), take, lost)
        return peer

    async def supervisor(self, *frames: Frame) -> Peer:
        """A supervisor that has sent its catalogue."""
        supervisor = await self.peer(Role.SUPERVISOR, "keeper")
        supervisor.send(*frames, Ask(ask_id=1, what=Question.STATE))
        await until(lambda: supervisor.of(Reply))
        return supervisor

    async def worker(self, name: str, *devices: str) -> Peer:
        worker = await self.peer(Role.WORKER, name)
        worker.send(joined(name, *devices))
        return worker

    def decide(self, *effects: ControllerEffect) -> None:
        self.brain.effects += effects
        self.exchange.driver.wake()


@asynccontextmanager
async def a_world(tmp_path: Path, make: Callable[[Path], World] = World) -> AsyncIterator[World]:
    world = make(tmp_path / "c.sock")
    hub = world.exchange
    own = hello(Role.CONTROLLER, "controller")
    listener = await listen(world.path, own, hub.on_link, hub.on_frames, hub.on_lost)
    try:
        yield world
    finally:
        listener.close()
        hub.driver.close()


def joined(worker: str, *devices: str) -> WorkerJoined:
    specs = tuple(
        records.device(device, 4, 4096, kind="cpu", workspace_bytes=1, io_bytes=1) for device in devices
    )
    return WorkerJoined(worker=worker, devices=specs)


def code(code_id: str = "c1") -> CodeAdded:
    return CodeAdded(code=records.code(code_id, (1,), backend="onnx", path="/c", inputs=(), outputs=()))


def model(key: str = "m/1", code_id: str = "c1", priority: int = 0) -> ModelAdded:
    name, version = key.split("/")
    made = records.model(name, code_id, version=version, sizes=(1,), size=1, path="/w", priority=priority)
    return ModelAdded(model=made)

"""Lanes of a worker on a scripted device."""

from __future__ import annotations

import asyncio
import queue
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

import numpy as np
from msgspec import structs

from clockwork_serve.devices.base import CallBuffers, Phases, Underway, put_outputs
from clockwork_serve.messages import (
    Code,
    CodeAdded,
    CodeReady,
    DeviceSpec,
    Infer,
    Load,
    Result,
    Status,
    TensorSpec,
    Unload,
    Window,
)
from clockwork_serve.serve.worker.lanes import Answer, LaneExecutors
from clockwork_serve.units import ms
from clockwork_serve.worker import Worker, WorkerEvent
from tests.serve.slots import Slot
from tests.worker.actions import CODE, GPU, SPEC, load

Timed = TypeVar("Timed", Load, Unload, Infer)


TIMEOUT_S = 30.0
FAR = 1 << 62
Y = TensorSpec(name="y", datatype="FP32", shape=(-1,))


class Toy:
    """A device that logs its calls, calls ``act`` first, and computes ``y`` as twice ``x``."""

    def __init__(self, spec: DeviceSpec = SPEC) -> None:
        self.spec = spec
        self.log: list[str] = []
        self.started_ns: dict[int, int] = {}
        self.act: Callable[[str], None] = lambda what: None
        self.threads: dict[str, str] = {}

    def _note(self, what: str) -> None:
        self.threads[what.split(maxsplit=1)[0]] = threading.current_thread().name
        self.log.append(what)
        self.act(what)

    def prepare(self, code: Code) -> None:
        self._note(f"prepare {code.code_id}")

    def retire(self, code_id: str) -> None:
        self._note(f"retire {code_id}")

    def load(self, action: Load) -> int:
        self.started_ns[action.action_id] = time.monotonic_ns()
        self._note(f"load {action.model}")
        return 0

    def unload(self, action: Unload) -> None:
        self._note(f"unload {action.model}")

    def infer(self, action: Infer, calls: Sequence[CallBuffers]) -> Phases:
        self.started_ns[action.action_id] = time.monotonic_ns()
        self._note(f"infer {action.model} {len(calls)}")
        for call in calls:
            put_outputs(call, [(Y, call.inputs["x"] * 2)])
        return Phases(1, 2, 3)

    def close(self) -> None:
        self._note("close")


class TimedToy(Toy):
    """The same for a device that only takes time: a LOAD 1 ms, an INFER 2; ``y`` is 0."""

    def begin_load(self, action: Load) -> Underway:
        self.load(action)
        return Underway(time.monotonic_ns() + ms(1))

    def begin_infer(self, action: Infer, calls: Sequence[CallBuffers]) -> Underway:
        self._note(f"infer {action.model} {len(calls)}")
        for call in calls:
            put_outputs(call, [(Y, np.zeros((1, 1), np.float32))])
        return Underway(time.monotonic_ns() + ms(2), 5)


class Bench:
    """Lane executors around a brain and toy devices, and a queue of their answers."""

    def __init__(self, *devices: Toy, on_codes_changed: Callable[[], None] = lambda: None) -> None:
        self.devices = devices
        self.notified = threading.Semaphore(0)
        self.broken: list[BaseException] = []
        self.answers: queue.Queue[Answer] = queue.Queue()
        self.executors = LaneExecutors(
            Worker(tuple(device.spec for device in devices)),
            {device.spec.device: device for device in devices},
            self.notified.release,
            on_codes_changed=on_codes_changed,
            on_broken=self.broken.append,
        )

    def post(self, *events: WorkerEvent) -> None:
        self.executors.post(*events)
        self._collect()

    def _collect(self) -> None:
        for each in self.executors.take_answers():
            self.answers.put(each)

    def next(self) -> Answer:
        """The next answer, waited for."""
        while self.answers.empty():
            assert self.notified.acquire(timeout=TIMEOUT_S), f"not notified; broken: {self.broken}"
            self._collect()
        return self.answers.get()

    async def later(self) -> Answer:
        """The next answer of lanes that are on the running loop."""
        while self.answers.empty():
            await asyncio.sleep(0.0005)
            self._collect()
        return self.answers.get()

    async def result_later(self) -> Result:
        got = await self.later()
        assert isinstance(got, Result)
        return got

    def result(self) -> Result:
        got = self.next()
        assert isinstance(got, Result)
        return got

    def ask(self, *events: WorkerEvent) -> Result:
        self.post(*events)
        return self.result()

    def loaded(self, model: str = "a", first: int = 0, device: str = GPU) -> None:
        result = self.ask(timely(load(900 + first, model, first, device=device)))
        assert result.status is Status.OK, result


@contextmanager
def bench(*devices: Toy, on_codes_changed: Callable[[], None] = lambda: None) -> Iterator[Bench]:
    made = Bench(*devices, on_codes_changed=on_codes_changed)
    made.executors.start()
    made.post(CodeAdded(code=CODE))
    for _ in devices:
        assert isinstance(made.next(), CodeReady)
    try:
        yield made
    finally:
        assert made.executors.close(TIMEOUT_S)
        assert not made.broken


def timely(action: Timed, after_ms: float = 0) -> Timed:
    """The action with a window that opens ``after_ms`` from now (0: is open), and never closes."""
    opens = time.monotonic_ns() + ms(after_ms) if after_ms else 0
    return structs.replace(action, window=Window(opens, FAR))


def over(action: Infer, *slots: Slot) -> Infer:
    """The INFER with these requests as its calls."""
    calls = tuple(each.call(request_id=f"r{at}") for at, each in enumerate(slots))
    batch = 1 if len(calls) == 1 else 4
    return timely(structs.replace(action, calls=calls, batch=batch))


X: np.ndarray[Any, Any] = np.arange(4, dtype=np.float32).reshape(1, 4)

"""The I/O side of a worker process: its link to the controller, and the check of weights beside it."""

from __future__ import annotations

import asyncio
import logging
import os
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, Final, Protocol

from msgspec import Struct

from clockwork_serve.config import Settings
from clockwork_serve.devices import DeviceConfig
from clockwork_serve.devices.base import Device
from clockwork_serve.errors import DamageError, TransportError
from clockwork_serve.fence import Fence
from clockwork_serve.messages import (
    Beat,
    CodeAdded,
    CodeRemoved,
    DeviceNumbers,
    Frame,
    Hello,
    Infer,
    Lane,
    Load,
    ModelAdded,
    Result,
    RetainWeights,
    Role,
    TensorsOffered,
    Unload,
    Weights,
    WorkerJoined,
)
from clockwork_serve.serve.transport import SOCKET_NAME, Link, connect, hello, retry_s
from clockwork_serve.serve.worker.crash_report import create_recorder
from clockwork_serve.serve.worker.lanes import Answer, LaneExecutors
from clockwork_serve.worker import ControllerFound, ControllerLost, Stop, Worker, WorkerEvent

REPORT_INTERVAL_S: Final = 5.0  # how often the counters of devices are sent to the controller
PRUNE_INTERVAL_S: Final = 2.0
"""How often shared memory of dead gateways is unmapped; a worker without new requests would keep it."""
_IDLE_POLL_S: Final = 0.005
LAST_WORDS_S: Final = 2.0  # how long what was answered may take to be read before the process ends

_log = logging.getLogger(__name__)


class WorkerConfig(Struct, frozen=True, kw_only=True):
    """The configuration of a worker process.

    ``settings.isolate`` may run its threads under SCHED_FIFO, with CAP_SYS_NICE or an rtprio limit of 11
    or more, and two CPUs at least: a lane that computes leaves no CPU to other threads. ``elsewhere``: the
    worker joins the server at ``settings.controller``, on another machine.
    """

    run_dir: str
    name: str
    devices: tuple[DeviceConfig, ...]
    settings: Settings = Settings()
    elsewhere: bool = False


class TensorCarrier(Protocol):
    """Brings inputs from gateways on other machines, and outputs to them."""

    @property
    def idle(self) -> bool:
        """Whether nothing is on its way."""

    def bring(self, action: Infer) -> bool:
        """Have the inputs of an INFER brought, to post it then; False if it can be posted now."""

    def offered(self, offer: TensorsOffered) -> None:
        """Try whether tensors come from a gateway, and report it."""

    def answer(self, result: Result) -> Result | None:
        """The result if it can be sent now; else it is sent once its outputs are there."""

    def renew(self) -> None:
        """Forget all INFERs: the link was lost."""

    def close(self) -> None:
        """Close all connections."""


class WorkerHost:
    """One worker on the running loop. ``on_codes_changed``: see :class:`LaneExecutors`.

    ``tensors`` is set where gateways may be on other machines.
    """

    def __init__(
        self, config: WorkerConfig, devices: Mapping[str, Device],
        on_codes_changed: Callable[[], None] = lambda: None,
    ) -> None:  # fmt: skip
        name = self._name = config.name
        run_dir = Path(config.run_dir)
        self._path = run_dir / SOCKET_NAME
        self._counting = {
            name: count for name, device in devices.items() if (count := getattr(device, "counters", None))
        }
        self._expecting = [
            expect for device in devices.values() if (expect := getattr(device, "expect", None))
        ]
        self._specs = tuple(device.spec for device in devices.values())
        self._loop = asyncio.get_running_loop()
        self._thread = threading.get_ident()
        self._fence = Fence()
        self._link: Link | None = None  # None while there is no controller
        self.tensors: TensorCarrier | None = None
        self._unlinked = asyncio.Event()
        self.executors = LaneExecutors(
            Worker(self._specs), devices, self._wake, realtime=config.settings.is_realtime,
            on_codes_changed=on_codes_changed,
            recorder=create_recorder(run_dir, name, len(devices) * len(Lane)),
        )  # fmt: skip
        self.verifier = Verifier(devices.values(), self.executors.report_damage)

    def _wake(self) -> None:
        """Deliver the lanes' answers, or have the loop do so; for any thread."""
        if threading.get_ident() == self._thread:
            self._deliver()
        else:
            self._loop.call_soon_threadsafe(self._deliver)

    async def run(self, stop: asyncio.Event) -> None:
        """Serve until ``stop``; then refuse queued actions, finish running ones, and return."""
        self.executors.start()
        stopped = self._loop.create_task(stop.wait())
        reporting = self._loop.create_task(self._report_numbers())
        pruning = self._loop.create_task(self._prune())
        while not stop.is_set():
            joined = self._loop.create_task(self._join())
            await asyncio.wait((stopped, joined), return_when=asyncio.FIRST_COMPLETED)
            if not joined.done():
                joined.cancel()
                break
            joined.result()
            lost = self._loop.create_task(self._unlinked.wait())
            await asyncio.wait((stopped, lost), return_when=asyncio.FIRST_COMPLETED)
            lost.cancel()
        stopped.cancel()
        reporting.cancel()
        pruning.cancel()
        await self._finish()

    async def _report_numbers(self) -> None:
        """Send the counters of devices that have any, periodically."""
        while self._counting:
            for name, count in list(self._counting.items()):
                try:
                    numbers = count()
                except Exception as error:  # noqa: BLE001 - the device's lanes report what is wrong with it
                    _log.warning("the counters of %s cannot be read any more: %s", name, error)
                    del self._counting[name]
                    continue
                if self._link is not None:
                    self._link.send(DeviceNumbers(device=name, numbers=numbers))
            await asyncio.sleep(REPORT_INTERVAL_S)

    async def _prune(self) -> None:
        while True:
            await asyncio.sleep(PRUNE_INTERVAL_S)
            self.executors.regions.prune()
            self.executors.spill.free_unused()

    async def _join(self) -> None:
        """Connect, with as many attempts as it takes, and announce the devices with what they hold."""
        own, logged, tries = hello(Role.WORKER, self._name), "", 0
        while True:
            try:
                link = await self._connect(own)
            except TransportError as error:
                if str(error) != logged:
                    logged = str(error)
                    _log.info("no controller yet: %s", logged)
                tries += 1
                await asyncio.sleep(retry_s(tries))
                continue
            self._check(link.peer)
            self._link = link
            self._unlinked.clear()
            self._offer(link)
            _log.info("joined with %s", ", ".join(spec.device for spec in self._specs))
            return

    async def _connect(self, own: Hello) -> Link:
        return await connect(self._path, own, self._on_frames, self._on_lost, self._fence)

    def _offer(self, link: Link) -> None:
        """Announce the devices on a new link."""
        for answer in self._joined_answers():
            link.send(answer)
        link.flush()

    def _joined_answers(self) -> list[Answer]:
        self.executors.post(ControllerFound(worker=self._name))
        answers = self.executors.take_answers()
        # Answers before WorkerJoined belong to the link before.
        while not isinstance(answers[0], WorkerJoined):
            answers.pop(0)
        return answers

    def _check(self, peer: Hello) -> None:
        if peer.role is not Role.CONTROLLER:
            raise TransportError(
                f"{self._path}: expected a controller there, found {peer.role} {peer.name!r}"
            )

    def _on_frames(self, link: Link, frames: list[Frame]) -> None:
        events: list[WorkerEvent] = []
        for frame in frames:
            match frame:
                case Infer() if self._brought(frame, events):
                    pass
                case Load() | Unload() | Infer() | CodeAdded() | CodeRemoved() | RetainWeights():
                    events.append(frame)
                case ModelAdded():
                    self.verifier.add(frame.model.weights)
                    for expect in self._expecting:
                        expect(frame.model)
                case Beat():
                    link.send(frame)
                case TensorsOffered():
                    if self.tensors is not None:
                        self.tensors.offered(frame)
                case _:
                    _log.error("the controller sent a %s, which no worker expects", type(frame).__name__)
        if events:
            self.executors.post(*events)
        self._deliver()

    def _on_lost(self, link: Link) -> None:
        _log.warning("lost the controller: %s", link.lost_because)
        self._link = None
        self._unlinked.set()
        self.executors.post(ControllerLost())
        self._deliver()
        if self.tensors is not None:
            self.tensors.renew()
        self.executors.regions.prune()

    def post(self, event: WorkerEvent) -> None:
        """Post an event, and send what comes of it at once."""
        self.executors.post(event)
        self._deliver()

    def send(self, frame: Frame | None) -> None:
        """Send a frame, if there is one, and a link."""
        if frame is not None and self._link is not None:
            self._link.send(frame)

    def _brought(self, action: Infer, before: list[WorkerEvent]) -> bool:
        """Whether an INFER waits for inputs from elsewhere; what came before it is posted first."""
        if self.tensors is None:
            return False
        if before:
            self.executors.post(*before)
            before.clear()
        return self.tensors.bring(action)

    def _deliver(self) -> None:
        answers = self.executors.take_answers()
        if self._link is None or not answers:
            return
        for answer in answers:
            self._answer(answer)
        self._link.flush()

    def _answer(self, answer: Answer) -> None:
        if self.tensors is not None and isinstance(answer, Result):
            self.send(self.tensors.answer(answer))
        else:
            self.send(answer)

    async def _finish(self) -> None:
        self.verifier.close()
        self.executors.post(Stop())
        self._deliver()
        while not self.executors.idle:
            await asyncio.sleep(_IDLE_POLL_S)
            self._deliver()
        await self._before_close()
        if self._link is not None:
            self._link.close()
        if not self.executors.close():
            _log.error("a lane did not end")
        if self.tensors is not None:
            self.tensors.close()

    async def _before_close(self) -> None:
        """Wait for what would be lost with this process: outputs that no gateway has."""
        end_s = self._loop.time() + LAST_WORDS_S
        while self.executors.spill.free_unused() or not (self.tensors is None or self.tensors.idle):
            if self._loop.time() > end_s:
                return
            await asyncio.sleep(_IDLE_POLL_S)


# ------------------------------------------------------------
# Verifies the checksums of weights in the background, before their first LOAD; a quarter of a core at most.
#
# A worker knows every model. Reading and hashing a file takes about six times as long as its LOAD, and at a
# first LOAD of weights that are not verified yet the lane must do it. The thread is not niced: if it waited
# for a core while it held the interpreter's lock, lanes would wait, too. It sleeps three times as long as
# it works.


SLEEP_FACTOR: Final = 3  # the thread sleeps this many times as long as it worked
SLEEP_MIN_S: Final = 0.001


def is_blob(weights: Weights) -> bool:
    """Whether weights are a file of their own, named by its content."""
    return Path(weights.path).name == f"{weights.weights_id}.bin"


class Verifier:
    """Verifies weights on the given devices.

    ``damaged`` is called, by the verifier's thread, for each file whose content does not match its name.
    """

    def __init__(self, devices: Iterable[Device], damaged: Callable[[DamageError], None]) -> None:
        self._verifiers: list[Callable[[Weights], None]] = [
            verify for device in devices if (verify := getattr(device, "verify", None))
        ]
        self._damaged = damaged
        self._waiting: dict[str, Weights] = {}  # by id, in the order they were added
        self._lock = threading.Lock()
        self._thread: threading.Thread | None = None
        self._closing = threading.Event()

    def add(self, weights: Weights) -> None:
        """Queue weights for verification; ignored if they are no file of their own."""
        if not self._verifiers or not is_blob(weights):
            return
        with self._lock:
            self._waiting[weights.weights_id] = weights
            if self._thread is None and not self._closing.is_set():
                self._thread = threading.Thread(target=self._run, name="verifier", daemon=True)
                self._thread.start()

    def close(self) -> None:
        """Verify no more."""
        self._closing.set()

    def join(self) -> None:
        """Wait until all added weights are verified: for tests."""
        thread = self._thread
        if thread is not None:
            thread.join()

    def _run(self) -> None:
        # The scheduling policy is inherited: a real-time thread may have started this one. Any other may be
        # the operator's choice, which not everybody may change.
        if os.sched_getscheduler(0) == os.SCHED_FIFO:
            os.sched_setscheduler(0, os.SCHED_OTHER, os.sched_param(0))
        while (weights := self._next()) is not None:
            began_s = time.monotonic()
            self._verify_one(weights)
            sleep_s = max(SLEEP_MIN_S, SLEEP_FACTOR * (time.monotonic() - began_s))
            if self._closing.wait(sleep_s):
                return

    def _next(self) -> Any:
        with self._lock:
            if self._waiting and not self._closing.is_set():
                return self._waiting.pop(next(iter(self._waiting)))
            self._thread = None
            return None

    def _verify_one(self, weights: Weights) -> None:
        for verify in self._verifiers:
            try:
                verify(weights)
            except DamageError as error:
                self._damaged(error)
                return
            except Exception as error:  # noqa: BLE001 - the LOAD will report what is wrong
                _log.warning("weights %s could not be verified: %s", weights.weights_id, error)

"""A worker on another machine than its controller: the same lanes, behind a link over the network.

After a lost link it joins with empty memory, whatever weights it holds.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Mapping
from random import Random
from typing import Final

import msgspec

from clockwork_serve import __version__
from clockwork_serve.config import Settings
from clockwork_serve.config.table import split_address
from clockwork_serve.devices import profile_kind
from clockwork_serve.devices.base import Device
from clockwork_serve.errors import ConfigError
from clockwork_serve.messages import (
    ArtefactDamaged,
    CodeAdded,
    CodeReady,
    CodeRemoved,
    Fetch,
    Frame,
    Hello,
    Infer,
    Load,
    MachineHello,
    ModelAdded,
    ModelRemoved,
    Part,
    Refused,
    RetainWeights,
    Unload,
    WorkerJoined,
)
from clockwork_serve.serve.remote.config import ClusterContext, cluster_files
from clockwork_serve.serve.remote.link import connect_machine
from clockwork_serve.serve.remote.tensors import RemoteTensors, waiting_s
from clockwork_serve.serve.remote.transfer import MachineArtefacts
from clockwork_serve.serve.transport import RETRY_S, Link
from clockwork_serve.serve.worker.host import WorkerConfig, WorkerHost
from clockwork_serve.serve.worker.lanes import Answer
from clockwork_serve.store import Cache, runtime_fingerprint

RETRY_S_MAX: Final = 1.0
"""The longest pause between attempts to connect."""

_log = logging.getLogger(__name__)


class MachineHost(WorkerHost):
    """A :class:`WorkerHost` whose server is at ``settings.controller``, on another machine."""

    def __init__(
        self,
        config: WorkerConfig,
        devices: Mapping[str, Device],
        on_codes_changed: Callable[[], None] = lambda: None,
    ) -> None:
        super().__init__(config, devices, on_codes_changed)
        settings = self._settings = config.settings
        self._kinds = tuple(profile_kind(device) for device in config.devices)
        self._context = ClusterContext(cluster_files(settings), server=False)
        self._dice = Random()
        self._artefacts = MachineArtefacts(
            Cache(settings.cache, reads_weights=False), self._ask, self._tell_damage, self.verifier.add
        )
        self.tensors = tensors_of(self, settings, split_address(settings.controller)[0])
        self._removed: set[str] = set()  # codes that were removed while they were fetched
        self._refused: asyncio.Future[None] = self._loop.create_future()
        self._linked_s = 0.0  # when the last link was opened
        self._pause_s = 0.0  # before the next one

    async def run(self, stop: asyncio.Event) -> None:
        """As :meth:`WorkerHost.run`. Raises :class:`ConfigError` if the server refuses it for good."""
        serving = self._loop.create_task(super().run(stop))
        await asyncio.wait((serving, self._refused), return_when=asyncio.FIRST_COMPLETED)
        if not serving.done():
            stop.set()
        await serving
        self._artefacts.close()
        if self._refused.done():
            self._refused.result()

    # Joining

    async def _connect(self, own: Hello) -> Link:
        await asyncio.sleep(self._pause_s)
        link = await connect_machine(
            split_address(self._settings.controller), self._context.now(), own, self._on_frames,
            self._on_lost, self._settings.silence_s,
        )  # fmt: skip
        self._linked_s = self._loop.time()
        return link

    def _retry_s(self, tries: int) -> float:
        return float(min(RETRY_S_MAX, RETRY_S * 2 ** min(tries - 1, 10)) * self._dice.uniform(0.5, 1.0))

    def _offer(self, link: Link) -> None:
        machine = MachineHello(
            worker=self._name, version=__version__, runtime=runtime_fingerprint(), kinds=self._kinds
        )
        link.send(machine)
        # It joins with empty memory, for versions of weights are not comparable between two servers.
        for answer in self._joined_answers():
            empty = isinstance(answer, WorkerJoined)
            link.send(msgspec.structs.replace(answer, states=()) if empty else answer)
        self.executors.post(*(RetainWeights(device=spec.device) for spec in self._specs))
        _log.info("offered %s to %s", self._name, self._settings.controller)

    def _on_refused(self, link: Link, refused: Refused) -> None:
        if refused.final:
            if not self._refused.done():
                self._refused.set_exception(
                    ConfigError(f"the server does not take {self._name}: {refused.why}")
                )
            return
        _log.warning("the server does not take this worker yet: %s", refused.why)

    def _on_lost(self, link: Link) -> None:
        # While links are lost soon after they were opened, the pause before the next attempt grows.
        short = self._loop.time() - self._linked_s < RETRY_S_MAX
        self._pause_s = min(RETRY_S_MAX, 2 * self._pause_s or RETRY_S) if short else 0.0
        super()._on_lost(link)
        self._artefacts.forget()

    # Received frames

    def _on_frames(self, link: Link, frames: list[Frame]) -> None:
        for frame in frames:
            match frame:
                case Infer():
                    if not self._brought(frame, []):
                        self.post(frame)
                case Load():
                    self._load(link, frame)
                case CodeAdded():
                    self._removed.discard(frame.code.code_id)
                    self._artefacts.code(frame, self._on_code)
                case CodeRemoved():
                    self._removed.add(frame.code_id)
                    self.post(frame)
                case Unload():
                    self.post(frame)
                case ModelAdded():
                    self._artefacts.add_model(frame.model)
                case ModelRemoved():
                    self._artefacts.remove_model(frame.model)
                case Part():
                    self._artefacts.take(frame)
                case Refused():
                    self._on_refused(link, frame)
                case _:
                    _log.error("the server sent a %s, which no worker takes", type(frame).__name__)

    def _load(self, link: Link, action: Load) -> None:
        """Post a LOAD once its weights are cached, or when its window closes, so that its lane rejects it."""
        waits = True

        def go(there: Load) -> None:
            nonlocal waits
            if waits and self._link is link:
                waits = False
                self.post(there)

        if not self._artefacts.load(action, go):
            left_ns = action.window.latest_ns - time.monotonic_ns()
            self._loop.call_later(waiting_s(left_ns), go, action)

    def _on_code(self, added: CodeAdded, error: str) -> None:
        code = added.code
        if not error:
            if code.code_id not in self._removed:
                self.post(added)
            return
        for spec in self._specs:
            if spec.runs(code.backend) and self._link is not None:
                self._link.send(CodeReady(device=spec.device, code_id=code.code_id, ok=False, message=error))

    def _tell_damage(self, damaged: ArtefactDamaged) -> None:
        if self._link is not None:
            self._link.send(damaged)

    def _ask(self, asked: Fetch) -> None:
        if self._link is not None:
            self._link.send(asked)

    def _answer(self, answer: Answer) -> None:
        if isinstance(answer, ArtefactDamaged):
            self._artefacts.damaged(answer)
        super()._answer(answer)


def tensors_of(host: WorkerHost, settings: Settings, server: str = "") -> RemoteTensors:
    """The tensors that a worker has elsewhere; ``server`` as in :class:`RemoteTensors`."""
    context = ClusterContext(cluster_files(settings), server=False)
    # Room for inputs and outputs of the actions that run, and of those that follow.
    region_bytes = 2 * max(settings.io_memory, settings.gateway_memory)
    return RemoteTensors(region_bytes, context, settings.silence_s, host.post, host.send, server)

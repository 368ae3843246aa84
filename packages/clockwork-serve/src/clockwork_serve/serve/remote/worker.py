"""A worker on another machine than its controller: the same lanes, behind a link over the network.

Where controllers of several hosts share a lease, whoever leads next is told what it holds. Any other server
has versions of weights of its own, so there it joins with empty memory after a lost link.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Mapping

import msgspec

from clockwork_serve import __version__
from clockwork_serve.config import Settings
from clockwork_serve.config.values import split_addresses
from clockwork_serve.devices import profile_kind
from clockwork_serve.devices.base import Device
from clockwork_serve.errors import TransportError
from clockwork_serve.messages import (
    Admitted,
    ArtefactDamaged,
    CodeAdded,
    CodeReady,
    CodeRemoved,
    Frame,
    Hello,
    Infer,
    Load,
    MachineHello,
    ModelAdded,
    ModelRemoved,
    Result,
    RetainWeights,
    Role,
    Status,
    TensorsOffered,
    Unload,
    WeightsReady,
    WorkerJoined,
)
from clockwork_serve.serve.remote.artefacts import MachineArtefacts
from clockwork_serve.serve.remote.config import ClusterContext, cluster_files, runtime
from clockwork_serve.serve.remote.finding import Joiner
from clockwork_serve.serve.remote.link import MachineLink
from clockwork_serve.serve.remote.tensors import RemoteTensors, waiting_s
from clockwork_serve.serve.transport import Link, hello
from clockwork_serve.serve.worker.host import WorkerConfig, WorkerHost
from clockwork_serve.serve.worker.lanes import Answer
from clockwork_serve.store import Cache

_log = logging.getLogger(__name__)


class MachineHost(WorkerHost):
    """A :class:`WorkerHost` whose server is at ``settings.controller``, on another machine."""

    def __init__(
        self, config: WorkerConfig, devices: Mapping[str, Device],
        on_codes_changed: Callable[[], None] = lambda: None,
    ) -> None:  # fmt: skip
        super().__init__(config, devices, on_codes_changed)
        settings = self._settings = config.settings
        self._kinds = tuple(profile_kind(device) for device in config.devices)
        self._joiner = Joiner(
            hello(Role.WORKER, config.name), settings, self._on_frames, self._on_lost, self._fence
        )
        self._artefacts = MachineArtefacts(
            Cache(settings.cache, reads_weights=False, store=settings.store), self.verifier.add,
            self._on_weights,
        )  # fmt: skip
        self.tensors = self._tensors = tensors_of(self, settings, split_addresses(settings.controller)[0][0])
        self._epoch = 0  # of the last controller that it joined; 0 if that had no lease that hosts share
        self._strays: set[int] = set()  # actions that still run, of which the controller was told nothing

    async def run(self, stop: asyncio.Event) -> None:
        """As :meth:`WorkerHost.run`. Raises :class:`ConfigError` if the server refuses it for good."""
        serving = self._loop.create_task(super().run(stop))
        await asyncio.wait((serving, self._joiner.refused), return_when=asyncio.FIRST_COMPLETED)
        if not serving.done():
            stop.set()
        await serving
        self._artefacts.close()
        if self._joiner.refused.done():
            self._joiner.refused.result()

    # Joining

    async def _connect(self, own: Hello) -> Link:
        shown = MachineHello(worker=self._name, version=__version__, runtime=runtime(), kinds=self._kinds)
        while True:
            try:
                link = await self._joiner.join(shown, self._on_open)
            except TransportError:
                continue  # it was logged, and the next attempt is made after a pause
            if link.is_open:  # it may have been lost again already
                return link

    def _on_open(self, link: MachineLink) -> None:
        self._tensors.server = self._joiner.host

    def _offer(self, link: Link) -> None:
        # Versions of weights are comparable between controllers that share a lease, and between no others.
        known = bool(self._epoch and link.peer.epoch)
        self._epoch = link.peer.epoch
        self._strays.clear()
        for answer in self._joined_answers():
            if isinstance(answer, WorkerJoined) and not known:
                self._strays.update(each.action_id for state in answer.states for each in state.running)
                link.send(msgspec.structs.replace(answer, states=()))
            else:
                link.send(answer)
        if not known:
            self.executors.post(*(RetainWeights(device=spec.device) for spec in self._specs))

    def _on_lost(self, link: Link) -> None:
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
                    self._artefacts.add_code(frame, self._on_code)
                case CodeRemoved():
                    self._artefacts.remove_code(frame.code_id)
                    self.post(frame)
                case Unload() | RetainWeights():
                    self.post(frame)
                case ModelAdded():
                    self._artefacts.add_model(frame.model)
                case ModelRemoved():
                    self._artefacts.remove_model(frame.model)
                case TensorsOffered():
                    self._tensors.offered(frame)
                case Admitted():
                    pass  # the first frame, which the joiner has understood
                case _:
                    _log.error("the server sent a %s, which no worker takes", type(frame).__name__)

    def _load(self, link: Link, action: Load) -> None:
        """Post a LOAD once its weights are cached, or when its window closes, so that its lane rejects it.

        If they cannot be had, it fails at once.
        """
        waits = True

        def go(there: Load, why: str = "") -> None:
            nonlocal waits
            if not waits or self._link is not link:
                return
            waits = False
            if why:
                self._on_weights(there.weights.weights_id, why)  # this may be another controller, or model
                now_ns = time.monotonic_ns()
                failed = Result(
                    action_id=there.action_id, device=there.device, status=Status.DAMAGED,
                    started_ns=now_ns, ended_ns=now_ns, message=why,
                )  # fmt: skip
                link.send(failed)
            else:
                self.post(there)

        if not self._artefacts.load(action, go):
            self._loop.call_later(waiting_s(action.window.latest_ns - time.monotonic_ns()), go, action)

    def _on_code(self, added: CodeAdded, error: str) -> None:
        code = added.code
        if not error:
            self.post(added)
            return
        for spec in self._specs:
            if spec.runs(code.backend) and self._link is not None:
                self._link.send(CodeReady(device=spec.device, code_id=code.code_id, ok=False, message=error))

    def _on_weights(self, weights_id: str, why: str) -> None:
        for spec in self._specs:
            self.send(WeightsReady(device=spec.device, weights_id=weights_id, ok=not why, message=why))

    def _answer(self, answer: Answer) -> None:
        if isinstance(answer, Result) and answer.action_id in self._strays:
            self._strays.remove(answer.action_id)
            return
        if isinstance(answer, ArtefactDamaged):
            self._artefacts.damaged(answer)
        super()._answer(answer)


def tensors_of(host: WorkerHost, settings: Settings, server: str = "") -> RemoteTensors:
    """The tensors that a worker has elsewhere; ``server`` as in :class:`RemoteTensors`."""
    context = ClusterContext(cluster_files(settings), server=False)
    # Room for inputs and outputs of the actions that run, and of those that follow.
    region_bytes = 2 * max(settings.io_memory, settings.gateway_memory)
    return RemoteTensors(region_bytes, context, settings.silence_s, host.post, host.send, server)

"""The controller process's links to gateways, workers and the supervisor, around its brain."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Final, Protocol

import msgspec

from clockwork_serve.errors import TransportError
from clockwork_serve.machine import Machine
from clockwork_serve.messages import (
    AdmissionQuery,
    AdmissionReply,
    Answer,
    ArtefactDamaged,
    Ask,
    Beat,
    Cancel,
    CodeAdded,
    CodeReady,
    CodeRemade,
    CodeRemoved,
    ControllerEffect,
    ControllerEvent,
    CreditBlocked,
    DamageCounted,
    Delivered,
    DeviceNumbers,
    DeviceSpec,
    Drain,
    Frame,
    GatewayLost,
    HandingOver,
    Infer,
    Load,
    ModelAdded,
    ModelRemoved,
    ModelsAskedFor,
    Preparing,
    ProcessesEnded,
    Quarantined,
    Question,
    QuotasSet,
    Readiness,
    Reason,
    Release,
    ReleaseFromQuarantine,
    Reply,
    Request,
    Result,
    RetainWeights,
    Role,
    SoonestEnd,
    SoonestEnds,
    StandbysCounted,
    TensorsOffered,
    TensorsReached,
    Unload,
    Unservable,
    WeightsReady,
    WorkerCrashed,
    WorkerHung,
    WorkerJoined,
)
from clockwork_serve.serve.driver import Driver, LoopTimer
from clockwork_serve.serve.flow_control import (
    CreditIssuer,
    PeerHeartbeat,
    SummaryIssuer,
    WorkerHeartbeats,
)
from clockwork_serve.serve.quarantines import Quarantines
from clockwork_serve.serve.transport import Link
from clockwork_serve.serve.worker.crash_report import ReadCrashReport, no_crash_report
from clockwork_serve.telemetry import Journal, Recorder
from clockwork_serve.telemetry.counters import DevicesWanted

# ------------------------------------------------------------
# Questions to the controller process: answered at once, or forwarded to the supervisor under an id of ours.


_log = logging.getLogger(__name__)

_SUPERVISOR_QUESTIONS: Final = frozenset({Question.INDEX, Question.LOAD, Question.UNLOAD})


@dataclass(slots=True, frozen=True)
class _PendingQuestion:
    link: Link
    ask_id: int

    def refuse(self, code: int, why: str) -> None:
        body = msgspec.json.encode({"error": why})
        self.link.send(Reply(ask_id=self.ask_id, ok=False, body=body, code=code))


class Questions:
    """Sends one reply to each question.

    ``answer`` returns the body of a reply to those that are not the supervisor's, or raises.
    ``supervisor_stuck`` returns why the supervisor will not answer; "" if it may.
    """

    def __init__(
        self, answer: Callable[[Ask], bytes], supervisor_stuck: Callable[[], str] = lambda: ""
    ) -> None:
        self._answer = answer
        self._supervisor_stuck = supervisor_stuck
        self._waiting: dict[int, _PendingQuestion] = {}  # for the supervisor, by our id
        self._count = 0

    def ask(self, link: Link, ask: Ask, supervisor: Link | None) -> None:
        """Answer a question, or forward it to the ``supervisor``; without one it is refused."""
        pending = _PendingQuestion(link, ask.ask_id)
        if ask.what in _SUPERVISOR_QUESTIONS:
            if supervisor is None:
                pending.refuse(503, "the supervisor is not connected; try again")
                return
            if why := self._supervisor_stuck():
                pending.refuse(503, why)
                return
            self._count += 1
            self._waiting[self._count] = pending
            supervisor.send(msgspec.structs.replace(ask, ask_id=self._count))
            return
        try:
            link.send(Reply(ask_id=ask.ask_id, ok=True, body=self._answer(ask)))
        except (msgspec.MsgspecError, ValueError, RecursionError, TransportError) as error:
            pending.refuse(400, f"{ask.what}: {error}")

    def reply(self, reply: Reply) -> None:
        """Forward the supervisor's reply to the link that asked; dropped if nobody waits for it."""
        pending = self._waiting.pop(reply.ask_id, None)
        if pending is not None:
            pending.link.send(msgspec.structs.replace(reply, ask_id=pending.ask_id))

    def requester_lost(self, link: Link) -> None:
        """Drop the questions of a link that was lost."""
        self._waiting = {ours: pending for ours, pending in self._waiting.items() if pending.link is not link}

    def supervisor_lost(self) -> None:
        """Refuse all forwarded questions: the supervisor's link was lost."""
        self._refuse_waiting("the supervisor went away; try again")

    def supervisor_stalled(self, why: str) -> None:
        """Refuse all forwarded questions: the supervisor is stalled. Its later replies are dropped."""
        self._refuse_waiting(f"{why}; what was asked of it may still be done then")

    def _refuse_waiting(self, why: str) -> None:
        waiting, self._waiting = self._waiting, {}
        for pending in waiting.values():
            pending.refuse(503, why)


# ------------------------------------------------------------
# Which workers get tensors from which gateways, where either may be on other machines.


class Reaching:
    """What gateways offer, and what workers report of it.

    A gateway is to serve once one worker gets tensors from it. Which worker runs a request is chosen without
    a look at this: where only some get them, the others refuse their INFERs, and the log says why.
    """

    def __init__(self) -> None:
        self.offers: dict[str, TensorsOffered] = {}  # by gateway
        self._why: dict[str, dict[str, str]] = {}  # by gateway and worker: "" where tensors come

    def offered(self, offer: TensorsOffered) -> None:
        """A gateway has its tensors there; nobody has tried yet."""
        self.offers[offer.gateway] = offer
        self._why[offer.gateway] = {}

    def gateway_lost(self, gateway: str) -> bool:
        """Forget a gateway; whether it had offered anything."""
        self._why.pop(gateway, None)
        return self.offers.pop(gateway, None) is not None

    def reported(self, worker: str, found: TensorsReached) -> TensorsReached:
        """A worker has tried; what its gateway is to be sent."""
        if not found.ok:
            _log.warning("%s gets no tensors from %s: %s", worker, found.gateway, found.why)
        elif self._why.get(found.gateway, {}).get(worker):
            _log.warning("%s gets tensors from %s again", worker, found.gateway)
        self._why.setdefault(found.gateway, {})[worker] = found.why
        return self._of(found.gateway)

    def worker_lost(self, worker: str) -> list[TensorsReached]:
        """A worker is gone; what gateways are to be sent."""
        had = [gateway for gateway, workers in self._why.items() if workers.pop(worker, None) is not None]
        return [self._of(gateway) for gateway in had if self._why[gateway]]

    def _of(self, gateway: str) -> TensorsReached:
        workers = self._why[gateway]
        if "" in workers.values():
            return TensorsReached(gateway=gateway, ok=True)
        worker, why = next(iter(workers.items()))
        return TensorsReached(gateway=gateway, ok=False, why=f"{worker}: {why}")


# ------------------------------------------------------------
# The links: frames become events of the brain, and its effects are sent to the process that they concern.


class Brain(Machine[ControllerEvent, ControllerEffect], Protocol):
    """The controller, as this process uses it."""

    def snapshot(self) -> dict[str, object]:
        """Its state, for screens: plain data that encodes as JSON."""

    def soonest_ends(self, keys: Iterable[str], now_ns: int) -> dict[str, SoonestEnd]:
        """By model key, of these ``keys``, when one more request could end at the soonest."""

    def accounts(self) -> dict[str, dict[str, int]]:
        """Quota and charges of each tenant that has a quota, by name."""


class Hub:
    """Runs a brain under a driver, and carries frames between it and the links.

    It keeps the catalogue of codes and models, and replays it to each process that connects.
    ``read_crash_report`` is called when a worker's link is lost. ``read_wanted`` has what is
    said of devices, for metrics.
    """

    def __init__(
        self,
        brain: Brain,
        recorder: Recorder,
        journal: Journal | None = None,
        *,
        read_crash_report: ReadCrashReport = no_crash_report,
        read_wanted: Callable[[], DevicesWanted | None] = lambda: None,
        timer: Callable[[Callable[[], None]], LoopTimer] = LoopTimer,
    ) -> None:
        self.driver: Driver[ControllerEvent, ControllerEffect] = Driver(
            brain, self.perform, journal=self._on_step, woke=recorder.counters.wakeup.add, timer=timer
        )
        self._brain = brain
        self._recorder = recorder
        self._journal = journal
        self._read_crash_report, self._read_wanted = read_crash_report, read_wanted
        self._gateways: dict[str, Link] = {}  # open links by the peer's name
        self._workers: dict[str, Link] = {}
        self._supervisor: Link | None = None
        self._worker_by_device: dict[str, Link] = {}  # devices of all and only workers that joined
        self._specs: dict[Link, tuple[DeviceSpec, ...]] = {}  # of the same workers
        self._codes: dict[str, CodeAdded] = {}  # the catalogue, replayed to newcomers
        self._models: dict[str, ModelAdded] = {}
        self._quarantines = Quarantines()
        # Workers that joined before the supervisor had sent the whole catalogue (its first question marks the
        # end) wait here: a device without codes to prepare would count as warm, and the server as ready
        # although it knows no model. None from then on.
        self._unadmitted: dict[Link, WorkerJoined] | None = {}
        self._readiness = Readiness(ready=False, why="starting")
        self._preparing = Preparing()
        self._questions = Questions(self._answer_to, self._supervisor_stuck)
        self._supervisor_heartbeat = PeerHeartbeat(self._to_supervisor, self._on_supervisor_heartbeat)
        self._standbys: dict[str, int] = {}  # how many each process knows: the supervisor, and the bridge
        self._reaching = Reaching()
        self._credit = CreditIssuer(self.driver.post)
        self._summaries = SummaryIssuer(brain.soonest_ends, self._to_gateways)
        self._heartbeats = WorkerHeartbeats(self.driver.post)
        self._lost_level = logging.WARNING  # of lost links; INFO while the server drains
        self._receivers: dict[Role, Callable[[Link, Frame], bool]] = {
            Role.GATEWAY: self._from_gateway,
            Role.WORKER: self._from_worker,
            Role.SUPERVISOR: self._from_supervisor,
        }

    @property
    def open_requests(self) -> int:
        """How many requests have no answer."""
        return self._recorder.counters.open

    @property
    def workers(self) -> int:
        """How many workers are connected, and have joined."""
        return len(self._specs)

    def hand_over(self) -> None:
        """Have gateways keep new requests for the next controller."""
        for gateway in self._gateways.values():
            gateway.send(HandingOver())

    # Links

    def on_link(self, link: Link) -> None:
        """Register a process that connected; its link replaces an earlier one of the same name."""
        name = link.peer.name
        _log.info("%s %s connected", link.peer.role, name, extra={"pid": link.peer.pid})
        match link.peer.role:
            case Role.WORKER:
                self._replace(self._workers.get(name))
                self._workers[name] = link
                self._heartbeats.watch(link)
            case Role.GATEWAY:
                self._replace(self._gateways.get(name))
                self._gateways[name] = link
                self._start_gateway(link)
            case Role.SUPERVISOR:
                self._replace(self._supervisor)
                self._supervisor = link
                self._supervisor_heartbeat.start()
                self._recorder.counters.keeper_up = True
                link.send(self._readiness)
                for frame in self._quarantines.frames():
                    link.send(frame)
            case Role.CONTROLLER:
                _log.warning("turned away a second controller", extra={"pid": link.peer.pid})
                link.close()

    def on_lost(self, link: Link) -> None:
        """Unregister a link, and post an event about what its process had in flight."""
        role, name = link.peer.role, link.peer.name
        if self._standbys.pop(name, 0):
            self._recorder.counters.standbys = sum(self._standbys.values())
        _log.log(self._lost_level, "link lost: %s", link.lost_because)
        if role is Role.WORKER and self._workers.get(name) is link:
            del self._workers[name]
            self._heartbeats.unwatch(link)
            devices = [device for device, owner in self._worker_by_device.items() if owner is link]
            for device in devices:
                del self._worker_by_device[device]
            self._specs.pop(link, None)
            self._tell_reached(*self._reaching.worker_lost(name))
            unadmitted = self._unadmitted is not None and self._unadmitted.pop(link, None) is not None
            if devices and not unadmitted:
                self.driver.post(self._read_crash_report(name, link.peer.pid))
        elif role is Role.GATEWAY and self._gateways.get(name) is link:
            del self._gateways[name]
            self._credit.remove_gateway(link)
            if self._reaching.gateway_lost(name):
                for worker in self._joined():
                    worker.send(TensorsOffered(gateway=name))
            self._questions.requester_lost(link)
            self.driver.post(GatewayLost(gateway=name))
        elif role is Role.SUPERVISOR and self._supervisor is link:
            self._supervisor = None
            self._supervisor_heartbeat.stop()
            self._recorder.counters.keeper_up = False
            self._questions.supervisor_lost()

    def on_frames(self, link: Link, frames: list[Frame]) -> None:
        """Handle frames of one process; if it sends a frame that its role may not, its link is closed."""
        receive = self._receivers.get(link.peer.role)
        for frame in frames:
            if receive is None or not receive(link, frame):
                _log.error("cut off %s %s: it sent %r", link.peer.role, link.peer.name, type(frame).__name__)
                self.on_lost(link)
                link.close()
                return
        if link.peer.role is Role.GATEWAY:
            self._credit.received(link, frames)

    def _replace(self, old: Link | None) -> None:
        if old is not None:
            old.lost_because = f"{old.peer.role} {old.peer.name!r}: it connected again"
            self.on_lost(old)
            old.close()

    def _start_gateway(self, link: Link) -> None:
        for code in self._codes.values():
            link.send(code)
        for model in self._models.values():
            link.send(model)
        for quarantined in self._quarantines.frames():
            link.send(quarantined)
        if self._preparing.waiting:
            link.send(self._preparing)
        link.send(self._readiness)
        self._credit.add_gateway(link)

    # Frames, by role: False for what that role may not send

    def _from_gateway(self, link: Link, frame: Frame) -> bool:
        match frame:
            case Request() if frame.gateway == link.peer.name:
                self.driver.post(frame)
                if self._summaries.active:
                    self._summaries.asked_for(frame.model)
            case AdmissionQuery() if frame.gateway == link.peer.name:
                self.driver.post(frame)
            case Cancel():
                self.driver.post(frame)
            case CreditBlocked():
                self._credit.blocked(link)
            case Delivered():
                self._recorder.on_delivered(link.peer.name, frame, time.monotonic_ns())
            case StandbysCounted():
                self._count_standbys(link, frame)
            case Ask():
                self._on_ask(link, frame)
            case Beat():
                link.send(frame)
            case TensorsOffered() if frame.gateway == link.peer.name:
                self._reaching.offered(frame)
                for worker in self._joined():
                    worker.send(frame)
            case ModelsAskedFor():
                if self._supervisor is not None:
                    self._supervisor.send(frame)
            case _:
                return False
        return True

    def _from_worker(self, link: Link, frame: Frame) -> bool:
        match frame:
            case Result() | CodeReady() | WeightsReady():
                if self._worker_by_device.get(frame.device) is not link:
                    return False
                self.driver.post(frame)
            case DeviceNumbers():
                if self._worker_by_device.get(frame.device) is not link:
                    return False
                counted = self._recorder.counters.devices.get(frame.device)
                if counted is not None:
                    counted.numbers = frame.numbers
            case Beat():
                self._heartbeats.beat_received(link)
            case ArtefactDamaged():
                if self._supervisor is not None:  # else the worker reports it again
                    self._supervisor.send(frame)
            case TensorsReached():
                self._tell_reached(self._reaching.reported(link.peer.name, frame))
            case WorkerJoined():
                return self._on_worker_joined(link, frame)
            case _:
                return False
        return True

    def _tell_reached(self, *reached: TensorsReached) -> None:
        for frame in reached:
            if (gateway := self._gateways.get(frame.gateway)) is not None:
                gateway.send(frame)

    def _on_worker_joined(self, link: Link, frame: WorkerJoined) -> bool:
        names = {spec.device for spec in frame.devices}
        if taken := sorted(names & self._worker_by_device.keys()):
            _log.error("worker %s claims devices that others have: %s", frame.worker, ", ".join(taken))
            return False
        if frame.worker != link.peer.name or not names:
            return False
        for device in names:
            self._worker_by_device[device] = link
        self._specs[link] = frame.devices
        if self._unadmitted is not None:
            self._unadmitted[link] = frame
        else:
            self._join(link, frame)
        return True

    def _join(self, link: Link, frame: WorkerJoined) -> None:
        self.driver.post(frame)
        for code in self._codes.values():
            if self._prepares(link, code):
                link.send(code)
        for model in self._models.values():
            link.send(model)
        for offer in self._reaching.offers.values():
            link.send(offer)

    def _from_supervisor(self, link: Link, frame: Frame) -> bool:
        match frame:
            case CodeAdded():
                if self._codes.get(frame.code.code_id) != frame:
                    self._codes[frame.code.code_id] = frame
                    able = [link for link in self._joined() if self._prepares(link, frame)]
                    self._publish(frame, able, self._gateways.values())
            case CodeRemoved():
                if self._codes.pop(frame.code_id, None) is not None:
                    self._publish(frame, self._joined(), self._gateways.values())
            case ModelAdded():
                return self._on_model_added(frame)
            case CodeRemade():
                self._on_code_remade(frame)
            case Preparing():
                self._on_preparing(frame)
            case StandbysCounted():
                self._count_standbys(link, frame)
            case DamageCounted() | ProcessesEnded():
                self._on_counted(frame)
            case ModelRemoved():
                if self._models.pop(frame.model, None) is not None:
                    self._publish(frame, self._gateways.values())
            case QuotasSet() | ReleaseFromQuarantine() | WorkerCrashed():
                self.driver.post(frame)
            case Drain():
                self._lost_level = logging.INFO
                self.driver.post(frame)
            case Ask():
                self._on_catalogue_complete()
                self._on_ask(link, frame)
            case Reply():
                self._questions.reply(frame)
            case Beat():
                self._supervisor_heartbeat.beat_received()
            case _:
                return False
        return True

    def _on_ask(self, link: Link, ask: Ask) -> None:
        """Answer with what was sent before the question, for both may have been read at once."""
        self.driver.settle()
        self._questions.ask(link, ask, self._supervisor)

    def _count_standbys(self, link: Link, frame: StandbysCounted) -> None:
        self._standbys[link.peer.name] = frame.ready
        self._recorder.counters.standbys = sum(self._standbys.values())

    def _on_counted(self, frame: DamageCounted | ProcessesEnded) -> None:
        counters = self._recorder.counters
        if isinstance(frame, ProcessesEnded):
            counters.processes_ended = frame.unanswering
        else:
            counters.damaged_files = frame.found
            counters.artefacts_remade = frame.remade
            counters.models_lost = frame.lost

    def _on_preparing(self, frame: Preparing) -> None:
        self._preparing = frame
        self._recorder.counters.models_waiting = len(frame.waiting)
        self._to_gateways(frame)

    def _on_catalogue_complete(self) -> None:
        unadmitted, self._unadmitted = self._unadmitted, None
        for link, frame in (unadmitted or {}).items():
            self._join(link, frame)

    def _on_model_added(self, frame: ModelAdded) -> bool:
        key = frame.model.key
        if frame.model.code_id not in self._codes:
            return False
        known = self._models.get(key)
        if known == frame:
            return True
        if known is not None:
            self._publish(ModelRemoved(model=key), self._gateways.values())
        self._models[key] = frame
        self._publish(frame, self._joined(), self._gateways.values())
        return True

    def _on_code_remade(self, frame: CodeRemade) -> None:
        """Have all workers prepare a code again; one that has prepared it already reports so at once."""
        code = self._codes.get(frame.code_id)
        if code is None:
            return
        self.driver.post(frame)
        for link in self._joined():
            if self._prepares(link, code):
                link.send(code)

    def _joined(self) -> list[Link]:
        """Links of workers to which the catalogue was sent."""
        unadmitted = self._unadmitted or {}
        return [link for link in dict.fromkeys(self._worker_by_device.values()) if link not in unadmitted]

    def _prepares(self, link: Link, added: CodeAdded) -> bool:
        """Whether a worker has a device that runs this code, and the code is not in quarantine."""
        code = added.code
        runs = any(spec.runs(code.backend) for spec in self._specs[link])
        return runs and code.code_id not in self._quarantines.codes

    def _publish(
        self, frame: CodeAdded | CodeRemoved | ModelAdded | ModelRemoved, *audiences: Iterable[Link]
    ) -> None:
        self.driver.post(frame)
        for links in audiences:
            for link in links:
                link.send(frame)

    # Questions

    def _to_supervisor(self, frame: Beat) -> None:
        if self._supervisor is not None:
            self._supervisor.send(frame)

    def _on_supervisor_heartbeat(self) -> None:
        self._recorder.counters.keeper_up = not self._supervisor_heartbeat.stalled
        if why := self._supervisor_stuck():
            _log.error("%s", why)
            self._questions.supervisor_stalled(why)
        else:
            _log.warning("the supervisor answers again")

    def _supervisor_stuck(self) -> str:
        if self._supervisor is None or not self._supervisor_heartbeat.stalled:
            return ""
        return (
            f"the supervisor (process {self._supervisor.peer.pid}) has not answered for "
            f"{self._supervisor_heartbeat.stalled_s:.1f} s, so nothing is loaded, unloaded or restarted: let "
            "it go on if it was stopped (kill -CONT), else restart the server"
        )

    def _answer_to(self, ask: Ask) -> bytes:
        match ask.what:
            case Question.STATISTICS:
                wanted = msgspec.json.decode(ask.body, type=dict[str, str | None])
                return self._recorder.statistics(wanted.get("model"))
            case Question.METRICS:
                self._recorder.counters.wanted = self._read_wanted()
                return self._recorder.encoded(self._brain.accounts())
            case Question.STATE:
                return msgspec.json.encode(self._state(), enc_hook=str)
            case _:
                raise ValueError(f"expected one of {', '.join(Question)}")

    def _state(self) -> dict[str, Any]:
        counters = self._recorder.counters
        return {
            "ready": self._readiness.ready,
            "why": self._readiness.why,
            "epoch": counters.epoch,
            "standbys": counters.standbys,
            "open": counters.open,
            "queued": counters.queued,
            "gateways": sorted(self._gateways),
            "workers": sorted(self._workers),
            "devices": counters.devices,
            "controller": self._brain.snapshot(),
        }

    # Effects

    def perform(self, effect: ControllerEffect) -> None:
        """Send one effect to the process that it concerns; dropped if that is not connected."""
        match effect:
            case Answer() | Release() | AdmissionReply():
                if (gateway := self._gateways.get(effect.gateway)) is not None:
                    gateway.send(effect)
                if type(effect) is Answer and effect.reason is Reason.WOULD_MISS_DEADLINE:
                    self._summaries.rejected(time.monotonic_ns())
            case Load() | Infer() | Unload() | RetainWeights():
                self._send_action(effect)
            case Quarantined():
                self._on_quarantined(effect)
            case Unservable():
                level = logging.ERROR if effect.why else logging.INFO
                _log.log(level, "model %s: %s", effect.model, effect.why or "a device can run it now")
                self._quarantines.update(effect)
                self._broadcast(effect)
            case WorkerHung():
                self._heartbeats.report_hung(effect, self._supervisor)
            case Readiness():
                self._readiness = effect
                _log.info("ready" if effect.ready else f"not ready: {effect.why}")
                self._broadcast(effect)

    def _to_gateways(self, frame: Preparing | SoonestEnds) -> None:
        for gateway in self._gateways.values():
            gateway.send(frame)

    def _broadcast(self, effect: Readiness | Quarantined | Unservable) -> None:
        for link in (*self._gateways.values(), *([self._supervisor] if self._supervisor else [])):
            link.send(effect)

    def _on_quarantined(self, effect: Quarantined) -> None:
        _log.error("model %s: %s", effect.model, effect.why or "in quarantine no more")
        before = self._quarantines.codes
        self._quarantines.update(effect)
        after = self._quarantines.codes
        released = [self._codes[code_id] for code_id in before - after if code_id in self._codes]
        for link in self._joined():
            for code_id in after - before:
                link.send(CodeRemoved(code_id=code_id))
            for code in released:
                if self._prepares(link, code):
                    link.send(code)
        self._broadcast(effect)

    def _send_action(self, action: Load | Infer | Unload | RetainWeights) -> None:
        # Dropped without a result if the worker is not connected: WorkerLost, posted when its link was lost,
        # ended its actions.
        worker = self._worker_by_device.get(action.device)
        if worker is None:
            return
        worker.send(action)

    def _on_step(self, now_ns: int, events: list[ControllerEvent], effects: list[ControllerEffect]) -> None:
        if self._summaries.active:
            self._summaries.publish(now_ns)
        self._recorder.on_step(now_ns, events, effects)
        if self._journal is not None:
            self._journal.on_step(now_ns, events, effects)

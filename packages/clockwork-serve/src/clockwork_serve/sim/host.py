"""A simulated worker (the real worker's brain on simulated lanes), faults of its link, and open requests.

Lanes take about the time that the profile says. Nothing here makes a choice: what happens follows from the
brain, the profile, the random streams and the faults.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from heapq import heapify, heappop, heappush
from typing import Any, Final

import numpy as np
from msgspec.structs import replace

from clockwork_serve.controller import POLICIES, ControllerConfig
from clockwork_serve.fence import Fence
from clockwork_serve.messages import (
    Action,
    Answer,
    Cancel,
    CodeAdded,
    CodeRemoved,
    ControllerEvent,
    DeviceSpec,
    Drain,
    GatewayLost,
    Infer,
    Load,
    Model,
    ModelAdded,
    ModelRemoved,
    Outcome,
    Profile,
    QuotasSet,
    Reason,
    Request,
    Result,
    RetainWeights,
    Status,
    Unload,
    WorkerJoined,
    WorkerLost,
)
from clockwork_serve.sim.constants import Draws, KeyedDraws
from clockwork_serve.sim.tally import Busy, Tally
from clockwork_serve.units import NS_PER_MS
from clockwork_serve.worker import Worker
from clockwork_serve.worker.events import (
    ControllerFound,
    Prepare,
    Prepared,
    Retire,
    Retired,
    Start,
    WorkerEffect,
    WorkerEvent,
)
from clockwork_serve.worker.lanes import Work

# ruff: noqa: FURB136, PLR1730 - max() costs 100 ns more than a condition


Entry = tuple[int, int, int, Any, Any]
"""An entry of the event heap: (instant in ns, sequence number, kind, target, payload)."""

# Kinds of entries; the target of those up to WAKE is a host.
TO_WORKER: Final = 0
LANE_DONE: Final = 1
WAKE: Final = 2
TO_CONTROLLER: Final = 3
CALL: Final = 4

LEAST_NS: Final = 1_000
"""The shortest duration of anything on a lane."""

NOTHING: Final = tuple((b"",) * count for count in range(1025))
"""By number of calls: their (empty) outputs."""

FAR_NS: Final = 1 << 62

_OK: Final = Status.OK


class World:
    """What all parts of a simulation share: the event heap, the random streams, the tally.

    ``truth`` holds the true durations, by code; the controller's profiles may differ.
    """

    __slots__ = (
        "dirty", "endless", "heap", "infer_noise", "jitter", "keyed", "killers", "load_noise", "order",
        "prepare_ns", "slower", "tally", "truth", "worker_delay_ns",
    )  # fmt: skip

    def __init__(
        self, truth: dict[str, Profile], tally: Tally, worker_delay_ns: int, prepare_ns: int
    ) -> None:
        self.heap: list[Entry] = []
        self.order = 0
        self.dirty: list[SimulatedWorker] = []
        """Workers that are to decide at this instant."""
        self.truth = truth
        self.slower: dict[str, float] = {}
        """By device, where it is not 1: how many times as long as ``truth`` everything takes there."""
        self.tally = tally
        self.worker_delay_ns = worker_delay_ns
        self.prepare_ns = prepare_ns
        self.jitter: Draws | None = None
        self.infer_noise: Draws | None = None
        self.load_noise: Draws | None = None
        self.keyed: KeyedDraws | None = None
        """In place of these three: what each action and message draws follows from what it is."""
        self.killers: dict[str, Callable[[SimulatedWorker], Sequence[ControllerEvent]]] = {}
        """By a model's key: called with the host whenever an INFER of it ends, before the result is sent."""

        self.endless: dict[str, Callable[[SimulatedWorker], None]] = {}
        """By a model's key: called with the host whenever an INFER of it starts; that INFER never ends."""

    def at(self, when_ns: int, kind: int, whom: Any, what: Any) -> None:
        """Add an entry to the event heap."""
        self.order += 1
        heappush(self.heap, (when_ns, self.order, kind, whom, what))

    def delay_ns(self) -> int:
        """The delay of the next message between controller and worker."""
        jitter = self.jitter
        return self.worker_delay_ns if jitter is None else self.worker_delay_ns + jitter.next()

    def happen(self, now_ns: int, events: list[ControllerEvent]) -> None:
        """Process all entries of this instant; appends to ``events`` what the controller observes."""
        heap, dirty = self.heap, self.dirty
        while heap and heap[0][0] == now_ns:
            _, _, kind, whom, what = heappop(heap)
            if kind == TO_CONTROLLER:
                events.append(what)
            elif kind <= WAKE:
                host: SimulatedWorker = whom
                if kind == WAKE:
                    if what == host.wake_ns and host.stopped is None:
                        dirty.append(host)
                elif host.stopped is None:
                    host.observe(what, now_ns)
                    dirty.append(host)
                else:
                    host.stopped.append(what)
            else:
                events.extend(what())
        if dirty:
            for host in dirty:
                if host.stopped is None:
                    host.decide(now_ns)
            dirty.clear()

    def forget(self, whom: Any, kinds: tuple[int, ...]) -> None:
        """Remove the entries of these kinds for ``whom`` from the event heap."""
        self.heap[:] = [entry for entry in self.heap if entry[3] is not whom or entry[2] not in kinds]
        heapify(self.heap)


class LinkFault:
    """A fault of the link between the controller and a worker, whose messages keep their order.

    It delays them by ``delay_ns``, or loses a share of them.
    """

    __slots__ = ("cut", "cut_link", "delay_ns", "dice", "divert", "loss")

    def __init__(self, dice: np.random.Generator, cut_link: Callable[[], None]) -> None:
        self.delay_ns = 0
        self.loss = 0.0
        """The share of messages that is lost."""
        self.cut = False
        """A message was lost: none arrives any more."""
        self.divert: Callable[[int, object], None] | None = None
        """Gets messages to the controller that do not arrive, and when they would."""
        self.dice = dice
        self.cut_link = cut_link

    def lengthen(self, by_ns: int) -> None:
        """Delay messages by so much more."""
        self.delay_ns += by_ns

    def lose_no_more(self) -> None:
        """Lose no message from now on; a link that is cut stays so."""
        self.loss = 0.0

    def arrival_ns(self, when_ns: int) -> int | None:
        """When a message arrives that would arrive at ``when_ns``; None: never."""
        if not self.cut and self.loss and self.dice.random() < self.loss:
            self.cut = True
            self.cut_link()
        return None if self.cut else when_ns + self.delay_ns


def is_cut(host: SimulatedWorker) -> bool:
    """Whether its link is cut: messages of neither direction arrive."""
    return host.link_fault is not None and host.link_fault.cut


class SimulatedWorker:
    """One worker process and its devices.

    ``now_ns`` is the simulation's clock everywhere; the brain sees that clock plus ``skew_ns``.
    """

    __slots__ = (
        "cores_busy_until_ns", "died_at", "fence", "from_worker_until_ns", "gone", "joined", "link_fault",
        "machine", "name", "not_before_ns", "skew_ns", "slowness", "specs", "stopped", "stopped_ns", "stuck",
        "to_worker_until_ns", "wake_ns", "world",
    )  # fmt: skip

    def __init__(self, name: str, specs: tuple[DeviceSpec, ...], world: World) -> None:
        self.name = name
        self.specs = specs
        self.world = world
        self.machine = Worker(specs)
        self.fence = Fence()
        self.gone = False
        """It crashed; another worker of the same name may have replaced it."""
        self.died_at: list[Work] = []
        """What its lanes were executing when it died."""
        self.stopped: list[WorkerEvent] | None = None
        """Events held back while its process is stopped, as by SIGSTOP; None: it runs."""
        self.stuck = False
        """What one of its lanes executes never ends."""
        self.stopped_ns = 0
        """When it was last stopped."""
        self.skew_ns = 0
        """By how much its clock, as converted by the transport, is ahead."""
        self.not_before_ns = 0
        """Lower bound of its clock, which is monotonic even when ``skew_ns`` shrinks."""
        self.slowness: dict[str, float] = {}
        """By device: the factor by which durations are longer than usual."""
        self.cores_busy_until_ns = {spec.device: 0 for spec in specs if spec.lanes_share}
        """By device whose lanes share cores: until when these are busy. First come, first served."""
        self.link_fault: LinkFault | None = None
        self.to_worker_until_ns = 0
        """When the last message to it arrives; the next one may not arrive earlier (links keep the order)."""
        self.from_worker_until_ns = 0
        """The same for messages from it."""
        self.wake_ns = FAR_NS
        self.joined: WorkerJoined | None = None
        """The WorkerJoined that its brain decided, until it is sent."""

    def axis_ns(self, now_ns: int) -> int:
        """The instant that its clock shows."""
        axis_ns = now_ns + self.skew_ns
        return axis_ns if axis_ns > self.not_before_ns else self.not_before_ns

    def connect(self, now_ns: int) -> WorkerJoined:
        """Open a link to a controller; returns the first message on it."""
        self.observe(ControllerFound(worker=self.name), now_ns)
        self.decide(now_ns)
        joined, self.joined = self.joined, None
        assert joined is not None
        return joined

    def send(self, message: Action | CodeAdded | CodeRemoved | RetainWeights, now_ns: int) -> None:
        """Send it a message from the controller."""
        self.to_worker_until_ns = self._post(TO_WORKER, message, now_ns, self.to_worker_until_ns)

    def _send_to_controller(self, message: WorkerEffect, now_ns: int) -> None:
        """Send the controller a message from it."""
        self.from_worker_until_ns = self._post(TO_CONTROLLER, message, now_ns, self.from_worker_until_ns)

    def _post(self, kind: int, message: object, now_ns: int, before_ns: int) -> int:
        """Send a message on one direction of its link; it arrives not before ``before_ns``.

        Returns when it arrives, or ``before_ns`` if it is lost.
        """
        world = self.world
        jitter = world.jitter
        when_ns = now_ns + world.worker_delay_ns
        if jitter is not None:
            when_ns += jitter.next()
        elif world.keyed is not None:
            when_ns += world.keyed.delay_ns(message)
        if self.link_fault is not None:
            delayed_ns = self.link_fault.arrival_ns(when_ns)
            if delayed_ns is None:
                if kind == TO_CONTROLLER and self.link_fault.divert is not None:
                    self.link_fault.divert(when_ns, message)
                return before_ns
            when_ns = delayed_ns
        if when_ns < before_ns:
            when_ns = before_ns
        world.order = order = world.order + 1
        heappush(world.heap, (when_ns, order, kind, self, message))
        return when_ns

    def observe(self, event: WorkerEvent, now_ns: int) -> None:
        """Pass an event to its brain."""
        axis_ns = now_ns + self.skew_ns
        self.machine.observe(event, axis_ns if axis_ns > self.not_before_ns else self.not_before_ns)

    def decide(self, now_ns: int) -> None:
        """Have its brain decide, perform the effects and schedule its next wake-up."""
        machine = self.machine
        axis_ns = now_ns + self.skew_ns
        if axis_ns < self.not_before_ns:
            axis_ns = self.not_before_ns
        for effect in machine.decide(axis_ns):
            kind = type(effect)
            if kind is Start:
                self._start(effect, now_ns)  # type: ignore[arg-type]
            elif kind is Result:
                if effect.status is not _OK:  # type: ignore[union-attr]
                    self.world.tally.busy.refused += 1
                self._send_to_controller(effect, now_ns)
            else:
                self._perform_other(effect, now_ns)
        wake_ns = machine.next_wakeup_ns()
        if wake_ns is not None:
            wake_ns -= self.skew_ns
            if wake_ns <= now_ns:
                wake_ns = now_ns + 1
            if wake_ns != self.wake_ns:
                self.wake_ns = wake_ns
                self.world.at(wake_ns, WAKE, self, wake_ns)
        else:
            self.wake_ns = FAR_NS

    def _start(self, effect: Start, now_ns: int) -> None:
        world, action, device = self.world, effect.action, effect.device
        outputs = NOTHING[len(action.calls)] if type(action) is Infer else ()
        lasts_ns = self.lasts_ns(action, now_ns)
        if lasts_ns < LEAST_NS:
            lasts_ns = LEAST_NS
        tally = world.tally
        if now_ns >= tally.warmup_ns:
            _add(tally.busy, action, lasts_ns)
        if tally.bucket_ns:
            _add(tally.busy_row(now_ns), action, lasts_ns)
        if device in self.cores_busy_until_ns and type(action) is not Unload:
            lasts_ns += self.wait_ns(device, now_ns)
            self.cores_busy_until_ns[device] = now_ns + lasts_ns
        started_ns = now_ns + self.skew_ns
        if started_ns < self.not_before_ns:
            started_ns = self.not_before_ns
        done = Result(
            action_id=action.action_id, device=device, status=_OK, started_ns=started_ns,
            ended_ns=started_ns + lasts_ns, run_ns=lasts_ns, outputs=outputs,
        )  # fmt: skip
        if world.killers and type(action) is Infer and action.model in world.killers:
            world.at(now_ns + lasts_ns, CALL, None, partial(world.killers[action.model], self))
        if world.endless and type(action) is Infer and action.model in world.endless:
            self.stuck = True
            world.endless[action.model](self)
            return
        world.order = order = world.order + 1
        heappush(world.heap, (now_ns + lasts_ns, order, LANE_DONE, self, done))

    def lasts_ns(self, action: Action, now_ns: int) -> int:
        """How long an action that starts now takes, if its device's lanes do not share cores."""
        world, device = self.world, action.device
        if type(action) is Infer:
            lasts_ns = world.truth[action.code_id].infer_ns[action.batch]
            if world.infer_noise is not None:
                lasts_ns += world.infer_noise.next()
        elif type(action) is Load:
            lasts_ns = world.truth[action.code_id].load_ns(action.weights.size)
            if world.load_noise is not None:
                lasts_ns += world.load_noise.next()
        else:
            lasts_ns = LEAST_NS
        if world.keyed is not None:
            lasts_ns += world.keyed.extra_ns(action)
        if world.slower:
            lasts_ns = int(lasts_ns * world.slower.get(device, 1.0))
        if self.slowness:
            lasts_ns = int(lasts_ns * self.slowness.get(device, 1.0))
        return lasts_ns

    def wait_ns(self, device: str, now_ns: int) -> int:
        """How long an action that starts now waits for the other lane, which uses the same cores."""
        wait_ns = self.cores_busy_until_ns[device] - now_ns
        return wait_ns if wait_ns > 0 else 0

    def _perform_other(self, effect: WorkerEffect, now_ns: int) -> None:
        """Perform an effect that is neither a start nor a result: prepare, retire or report a code; join."""
        world = self.world
        if isinstance(effect, Prepare):
            done = Prepared(device=effect.device, code_id=effect.code.code_id)
            world.at(now_ns + world.prepare_ns, LANE_DONE, self, done)
        elif isinstance(effect, Retire):
            gone = Retired(device=effect.device, code_id=effect.code_id)
            world.at(now_ns + LEAST_NS, LANE_DONE, self, gone)
        elif isinstance(effect, WorkerJoined):
            self.joined = effect
        else:
            self._send_to_controller(effect, now_ns)

    # Faults

    def deliver_now(self, event: WorkerEvent, now_ns: int) -> None:
        """Pass an event to its brain and have it decide; if the process is stopped, when it resumes."""
        if self.stopped is not None:
            self.stopped.append(event)
        else:
            self.observe(event, now_ns)
            self.decide(now_ns)

    def stop(self, now_ns: int) -> None:
        """Stop the process, as by SIGSTOP; its devices go on."""
        assert self.stopped is None, f"{self.name} is stopped already"
        self.stopped = []
        self.stopped_ns = now_ns

    def stalled(self, extra_ns: int) -> None:
        """Called after its devices were stopped for that long; a hook for the checks."""

    def resume(self, now_ns: int) -> None:
        """Resume the process, as by SIGCONT: its brain observes all held-back events, in order."""
        assert self.stopped is not None and not self.gone, f"{self.name} cannot resume"
        missed, self.stopped = self.stopped, None
        for event in missed:
            self.observe(event, now_ns)
        self.decide(now_ns)

    def die(self) -> None:
        """End the process: what runs on it or is on the way to it is lost; what it sent still arrives."""
        self.gone = True
        self.died_at = self.machine.executing()
        self.stopped = []
        self.world.forget(self, (TO_WORKER, LANE_DONE, WAKE))

    def lost_event(self) -> WorkerLost:
        """The event for the controller when its link has ended; if it died, with what it was executing."""
        if not self.gone:
            return WorkerLost(worker=self.name)
        running = [one.action_id for one in self.died_at if not isinstance(one, Prepare | Retire)]
        preparing = [one.code.code_id for one in self.died_at if isinstance(one, Prepare)]
        return WorkerLost(worker=self.name, running=tuple(running), preparing=tuple(preparing))

    def set_skew(self, skew_ns: int, now_ns: int) -> None:
        """Set its clock's skew; if it shrinks, the clock stands still until real time has caught up.

        Running actions report instants by the new clock: the transport converts them when they are sent.
        """
        self.not_before_ns = self.axis_ns(now_ns)
        jump_ns, self.skew_ns = skew_ns - self.skew_ns, skew_ns
        heap = self.world.heap
        for at, (when_ns, order, kind, whom, what) in enumerate(heap):
            if kind == LANE_DONE and whom is self and type(what) is Result:
                moved = replace(what, started_ns=what.started_ns + jump_ns, ended_ns=what.ended_ns + jump_ns)
                heap[at] = (when_ns, order, kind, whom, moved)
        if self.stopped is None:
            self.decide(now_ns)


def _add(busy: Busy, action: Action, lasts_ns: int) -> None:
    if type(action) is Infer:
        busy.exec_ns += lasts_ns
        busy.infers += 1
    elif type(action) is Load:
        busy.load_ns += lasts_ns
        busy.loads += 1
    else:
        busy.unloads += 1


# ------------------------------------------------------------
# Which requests are open, and which outcomes are legal for each, by the events that the controller observed.


AT_ONCE_NS: Final = 10 * NS_PER_MS
"""A verdict at the door may take this long, or a tenth of the SLO if that is less."""


class OpenRequests:
    """Requests without a response, and what happened that makes each outcome legal; for the checks."""

    def __init__(self, config: ControllerConfig) -> None:
        self._config = config
        self.open: dict[str, Request] = {}
        """All and only requests without a response."""
        self.served: dict[str, Model] = {}
        """All and only models that are served, by key."""
        self._orphans: set[str] = set()
        """Open requests whose models were removed."""
        self._cancelled: set[str] = set()
        """Open requests that their clients cancelled."""
        self._lost_gateways: set[str] = set()
        self._limited: set[str] = set()
        """Tenants that have a quota."""
        self._draining = False
        self.awaiting_failover: set[str] = set()
        """Open requests that their gateways may send again, because the controller died."""
        self._controller_lost = False
        self._worker_lost = False
        self.hung = False
        """The controller declared a worker hung at least once."""
        self.quarantined: set[str] = set()
        """Keys of models that the controller has in quarantine."""
        self.unservable: set[str] = set()
        """Keys of models of which the controller said that no device can run them."""

    def observe(self, event: ControllerEvent) -> None:
        """The controller observes an event."""
        match event:
            case Request():
                assert event.request_id not in self.open.keys() - self.awaiting_failover, (
                    f"{event} came twice"
                )
                self.awaiting_failover.discard(event.request_id)
                self.open[event.request_id] = event
            case Cancel():
                if event.request_id in self.open:
                    self._cancelled.add(event.request_id)
            case GatewayLost():
                self._lost_gateways.add(event.gateway)
            case ModelAdded():
                self.served[event.model.key] = event.model
            case ModelRemoved():
                self.served.pop(event.model, None)
                self._orphans.update([one for one, asked in self.open.items() if asked.model == event.model])
            case QuotasSet():
                self._limited = {quota.tenant for quota in event.quotas}
            case Drain():
                self._draining = True
            case WorkerLost():
                self._worker_lost = True
            case _:
                pass

    def controller_died(self) -> None:
        """Open requests await failover; the successor knows nothing of quarantines."""
        self.awaiting_failover = set(self.open)
        self.quarantined.clear()
        self.unservable.clear()
        self._controller_lost = self._worker_lost = True

    def answer(self, answer: Answer, now_ns: int) -> None:
        """Assert that a response is the request's first and its outcome legal."""
        request = self.open.pop(answer.request_id, None)
        assert request is not None, f"{answer}: unknown request, or its second response"
        self.awaiting_failover.discard(answer.request_id)
        cancelled = answer.request_id in self._cancelled
        orphan = answer.request_id in self._orphans or request.model not in self.served
        self._cancelled.discard(answer.request_id)
        self._orphans.discard(answer.request_id)
        match answer.outcome:
            case Outcome.OK:
                good = now_ns <= request.deadline_ns
            case Outcome.EXPIRED:
                broken = answer.reason is Reason.PROMISE_BROKEN
                good = answer.promised if broken else now_ns >= self._expires_ns(request)
            case Outcome.CANCELLED:
                good = cancelled or request.gateway in self._lost_gateways
            case Outcome.INVALID:
                good = request.model not in self.served
            case Outcome.REJECTED:
                good = self._may_reject(request, answer.reason, now_ns, orphan=orphan)
            case Outcome.FAILED if answer.reason is Reason.QUARANTINED:
                good = request.model in self.quarantined
            case Outcome.FAILED if answer.reason is Reason.UNSERVABLE:
                good = request.model in self.unservable
            case Outcome.FAILED:
                # Simulated devices never fail, but after a cut link a worker may hold other weights than
                # the controller believes.
                good = (self._worker_lost or self.hung) and answer.reason is not Reason.MODEL_RAISED
        assert good, f"{answer} at {now_ns} to {request}"

    def _expires_ns(self, request: Request) -> int:
        """From when on EXPIRED is legal: the deadline, or, by a policy that is not ours, the slack before."""
        ours = self._config.policy in POLICIES  # others may answer when the plan has failed
        return request.deadline_ns - (0 if ours else self._config.slack_ns)

    def _may_reject(self, request: Request, reason: Reason, now_ns: int, *, orphan: bool) -> bool:
        if reason is Reason.TENANT_QUOTA:
            return request.tenant in self._limited
        if reason is Reason.DRAINING:
            return self._draining
        if reason is Reason.NOT_SERVING:
            return self._config.reject_infeasible or orphan or self._controller_lost
        asked_ns = request.decide_ns if request.decide_ns >= 0 else self._config.decide_ns
        if asked_ns < 0 or self._config.policy != "default":
            return reason is Reason.WOULD_MISS_DEADLINE and self._config.reject_infeasible
        # After the verdict a no would be a broken promise, of whichever controller.
        at_once_ns = min(AT_ONCE_NS, (request.deadline_ns - request.arrival_ns) // 10)
        in_time = now_ns <= request.arrival_ns + max(asked_ns, at_once_ns)
        return reason is Reason.WOULD_MISS_DEADLINE and in_time

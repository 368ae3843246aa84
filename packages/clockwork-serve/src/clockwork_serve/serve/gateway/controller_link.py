"""A gateway's link to the controller: the catalogue, queries, and requests that await failover."""

from __future__ import annotations

import asyncio
import logging
import time
from collections import Counter, deque
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Protocol

import msgspec
from msgspec import structs

from clockwork_serve.errors import TransportError
from clockwork_serve.fence import Fence
from clockwork_serve.messages import (
    AdmissionReply,
    Answer,
    Ask,
    Beat,
    CodeAdded,
    CodeRemoved,
    Delivered,
    Frame,
    HandingOver,
    Model,
    ModelAdded,
    ModelRemoved,
    ModelsAskedFor,
    Preparing,
    Quarantined,
    Question,
    Readiness,
    Release,
    Reply,
    Request,
    RequestCredit,
    Role,
    SoonestEnds,
    TensorsOffered,
    TensorsReached,
    Unservable,
)
from clockwork_serve.oip import Served, UnknownModel, default_slo_ns, missing
from clockwork_serve.serve.flow_control import SWEEP_NS, CreditGate, KnownEnds, PeerHeartbeat
from clockwork_serve.serve.gateway.requests import PendingRequest, Slots
from clockwork_serve.serve.quarantines import Quarantines
from clockwork_serve.serve.transport import connect, hello, retry_s
from clockwork_serve.units import NS_PER_MS, NS_PER_S

# ------------------------------------------------------------
# The catalogue of models, as the controller sent it.


class GatewayModels:
    """The catalogue as the controller sent it: all versions of all models by name.

    ``server_slo_ns`` is the server's own default SLO, if any.
    """

    def __init__(self, server_slo_ns: int | None) -> None:
        self.quarantines = Quarantines()
        self._server_slo_ns = server_slo_ns
        self._codes: dict[str, CodeAdded] = {}
        self._by_version: dict[tuple[str, str], Served] = {}
        self._versions: dict[str, list[str]] = {}  # of exactly the names that have a version, ascending

    def __len__(self) -> int:
        return len(self._by_version)

    @property
    def none_can_run(self) -> bool:
        """Whether there are models, and none can run: all are in quarantine, or fit no device."""
        held = self.quarantines
        return (
            bool(held)
            and bool(self._by_version)
            and all(served.model.key in held for served in self._by_version.values())
        )

    def add_code(self, added: CodeAdded) -> None:
        """Add a code, which models may refer to from now on."""
        self._codes[added.code.code_id] = added

    def remove_code(self, code_id: str) -> None:
        """Remove a code that no model refers to any more."""
        self._codes.pop(code_id, None)

    def add(self, model: Model) -> None:
        """Add a model whose code is known, or replace the one of that name and version."""
        added = self._codes[model.code_id]
        batch_1_ns = max((profile.infer_ns.get(1, 0) for profile in added.profiles), default=None)
        slo_ns = default_slo_ns(model.slo_ns, self._server_slo_ns, batch_1_ns)
        served = Served(model, added.code, slo_ns)
        self._by_version[model.name, model.version] = served
        self._set_versions(model.name, {*self._versions.get(model.name, ()), model.version})

    def remove(self, key: str) -> None:
        """Remove a model (``name/version``)."""
        name, _, version = key.rpartition("/")
        if self._by_version.pop((name, version), None) is not None:
            self._set_versions(name, set(self._versions[name]) - {version})

    def find(self, name: str, version: str = "") -> Served:
        """That version of the model, or its highest one. Raises :class:`UnknownModel`."""
        served = self._by_version.get((name, version))
        if served is None:
            raise UnknownModel(missing(name, version))
        return served

    def versions(self, name: str) -> list[str]:
        """The served versions of a model, ascending."""
        return self._versions.get(name, [])

    def all(self) -> list[Served]:
        """Every version of every model."""
        return [served for (_, version), served in self._by_version.items() if version]

    def names(self) -> list[str]:
        """The names of all models, sorted."""
        return sorted(self._versions)

    def _set_versions(self, name: str, versions: set[str]) -> None:
        if not versions:
            del self._versions[name]
            del self._by_version[name, ""]
            return
        ordered = self._versions[name] = sorted(versions, key=_order)
        # A request without a version gets the highest.
        self._by_version[name, ""] = self._by_version[name, ordered[-1]]


def _order(version: str) -> tuple[int, str]:
    return (int(version) if version.isdecimal() else -1, version)


# ------------------------------------------------------------
# A gateway's link to the controller's process: reconnects, keeps the catalogue, asks questions.
#
# Answers to requests go to the listener. Where the controller runs is known to ``Connector`` alone.


GRACE_NS: Final = 40 * NS_PER_MS  # how long after a deadline to wait for the controller's answer
REPORT_S: Final = 0.1
"""Within this time, requests for models that are still to be prepared are reported together."""

_log = logging.getLogger(__name__)


class ControllerLink(Protocol):
    """A connection to the controller, direct or through the bridge."""

    @property
    def is_open(self) -> bool:
        """Whether frames can still be sent."""

    def send(self, frame: Frame) -> None:
        """Send one frame; dropped if the connection is lost."""

    def close(self) -> None:
        """Close once everything queued was sent; ``on_lost`` is not called."""


Connector = Callable[[Callable[[list[Frame]], None], Callable[[str], None]], Awaitable[ControllerLink]]
"""Connects to the controller, given the callbacks ``on_frames`` and ``on_lost`` (called at most once, with
the reason).

Raises :class:`TransportError` if it cannot be reached now.
"""


def local_connector(controller: Path, name: str) -> Connector:
    """Connects to a controller on this host, at that socket."""
    fence = Fence()

    async def connect_here(
        on_frames: Callable[[list[Frame]], None], on_lost: Callable[[str], None]
    ) -> ControllerLink:
        own = hello(Role.GATEWAY, name)
        return await connect(
            controller, own, lambda _, frames: on_frames(frames), lambda link: on_lost(link.lost_because),
            fence,
        )  # fmt: skip

    return connect_here


@dataclass(slots=True, frozen=True)
class LinkListener:
    """The callbacks of a :class:`GatewayLink`.

    - ``on_lost``: the link was lost; with the reason. ``on_stuck``: it is open, without heartbeats.
    - ``on_readiness``: readiness may have changed.
    - ``on_refused``: a request was not sent for lack of credit; with how long it waited, in ns.
    - ``on_handing_over``: the controller gives the lead up; requests are to wait for the next one.
    - ``on_late``: these answers came to their clients too late; the controller was told.
    - ``on_batch``, ``on_batch_end``: called before and after all frames that were read at once.
    """

    on_answer: Callable[[Answer], None]
    on_release: Callable[[Release], None]
    on_lost: Callable[[str], None]
    on_readiness: Callable[[], None]
    on_admission_reply: Callable[[AdmissionReply], None] = lambda _: None
    on_batch: Callable[[], None] = lambda: None
    on_batch_end: Callable[[], None] = lambda: None
    on_refused: Callable[[Request, int], None] = lambda request, waited_ns: None
    on_stuck: Callable[[], None] = lambda: None
    on_late: Callable[[tuple[str, ...]], None] = lambda _: None
    on_handing_over: Callable[[], None] = lambda: None


class GatewayLink:
    """Connects to the controller, and again after each loss; keeps the catalogue and sends frames.

    All methods are for the running loop's thread. ``models`` is the catalogue of the open link; ``serves``
    says whether the server can serve, and ``ready`` whether it can and nothing is still to be prepared since
    its start. What answers mean for requests is for the listener. ``standby``: a controller stands by.
    ``offer`` says where workers on other machines get tensors, where there may be any.
    """

    def __init__(
        self, connector: Connector, server_slo_ns: int | None, listener: LinkListener,
        *, standby: bool = False, offer: Callable[[], TensorsOffered | None] = lambda: None,
    ) -> None:  # fmt: skip
        self.models = GatewayModels(server_slo_ns)
        self.serves = False  # read for each request, so it is not computed each time
        self.ready = False
        self.preparing = Preparing()
        self._waiting: frozenset[str] = frozenset()  # the names in it
        self._asked_for: Counter[str] = Counter()  # of these, since the last report
        self._connector = connector
        self._server_slo_ns = server_slo_ns
        self._listener = listener
        self._standby = standby
        self._offer = offer
        self.read_standby: Callable[[], str] = lambda: ""
        """Says that the controller of this host stands by, and who leads; "" if it does not."""
        self.unreached = ""  # why no worker gets tensors from this gateway, so that it serves nothing
        self._loop = asyncio.get_running_loop()
        self._link: ControllerLink | None = None
        self._readiness = Readiness(ready=False, why="connecting to the controller")
        self._handing_over = False  # the controller said so
        self._incoming: GatewayModels | None = None  # the catalogue of a new link, until it is complete
        self._open_questions: dict[int, asyncio.Future[Reply]] = {}  # exactly the questions without a reply
        self._ask_count = 0
        self._lost = asyncio.Event()
        self._credit_gate = CreditGate(self.send, listener.on_refused)
        self._sweep: asyncio.TimerHandle | None = None  # set while requests wait for credit
        self._pulse = PeerHeartbeat(self.send, self._on_pulse)
        self.ends = KnownEnds()
        # Ids of requests whose answers were delivered, or are not to be; reported soon. For any thread.
        self.in_time: deque[str] = deque()
        self.late: deque[str] = deque()

    @property
    def is_open(self) -> bool:
        """Whether the controller is connected and has sent its catalogue."""
        return self._link is not None and self._incoming is None

    @property
    def stuck(self) -> bool:
        """Whether the controller is connected, but returns no heartbeats: it would answer no request."""
        return self._pulse.stalled

    @property
    def why_silent(self) -> str:
        """That the controller is connected and returns no heartbeats; "" if it does."""
        if not self._pulse.late:
            return ""
        return f"the controller has not answered for {self._pulse.stalled_s:.1f} s"

    def grace_ns(self) -> int:
        """How long after a deadline to wait for the controller's answer; not at all while it is silent."""
        return 0 if self._pulse.late else GRACE_NS

    @property
    def why_not_ready(self) -> str:
        """Why the server is not ready, for clients and the log."""
        if not self.is_open:
            return self.read_standby() or "no link to the controller"
        if self._handing_over:
            return "the controller hands over to another one"
        if self._pulse.stalled:
            return self.why_silent
        if self._readiness.ready and self.unreached:
            return self.unreached
        if self._readiness.ready and self.models.none_can_run:
            return "all models are in quarantine, or fit no device"
        preparing = self.preparing
        if self._readiness.ready and preparing.waiting:
            return f"models are being prepared, {preparing.done} of {preparing.total} are done"
        return self._readiness.why

    def why_waiting(self, model: str) -> str:
        """Why a model is not served yet that is still to be prepared; "" for any other."""
        if model not in self._waiting:
            return ""
        preparing = self.preparing
        return f"model {model} is being prepared, {preparing.done} of {preparing.total} models are done"

    def report_asked_for(self, model: str) -> None:
        """Report soon that a request was refused for a model that is still to be prepared."""
        if not self._asked_for:
            self._loop.call_later(REPORT_S, self._report_asked_for)
        self._asked_for[model] += 1

    def _report_asked_for(self) -> None:
        self.send(ModelsAskedFor(requests=dict(self._asked_for)))
        self._asked_for.clear()

    async def run(self) -> None:
        """Keep a link until cancelled."""
        tries = 0
        while True:
            self._incoming = GatewayModels(self._server_slo_ns)
            self._lost.clear()
            try:
                link = await self._connector(self._on_frames, self._on_lost)
            except TransportError as error:
                tries += 1
                _log.debug("%s", error)
            else:
                tries = 0
                # It may have been lost again already.
                if link.is_open:
                    self._link = link
                    self._pulse.start()
                    self.in_time.clear()
                    self.late.clear()
                    link.send(Delivered())
                    if (offer := self._offer()) is not None:
                        link.send(offer)
                    _log.info("connected to the controller")
                    self._update_readiness()
                    await self._lost.wait()
            await asyncio.sleep(retry_s(tries))

    def send(self, frame: Frame) -> None:
        """Send one frame; dropped if there is no link."""
        if self._link is not None:
            self._link.send(frame)

    def shortage_ns(self, model: str, due_ns: int, *, count: bool = True) -> int:
        """See :meth:`KnownEnds.shortage_ns`; only for requests that :class:`SoonestEnds` is about.

        With ``count`` it is about to be sent, and nothing is known of it where credit is not scarce.
        """
        ends = self.ends
        if not ends.known or (count and not self._credit_gate.scarce):
            return 0
        return ends.shortage_ns(model, due_ns, time.monotonic_ns(), count=count)

    def retry_after_ns(self, model: str, shortage_ns: int) -> int:
        """See :meth:`KnownEnds.retry_after_ns`."""
        return self.ends.retry_after_ns(model, shortage_ns, time.monotonic_ns())

    def submit(self, request: Request) -> None:
        """Send a request as soon as there is credit for it; else ``on_refused`` is called later."""
        if self._credit_gate.submit(request) and self._sweep is None:
            self._sweep = self._loop.call_later(SWEEP_NS / NS_PER_S, self._sweep_waiting)

    def note_delivered(self, request_id: str, *, in_time: bool) -> None:
        """An answer was delivered: report it soon. For those that do not report in turns of their own."""
        if not (self.in_time or self.late):
            self._loop.call_soon(self.report_delivered)
        (self.in_time if in_time else self.late).append(request_id)

    def report_delivered(self) -> None:
        """Report to the controller which answers were delivered in time, and which were late."""
        in_time, late = self.in_time, self.late
        if in_time or late:
            overdue = tuple([late.popleft() for _ in range(len(late))])
            self.send(
                Delivered(in_time=tuple([in_time.popleft() for _ in range(len(in_time))]), late=overdue)
            )
            if overdue:
                self._listener.on_late(overdue)

    def withdraw(self, request_id: str) -> bool:
        """Drop a request that waits for credit; False if it was sent already."""
        return self._credit_gate.withdraw(request_id)

    def close(self) -> None:
        """Send what was queued and close; open questions get the code 503."""
        self.report_delivered()
        link, self._link = self._link, None
        self._pulse.stop()
        self.serves = self.ready = False
        if link is not None:
            link.close()
        self._fail_questions("the server is shutting down")

    async def ask(self, what: Question, body: bytes, timeout_s: float) -> Reply:
        """The controller's reply; with code 503 if it cannot be asked, 504 after ``timeout_s``."""
        if self._link is None or self.stuck:
            return _refusal(503, self.why_not_ready)
        self.report_delivered()  # so that the reply includes them
        self._ask_count += 1
        ask_id = self._ask_count
        waiter: asyncio.Future[Reply] = self._loop.create_future()
        self._open_questions[ask_id] = waiter
        self._link.send(Ask(ask_id=ask_id, what=what, body=body))
        try:
            async with asyncio.timeout(timeout_s):
                return await waiter
        except TimeoutError:
            return _refusal(504, f"{what}: no reply within {timeout_s:g} s")
        finally:
            self._open_questions.pop(ask_id, None)

    def _on_frames(self, frames: list[Frame]) -> None:
        on_answer = self._listener.on_answer
        self._listener.on_batch()
        try:
            for frame in frames:
                if type(frame) is Answer:
                    on_answer(frame)
                else:
                    self._on_frame(frame)
        finally:
            self._listener.on_batch_end()

    def _on_frame(self, frame: Frame) -> None:
        listener = self._listener
        match frame:
            case Release():
                listener.on_release(frame)
            case AdmissionReply():
                listener.on_admission_reply(frame)
            case Reply():
                waiter = self._open_questions.get(frame.ask_id)
                if waiter is not None and not waiter.done():
                    waiter.set_result(frame)
            case RequestCredit():
                self._credit_gate.on_credit(frame)
            case SoonestEnds():
                self.ends.update(frame)
            case HandingOver():
                self._handing_over = True
                self._listener.on_handing_over()
                self._update_readiness()
            case Beat():
                self._pulse.beat_received()
            case TensorsReached():
                self._on_reached(frame)
            case Readiness():
                self._on_readiness(frame)
            case Preparing():
                self.preparing, self._waiting = frame, frozenset(frame.waiting)
                self._update_readiness()
            case CodeAdded() | CodeRemoved() | ModelAdded() | ModelRemoved() | Quarantined() | Unservable():
                self._on_catalogue(frame)
            case _:
                _log.error("the controller sent %r, which no gateway expects", type(frame).__name__)

    def _on_catalogue(
        self, frame: CodeAdded | CodeRemoved | ModelAdded | ModelRemoved | Quarantined | Unservable
    ) -> None:
        models = self.models if self._incoming is None else self._incoming
        match frame:
            case CodeAdded():
                models.add_code(frame)
            case CodeRemoved():
                models.remove_code(frame.code_id)
            case ModelAdded():
                models.add(frame.model)
            case ModelRemoved():
                models.remove(frame.model)
            case Quarantined() | Unservable():
                models.quarantines.update(frame)
        if models is self.models and (models.quarantines or isinstance(frame, Quarantined | Unservable)):
            self._update_readiness()

    def _on_readiness(self, frame: Readiness) -> None:
        # The first one ends the catalogue, which a new link begins with. A controller that stood by may have
        # none yet; until it has, the one before counts.
        incoming = self._incoming
        if incoming is not None and (len(incoming) or frame.ready or not self._standby):
            self.models, self._incoming = incoming, None
        self._readiness = frame
        self._update_readiness()

    def _on_reached(self, frame: TensorsReached) -> None:
        """Whether a worker gets tensors from here: known until the next one, also while there is no link."""
        why = "" if frame.ok else f"no worker gets tensors from this gateway: {frame.why}"
        if why != self.unreached:
            self.unreached = why
            if why:
                _log.error("%s: requests are refused", why)
            else:
                _log.info("workers get tensors from this gateway")
            self._update_readiness()

    def _on_lost(self, why: str) -> None:
        _log.warning("link lost: %s", why)
        self._link = None
        self._handing_over = False
        self.ends.reset()
        self._pulse.stop()
        self._credit_gate.reset()
        self._incoming = GatewayModels(self._server_slo_ns)
        self.preparing, self._waiting = Preparing(), frozenset()  # the next controller sends its own
        self._fail_questions("the link to the controller was lost")
        self.serves = self.ready = False
        self._listener.on_lost("the link to the controller was lost")
        self._update_readiness()
        self._lost.set()

    def _on_pulse(self) -> None:
        if self._pulse.stalled:
            why = self.why_not_ready
            _log.error("%s: requests are refused", why)
            self.serves = self.ready = False
            self._fail_questions(why)
            self._listener.on_stuck()
        else:
            _log.warning("the controller answers again")
        self._update_readiness()

    def _update_readiness(self) -> None:
        """Something that readiness depends on has changed."""
        able = self.is_open and self._readiness.ready and not self._pulse.stalled and not self._handing_over
        self.serves = able and not self.models.none_can_run and not self.unreached
        self.ready = self.serves and not self.preparing.waiting
        self._listener.on_readiness()

    def _sweep_waiting(self) -> None:
        self._sweep = None
        if not (self._standby and self._pulse.late):  # else the next controller may answer what waits
            self._credit_gate.sweep()
        if self._credit_gate.holds:
            self._sweep = self._loop.call_later(SWEEP_NS / NS_PER_S, self._sweep_waiting)

    def _fail_questions(self, why: str) -> None:
        for waiter in self._open_questions.values():
            if not waiter.done():
                waiter.set_result(_refusal(503, why))


def _refusal(code: int, why: str) -> Reply:
    return Reply(ask_id=0, ok=False, body=msgspec.json.encode({"error": why}), code=code)


# ------------------------------------------------------------
# Requests whose controller died, and which the next one can still answer in time: they await failover here.
#
# Each is submitted twice at most, so that one that crashes controllers does not do so again and again. Its
# tensors are copied to another region, for actions of the dead controller may still write to the old one.
# The second time it has another id: if only the link was lost, the controller may still know the first one.


FAILOVER_LEAST_NS: Final = 100 * NS_PER_MS
"""A controller that starts takes at least this long: requests due sooner are ended at once."""
TAKEOVER_LEAST_NS: Final = 20 * NS_PER_MS  # likewise, one that stands by
TAKEOVER_NS: Final = NS_PER_S
"""One that stands by serves within this time as a rule: until then new requests await it, too, and later
those that can wait for as long again."""
FAILOVER_TIMEOUT_NS: Final = 3 * NS_PER_S
"""If there is no controller by then, it will take long, and clients had better try another server."""

RESUBMITTED: Final = "-2"  # added to the id of a request that is submitted again

Pendings = dict[str, PendingRequest]


class AwaitingFailover:
    """Requests that await failover, by id, in order of arrival. The caller ends those that it returns.

    ``standby``: a controller stands by, so that failover takes milliseconds.
    """

    def __init__(self, clock: Callable[[], int], *, standby: bool = False) -> None:
        self._clock = clock
        self._standby = standby
        self._waiting: Pendings = {}
        self._unsent: set[str] = set()  # those of them that no controller was sent
        self._hopeless: set[str] = set()  # those that came too late to await it
        self._lost_ns = -FAILOVER_TIMEOUT_NS  # when the controller was last lost, stuck, or gave the lead up
        self._handed_over = False  # it did that

    def __len__(self) -> int:
        return len(self._waiting)

    def keep(self, pendings: Pendings, slots: Slots) -> Pendings:
        """The controller died before it answered these: keep some; return the others, to be ended."""
        now_ns = self._lost_ns = self._clock()
        least_ns = TAKEOVER_LEAST_NS if self._standby else FAILOVER_LEAST_NS
        waiting = self._waiting | {
            request_id: pending
            for request_id, pending in pendings.items()
            if pending.exchange is not None
            and not pending.resubmitted
            and pending.deadline_ns - now_ns >= least_ns
        }
        moved = slots.renew([pending.slot for pending in waiting.values()])
        self._waiting = {}
        for (request_id, pending), slot in zip(waiting.items(), moved, strict=True):
            if slot is not None:
                pending.slot = slot
                self._waiting[request_id] = pending
        together = waiting | pendings
        return {one: pending for one, pending in together.items() if one not in self._waiting}

    def release(self) -> Pendings:
        """There is a new controller: all requests, to be submitted to it, by their new ids."""
        self._handed_over = False
        waiting, self._waiting = self._waiting, {}
        unsent, self._unsent = self._unsent, set()
        for request_id, pending in waiting.items():
            if request_id not in unsent:
                pending.resubmitted = True
                pending.request = structs.replace(pending.request, request_id=request_id + RESUBMITTED)
        return {pending.request.request_id: pending for pending in waiting.values()}

    @property
    def holding(self) -> bool:
        """Whether new requests are to wait, too: the controller was lost just now, and another takes over."""
        expected = self._standby or self._handed_over
        return expected and self._clock() < self._lost_ns + FAILOVER_TIMEOUT_NS

    def stuck(self) -> None:
        """The controller is stuck: it will be ended, or go on."""
        self._lost_ns = self._clock()

    def hand_over(self) -> None:
        """The controller gives the lead up, so another one is there soon."""
        self._lost_ns, self._handed_over = self._clock(), True

    def add(self, request_id: str, pending: PendingRequest) -> None:
        """Keep a new request, which no controller was sent."""
        self._waiting[request_id] = pending
        self._unsent.add(request_id)
        gone_ns = (now_ns := self._clock()) - self._lost_ns
        if gone_ns >= TAKEOVER_NS and pending.deadline_ns - now_ns < gone_ns:
            self._hopeless.add(request_id)

    def overdue(self) -> Pendings:
        """Remove and return those whose deadline, or whose time to wait, has passed; and the hopeless."""
        now_ns = self._clock()
        if now_ns >= self._lost_ns + FAILOVER_TIMEOUT_NS:
            found, self._waiting = self._waiting, {}
            self._unsent.clear()
            return found
        hopeless, self._hopeless = self._hopeless, set()
        found = {
            one: pending
            for one, pending in self._waiting.items()
            if pending.deadline_ns <= now_ns or one in hopeless
        }
        for one in found:
            del self._waiting[one]
        return found

    def withdraw(self, request_id: str) -> PendingRequest | None:
        """Remove one whose client left; None if there is none of that id."""
        return self._waiting.pop(request_id, None)

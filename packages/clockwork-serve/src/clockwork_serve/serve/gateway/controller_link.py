"""A gateway's link to the controller: catalogue, questions, requests that wait for the next one."""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Protocol

import msgspec
from msgspec import structs

from clockwork_serve.errors import TransportError
from clockwork_serve.messages import (
    AdmissionReply,
    Answer,
    Ask,
    Beat,
    CodeAdded,
    CodeRemoved,
    Delivered,
    Frame,
    Model,
    ModelAdded,
    ModelRemoved,
    Quarantined,
    Question,
    Readiness,
    Release,
    Reply,
    Request,
    RequestCredit,
    Role,
    Undelivered,
)
from clockwork_serve.oip import Served, UnknownModel, default_slo_ns, missing
from clockwork_serve.serve.flow_control import SWEEP_NS, CreditGate, PeerHeartbeat
from clockwork_serve.serve.gateway.requests import Pending, Slots
from clockwork_serve.serve.quarantines import Quarantines
from clockwork_serve.serve.transport import connect, hello
from clockwork_serve.units import NS_PER_MS, NS_PER_S

# ------------------------------------------------------------
# The models that a gateway serves, as the controller process told; it never makes one up.


class GatewayModels:
    """All versions of all models by name. ``server_slo_ns`` is the server's own default SLO, if any."""

    def __init__(self, server_slo_ns: int | None) -> None:
        self.quarantines = Quarantines()
        self._server_slo_ns = server_slo_ns
        self._codes: dict[str, CodeAdded] = {}
        self._by_version: dict[tuple[str, str], Served] = {}
        self._versions: dict[str, list[str]] = {}  # of all and only names with a version, ascending

    def __len__(self) -> int:
        return len(self._by_version)

    @property
    def all_quarantined(self) -> bool:
        """Whether there are models, and every request for one fails."""
        held = self.quarantines
        return (
            bool(held)
            and bool(self._by_version)
            and all(served.model.key in held for served in self._by_version.values())
        )

    def add_code(self, added: CodeAdded) -> None:
        """A code that models may name from now on."""
        self._codes[added.code.code_id] = added

    def remove_code(self, code_id: str) -> None:
        """No model names it any more."""
        self._codes.pop(code_id, None)

    def add(self, model: Model) -> None:
        """Serve a model whose code is known; it replaces an earlier one of that name and version."""
        added = self._codes[model.code_id]
        batch_1_ns = max((profile.infer_ns.get(1, 0) for profile in added.profiles), default=None)
        slo_ns = default_slo_ns(model.slo_ns, self._server_slo_ns, batch_1_ns)
        served = Served(model, added.code, slo_ns)
        self._by_version[model.name, model.version] = served
        versions = {*self._versions.get(model.name, ()), model.version}
        self._set_versions(model.name, versions)

    def remove(self, key: str) -> None:
        """Serve a model no more."""
        name, _, version = key.rpartition("/")
        if self._by_version.pop((name, version), None) is not None:
            self._set_versions(name, set(self._versions[name]) - {version})

    def find(self, name: str, version: str = "") -> Served:
        """The version of that name, or its highest one. Raises :class:`UnknownModel`."""
        served = self._by_version.get((name, version))
        if served is None:
            raise UnknownModel(missing(name, version))
        return served

    def versions(self, name: str) -> list[str]:
        """The versions of a name that are served, ascending."""
        return self._versions.get(name, [])

    def all(self) -> list[Served]:
        """Every version of every name."""
        return [served for (_, version), served in self._by_version.items() if version]

    def names(self) -> list[str]:
        """Every name."""
        return sorted(self._versions)

    def _set_versions(self, name: str, versions: set[str]) -> None:
        if not versions:
            del self._versions[name]
            del self._by_version[name, ""]
            return
        ordered = self._versions[name] = sorted(versions, key=_order)
        # A request without a version means the highest.
        self._by_version[name, ""] = self._by_version[name, ordered[-1]]


def _order(version: str) -> tuple[int, str]:
    return (int(version) if version.isdecimal() else -1, version)


# ------------------------------------------------------------
# A gateway's link to the controller process: connects again and again, keeps the catalogue, asks questions.
#
# It knows nothing of requests: answers go to whoever owns it. Nor does it know where the controller is.


RECONNECT_S: Final = 0.05

_log = logging.getLogger(__name__)


class ControllerLink(Protocol):
    """A link to the controller, or what stands for one."""

    @property
    def is_open(self) -> bool:
        """Whether frames can still be sent."""

    def send(self, frame: Frame) -> None:
        """Send one; dropped if the link is gone."""

    def close(self) -> None:
        """Close after what was sent; nothing is told of it."""


Reach = Callable[[Callable[[list[Frame]], None], Callable[[str], None]], Awaitable[ControllerLink]]
"""How to reach the controller: given whom to tell of frames, and at most once why the link was lost.

Raises :class:`TransportError` if it cannot be reached now.
"""


def at_home(controller: Path, name: str) -> Reach:
    """A controller of this host, at that socket."""

    async def reach(
        on_frames: Callable[[list[Frame]], None], on_lost: Callable[[str], None]
    ) -> ControllerLink:
        own = hello(Role.GATEWAY, name)
        return await connect(
            controller, own, lambda _, frames: on_frames(frames), lambda link: on_lost(link.lost_because)
        )

    return reach


@dataclass(slots=True, frozen=True)
class LinkListener:
    """Whom to tell. ``on_lost`` gets a reason; ``on_readiness`` tells that readiness may have changed.

    ``on_stuck``: the controller is there and does not answer.

    ``on_refused`` gets a request that waited for its turn in vain, and for how long it did, in ns;
    ``on_unheard`` hears of one that was sent, and the controller never heard of it.
    ``on_batch`` is called before what came in one piece is told, and ``on_batch_end`` after it.
    """

    on_answer: Callable[[Answer], None]
    on_release: Callable[[Release], None]
    on_lost: Callable[[str], None]
    on_readiness: Callable[[], None]
    on_foretold: Callable[[AdmissionReply], None] = lambda _: None
    on_batch: Callable[[], None] = lambda: None
    on_batch_end: Callable[[], None] = lambda: None
    on_refused: Callable[[Request, int], None] = lambda request, waited_ns: None
    on_unheard: Callable[[Undelivered], None] = lambda _: None
    on_stuck: Callable[[], None] = lambda: None


class GatewayLink:
    """All methods are for the running loop's own thread. ``models`` is the catalogue of the open link.

    ``ready``: whether the server can serve.
    """

    def __init__(self, reach: Reach, server_slo_ns: int | None, listener: LinkListener) -> None:
        self.models = GatewayModels(server_slo_ns)
        self.ready = False  # asked for each request, so not found out anew each time
        self._reach = reach
        self._server_slo_ns = server_slo_ns
        self._listener = listener
        self._loop = asyncio.get_running_loop()
        self._link: ControllerLink | None = None
        self._readiness = Readiness(ready=False, why="connecting to the controller")
        self._incoming: GatewayModels | None = None  # the catalogue of a new link, until it is complete
        self._asks: dict[int, asyncio.Future[Reply]] = {}  # all and only questions without a reply
        self._ask_count = 0
        self._lost = asyncio.Event()
        self._turnstile = CreditGate(self.send, listener.on_refused)
        self._sweep: asyncio.TimerHandle | None = None  # set while requests wait for their turn
        self._pulse = PeerHeartbeat(self.send, self._on_pulse)
        # Requests whose answers were given to their clients, or are not to be: told soon. For any thread.
        self.in_time: deque[str] = deque()
        self.late: deque[str] = deque()

    @property
    def is_open(self) -> bool:
        """Whether the controller is there and has told its catalogue."""
        return self._link is not None and self._incoming is None

    @property
    def stuck(self) -> bool:
        """Whether the controller is there and does not answer: it would answer no request either."""
        return self._pulse.stalled

    @property
    def why_not_ready(self) -> str:
        """What is missing."""
        if not self.is_open:
            return "no link to the controller"
        if self._pulse.stalled:
            return f"the controller has not answered for {self._pulse.stalled_s:.1f} s"
        if self._readiness.ready and self.models.all_quarantined:
            return "all models are in quarantine"
        return self._readiness.why

    async def run(self) -> None:
        """Keep a link until cancelled."""
        while True:
            self._incoming = GatewayModels(self._server_slo_ns)
            self._lost.clear()
            try:
                link = await self._reach(self._on_frames, self._on_lost)
            except TransportError as error:
                _log.debug("%s", error)
            else:
                # It may be gone again already.
                if link.is_open:
                    self._link = link
                    self._pulse.start()
                    self.in_time.clear()
                    self.late.clear()
                    link.send(Delivered())
                    _log.info("connected to the controller")
                    self._look_again()
                    await self._lost.wait()
            await asyncio.sleep(RECONNECT_S)

    def send(self, frame: Frame) -> None:
        """Send one frame; dropped if there is no link."""
        if self._link is not None:
            self._link.send(frame)

    def submit(self, request: Request) -> None:
        """Send a request when the controller will hear it soon; ``on_refused`` is told if it will not."""
        if self._turnstile.submit(request) and self._sweep is None:
            self._sweep = self._loop.call_later(SWEEP_NS / NS_PER_S, self._look_for_overdue)

    def tell_delivered(self) -> None:
        """Tell the controller what became of its answers."""
        in_time, late = self.in_time, self.late
        if in_time or late:
            self.send(
                Delivered(
                    in_time=tuple([in_time.popleft() for _ in range(len(in_time))]),
                    late=tuple([late.popleft() for _ in range(len(late))]),
                )
            )

    def withdraw(self, request_id: str) -> bool:
        """Nobody waits for a request any more; whether the controller never heard of it, and will not."""
        return self._turnstile.withdraw(request_id)

    def close(self) -> None:
        """Send what was queued and close; questions are answered 503."""
        self.tell_delivered()
        link, self._link = self._link, None
        self._pulse.stop()
        self.ready = False
        if link is not None:
            link.close()
        self._fail_asks("the server is shutting down")

    async def ask(self, what: Question, body: bytes, patience_s: float) -> Reply:
        """The reply; one that says 503 if there can be none, 504 if none comes."""
        if self._link is None or self.stuck:
            return _refusal(503, self.why_not_ready)
        self.tell_delivered()  # so that the reply counts them
        self._ask_count += 1
        ask_id = self._ask_count
        waiter: asyncio.Future[Reply] = self._loop.create_future()
        self._asks[ask_id] = waiter
        self._link.send(Ask(ask_id=ask_id, what=what, body=body))
        try:
            async with asyncio.timeout(patience_s):
                return await waiter
        except TimeoutError:
            return _refusal(504, f"{what}: no reply within {patience_s:g} s")
        finally:
            self._asks.pop(ask_id, None)

    def _on_frames(self, frames: list[Frame]) -> None:
        on_answer = self._listener.on_answer
        self._listener.on_batch()
        try:
            for frame in frames:
                if type(frame) is Answer:
                    on_answer(frame)
                else:
                    self._take(frame)
        finally:
            self._listener.on_batch_end()

    def _take(self, frame: Frame) -> None:
        listener = self._listener
        match frame:
            case Release():
                listener.on_release(frame)
            case AdmissionReply():
                listener.on_foretold(frame)
            case Reply():
                waiter = self._asks.get(frame.ask_id)
                if waiter is not None and not waiter.done():
                    waiter.set_result(frame)
            case RequestCredit():
                self._turnstile.on_credit(frame)
            case Beat():
                self._pulse.beat_received()
            case Undelivered():
                listener.on_unheard(frame)
                self._turnstile.return_credit()
            case Readiness():
                self._on_readiness(frame)
            case CodeAdded() | CodeRemoved() | ModelAdded() | ModelRemoved() | Quarantined():
                self._on_catalogue(frame)
            case _:
                _log.error("the controller sent %r, which no gateway takes", type(frame).__name__)

    def _on_catalogue(self, frame: CodeAdded | CodeRemoved | ModelAdded | ModelRemoved | Quarantined) -> None:
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
            case Quarantined():
                models.quarantines.update(frame)
        if models is self.models and (models.quarantines or isinstance(frame, Quarantined)):
            self._look_again()

    def _on_readiness(self, frame: Readiness) -> None:
        # It ends the catalogue that a new link begins with.
        if self._incoming is not None:
            self.models, self._incoming = self._incoming, None
        self._readiness = frame
        self._look_again()

    def _on_lost(self, why: str) -> None:
        _log.warning("link lost: %s", why)
        self._link = None
        self._pulse.stop()
        self._turnstile.reset()
        self._incoming = GatewayModels(self._server_slo_ns)
        self._fail_asks("the controller went away")
        self.ready = False
        self._listener.on_lost("the controller went away")
        self._look_again()
        self._lost.set()

    def _on_pulse(self) -> None:
        if self._pulse.stalled:
            why = self.why_not_ready
            _log.error("%s: requests are refused", why)
            self.ready = False
            self._fail_asks(why)
            self._listener.on_stuck()
        else:
            _log.warning("the controller answers again")
        self._look_again()

    def _look_again(self) -> None:
        """Something happened that readiness depends on."""
        serves = self.is_open and self._readiness.ready and not self._pulse.stalled
        self.ready = serves and not self.models.all_quarantined
        self._listener.on_readiness()

    def _look_for_overdue(self) -> None:
        self._sweep = None
        self._turnstile.sweep()
        if self._turnstile.holds:
            self._sweep = self._loop.call_later(SWEEP_NS / NS_PER_S, self._look_for_overdue)

    def _fail_asks(self, why: str) -> None:
        for waiter in self._asks.values():
            if not waiter.done():
                waiter.set_result(_refusal(503, why))


def _refusal(code: int, why: str) -> Reply:
    return Reply(ask_id=0, ok=False, body=msgspec.json.encode({"error": why}), code=code)


# ------------------------------------------------------------
# Requests whose controller died: those that the next one can still answer wait here for it; others do not.
#
# Each is asked twice at most, so that one that kills controllers does not go on to do so. Its tensors are
# copied to memory that no worker knows of, for what the dead one sent may still write to the old. The second
# time it has another id: where the link alone was lost, the controller may still know the first one.


LEAST_NS: Final = 100 * NS_PER_MS
"""No controller is back sooner: what is due before that hears at once that it cannot be answered."""
PATIENCE_NS: Final = 3 * NS_PER_S
"""If none is back then, it will take long, and a client may rather ask another server."""

AGAIN: Final = "-2"
"""Added to the id of a request that is asked again."""

Pendings = dict[str, Pending]


class AwaitingFailover:
    """By id, in the order in which they came. It tells no client anything."""

    def __init__(self, clock: Callable[[], int]) -> None:
        self._clock = clock
        self._waiting: Pendings = {}
        self._until_ns = 0

    def __len__(self) -> int:
        return len(self._waiting)

    def take(self, pendings: Pendings, slots: Slots) -> Pendings:
        """A controller died before it answered these: keep some of them; return the others, to be ended."""
        now_ns = self._clock()
        self._until_ns = now_ns + PATIENCE_NS
        waiting = self._waiting | {
            request_id: pending
            for request_id, pending in pendings.items()
            if pending.inquiry is not None
            and not pending.asked_again
            and pending.deadline_ns - now_ns >= LEAST_NS
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
        """There is a controller that can be asked: all, to be sent to it, by the ids that they have there."""
        released, self._waiting = self._waiting, {}
        for request_id, pending in released.items():
            pending.asked_again = True
            pending.request = structs.replace(pending.request, request_id=request_id + AGAIN)
        return {request_id + AGAIN: pending for request_id, pending in released.items()}

    def overdue(self) -> Pendings:
        """Those that have waited for as long as they can, which do so no more."""
        now_ns = self._clock()
        if now_ns >= self._until_ns:
            found, self._waiting = self._waiting, {}
            return found
        found = {one: pending for one, pending in self._waiting.items() if pending.deadline_ns <= now_ns}
        for one in found:
            del self._waiting[one]
        return found

    def withdraw(self, request_id: str) -> Pending | None:
        """Its client went away."""
        return self._waiting.pop(request_id, None)

"""A gateway's link to the controller process: connects again and again, keeps the catalogue, asks questions.

It knows nothing of requests: answers go to whoever owns it. Nor does it know where the controller is.
"""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Protocol

import msgspec

from clockwork_serve.errors import TransportError
from clockwork_serve.messages import (
    Answer,
    Ask,
    Beat,
    CodeAdded,
    CodeRemoved,
    Delivered,
    Foretold,
    Frame,
    Intake,
    ModelAdded,
    ModelRemoved,
    Quarantined,
    Question,
    Readiness,
    Release,
    Reply,
    Request,
    Role,
    Unheard,
)
from clockwork_serve.serve.gateway_models import GatewayModels
from clockwork_serve.serve.gateway_turnstile import SWEEP_NS, Turnstile
from clockwork_serve.serve.heartbeat import Pulse
from clockwork_serve.serve.transport import connect, hello
from clockwork_serve.units import NS_PER_S

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
    on_foretold: Callable[[Foretold], None] = lambda _: None
    on_batch: Callable[[], None] = lambda: None
    on_batch_end: Callable[[], None] = lambda: None
    on_refused: Callable[[Request, int], None] = lambda request, waited_ns: None
    on_unheard: Callable[[Unheard], None] = lambda _: None
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
        self._turnstile = Turnstile(self.send, listener.on_refused)
        self._sweep: asyncio.TimerHandle | None = None  # set while requests wait for their turn
        self._pulse = Pulse(self.send, self._on_pulse)
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
        return self._pulse.silent

    @property
    def why_not_ready(self) -> str:
        """What is missing."""
        if not self.is_open:
            return "no link to the controller"
        if self._pulse.silent:
            return f"the controller has not answered for {self._pulse.silent_s:.1f} s"
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
                    self._pulse.begin()
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
        if self._turnstile.enter(request) and self._sweep is None:
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
        self._pulse.end()
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
            case Foretold():
                listener.on_foretold(frame)
            case Reply():
                waiter = self._asks.get(frame.ask_id)
                if waiter is not None and not waiter.done():
                    waiter.set_result(frame)
            case Intake():
                self._turnstile.take(frame)
            case Beat():
                self._pulse.heard()
            case Unheard():
                listener.on_unheard(frame)
                self._turnstile.take_back()
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
                models.quarantines.take(frame)
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
        self._pulse.end()
        self._turnstile.reset()
        self._incoming = GatewayModels(self._server_slo_ns)
        self._fail_asks("the controller went away")
        self.ready = False
        self._listener.on_lost("the controller went away")
        self._look_again()
        self._lost.set()

    def _on_pulse(self) -> None:
        if self._pulse.silent:
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
        serves = self.is_open and self._readiness.ready and not self._pulse.silent
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

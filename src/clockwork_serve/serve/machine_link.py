"""Links between machines: TCP and TLS, both sides with certificates of one authority. It knows no message.

What holds for links on one host holds here too, and more: a link that says nothing for a while is lost, and
what is large waits for what is small.
"""

from __future__ import annotations

import asyncio
import logging
import socket
import ssl
import time
from collections import deque
from collections.abc import Iterator
from contextlib import suppress
from typing import Any, Final

from clockwork_serve.errors import TransportError
from clockwork_serve.messages import Frame, Hello, Ping
from clockwork_serve.serve.cluster_tls import PROTOCOL_NAME, ClusterContext
from clockwork_serve.serve.pem import words_of
from clockwork_serve.serve.transport import Handlers, Link, OnFrames, OnLink, OnLost
from clockwork_serve.units import KIB

SILENCE_S: Final = 2.0
"""Unless a setting says otherwise."""
BEATS: Final = 4
"""So many pings come in the time after which silence means that the link is lost."""
PIECE_BYTES: Final = 128 * KIB
"""Of tensors and artefacts in one frame: a millisecond of a fast network."""
CONNECT_S: Final = 5.0
"""For TCP and TLS together."""
SHAKING_MAX: Final = 64
SHAKING_EACH: Final = 8
"""Handshakes at once, of all and of one address: nobody has shown a certificate yet."""
SAID_AGAIN_S: Final = 600.0
"""How long the same complaint of the same address is not repeated."""
_TCP_USER_TIMEOUT: Final = 18
_TCP_NOTSENT_LOWAT: Final = 25

_log = logging.getLogger(__name__)


class MachineLink(Link):
    """A link to another machine. ``at`` is where that is, for logs."""

    samples = 32
    """The last ten seconds: clocks that nobody disciplines drift apart by up to 50 us in each of them."""

    def __init__(self, own: Hello, handlers: Handlers, silence_s: float) -> None:
        super().__init__(own, handlers)
        self.at = "?"
        self._silence_s = silence_s
        self._heard_s = self._loop.time()
        self._beat: asyncio.TimerHandle | None = None
        self._full = False  # more was written than the loop likes to hold
        # Frames that may wait: tensors before artefacts. A queue's first one is being sent.
        self._paced: tuple[deque[Iterator[Frame]], deque[Iterator[Frame]]] = (deque(), deque())

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Begin to listen for silence, and go on as on one host."""
        self._heard_s = self._loop.time()
        address = transport.get_extra_info("peername") or ("?", 0)
        self.at = f"{address[0]}:{address[1]}"
        _tune(transport.get_extra_info("socket"), self._silence_s)
        super().connection_made(transport)

    def buffer_updated(self, nbytes: int) -> None:
        """Whatever comes shows that the other side lives."""
        self._heard_s = self._loop.time()
        super().buffer_updated(nbytes)

    def queue(self, frames: Iterator[Frame], *, bulk: bool = False) -> None:
        """Send these one after the other as the network takes them; ``bulk`` after all that is not."""
        self._paced[bulk].append(frames)
        self._pump()

    @property
    def all_sent(self) -> bool:
        """Whether nothing queued waits any more."""
        return not any(self._paced)

    def pause_writing(self) -> None:
        """The network is slower than we are."""
        self._full = True

    def resume_writing(self) -> None:
        """It took what it had."""
        self._full = False
        self._pump()

    def _pump(self) -> None:
        for waiting in self._paced:
            while waiting and not self._full and self.is_open:
                frame = next(waiting[0], None)
                if frame is None:
                    waiting.popleft()
                    continue
                self.send(frame)
                self.flush()

    def _stranger(self, transport: asyncio.BaseTransport) -> str:
        shown: Any = transport.get_extra_info("ssl_object")
        if shown is None or not shown.getpeercert():
            return "it showed no certificate"
        if shown.selected_alpn_protocol() != PROTOCOL_NAME:
            return f"it does not speak {PROTOCOL_NAME}"
        return ""

    def _opened(self) -> None:
        super()._opened()
        if self.is_open:
            self._listen_for_silence()

    def _listen_for_silence(self) -> None:
        silent_s = self._loop.time() - self._heard_s
        if silent_s >= self._silence_s:
            self._break(f"silent for {silent_s:.1f} s")
        elif self.is_open:
            self._ping()
            self._beat = self._loop.call_later(self._silence_s / BEATS, self._listen_for_silence)

    def _deliver(self, frames: list[Frame]) -> None:
        if self._peer is None:
            self._greet(frames.pop(0))
        if self._alignment.same_clock:
            # They only show that the other side lives.
            frames = [frame for frame in frames if type(frame) is not Ping]
        if frames and self._transport is not None:
            super()._deliver(frames)

    def _end(self) -> None:
        super()._end()
        for waiting in self._paced:
            waiting.clear()
        if self._beat is not None:
            self._beat.cancel()
            self._beat = None


async def connect_machine(
    address: tuple[str, int], context: ssl.SSLContext, own: Hello, on_frames: OnFrames, on_lost: OnLost,
    silence_s: float = SILENCE_S,
) -> MachineLink:  # fmt: skip
    """A link to the bridge at ``address``; as :func:`~clockwork_serve.serve.transport.connect`."""
    host, port = address
    loop = asyncio.get_running_loop()
    opened: asyncio.Future[MachineLink] = loop.create_future()

    def refused(_: Link, error: TransportError) -> None:
        if not opened.done():
            opened.set_exception(error)

    def ready(link: Link) -> None:
        assert isinstance(link, MachineLink)
        if not opened.done():
            opened.set_result(link)

    link = MachineLink(own, Handlers(ready, on_frames, on_lost, refused), silence_s)
    try:
        async with asyncio.timeout(CONNECT_S):
            await loop.create_connection(lambda: link, host, port, ssl=context, server_hostname=host)
    except (TimeoutError, OSError) as error:
        if opened.done():
            opened.exception()  # nobody else will ask for it
        why = f"nothing within {CONNECT_S:.0f} s" if isinstance(error, TimeoutError) else words_of(error)
        raise TransportError(f"cannot connect to {host}:{port}: {why}") from None
    try:
        return await opened
    except asyncio.CancelledError:
        link.close()
        raise


class MachineListener:
    """Accepts links on one port. ``on_link`` is called once a peer's Hello was accepted."""

    def __init__(
        self, context: ClusterContext, own: Hello, on_link: OnLink, on_frames: OnFrames, on_lost: OnLost,
        silence_s: float = SILENCE_S,
    ) -> None:  # fmt: skip
        self._context = context
        self._own = own
        self._on_link = on_link
        self._on_frames = on_frames
        self._on_lost = on_lost
        self._silence_s = silence_s
        self._loop = asyncio.get_running_loop()
        self._links: set[Link] = set()
        self._shaking: dict[asyncio.Task[None], str] = {}  # all and only handshakes, and of which address
        self._said: dict[str, float] = {}  # complaints, and when each was logged
        self._socket: socket.socket | None = None
        self._accepting: asyncio.Task[None] | None = None

    def listen(self, listening: socket.socket) -> None:
        """Begin to accept; the socket is ours from now on."""
        listening.setblocking(False)  # noqa: FBT003 - its only name
        self._socket = listening
        self._accepting = self._loop.create_task(self._accept(listening))

    def close(self) -> None:
        """Stop listening and close every link that was accepted."""
        if self._accepting is not None:
            self._accepting.cancel()
        for shaking in self._shaking:
            shaking.cancel()
        if self._socket is not None:
            self._socket.close()
        for link in tuple(self._links):
            link.close()

    async def _accept(self, listening: socket.socket) -> None:
        while True:
            try:
                connected, address = await self._loop.sock_accept(listening)
            except OSError as error:
                _log.warning("cannot accept a machine: %s", error)
                await asyncio.sleep(0.1)
                continue
            host = str(address[0])
            if len(self._shaking) >= SHAKING_MAX or list(self._shaking.values()).count(host) >= SHAKING_EACH:
                connected.close()
                self._complain(host, "too many handshakes at once")
                continue
            shaking = self._loop.create_task(self._shake(connected, host))
            self._shaking[shaking] = host
            shaking.add_done_callback(lambda done: self._shaking.pop(done, None))

    async def _shake(self, connected: socket.socket, host: str) -> None:
        link = MachineLink(
            self._own,
            Handlers(self._on_link, self._on_frames, self._lost, self._refused, self._links.discard),
            self._silence_s,
        )
        self._links.add(link)
        try:
            async with asyncio.timeout(CONNECT_S):
                await self._loop.connect_accepted_socket(lambda: link, connected, ssl=self._context.now())
        except (OSError, TimeoutError) as error:
            self._links.discard(link)
            with suppress(OSError):
                connected.close()
            why = "no handshake in time" if isinstance(error, TimeoutError) else words_of(error)
            self._complain(host, why)

    def _lost(self, link: Link) -> None:
        self._links.discard(link)
        self._on_lost(link)

    def _refused(self, link: Link, error: TransportError) -> None:
        self._links.discard(link)
        assert isinstance(link, MachineLink)
        self._complain(link.at.rpartition(":")[0], str(error))

    def _complain(self, host: str, why: str) -> None:
        """Log it, unless that was said lately: whoever knocks again and again fills no disk."""
        now_s, said = time.monotonic(), f"{host}: {why}"
        if now_s - self._said.get(said, -SAID_AGAIN_S) < SAID_AGAIN_S:
            return
        if len(self._said) >= 1000:
            self._said.clear()
        self._said[said] = now_s
        _log.warning("turned a machine away: %s", said)


def _tune(connected: Any, silence_s: float) -> None:
    """Send at once, keep little unsent in the kernel, and give up what nobody acknowledges."""
    with suppress(OSError, AttributeError):
        connected.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        connected.setsockopt(socket.IPPROTO_TCP, _TCP_NOTSENT_LOWAT, PIECE_BYTES)
        connected.setsockopt(socket.IPPROTO_TCP, _TCP_USER_TIMEOUT, round(2000 * silence_s))

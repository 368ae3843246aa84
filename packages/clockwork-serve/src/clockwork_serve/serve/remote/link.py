"""Links between machines: TCP and TLS with certificates on both sides."""

from __future__ import annotations

import asyncio
import logging
import socket
import time
from abc import ABC, abstractmethod
from contextlib import suppress
from functools import partial
from typing import Any, Final

from clockwork_serve.errors import TransportError
from clockwork_serve.fence import Fence
from clockwork_serve.messages import Frame, Hello, Ping
from clockwork_serve.serve.accepting import Acceptor, Strangers, network_of
from clockwork_serve.serve.gateway.tls import reason_of
from clockwork_serve.serve.remote.config import PROTOCOL_NAME, ClusterContext, PeerContext, refused_by_itself
from clockwork_serve.serve.transport import Handlers, Handshake, Link, OnFrames, OnLink, OnLost
from clockwork_serve.units import KIB

# ------------------------------------------------------------
# Links between machines: TCP and TLS, both sides with certificates of one authority.
#
# They work as links on one host do, and more: a link over which nothing is received for a while is lost.
# Tensors have connections of their own.


SILENCE_S: Final = 2.0  # after how long without a byte a link is lost, by default
BEATS: Final = 4  # how many pings are sent within that time
PIECE_BYTES: Final = 128 * KIB
"""The most bytes of tensors in one frame: a millisecond of a fast network."""
CONNECT_S: Final = 5.0  # the time limit of the handshake of TLS
TCP_S: Final = 0.4
"""That of TCP, after which another attempt is worth more: to a host of which nothing is heard the
kernel tries again only after 1, 3 and 7 s, though it may be there again. Of a busy one something is heard."""
SHAKING_MAX: Final = 256
"""The most concurrent handshakes, for these peers are not authenticated yet: of networks from which no
machine has joined, and of those from which one has."""
MET_MAX: Final = 1024  # networks from which machines have joined, and are remembered
SAID_AGAIN_S: Final = 600.0  # the same warning about the same address is not logged again for this long
KEEP_IDLE_S: Final = 30  # after how long without data the kernel asks whether the peer is still there
_CROWDED: Final = "too many handshakes at once"
_TCP_USER_TIMEOUT: Final = 18
_TCP_NOTSENT_LOWAT: Final = 25

_log = logging.getLogger(__name__)


class MachineLink(Link):
    """A link to another machine. ``at`` is the peer's address, for logs; ``host`` that of this end."""

    samples = 32
    """Those of the last ten seconds: undisciplined clocks drift apart by up to 50 us in each second."""

    def __init__(self, own: Hello, handlers: Handlers, silence_s: float, fence: Fence | None = None) -> None:
        super().__init__(own, handlers, fence)
        self.at = "?"
        self.host = ""
        self._silence_s = silence_s
        self._heard_s = self._loop.time()
        self._beat: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Start the timeout, set options of the socket, and go on as on one host."""
        self._heard_s = self._loop.time()
        address = transport.get_extra_info("peername") or ("?", 0)
        self.at = f"{address[0]}:{address[1]}"
        self.host = str((transport.get_extra_info("sockname") or ("",))[0])
        tune(transport, self._silence_s)
        super().connection_made(transport)

    def buffer_updated(self, nbytes: int) -> None:
        """Restart the timeout: any byte shows that the peer lives."""
        self._heard_s = self._loop.time()
        super().buffer_updated(nbytes)

    def _why_refused(self, transport: asyncio.BaseTransport) -> str:
        return why_refused(transport)

    def _opened(self) -> None:
        super()._opened()
        if self.is_open:
            self._listen_for_silence()

    def _listen_for_silence(self) -> None:
        silent_s = self._loop.time() - self._heard_s
        if silent_s >= self._silence_s:
            self.abort(f"silent for {silent_s:.1f} s")
        elif self.is_open:
            self._ping()
            self._beat = self._loop.call_later(self._silence_s / BEATS, self._listen_for_silence)

    def _deliver(self, frames: list[Frame]) -> None:
        if self._peer is None:
            self._on_hello(frames.pop(0))
        if self._alignment.same_clock:
            # Between processes with one clock, pings only restart the timeout.
            frames = [frame for frame in frames if type(frame) is not Ping]
        if frames and self._transport is not None:
            super()._deliver(frames)

    def _end(self) -> None:
        super()._end()
        if self._beat is not None:
            self._beat.cancel()
            self._beat = None


async def connect_machine(
    address: tuple[str, int], context: PeerContext, own: Hello, on_frames: OnFrames, on_lost: OnLost,
    silence_s: float = SILENCE_S, *, fence: Fence | None = None,
) -> MachineLink:  # fmt: skip
    """Connect to the bridge at ``address``; as :func:`~clockwork_serve.serve.transport.connect`."""
    handshake = Handshake()
    link = MachineLink(own, handshake.handlers(on_frames, on_lost), silence_s, fence)
    await dial(address, context, link)
    try:
        await handshake.done(link)
    except TransportError as error:
        # A machine that does not accept a certificate closes the connection without a reason.
        if fault := refused_by_itself(context.files):
            raise TransportError(f"{error}; {fault}") from None
        raise
    return link


async def dial(address: tuple[str, int], context: PeerContext, protocol: asyncio.BaseProtocol) -> None:
    """Connect and shake hands with the machine at ``address``. Raises :class:`TransportError`.

    Its certificate must name the cluster.
    """
    (host, port), loop, connected = address, asyncio.get_running_loop(), None
    name = context.files.name
    try:
        async with asyncio.timeout(TCP_S):
            connected = await _connected(host, port)
        async with asyncio.timeout(CONNECT_S):
            await loop.create_connection(lambda: protocol, sock=connected, ssl=context, server_hostname=name)
    except (TimeoutError, OSError) as error:
        limit_s = TCP_S if connected is None else CONNECT_S
        why = f"nothing within {limit_s:g} s" if isinstance(error, TimeoutError) else reason_of(error)
        raise TransportError(f"cannot connect to {host}:{port}: {why}") from error


async def _connected(host: str, port: int) -> socket.socket:
    """A socket that is connected to the first of its addresses that answers. Raises OSError."""
    loop, error = asyncio.get_running_loop(), OSError("it has no address")
    for family, *_, at in await loop.getaddrinfo(host, port, type=socket.SOCK_STREAM):
        made = socket.socket(family, socket.SOCK_STREAM)
        made.setblocking(False)  # noqa: FBT003 - the socket's own word
        try:
            await loop.sock_connect(made, at)
        except OSError as failed:
            made.close()
            error = failed
        except BaseException:
            made.close()
            raise
        else:
            return made
    raise error


def why_refused(transport: asyncio.BaseTransport) -> str:
    """Why a peer that has shaken hands is none of ours; empty if it is."""
    shown: Any = transport.get_extra_info("ssl_object")
    if shown is None or not shown.getpeercert():
        return "it showed no certificate"
    if shown.selected_alpn_protocol() != PROTOCOL_NAME:
        return f"it does not speak {PROTOCOL_NAME}"
    return ""


def tune(transport: asyncio.BaseTransport, silence_s: float) -> None:
    """Send without delay, keep little unsent data in the kernel, and end without acknowledgements.

    A peer that is gone without a word is noticed on a connection that nobody uses, too.
    """
    connected: Any = transport.get_extra_info("socket")
    with suppress(OSError, AttributeError):
        connected.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        connected.setsockopt(socket.IPPROTO_TCP, _TCP_NOTSENT_LOWAT, PIECE_BYTES)
        connected.setsockopt(socket.IPPROTO_TCP, _TCP_USER_TIMEOUT, round(2000 * silence_s))
        connected.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        connected.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, KEEP_IDLE_S)


class Complaints:
    """What was said of machines lately: repeated attempts may not fill the disk."""

    def __init__(self) -> None:
        self._said: dict[str, float] = {}  # and when

    def new(self, said: str) -> bool:
        """Whether this is to be logged, for it was not lately."""
        now_s = time.monotonic()
        if now_s - self._said.get(said, -SAID_AGAIN_S) < SAID_AGAIN_S:
            return False
        if len(self._said) >= 1000:
            self._said.clear()
        self._said[said] = now_s
        return True


class MachineAcceptor(ABC):
    """Accepts connections of machines on one port: TCP, then TLS with certificates on both sides."""

    def __init__(self, context: ClusterContext) -> None:
        self._context = context
        self._loop = asyncio.get_running_loop()
        # Handshakes in progress, where nobody has joined from before, and where somebody has: a machine that
        # comes back finds room.
        self._shaking = Strangers[asyncio.Task[None]]()
        self._shaking_again = Strangers[asyncio.Task[None]]()
        self._met: dict[str, None] = {}  # networks of machines, the last that joined last
        self._complaints = Complaints()
        self._acceptor: Acceptor | None = None
        self.turns_away = False
        """Whether who connects is cut off at once, without a handshake: others are to be asked."""

    @abstractmethod
    def made(self) -> asyncio.BaseProtocol:
        """What serves one connection, once its handshake is done."""

    def failed(self, protocol: asyncio.BaseProtocol) -> None:  # noqa: B027 - optional
        """The handshake failed: there will be no such connection."""

    def listen(self, listening: socket.socket) -> None:
        """Accept on this socket, which is closed with this."""
        self._acceptor = Acceptor(listening, self._accepted)

    def close(self) -> None:
        """Stop listening, and end all handshakes."""
        if self._acceptor is not None:
            self._acceptor.close()
            self._acceptor = None
        for shaking in (*self._shaking, *self._shaking_again):
            shaking.cancel()

    def complain(self, host: str, why: str) -> None:
        """Log a warning, unless it was logged lately: repeated attempts may not fill the disk."""
        if self._complaints.new(said := f"{host}: {why}"):
            _log.warning("turned a machine away: %s", said)

    def _accepted(self, connected: socket.socket, host: str) -> None:
        if self.turns_away:
            connected.close()
            return
        network = network_of(host)
        table = self._shaking_again if network in self._met else self._shaking
        now_s = self._loop.time()
        if len(table) >= SHAKING_MAX:
            displaced = table.displace(network, now_s)
            if displaced is None:
                connected.close()
                self.complain(host, _CROWDED)
                return
            displaced.cancel()
            self.complain(displaced.get_name(), _CROWDED)
        shaking = self._loop.create_task(self._shake(connected, host, network), name=host)
        table.add(shaking, network, now_s)
        shaking.add_done_callback(table.discard)
        shaking.add_done_callback(partial(_close_if_cancelled, connected))

    async def _shake(self, connected: socket.socket, host: str, network: str) -> None:
        protocol = self.made()
        try:
            async with asyncio.timeout(CONNECT_S):
                await self._loop.connect_accepted_socket(lambda: protocol, connected, ssl=self._context.now())
        except (OSError, TimeoutError, asyncio.CancelledError) as error:
            self.failed(protocol)
            if isinstance(error, asyncio.CancelledError):
                raise
            with suppress(OSError):
                connected.close()
            why = "no handshake in time" if isinstance(error, TimeoutError) else reason_of(error)
            self.complain(host, why)
            return
        self._met.pop(network, None)
        if len(self._met) >= MET_MAX:
            del self._met[next(iter(self._met))]
        self._met[network] = None


class MachineListener(MachineAcceptor):
    """Accepts links. ``on_link`` is called once a peer's Hello was accepted.

    ``own`` is said on each link from now on.
    """

    def __init__(
        self, context: ClusterContext, own: Hello, on_link: OnLink, on_frames: OnFrames, on_lost: OnLost,
        silence_s: float = SILENCE_S,
    ) -> None:  # fmt: skip
        super().__init__(context)
        self.own = own
        self._on_lost = on_lost
        self._silence_s = silence_s
        self._links: set[Link] = set()
        self._handlers = Handlers(on_link, on_frames, self._lost, self._refused, self._links.discard)

    def made(self) -> MachineLink:
        """A link, which is kept until its end."""
        link = MachineLink(self.own, self._handlers, self._silence_s)
        self._links.add(link)
        return link

    def failed(self, protocol: asyncio.BaseProtocol) -> None:
        """Forget it."""
        assert isinstance(protocol, MachineLink)
        self._links.discard(protocol)

    def close(self) -> None:
        """Stop listening, and close all accepted links."""
        super().close()
        for link in tuple(self._links):
            link.close()

    def _lost(self, link: Link) -> None:
        self._links.discard(link)
        self._on_lost(link)

    def _refused(self, link: Link, error: TransportError) -> None:
        self._links.discard(link)
        assert isinstance(link, MachineLink)
        self.complain(link.at.rpartition(":")[0], str(error))


def _close_if_cancelled(connected: socket.socket, shaking: asyncio.Task[None]) -> None:
    """Close a connection, whether its handshake had begun or not."""
    if shaking.cancelled():
        with suppress(OSError):
            connected.close()

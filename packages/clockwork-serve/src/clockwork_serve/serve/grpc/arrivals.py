"""When the messages of gRPC calls arrived, where sockets are out of reach.

gRPC's core owns its sockets, and reads them in threads of its own. A message that waited for this process
shows in two ways: the thread that takes messages from the core had a gap, and the kernel reports how long ago
it received the connection's last bytes.
"""

from __future__ import annotations

import socket
import struct
import time
from collections.abc import Callable
from contextlib import suppress
from functools import lru_cache
from typing import Final
from urllib.parse import unquote

from clockwork_serve.units import NS_PER_MS, NS_PER_S

BEAT_S: Final = 0.005  # the thread that reads messages runs at least this often, unless something holds it up
IDLE_BEAT_S: Final = 0.02
IDLE_AFTER: Final = 40
"""After this many rounds without an event they come every ``IDLE_BEAT_S``: else an idle thread takes 1.4 % of
a core."""
GAP_NS: Final = 10 * NS_PER_MS
"""A longer time between two rounds is a gap: the process did not run, or Python's lock was held."""
IDLE_GAP_NS: Final = 25 * NS_PER_MS  # the same for the longer interval
AFTER_NS: Final = (10 * NS_PER_MS, 50 * NS_PER_MS)
"""A message read within this time after a gap may have arrived in it: gRPC's core is then still reading what
waited in its sockets. The time is as long as the gap, within these limits."""
ASK_EVERY_NS: Final = NS_PER_MS
"""The kernel is asked about one message in this time: it takes 9 us, the client's address included, and a
gateway at its limit has 60 for a call. After a stall, in which none come, it is asked about the first."""


class ArrivalTimes:
    """Estimates when messages arrived, for the thread that takes them from gRPC: from gaps, and receipts."""

    __slots__ = ("_requested_ns", "_since_ns", "_until_ns", "last_ns", "receipts")

    def __init__(self, now_ns: int, receipts: Receipts | None = None) -> None:
        self.last_ns = now_ns
        """The last round. One that comes no later than a gap after it may just be assigned here."""
        self.receipts = receipts  # what the kernel knows, once a port is open
        self._requested_ns = now_ns - ASK_EVERY_NS  # when the kernel was asked
        self._since_ns = self._until_ns = 0  # the last gap's start; until when messages count as of it

    def listens(self, address: str, port: int) -> None:
        """The transport listens at that port of ``address``, which is ``HOST:PORT`` with any port."""
        self.close()
        self.receipts = Receipts(address.rpartition(":")[0].strip("[]"), port)

    def close(self) -> None:
        """The transport has ended."""
        if self.receipts is not None:
            self.receipts.close()
            self.receipts = None

    def beat(self, now_ns: int, limit_ns: int = GAP_NS) -> None:
        """The thread runs a round; more than ``limit_ns`` since the last one is a gap."""
        if now_ns - self.last_ns > limit_ns:
            self._gap(self.last_ns, now_ns)
        self.last_ns = now_ns

    def arrival_ns(self, now_ns: int, peer: Callable[[], str], *, awaited: bool) -> int:
        """The arrival of a message of ``peer()`` that is taken now: it had arrived by then, or before.

        ``awaited``: the core was asked for it before it came. If the kernel received it long ago, the core's
        threads had no CPU while this one had, and other messages may have waited as long: a gap, too.
        """
        age_ns = 0
        if self.receipts is not None and now_ns - self._requested_ns >= ASK_EVERY_NS:
            self._requested_ns = now_ns
            age_ns = self.receipts.age_ns(peer())
        received_ns = now_ns - age_ns
        if awaited and age_ns > GAP_NS:
            self._gap(received_ns, now_ns)
        return min(received_ns, self._since_ns) if now_ns < self._until_ns else received_ns

    def _gap(self, start_ns: int, now_ns: int) -> None:
        # Two gaps with hardly anything between them are one.
        self._since_ns = min(self._since_ns, start_ns) if start_ns < self._until_ns else start_ns
        self._until_ns = now_ns + min(max(now_ns - start_ns, AFTER_NS[0]), AFTER_NS[1])


# ------------------------------------------------------------
# When the kernel received the last bytes of a connection that is named by its two addresses (sock_diag(7)).
# A question needs no privilege.


_CONNECTIONS: Final = 4096  # connections whose question is kept
_SOCK_DIAG: Final = 4  # ``NETLINK_SOCK_DIAG``
_BY_FAMILY: Final = 20  # ``SOCK_DIAG_BY_FAMILY``: the type of question and answer
_REQUEST: Final = 1
_INFO: Final = 2  # ``INET_DIAG_INFO``: the attribute that is a ``struct tcp_info``
_ANY: Final = 0xFFFFFFFF  # of all states, and of all cookies
_HEADER: Final = struct.Struct("=IHHII")
_QUESTION: Final = struct.Struct("=BBBxI")
_PORTS: Final = struct.Struct("!HH")
_REST: Final = struct.Struct("=III")  # the interface, and twice a half of the cookie
_ATTRIBUTES_AT: Final = _HEADER.size + 72
_attribute: Final = struct.Struct("=HH").unpack_from
_number: Final = struct.Struct("=I").unpack_from
_LAST_DATA_AT: Final = 56
_ANSWER_BYTES: Final = 4096
_FAMILIES: Final = {"ipv4": socket.AF_INET, "ipv6": socket.AF_INET6}
_TICK_CLOCK: Final = 6  # ``CLOCK_MONOTONIC_COARSE``, which advances by ticks of the kernel


class Receipts:
    """Asks the kernel when bytes were last received from a client of one port. For one thread."""

    def __init__(self, host: str, port: int) -> None:
        """``host`` is the address that is listened at, or all of them (``0.0.0.0``, ``::``).

        Without the means to ask (a sandbox) every age is 0.
        """
        self._question = lru_cache(_CONNECTIONS)(lambda peer: _question(peer, host, port))
        self._answer = bytearray(_ANSWER_BYTES)
        self._kernel: socket.socket | None = None
        self._tick_ns = int(time.clock_getres(_TICK_CLOCK) * NS_PER_S)
        self._connect()

    def close(self) -> None:
        """Ask no more."""
        kernel, self._kernel = self._kernel, None
        if kernel is not None:
            kernel.close()

    def age_ns(self, peer: str) -> int:
        """The least time since the last bytes of ``peer``, an address as gRPC writes it, were received.

        0 if unknown. The kernel counts in ticks (4 ms where it has 250 a second): one is taken off. Of bytes
        that wait to be read it reports the first rather than the last (measured, Linux 6.18, short segments):
        what the core reads late may seem older than it is.
        """
        kernel = self._kernel
        if kernel is None or not (question := self._question(peer)):
            return 0
        try:
            kernel.send(question)
            length = kernel.recv_into(self._answer)
        except OSError:  # the kernel had no memory; a late answer must not be taken for the next one
            self.close()
            self._connect()
            return 0
        return max(_quiet_ms(self._answer, length) * NS_PER_MS - self._tick_ns, 0)

    def _connect(self) -> None:
        kernel = None
        try:
            kernel = socket.socket(socket.AF_NETLINK, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK, _SOCK_DIAG)
            kernel.connect((0, 0))
        except OSError:
            if kernel is not None:
                kernel.close()
        else:
            self._kernel = kernel


def _quiet_ms(answer: bytearray, length: int) -> int:
    """Time since the last data, in the kernel's answer; 0 if it is about no connection."""
    if length < _ATTRIBUTES_AT or _HEADER.unpack_from(answer)[1] != _BY_FAMILY:
        return (
            0  # an error; of a connection that is gone the listening socket's answer comes, whose times are 0
        )
    at = _ATTRIBUTES_AT
    while at < length:
        nbytes, kind = _attribute(answer, at)
        if kind == _INFO:
            last_ms: int = _number(answer, at + 4 + _LAST_DATA_AT)[0]
            return last_ms
        at += max((nbytes + 3) & ~3, 4)
    return 0


def _question(peer: str, host: str, port: int) -> bytes:
    """What to ask about the connection of that client to our port; empty if it has none."""
    kind, _, address = peer.partition(":")
    family = _FAMILIES.get(kind)
    client, _, client_port = unquote(address).rpartition(":")
    client = client.strip("[]").partition("%")[0]
    if family is None or not client_port.isdecimal():
        return b""
    try:
        addresses = [_packed(family, _ours(family, host, client)), _packed(family, client)]
    except OSError:
        return b""
    return b"".join((
        _HEADER.pack(_HEADER.size + 56, _BY_FAMILY, _REQUEST, 0, 0),
        _QUESTION.pack(family, socket.IPPROTO_TCP, 1 << (_INFO - 1), _ANY),
        _PORTS.pack(port, int(client_port)), *addresses, _REST.pack(0, _ANY, _ANY),
    ))  # fmt: skip


def _packed(family: socket.AddressFamily, address: str) -> bytes:
    return socket.inet_pton(family, address).ljust(16, b"\0")


def _ours(family: socket.AddressFamily, host: str, client: str) -> str:
    """The address that the client is connected to; of all addresses it is the one that reaches the client."""
    with suppress(OSError):
        if any(_packed(family, host)):
            return host
    with socket.socket(family, socket.SOCK_DGRAM) as probe:
        probe.connect((client, 1))  # sends nothing
        found: str = probe.getsockname()[0]
        return found.partition("%")[0]

"""Accepting connections, so that a crowd of those who say nothing keeps nobody out.

Of who has connected nothing is known but an address, and whoever floods a port has few of them. So where
there is no room for one more, those make room whose network has most.
"""

from __future__ import annotations

import asyncio
import ipaddress
import logging
import socket
from collections.abc import Callable, Iterator
from typing import Final, Generic, TypeVar

BURST: Final = 16
"""The most connections accepted before the loop handles other events, among them the handshakes."""
PATIENCE_S: Final = 1.0
"""For how long one of many from the same network is let be: whoever means it needs a fraction of that."""
_FULL_S: Final = 0.5  # when to try again if the system has no file descriptor left
_NETWORK_BITS: Final = 64  # of an IPv6 address: whoever has one has all that begin so

_Stranger = TypeVar("_Stranger")
_log = logging.getLogger(__name__)


class Strangers(Generic[_Stranger]):
    """Those of whom nothing is known, by the network that they come from.

    However many there are, each method takes as long.
    """

    def __init__(self) -> None:
        self._networks: dict[_Stranger, str] = {}
        self._since_s: dict[str, dict[_Stranger, float]] = {}  # by network: when each came, oldest first
        self._with: list[dict[str, None]] = [{}]  # networks, by how many strangers they have

    def __len__(self) -> int:
        return len(self._networks)

    def __iter__(self) -> Iterator[_Stranger]:
        return iter(tuple(self._networks))

    def add(self, stranger: _Stranger, network: str, now_s: float) -> None:
        """Add one that is not there."""
        own = self._since_s.setdefault(network, {})
        own[stranger] = now_s
        self._networks[stranger] = network
        self._move(network, len(own) - 1, len(own))

    def discard(self, stranger: _Stranger) -> None:
        """Remove one: it is known now, or gone. Nothing happens if it is not there."""
        network = self._networks.pop(stranger, None)
        if network is None:
            return
        own = self._since_s[network]
        del own[stranger]
        self._move(network, len(own) + 1, len(own))
        if not own:
            del self._since_s[network]

    def displace(self, network: str, now_s: float) -> _Stranger | None:
        """Remove and return one that makes room for another one from ``network``; None if none does.

        It is the oldest of the network that has most, if that has more than this one then will have. Else it
        is the oldest of this network, and had its time: to turn somebody away costs less.
        """
        if not self._networks:
            return None
        own = self._since_s.get(network, {})
        most = self._since_s[next(iter(self._with[-1]))]
        evens_out = len(own) + 1 < len(most)
        found, since_s = next(iter((most if evens_out else own or most).items()))
        if not evens_out and now_s - since_s < PATIENCE_S:
            return None
        self.discard(found)
        return found

    def _move(self, network: str, before: int, now: int) -> None:
        self._with[before].pop(network, None)
        if now == len(self._with):
            self._with.append({})
        if now:
            self._with[now][network] = None
        while len(self._with) > 1 and not self._with[-1]:
            self._with.pop()


def network_of(host: str) -> str:
    """What whoever has this address has: an IPv4 address alone, of an IPv6 one all that begin alike."""
    if ":" not in host:
        return host
    found = ipaddress.IPv6Address(host)
    if found.ipv4_mapped is not None:
        return str(found.ipv4_mapped)
    return str(ipaddress.IPv6Network((found, _NETWORK_BITS), strict=False))


class Acceptor:
    """Accepts on a listening socket, which is closed with it. ``on_accepted`` gets connection and address."""

    def __init__(self, listening: socket.socket, on_accepted: Callable[[socket.socket, str], None]) -> None:
        self._listening = listening
        self._on_accepted = on_accepted
        self._loop = asyncio.get_running_loop()
        self._again: asyncio.TimerHandle | None = None
        listening.setblocking(False)  # noqa: FBT003 - the socket's own word
        self._resume()

    def close(self) -> None:
        """Accept no more."""
        if self._again is not None:
            self._again.cancel()
        self._loop.remove_reader(self._listening.fileno())
        self._listening.close()

    def _resume(self) -> None:
        self._loop.add_reader(self._listening.fileno(), self._accept)

    def _accept(self) -> None:
        for _ in range(BURST):
            try:
                accepted, address = self._listening.accept()
            except (BlockingIOError, InterruptedError, ConnectionAbortedError):
                return
            except OSError as error:
                _log.warning("accepting a connection failed: %s", error)
                self._loop.remove_reader(self._listening.fileno())
                self._again = self._loop.call_later(_FULL_S, self._resume)
                return
            accepted.setblocking(False)  # noqa: FBT003 - the socket's own word
            self._on_accepted(accepted, str(address[0]))

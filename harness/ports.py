"""Ports for who must know its port before it listens."""

from __future__ import annotations

import random
import socket
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Final

GIVEN: Final = Path("/proc/sys/net/ipv4/ip_local_port_range")
"""From which the system gives to connections, and to who listens on port 0."""
FIRST: Final = 10_000


def _by_chance() -> Iterator[int]:
    """Each port below those once, in another order in each process."""
    ports = range(FIRST, max(int(GIVEN.read_text().split()[0]), FIRST + 10_000))
    yield from random.SystemRandom().sample(ports, len(ports))


_ports = _by_chance()


def free_port(host: str = "127.0.0.1") -> int:
    """A port that nobody has at ``host``, and that nobody is given meanwhile."""
    for port in _ports:
        with suppress(OSError), socket.create_server((host, port)):
            return port
    raise OSError(f"no port of {host} is left")

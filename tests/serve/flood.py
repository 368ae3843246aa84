"""Run as a program: floods a port of this host with connections that never say enough, until it is ended.

Each that is closed is opened again, from one of so many addresses.
"""

from __future__ import annotations

import selectors
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress

HELLO = bytes.fromhex("1603010200010001fc0303") + bytes(32)
"""The begin of TLS's first message."""


class Flood:
    """So many connections to a port; they begin with ``words``."""

    def __init__(self, port: int, addresses: int, words: bytes) -> None:
        self._port = port
        self._addresses = addresses
        self._words = words
        self._selector = selectors.DefaultSelector()

    def open(self, number: int) -> None:
        """Begin a connection from the address of this number."""
        high, low = divmod(number % self._addresses, 200)
        one = socket.socket()
        one.setblocking(False)
        one.bind((f"127.9.{1 + high}.{1 + low}", 0))
        with suppress(BlockingIOError):
            one.connect(("127.0.0.1", self._port))
        wanted = selectors.EVENT_READ | (selectors.EVENT_WRITE if self._words else 0)
        self._selector.register(one, wanted, number)

    def run(self) -> None:
        """Go on forever."""
        while True:
            for key, events in self._selector.select():
                one = key.fileobj
                assert isinstance(one, socket.socket)
                with suppress(OSError):
                    if events & selectors.EVENT_WRITE:
                        one.send(self._words)
                        self._selector.modify(one, selectors.EVENT_READ, key.data)
                        continue
                    if one.recv(4096):
                        continue
                self._selector.unregister(one)
                one.close()
                self.open(key.data)


@contextmanager
def flooded(port: int, *, addresses: int, connections: int, words: bytes = b"") -> Iterator[None]:
    """While there is such a flood, of a process of its own."""
    command = [sys.executable, __file__, *map(str, (port, addresses, connections)), words.hex()]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        try:
            assert process.stdout.readline() == b"up\n"
            yield
            assert process.poll() is None, "it goes on"
        finally:
            process.kill()


def main() -> None:
    port, addresses, connections = map(int, sys.argv[1:4])
    flood = Flood(port, addresses, bytes.fromhex(sys.argv[4]))
    for number in range(connections):
        flood.open(number)
    sys.stdout.write("up\n")
    sys.stdout.flush()
    flood.run()


if __name__ == "__main__":
    main()

"""An HTTP server that follows a script, connection by connection, for failures of all kinds."""

from __future__ import annotations

import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

OK = b'HTTP/1.1 200 OK\r\nContent-Length: 16\r\n\r\n{"name": "mock"}'
Script = Callable[[socket.socket], None]


def request(connection: socket.socket) -> bytes:
    """One request without a body; empty once the client has disconnected."""
    found = b""
    while b"\r\n\r\n" not in found:
        part = connection.recv(65536)
        if not part:
            return b""
        found += part
    return found


@contextmanager
def scripted(*scripts: Script) -> Iterator[str]:
    """The address of a server that plays each script with one connection, in order, then takes no more."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        listener.settimeout(60)

        def play() -> None:
            for script in scripts:
                try:
                    connection, _ = listener.accept()
                except OSError:
                    return
                with connection:
                    connection.settimeout(60)
                    script(connection)

        thread = threading.Thread(target=play, daemon=True)
        thread.start()
        yield f"127.0.0.1:{listener.getsockname()[1]}"
    thread.join(60)
    assert not thread.is_alive()

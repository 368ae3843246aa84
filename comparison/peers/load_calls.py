"""Has models loaded and unloaded by calls while a load is played: one thread that mostly sleeps."""

from __future__ import annotations

import http.client
import threading
import time
from collections.abc import Sequence
from typing import Any, Final

from comparison.peers.peer import HOST, Peer, Setup

HELD: Final = 20
"""So many of the models stay loaded."""


class LoadCalls:
    """Each turn unloads a model and loads another; a turn that comes late is not left out."""

    def __init__(self, asked: Peer, setup: Setup, names: Sequence[str], per_s: float) -> None:
        self._peer = asked
        self._port = setup.port
        self._names = names
        self._every_s = 1 / per_s
        self._held = setup.memory_models or HELD
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._run, name="load calls")
        self._done = self._failed = 0

    def start(self) -> None:
        """Begin."""
        self._thread.start()

    def stop(self) -> dict[str, Any]:
        """End; how many loads went well, and how many did not."""
        self._over.set()
        self._thread.join()
        return {"loads": self._done, "loads_failed": self._failed}

    def _run(self) -> None:
        connection = http.client.HTTPConnection(HOST, self._port, timeout=30)
        next_s, number = time.monotonic(), 0
        while not self._over.wait(max(0.0, next_s - time.monotonic())):
            next_s += self._every_s
            gone, come = turn(self._names, self._held, number)
            number += 1
            if gone:
                self._call(connection, self._peer.load_path(gone, unload=True))
            if self._call(connection, self._peer.load_path(come)):
                self._done += 1
            else:
                self._failed += 1
        connection.close()

    def _call(self, connection: http.client.HTTPConnection, path: str) -> bool:
        try:
            connection.request("POST", path)
            response = connection.getresponse()
            response.read()
        except (OSError, http.client.HTTPException):
            connection.close()
            return False
        return response.status == 200


def turn(names: Sequence[str], held: int, number: int) -> tuple[str, str]:
    """Which model goes ("" while there is room) and which comes."""
    gone = names[(number - held) % len(names)] if number >= held else ""
    return gone, names[number % len(names)]

"""Weights verified before their first LOAD, beside the lanes: one thread, a quarter of a core at most.

A worker knows every model. Reading and hashing a file takes about six times as long as a LOAD of it, and a
lane must do that by itself at a first LOAD that comes before this thread did. The thread is not niced: if it
waited for a core while it held the interpreter's lock, lanes would wait, too. It sleeps three times as long
as it works.
"""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, Final

from clockwork_serve.devices.base import Device
from clockwork_serve.errors import DamageError
from clockwork_serve.messages import Weights

SLEEP_FACTOR: Final = 3
"""How much longer it sleeps than it worked."""
SLEEP_MIN_S: Final = 0.001

_log = logging.getLogger(__name__)


def is_blob(weights: Weights) -> bool:
    """Whether weights are a file of their own, named by its content."""
    return Path(weights.path).name == f"{weights.weights_id}.bin"


class Verifier:
    """``damaged`` is called, by its thread, for each file that is not what its name says."""

    def __init__(self, devices: Iterable[Device], damaged: Callable[[DamageError], None]) -> None:
        self._verifiers: list[Callable[[Weights], None]] = [
            verify for device in devices if (verify := getattr(device, "verify", None))
        ]
        self._damaged = damaged
        self._waiting: dict[str, Weights] = {}  # by id, in the order they came
        self._lock = threading.Lock()
        self._thread: threading.Thread | None = None
        self._closing = threading.Event()

    def add(self, weights: Weights) -> None:
        """Look at these some time, unless they are no file."""
        if not self._verifiers or not is_blob(weights):
            return
        with self._lock:
            self._waiting[weights.weights_id] = weights
            if self._thread is None and not self._closing.is_set():
                self._thread = threading.Thread(target=self._run, name="verifier", daemon=True)
                self._thread.start()

    def close(self) -> None:
        """Look at no more."""
        self._closing.set()

    def join(self) -> None:
        """Wait until all that was added was looked at: for tests."""
        thread = self._thread
        if thread is not None:
            thread.join()

    def _run(self) -> None:
        # Whoever started this thread may run in real time, and would have it do so, too.
        os.sched_setscheduler(0, os.SCHED_OTHER, os.sched_param(0))
        while (weights := self._next()) is not None:
            began_s = time.monotonic()
            self._verify_one(weights)
            sleep_s = max(SLEEP_MIN_S, SLEEP_FACTOR * (time.monotonic() - began_s))
            if self._closing.wait(sleep_s):
                return

    def _next(self) -> Any:
        with self._lock:
            if self._waiting and not self._closing.is_set():
                return self._waiting.pop(next(iter(self._waiting)))
            self._thread = None
            return None

    def _verify_one(self, weights: Weights) -> None:
        for verify in self._verifiers:
            try:
                verify(weights)
            except DamageError as error:
                self._damaged(error)
                return
            except Exception as error:  # noqa: BLE001 - a LOAD finds out what is wrong
                _log.warning("weights %s could not be verified: %s", weights.weights_id, error)

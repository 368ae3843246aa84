"""Verifies the checksums of weights in the background, before their first LOAD; a quarter of a core at most.

A worker knows every model. Reading and hashing a file takes about six times as long as its LOAD, and at a
first LOAD of weights that are not verified yet the lane must do it. The thread is not niced: if it waited for
a core while it held the interpreter's lock, lanes would wait, too. It sleeps three times as long as it works.
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
"""The thread sleeps this many times as long as it worked."""
SLEEP_MIN_S: Final = 0.001

_log = logging.getLogger(__name__)


def is_blob(weights: Weights) -> bool:
    """Whether weights are a file of their own, named by its content."""
    return Path(weights.path).name == f"{weights.weights_id}.bin"


class Verifier:
    """Verifies weights on the given devices.

    ``damaged`` is called, by the verifier's thread, for each file whose content does not match its name.
    """

    def __init__(self, devices: Iterable[Device], damaged: Callable[[DamageError], None]) -> None:
        self._verifiers: list[Callable[[Weights], None]] = [
            verify for device in devices if (verify := getattr(device, "verify", None))
        ]
        self._damaged = damaged
        self._waiting: dict[str, Weights] = {}  # by id, in the order they were added
        self._lock = threading.Lock()
        self._thread: threading.Thread | None = None
        self._closing = threading.Event()

    def add(self, weights: Weights) -> None:
        """Queue weights for verification; ignored if they are no file of their own."""
        if not self._verifiers or not is_blob(weights):
            return
        with self._lock:
            self._waiting[weights.weights_id] = weights
            if self._thread is None and not self._closing.is_set():
                self._thread = threading.Thread(target=self._run, name="verifier", daemon=True)
                self._thread.start()

    def close(self) -> None:
        """Verify no more."""
        self._closing.set()

    def join(self) -> None:
        """Wait until all added weights are verified: for tests."""
        thread = self._thread
        if thread is not None:
            thread.join()

    def _run(self) -> None:
        # The scheduling policy is inherited: a real-time thread may have started this one.
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
            except Exception as error:  # noqa: BLE001 - the LOAD will report what is wrong
                _log.warning("weights %s could not be verified: %s", weights.weights_id, error)

"""The emulated device, which also writes down what it ran: see :mod:`comparison.promises.rig`.

The first number of each row is the request's own. Its log is apart from that of the device itself.
"""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

from comparison.peers import served
from comparison.peers.apps import clockwork_model


class Model(clockwork_model.Model):
    """One model."""

    def load(self, path: str) -> None:
        """It is called as its folder is."""
        super().load(path)
        self._name = Path(path).parent.name
        log = Path(served.plan()["log"]).with_name("executions.log")
        self._log = os.open(log, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)

    def infer(self, inputs: dict[str, Any]) -> dict[str, Any]:
        """A batch. One process has one lane for it, so it waits for no other."""
        began_ns = time.monotonic_ns()
        outputs = super().infer(inputs)
        numbers = ",".join(str(int(number)) for number in inputs["x"][:, 0])
        os.write(self._log, f"{began_ns} {time.monotonic_ns()} {self._name} {numbers}\n".encode())
        return outputs

    def unload(self) -> None:
        """The log is closed."""
        os.close(self._log)

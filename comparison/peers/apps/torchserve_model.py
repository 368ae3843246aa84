"""A handler that runs any of the models, which it finds by the name that it is served under."""

from __future__ import annotations

from typing import Any

import numpy as np

from comparison.peers import served


class Handler:
    """One model."""

    def __init__(self) -> None:
        self._run: served.Run | None = None

    def initialize(self, context: Any) -> None:
        """In its worker."""
        self._run = served.load(context.manifest["model"]["modelName"])

    def handle(self, data: list[dict[str, Any]], context: Any) -> list[bytes]:
        """A batch."""
        assert self._run is not None
        rows = [served.array(bytes(one.get("body") or one.get("data") or b"")) for one in data]
        found = self._run(np.concatenate(rows) if len(rows) > 1 else rows[0])
        return [row.tobytes() for row in found]

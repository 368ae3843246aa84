"""The emulated device as a Python model of Clockwork Serve, which has to find out its durations."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from comparison.peers import served


class Model:
    """One model."""

    def load(self, path: str) -> None:
        """It is called as its folder is."""
        self._run = served.load(Path(path).parent.name)

    def infer(self, inputs: dict[str, Any]) -> dict[str, Any]:
        """A batch."""
        return {"y": self._run(inputs["x"])}

    def unload(self) -> None:
        """Nothing is kept."""

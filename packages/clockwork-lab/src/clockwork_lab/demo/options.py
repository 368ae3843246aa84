"""What the demo may be told; it starts nothing."""

from __future__ import annotations

from pathlib import Path

from msgspec import Struct

from clockwork_serve.errors import ConfigError


class DemoOptions(Struct, frozen=True, kw_only=True):
    """``json``: also write the results there. ``cache``: where files are kept (None: the default cache).

    ``seconds``: how long the load lasts. ``utilisation``: which share of the device it asks for. ``offline``:
    fetch nothing, use what is cached. ``seed`` decides who asks whom and when.
    """

    json: Path | None = None
    cache: Path | None = None
    seconds: float = 35.0
    utilisation: float = 0.55
    offline: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        """Check the ranges. Raises :class:`ConfigError`."""
        if not 0 < self.seconds <= 3600:
            raise ConfigError(f"seconds: expected more than 0 and at most 3600; found {self.seconds}")
        if not 0 < self.utilisation <= 10:
            raise ConfigError(f"utilisation: expected more than 0 and at most 10; found {self.utilisation}")

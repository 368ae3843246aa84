"""The options of the demo."""

from __future__ import annotations

from pathlib import Path

from msgspec import Struct

from clockwork_serve.errors import ConfigError


class DemoOptions(Struct, frozen=True, kw_only=True):
    """``json``: a file for the results. ``cache``: where files are kept (None: the default cache).

    ``seconds``: the duration of the load. ``utilisation``: the share of the device that it uses. ``offline``:
    download nothing, use what is cached. ``seed`` is that of the load.
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

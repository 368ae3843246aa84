"""The entry point of the demo: reports missing dependencies before it imports any."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

from msgspec import Struct

from clockwork_serve.errors import ClockworkError, ConfigError, install_advice

NEEDED = ("tritonclient.http", "tritonclient.grpc", "aiohttp", "PIL", "tokenizers", "rich")
"""Modules of the ``demo`` extra."""


class DemoOptions(Struct, frozen=True, kw_only=True):
    """``json``: a file for the results. ``cache``: where files are kept. ``seconds``: the load's duration.

    ``offline``: download nothing, use what is cached. ``seed`` is that of the load.
    """

    json: Path | None = None
    cache: Path
    seconds: float = 35.0
    offline: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        """Check the range. Raises :class:`ConfigError`."""
        if not 0 < self.seconds <= 3600:
            raise ConfigError(f"seconds: expected more than 0 and at most 3600; found {self.seconds}")


def run(options: DemoOptions) -> int:
    """Run the demo and return an exit status.

    0: all good; 1: a result was wrong or a request failed; 2: it could not run; 130: interrupted.
    """
    lacking = [name for name in NEEDED if not _found(name)]
    if lacking:
        print(
            f"error: the demo needs {', '.join(lacking)}; {install_advice('clockwork-lab[demo]')}",
            file=sys.stderr,
        )
        return 2
    from clockwork_lab.demo.show import Demo

    try:
        return Demo(options).run()
    except KeyboardInterrupt:
        print("interrupted; what was fetched and compiled is kept", file=sys.stderr)
        return 130
    except (ClockworkError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


def _found(name: str) -> bool:
    try:
        return importlib.util.find_spec(name) is not None
    except ModuleNotFoundError:
        return False

"""The entry point of the demo: reports missing dependencies before it imports any."""

from __future__ import annotations

import importlib.util
import sys

from clockwork_lab.demo.options import DemoOptions
from clockwork_serve.errors import ClockworkError

NEEDED = ("tritonclient.http", "tritonclient.grpc", "aiohttp", "PIL", "tokenizers", "rich")
"""Modules of the ``demo`` extra."""


def run(options: DemoOptions) -> int:
    """Run the demo and return an exit status.

    0: all good; 1: a result was wrong or a request failed; 2: it could not run; 130: interrupted.
    """
    lacking = [name for name in NEEDED if not _found(name)]
    if lacking:
        print(
            f"error: the demo needs {', '.join(lacking)}; pip install 'clockwork-serve[demo]' installs them",
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

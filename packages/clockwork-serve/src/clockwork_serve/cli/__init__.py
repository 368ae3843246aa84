"""The command line: reads settings, runs a command, shows its result.

Modules of this package import heavy dependencies only when a command runs.
"""

from __future__ import annotations

from clockwork_serve.cli.entry import main

__all__ = ["main"]

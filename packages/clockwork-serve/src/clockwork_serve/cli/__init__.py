"""The command line: reads settings, has a part do the work, shows what came of it.

It decides nothing. Modules of this package import what is heavy only when a command runs.
"""

from __future__ import annotations

from clockwork_serve.cli.entry import main

__all__ = ["main"]

"""Writes ``examples/models``; run it after changing ``clockwork_lab/demo/tiny.py``."""

from __future__ import annotations

from pathlib import Path

from clockwork_lab.demo.tiny import write

write(Path(__file__).parent / "models")

"""The demo: real pretrained models, real inputs, one screen of results."""

from __future__ import annotations

from clockwork_lab.demo.options import DemoOptions
from clockwork_lab.demo.start import run

__all__ = ["DemoOptions", "run"]

"""Beside the server: the demo, the paper's figures made again, and a load generator."""

from __future__ import annotations

__version__ = "0.2.0"

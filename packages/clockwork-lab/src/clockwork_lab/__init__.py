"""Tools beside the server: the demo, the reproduction of the paper's figures, and a load generator."""

from __future__ import annotations

__version__ = "0.2.0"

"""The paper's figures, made again: one module for each, and what all of them share."""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from clockwork_lab.reproduce.figure import Figure
    from clockwork_lab.reproduce.run import FigureRun

NAMES = ("fig2", "fig5", "fig6", "fig7", "fig8", "fig9", "fig10", "fig11")
"""In the paper's order. Each is a module with a function of that name; they are slow to import."""
ALL = "all"


def experiment(name: str) -> Callable[[FigureRun], Figure]:
    """The function that makes a figure."""
    made: Callable[[FigureRun], Figure] = getattr(import_module(f"{__name__}.{name}"), name)
    return made

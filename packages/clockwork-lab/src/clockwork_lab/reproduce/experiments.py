"""The experiments by figure name."""

from __future__ import annotations

from collections.abc import Callable

from clockwork_lab.reproduce.fig2 import fig2
from clockwork_lab.reproduce.fig5 import fig5
from clockwork_lab.reproduce.fig6 import fig6
from clockwork_lab.reproduce.fig7 import fig7
from clockwork_lab.reproduce.fig8 import fig8
from clockwork_lab.reproduce.fig9 import fig9
from clockwork_lab.reproduce.fig10 import fig10
from clockwork_lab.reproduce.fig11 import fig11
from clockwork_lab.reproduce.figure import Figure
from clockwork_lab.reproduce.run import Run

EXPERIMENTS: dict[str, Callable[[Run], Figure]] = {
    "fig2": fig2, "fig5": fig5, "fig6": fig6, "fig7": fig7, "fig8": fig8, "fig9": fig9, "fig10": fig10,
    "fig11": fig11,
}  # fmt: skip
"""The function that makes each figure, in the paper's order."""

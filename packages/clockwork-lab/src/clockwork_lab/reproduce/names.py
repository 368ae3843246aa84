"""The names of the figures, apart from the experiments, which are slow to import."""

from __future__ import annotations

NAMES = ("fig2", "fig5", "fig6", "fig7", "fig8", "fig9", "fig10", "fig11")
"""In the paper's order."""
ALL = "all"

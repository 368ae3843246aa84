"""Draws a figure with matplotlib, reproducible to the byte."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

import matplotlib as mpl
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure as Canvas
from matplotlib.ticker import FuncFormatter, NullLocator

from clockwork_lab.reproduce.figure import Figure, Panel, Series, SeriesRole
from clockwork_lab.reproduce.write import number

COLOURS: Final = {
    SeriesRole.PAPER: "#8a8a8a",
    SeriesRole.RELEASED: "#1f5fa8",
    SeriesRole.MENDED: "#6fb1e8",
    SeriesRole.DEFAULT: "#e8730c",
    SeriesRole.OTHER: "#9c36b5",
    SeriesRole.LIMIT: "#000000",
    SeriesRole.REAL: "#2b8a3e",
}
_WIDE, _HIGH = 5.2, 3.6
_MARKED_MOST = 24  # curves of more points are drawn without markers
_TICKS_MOST = 9
_STYLES: Final = (("-", "o"), (":", "s"), ("-.", "^"), ((0, (5, 1, 1, 1, 1, 1)), "D"))
_RC: Final[Any] = {
    "svg.hashsalt": "clockwork",
    "font.family": "DejaVu Sans",
    "font.size": 9.0,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#e4e4e4",
    "grid.linewidth": 0.6,
    "axes.axisbelow": True,
    "legend.frameon": False,
    "lines.linewidth": 1.7,
    "lines.markersize": 4.0,
}


def draw(figure: Figure, path: Path) -> None:
    """Write the picture to ``path``, as SVG."""
    with _canvas(figure) as canvas:
        FigureCanvasSVG(canvas)
        canvas.savefig(path, format="svg", metadata={"Date": None, "Creator": None})


@contextmanager
def _canvas(figure: Figure) -> Iterator[Canvas]:
    count = len(figure.panels)
    columns = min(count, 3 if count > 4 else 2)
    rows = math.ceil(count / columns)
    with mpl.rc_context(_RC):
        canvas = Canvas(figsize=(_WIDE * columns, _HIGH * rows + 0.9), layout="constrained")
        canvas.suptitle(f"{figure.figure}: {figure.title}", fontsize=11, fontweight="bold")
        grid = canvas.subplots(rows, columns, squeeze=False).flatten()
        for axes, panel in zip(grid, figure.panels, strict=False):
            _draw_panel(axes, panel, titled=count > 1)
        for axes in grid[count:]:
            axes.set_visible(False)
        _legend(canvas, list(grid[:count]), columns)
        yield canvas


def _draw_panel(axes: Axes, panel: Panel, *, titled: bool) -> None:
    for series in panel.series:
        _draw_series(axes, series)
    if titled:
        axes.set_title(panel.name, fontsize=9.5, loc="left")
    axes.set_xlabel(panel.x_label)
    axes.set_ylabel(panel.y_label)
    if panel.x_log:
        axes.set_xscale("log")
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    ticks = sorted({point.x for series in panel.series for point in series.points})
    if len(ticks) <= _TICKS_MOST and (panel.x_log or all(tick.is_integer() for tick in ticks)):
        axes.set_xticks(ticks)
        axes.xaxis.set_minor_locator(NullLocator())
    if panel.y_log:
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: number(value)))
    else:
        found = [point.y for series in panel.series for point in series.points if point.y is not None]
        axes.set_ylim(bottom=0, top=panel.y_max or 1.06 * max(found, default=0.0) or 1.0)


def _draw_series(axes: Axes, series: Series) -> None:
    known = [(point.x, point.y) for point in series.points if point.y is not None]
    xs, ys = [x for x, _ in known], [y for _, y in known]
    line, marker = _STYLES[series.variant % len(_STYLES)]
    limit = series.role is SeriesRole.LIMIT
    axes.plot(
        xs, ys, label=series.name, color=COLOURS[series.role], linestyle="--" if limit else line,
        linewidth=1.3 if limit else 1.7, marker=None if limit or len(xs) > _MARKED_MOST else marker,
        markerfacecolor="white" if series.variant else None,
        zorder={SeriesRole.LIMIT: 1.5, SeriesRole.DEFAULT: 4, SeriesRole.PAPER: 2}.get(series.role, 3),
    )  # fmt: skip


def _legend(canvas: Canvas, grid: list[Axes], columns: int) -> None:
    """One legend for all panels: equal names are drawn alike."""
    found: dict[str, Artist] = {}
    for axes in grid:
        for handle, label in zip(*axes.get_legend_handles_labels(), strict=True):
            found.setdefault(label, handle)
    canvas.legend(
        list(found.values()), list(found), loc="outside lower center", ncols=min(len(found), 2 * columns)
    )

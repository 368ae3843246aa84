"""Writes the files of a figure: NAME.json, NAME.svg and NAME.md in one folder."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from clockwork_lab.reproduce.figure import Figure, Panel, PaperClaim
from clockwork_serve.errors import ConfigError, install_advice


def check_folder(folder: Path) -> None:
    """Check beforehand that pictures can be drawn and the folder is writable. ConfigError if not."""
    if find_spec("matplotlib") is None:
        raise ConfigError(
            "matplotlib: expected it to be installed, to draw the picture; "
            f"{install_advice('clockwork-lab[figures]')}, or ask for --json FILE alone"
        )
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"out: expected a folder, found {folder} ({error.strerror})") from error


def write(figure: Figure, folder: Path) -> list[Path]:
    """Write all three; their paths."""
    from clockwork_lab.reproduce.draw import draw

    paths = [folder / f"{figure.figure}.{ending}" for ending in ("json", "md", "svg")]
    paths[0].write_bytes(figure.to_json() + b"\n")
    paths[1].write_text(to_markdown(figure), encoding="utf-8")
    draw(figure, paths[2])
    return paths


# ------------------------------------------------------------
# A figure as Markdown: set-up, claims, and one table for each panel, with rounded numbers.


_DASH = "-"


def to_markdown(figure: Figure) -> str:
    """The whole page; it names the picture beside it."""
    lines = [f"# {figure.figure}: {figure.title}", "", f"![{figure.title}]({figure.figure}.svg)", ""]
    if figure.claims:
        lines += ["## Claims", "", *claims_table(figure.claims), ""]
    for panel in figure.panels:
        lines += [f"## {panel.name}", "", *panel_table(panel), ""]
    if figure.notes:
        lines += ["## Notes", "", *(f"- {note}" for note in figure.notes), ""]
    lines += ["## How it was made", "", *_setup_lines(figure.setup)]
    return "\n".join(lines) + "\n"


def claims_table(claims: Sequence[PaperClaim]) -> list[str]:
    """Lines of the table of claims."""
    rows = [
        (claim.name, number(claim.paper), number(claim.ours), claim.wanted, "yes" if claim.met else "**no**")
        for claim in claims
    ]
    return _table(("claim", "published", "ours", "wanted", "met"), rows)


def panel_table(panel: Panel) -> list[str]:
    """Lines of a table: a row for each x, a column for each series."""
    xs: list[float] = []
    for series in panel.series:
        xs += [point.x for point in series.points if not any(_same(point.x, x) for x in xs)]
    rows = [(number(x), *(number(series.at(x)) for series in panel.series)) for x in sorted(xs)]
    return _table((panel.x_label, *(series.name for series in panel.series)), rows)


def number(value: float | None) -> str:
    """For people: 4 significant digits, no exponent below a billion."""
    if value is None:
        return _DASH
    if value == int(value) and abs(value) < 1e9:
        return f"{int(value):,}"
    if abs(value) >= 1000:
        return f"{value:,.0f}"
    return f"{value:.3f}" if 0.1 <= abs(value) < 1 else f"{value:.4g}"


def _same(left: float, right: float) -> bool:
    return abs(left - right) <= 1e-6 * abs(right)


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    def line(cells: Sequence[str]) -> str:
        return f"| {' | '.join(cell.replace('|', '/') for cell in cells)} |"

    rule = f"|{'|'.join([' --- ', *([' --: '] * (len(head) - 1))])}|"
    return [line(head), rule, *(line(row) for row in rows)]


def _setup_lines(setup: dict[str, Any]) -> list[str]:
    lines = []
    for key, value in setup.items():
        if isinstance(value, list | tuple):
            lines += [f"- {key}:", *(f"  - {each}" for each in value)]
        else:
            lines.append(f"- {key}: {value}")
    return lines

"""A plan as one page with pictures, which needs no network and no script."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from html import escape
from typing import Final

from clockwork_serve.apps.plan.report import MixReport, PlanReport, SeedSpread

_WIDE, _HIGH, _LEFT, _RIGHT, _TOP, _BOTTOM = 480, 240, 62, 16, 16, 40
_INK, _GRID, _MARK = "#555", "#e6e6e6", "#c0392b"
_BLUE, _AMBER = "#1f5fa8", "#e0a100"
_STYLE: Final = """
html{color-scheme:light;background:#fff}
body{font:14px/1.45 system-ui,sans-serif;color:#222;max-width:1080px;margin:2em auto;padding:0 1em}
h1{font-size:1.4em;margin:0 0 .4em}h2{font-size:1.05em;margin:1.6em 0 .4em}.wide{overflow-x:auto}
p.answer{font-size:1.6em;font-weight:600;margin:.4em 0}
table{border-collapse:collapse;font-variant-numeric:tabular-nums;width:100%}
th,td{padding:.2em .6em;text-align:right;border-bottom:1px solid #eee;white-space:nowrap}
th{font-weight:600;color:#555}th.text,td.text{text-align:left}
pre{color:#555;white-space:pre-wrap;overflow-wrap:anywhere;font:inherit}svg{width:100%;height:auto}
.plots{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(440px,100%),1fr));gap:0 1.2em}
"""
_PERCENT: Final[Callable[[float], str]] = lambda value: f"{100 * value:.5g} %"  # noqa: E731
_NUMBER: Final[Callable[[float], str]] = lambda value: f"{value:,.4g}"  # noqa: E731

Series = tuple[str, str, Sequence[tuple[int, SeedSpread]]]
"""A name, a colour, and by place on the axis a number with its spread."""


def page(
    report: PlanReport, answer: str, lines: Sequence[str], columns: Sequence[str],
    rows: Sequence[Sequence[str]], names: Callable[[MixReport], str],
) -> str:  # fmt: skip
    """The whole page; ``answer``, ``lines``, ``columns`` and ``rows`` are what the screen shows, too."""
    kinds = ["" if name.startswith(">") else ' class="text"' for name in columns]
    head = "".join(
        f"<th{kind}>{escape(name.removeprefix('>'))}</th>" for kind, name in zip(kinds, columns, strict=True)
    )
    body = "".join(
        "<tr>"
        + "".join(f"<td{kind}>{escape(cell)}</td>" for kind, cell in zip(kinds, row, strict=True))
        + "</tr>"
        for row in rows
    )
    title = f"Plan: {escape(report.scenario)}"
    return (
        '<!doctype html><html lang="en"><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width,initial-scale=1">'
        f"<title>{title}</title><style>{_STYLE}</style><h1>{title}</h1>"
        f'<p class="answer">{escape(answer)}</p><div class="plots">{"".join(_plots(report, names))}</div>'
        f'<h2>What was simulated</h2><div class="wide"><table><tr>{head}</tr>{body}</table></div>'
        f"<h2>In words</h2><pre>{escape(chr(10).join(lines))}</pre></html>\n"
    )


def _plots(report: PlanReport, names: Callable[[MixReport], str]) -> list[str]:
    shown = list(report.mixes)
    if not shown:
        return []
    labels = [names(mix) for mix in shown]
    target = (report.target, f"target {_PERCENT(report.target)}")
    worst = ("worst minute", _BLUE, [(at, mix.worst_minute) for at, mix in enumerate(shown)])
    goodput = ("goodput", _BLUE, [(at, mix.goodput_rps) for at, mix in enumerate(shown)])
    offered = (report.offered_rps, f"asked for: {_NUMBER(report.offered_rps)}")
    found = [
        _chart("In time in the worst minute, by devices", labels, [worst], target, _PERCENT),
        _chart("Goodput in requests a second, by devices", labels, [goodput], offered, _NUMBER),
    ]
    answer, fewer = report.answer, report.fewer
    several = [mix for mix in (fewer, answer) if mix is not None and len(mix.minutes) > 1]
    if several:
        series: list[Series] = [
            (
                names(mix),
                colour,
                [(at, SeedSpread(share, share, share)) for at, share in enumerate(mix.minutes)],
            )
            for mix, colour in zip(several, (_AMBER, _BLUE), strict=False)
        ]
        minutes = [str(at + 1) for at in range(max(len(mix.minutes) for mix in several))]
        found.append(_chart("In time, by minute", minutes, series, target, _PERCENT))
    if report.breaks is not None and report.breaks.causes:
        found.append(_causes(report))
    return found


def _chart(
    title: str, labels: Sequence[str], series: Sequence[Series], line: tuple[float, str],
    text: Callable[[float], str],
) -> str:  # fmt: skip
    """Points with their spreads, joined, over places with names; a dashed line at one value."""
    values = [value for _, _, points in series for _, one in points for value in (one.least, one.most)]
    low, high = min(*values, line[0]), max(*values, line[0])
    pad = 0.08 * (high - low) or 0.01 * abs(high) or 1.0
    low, high = low - pad, high + pad
    step = (_WIDE - _LEFT - _RIGHT) / max(1, len(labels))

    def x(at: int) -> float:
        return _LEFT + step * (at + 0.5)

    def y(value: float) -> float:
        return _HIGH - _BOTTOM - (value - low) / (high - low) * (_HIGH - _BOTTOM - _TOP)

    parts = [f'<svg viewBox="0 0 {_WIDE} {_HIGH}" role="img" aria-label="{escape(title)}" font-size="12">']
    for part in (0.0, 0.25, 0.5, 0.75, 1.0):
        value = low + pad + part * (high - low - 2 * pad)
        parts.append(_rule(y(value), _GRID) + _text(_LEFT - 6, y(value) + 4, text(value), "end"))
    every = -(-len(labels) // 10)
    parts += [
        _text(x(at), _HIGH - _BOTTOM + 18, label, "middle")
        for at, label in enumerate(labels)
        if at % every == 0
    ]
    parts.append(_rule(y(line[0]), _MARK, ' stroke-dasharray="4 3"'))
    parts.append(_text(_WIDE - _RIGHT, y(line[0]) - 4, line[1], "end", _MARK))
    for number, (name, colour, points) in enumerate(series):
        way = " ".join(f"{x(at):.1f},{y(one.mean):.1f}" for at, one in points)
        parts.append(f'<polyline points="{way}" fill="none" stroke="{colour}" stroke-width="1.6"/>')
        parts += [
            f'<line x1="{x(at):.1f}" x2="{x(at):.1f}" y1="{y(one.least):.1f}" y2="{y(one.most):.1f}" '
            f'stroke="{colour}" stroke-width="4" stroke-opacity=".4"/>'
            f'<circle cx="{x(at):.1f}" cy="{y(one.mean):.1f}" r="3" fill="{colour}">'
            f"<title>{escape(name)}, {escape(labels[at])}: {text(one.mean)}</title></circle>"
            for at, one in points
        ]
        if len(series) > 1:
            parts.append(_text(_LEFT + 8, _TOP + 14 * (number + 1), name, "start", colour))
    return f"<div><h2>{escape(title)}</h2>{''.join(parts)}</svg></div>"


def _causes(report: PlanReport) -> str:
    """Why requests miss with one device less, as bars."""
    assert report.breaks is not None
    causes = report.breaks.causes
    most = max(cause.requests for cause in causes)
    parts = [f'<svg viewBox="0 0 {_WIDE} {44 * len(causes) + 8}" role="img" font-size="12">']
    for at, cause in enumerate(causes):
        wide = (_WIDE - 90) * cause.requests / most
        parts.append(
            _text(0, 44 * at + 14, cause.cause, "start")
            + f'<rect x="0" y="{44 * at + 19}" width="{wide:.1f}" height="14" fill="{_AMBER}"/>'
            + _text(wide + 6, 44 * at + 31, f"{cause.requests:,}", "start")
        )
    return f"<div><h2>Why requests miss with one device less</h2>{''.join(parts)}</svg></div>"


def _rule(at: float, colour: str, more: str = "") -> str:
    return f'<line x1="{_LEFT}" x2="{_WIDE - _RIGHT}" y1="{at:.1f}" y2="{at:.1f}" stroke="{colour}"{more}/>'


def _text(x: float, y: float, words: str, anchor: str, colour: str = _INK) -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" fill="{colour}">{escape(words)}</text>'

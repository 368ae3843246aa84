"""A load test's report as a self-contained HTML page, and the SVG plots in it."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape
from typing import Final

from clockwork_lab.bench.report import (
    COLUMNS,
    REASON_COLUMNS,
    BenchReport,
    closing_lines,
    group_rows,
    in_time,
    lost,
    rate,
    reason_rows,
    seconds,
    setup_lines,
)
from clockwork_lab.bench.report import Curve as Distribution

# ------------------------------------------------------------
# Plots as SVG: curves and areas over a numeric axis.


WIDE, HIGH = 480, 230
_LEFT, _RIGHT, _TOP, _BOTTOM = 62, 16, 14, 42
_INK, _GRID, _SHADE, _MARK = "#555", "#e6e6e6", "#f3f3f3", "#c0392b"
_TEXT_HIGH, _LETTER_WIDE = 12, 6.5
_HALO: Final = 'paint-order="stroke" stroke="#fff" stroke-width="6" stroke-opacity=".85"'
"""Text on top of curves can be read."""

Point = tuple[float, float]
Scale = Callable[[float], float]


@dataclass(frozen=True, slots=True)
class PlottedCurve:
    """Points in order of x; None in y cuts the line. An area is filled down to zero."""

    name: str
    colour: str
    points: Sequence[tuple[float, float | None]]
    area: bool = False
    dashed: bool = False


@dataclass(frozen=True, slots=True)
class Axis:
    """How values are placed: ``ticks`` are (value, text); ``log``: by their logarithm."""

    title: str
    least: float
    most: float
    ticks: Sequence[tuple[float, str]]
    log: bool = False

    def scale(self, start: float, end: float) -> Scale:
        """The position of a value on the axis."""
        place: Callable[[float], float] = math.log if self.log else float
        least, most = place(self.least), place(self.most)
        span = most - least or 1.0

        def at(value: float) -> float:
            held = min(max(value, self.least), self.most)
            return start + (place(held) - least) / span * (end - start)

        return at


def linear(title: str, values: Sequence[float]) -> Axis:
    """From zero to a round number above all values."""
    most = max((*values, 0.0)) or 1.0
    step = 10 ** math.floor(math.log10(most))
    for part in (0.2, 0.5, 1.0, 2.0):
        if most / (step * part) <= 6:
            step *= part
            break
    top = math.ceil(most / step - 1e-9) * step
    return Axis(
        title, 0.0, top, [(tick * step, f"{tick * step:,.6g}") for tick in range(round(top / step) + 1)]
    )


def logarithmic(title: str, values: Sequence[float]) -> Axis:
    """Decades around all values, which are above 0."""
    found = [value for value in values if value > 0] or [1.0]
    first, last = math.floor(math.log10(min(found))), math.ceil(math.log10(max(found)))
    last = max(last, first + 1)
    ticks = [(10.0**power, f"{10.0**power:,g}") for power in range(first, last + 1)]
    return Axis(title, 10.0**first, 10.0**last, ticks, log=True)


def plot(
    curves: Sequence[PlottedCurve], x: Axis, y: Axis, marks: Sequence[tuple[float, str]] = (),
    shaded: tuple[float, str] | None = None,
) -> str:  # fmt: skip
    """The picture; ``marks`` are lines across it at some y, ``shaded`` is grey from the left up to some x."""
    across = x.scale(_LEFT, WIDE - _RIGHT)
    down = y.scale(HIGH - _BOTTOM, _TOP)
    title = escape(f"{y.title} over {x.title}")
    looks = f'font-size="{_TEXT_HIGH}" font-family="inherit"'
    parts = [f'<svg viewBox="0 0 {WIDE} {HIGH}" role="img" aria-label="{title}" {looks}>']
    if shaded is not None:
        parts.append(
            f'<rect x="{_LEFT}" y="{_TOP}" width="{across(shaded[0]) - _LEFT:.1f}" '
            f'height="{HIGH - _BOTTOM - _TOP}" fill="{_SHADE}"><title>{escape(shaded[1])}</title></rect>'
        )
    parts += _grid(x, y, across, down)
    parts += [_drawn(curve, across, down) for curve in curves]
    parts += _marked(marks, down)
    return "".join((*parts, "</svg>"))


def _grid(x: Axis, y: Axis, across: Scale, down: Scale) -> list[str]:
    parts = []
    floor, middle = HIGH - _BOTTOM, (HIGH - _BOTTOM + _TOP) / 2
    for value, text in y.ticks:
        at = down(value)
        parts.append(
            f'<line x1="{_LEFT}" x2="{WIDE - _RIGHT}" y1="{at:.1f}" y2="{at:.1f}" stroke="{_GRID}"/>'
            f'<text x="{_LEFT - 6}" y="{at + 4:.1f}" text-anchor="end" fill="{_INK}">{text}</text>'
        )
    for value, text in x.ticks:
        at = across(value)
        parts.append(
            f'<line x1="{at:.1f}" x2="{at:.1f}" y1="{floor}" y2="{floor + 4}" stroke="{_INK}"/>'
            f'<text x="{at:.1f}" y="{floor + 17}" text-anchor="middle" fill="{_INK}">{text}</text>'
        )
    parts.append(
        f'<text x="{(_LEFT + WIDE - _RIGHT) / 2:.0f}" y="{HIGH - 6}" text-anchor="middle" fill="{_INK}">'
        f"{escape(x.title)}</text>"
        f'<text x="12" y="{middle:.0f}" fill="{_INK}" text-anchor="middle" '
        f'transform="rotate(-90 12 {middle:.0f})">{escape(y.title)}</text>'
    )
    return parts


def _marked(marks: Sequence[tuple[float, str]], down: Scale) -> list[str]:
    """Lines across, each with its text above it; beside the one below where there is no room."""
    parts: list[str] = []
    left, below = 0.0, math.inf
    for value, text in sorted(marks):
        at = down(value)
        left = left if below - at < _TEXT_HIGH else _LEFT + 4.0
        parts.append(
            f'<line x1="{_LEFT}" x2="{WIDE - _RIGHT}" y1="{at:.1f}" y2="{at:.1f}" stroke="{_MARK}" '
            f'stroke-dasharray="3 3"/><text x="{left:.0f}" y="{at - 3:.1f}" fill="{_MARK}" {_HALO}>'
            f"{escape(text)}</text>"
        )
        left, below = left + _LETTER_WIDE * (len(text) + 1), at
    return parts


def legend(curves: Sequence[PlottedCurve]) -> str:
    """The names of curves beside what they look like."""
    return "".join(
        f'<span class="key"><i style="border-top:{"3px dashed" if curve.dashed else "3px solid"} '
        f'{curve.colour}"></i>{escape(curve.name)}</span>'
        for curve in curves
    )


def _drawn(curve: PlottedCurve, across: Scale, down: Scale) -> str:
    drawn = []
    floor: Final = down(0.0)
    for run in _runs(curve.points):
        if len(run) == 1:
            ((at, value),) = run
            drawn.append(
                f'<circle cx="{across(at):.1f}" cy="{down(value):.1f}" r="2.5" fill="{curve.colour}"/>'
            )
            continue
        line = " ".join(f"{across(at):.1f},{down(value):.1f}" for at, value in run)
        if curve.area:
            ends = f"{across(run[-1][0]):.1f},{floor:.1f} {across(run[0][0]):.1f},{floor:.1f}"
            drawn.append(f'<polygon points="{line} {ends}" fill="{curve.colour}" fill-opacity=".25"/>')
        dashes = ' stroke-dasharray="5 3"' if curve.dashed else ""
        drawn.append(
            f'<polyline points="{line}" fill="none" stroke="{curve.colour}" stroke-width="1.8"{dashes}/>'
        )
    return "".join(drawn)


def _runs(points: Sequence[tuple[float, float | None]]) -> list[list[Point]]:
    """Pieces without a gap."""
    runs: list[list[Point]] = [[]]
    for at, value in points:
        if value is None:
            runs.append([])
        else:
            runs[-1].append((at, value))
    return [run for run in runs if run]


# ------------------------------------------------------------
# A report as one page without scripts or external resources.


_GREEN, _RED, _AMBER, _GREY, _BLUE, _BLACK = (
    "#2b8a3e", "#c0392b", "#e0a100", "#8a8a8a", "#1f5fa8", "#222222",
)  # fmt: skip
_NINES: Final = ((0.5, "p50"), (0.9, "p90"), (0.99, "p99"), (0.999, "p99.9"), (0.9999, "p99.99"))
_LAST_SHARE: Final = 0.99995  # where the longest of all is drawn
_MARKS_MAX: Final = 6
_TICKS: Final = 8
_LEAST_PART: Final = 0.2  # a last interval shorter than this share of the others is too short for a rate
_COLUMNS: Final = (*COLUMNS[1:-3], ">p99 ms", ">p99.9 ms", ">max ms")
_READING: Final = (
    ("answered in time", "within the request's SLO, counted from when the request was due"),
    ("late", "answered after that"),
    ("refused", "the server said no, or that the time was up"),
    ("failed, lost", "any other status; no word at all"),
    ("SLO line", "red and dotted: an answer above it is late for requests of that SLO"),
    ("sent late", "by this program: how far behind the schedule its own sending was"),
    ("warm-up", "grey: drawn, but in no number and no table"),
)
_STYLE: Final = """
html{color-scheme:light;background:#fff}
body{font:14px/1.45 system-ui,sans-serif;color:#222;max-width:1080px;margin:2em auto;padding:0 1em}
h1{font-size:1.4em;margin:0 0 .2em}h2{font-size:1.05em;margin:1.8em 0 .4em}
h1,h2,p{overflow-wrap:anywhere}
.wide{overflow-x:auto}
table{border-collapse:collapse;font-variant-numeric:tabular-nums;width:100%}
th,td{padding:.2em .6em;text-align:right;border-bottom:1px solid #eee;white-space:nowrap}
th{font-weight:600;color:#555}tr.total td{font-weight:600;border-top:1px solid #999}
td.text,th.text{text-align:left;white-space:normal;min-width:7em;overflow-wrap:anywhere}
td.text+td.text{min-width:13em}
.invalid{background:#fdecea;border-left:4px solid #c0392b;padding:.7em 1em;margin:1em 0}
.big{display:flex;gap:1em 2.2em;flex-wrap:wrap;margin:1em 0}.big div{font-size:1.6em;font-weight:600}
.big small{display:block;font-size:.5em;font-weight:400;color:#555}
.plots{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(440px,100%),1fr));gap:0 1.2em}
.key{display:inline-block;margin-right:1em;font-size:.85em;color:#444}
.key i{display:inline-block;width:1.5em;margin-right:.35em;vertical-align:middle}
dl{display:grid;grid-template-columns:max-content 1fr;gap:.3em 1em;margin:0;font-size:.93em}
dt{font-weight:600;color:#555}dd{margin:0}
pre{color:#555;white-space:pre-wrap;overflow-wrap:anywhere}svg{width:100%;height:auto}
"""


def page(report: BenchReport) -> str:
    """The whole page."""
    total = report.total
    figures = (
        (in_time(total), "answered in time"),
        (f"{rate(total.goodput_rps)} r/s", f"goodput, of {rate(total.offered_rps)} offered"),
        (f"{_ms(total.answers.p50_ms)} / {_ms(total.answers.p99_ms)}", "p50 and p99 of answers"),
        (f"{total.rejected + total.expired:,}", "refused"),
        (f"{total.late:,}", "late"),
        (f"{total.failed + lost(total):,}", "failed or lost"),
    )
    big = "".join(f"<div>{escape(value)}<small>{escape(name)}</small></div>" for value, name in figures)
    warned = "" if report.valid else f'<p class="invalid"><b>INVALID</b>: {escape(report.invalid)}</p>'
    if report.cut:
        warned += (
            '<p class="invalid"><b>CUT</b>: the run was ended early; the numbers are of what there was.</p>'
        )
    several = len(report.loads) > 1
    loads = group_rows([*report.loads, *([total] if several else [])])
    tables = [
        ("By load", _table(("load", *_COLUMNS), loads, total=several)),
        ("By SLO", _table(("SLO", *_COLUMNS), group_rows(report.slos))),
        ("By model", _table(("model", *_COLUMNS), group_rows(report.models))),
    ]
    if report.reasons:
        tables.insert(1, ("Not answered", _table(REASON_COLUMNS, reason_rows(report))))
    return (
        '<!doctype html><html lang="en"><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width,initial-scale=1">'
        f"<title>Load test: {escape(report.scenario)}</title><style>{_STYLE}</style>"
        f"<h1>Load test: {escape(report.scenario)}</h1>"
        f"<p>{escape(report.url)} over {escape(report.protocol)}; {seconds(report.measured_s)} s "
        "measured</p>"
        f'{warned}<div class="big">{big}</div><div class="plots">{"".join(_plots(report))}{_reading()}</div>'
        + "".join(f"<h2>{escape(title)}</h2>{content}" for title, content in tables)
        + f"<h2>The run</h2><pre>{escape(chr(10).join(_facts(report)))}</pre></html>\n"
    )


def _reading() -> str:
    terms = "".join(f"<dt>{escape(name)}</dt><dd>{escape(what)}</dd>" for name, what in _READING)
    return f"<div><h2>What the words mean</h2><dl>{terms}</dl></div>"


def _facts(report: BenchReport) -> list[str]:
    return [*setup_lines(report), "", *closing_lines(report)]


def _plots(report: BenchReport) -> list[str]:
    end_s = report.warmup_s + report.measured_s
    x = _time_axis(end_s)
    warm_up = (report.warmup_s, "warm-up, not counted") if report.warmup_s else None
    marks = _slo_marks(report)
    counts, rates = _counts(report, end_s)
    latencies = _latencies(report, end_s)
    y = _ms_axis(latencies, marks)
    found = [
        _figure(
            "What became of the requests that were due in each second", counts,
            plot(counts, x, rates, shaded=warm_up),
        ),
        _figure("Latency, by when requests were due", latencies, plot(latencies, x, y, marks, warm_up)),
    ]  # fmt: skip
    shares = [
        PlottedCurve(name, colour, _points(distribution))
        for name, colour, distribution in (
            ("answers", _BLUE, report.answers_curve),
            ("refusals: how long until the no", _AMBER, report.refusals_curve),
        )
        if distribution is not None
    ]
    if shares:
        ticks = [(_nine(at), text) for at, text in _NINES]
        nines = Axis("share that took no longer", 1.0, 0.5 / (1 - _LAST_SHARE), ticks, log=True)
        y = _ms_axis(shares, marks)
        found.append(_figure("How long it took, by share of requests", shares, plot(shares, nines, y, marks)))
    return found


def _counts(report: BenchReport, end_s: float) -> tuple[list[PlottedCurve], Axis]:
    """Requests per second by outcome; the last interval may be short."""
    whole = report.stretch_s
    spans = [(one.from_s, min(whole, end_s - one.from_s), one) for one in report.stretches]
    if len(spans) > 1 and spans[-1][1] < whole * _LEAST_PART:
        spans.pop()
    spans = [(from_s, length if length > 0 else whole, one) for from_s, length, one in spans]

    def curve(
        name: str, colour: str, field: str, *, area: bool = False, dashed: bool = False
    ) -> PlottedCurve:
        points = [(from_s + span / 2, getattr(one, field) / span) for from_s, span, one in spans]
        return PlottedCurve(name, colour, points, area=area, dashed=dashed)

    return [
        curve("offered", _BLACK, "offered", dashed=True),
        curve("answered in time", _GREEN, "good", area=True),
        curve("refused", _AMBER, "refused"),
        curve("late", _RED, "late"),
        curve("failed or lost", _GREY, "failed"),
    ], linear("requests per second", [one.offered / span for _, span, one in spans])


def _latencies(report: BenchReport, end_s: float) -> list[PlottedCurve]:
    times = [((one.from_s + min(one.from_s + report.stretch_s, end_s)) / 2, one) for one in report.stretches]
    return [
        PlottedCurve("p99 of answers", _BLUE, [(at, one.p99_ms) for at, one in times]),
        PlottedCurve("p50 of answers", _GREEN, [(at, one.p50_ms) for at, one in times]),
        PlottedCurve("sent late, p99", _GREY, [(at, one.lateness_p99_ms) for at, one in times], dashed=True),
    ]


def _ms_axis(curves: Sequence[PlottedCurve], marks: Sequence[tuple[float, str]]) -> Axis:
    values = [value for curve in curves for _, value in curve.points if value]
    return logarithmic("ms (logarithmic)", [*values, *(value for value, _ in marks)])


def _figure(title: str, curves: Sequence[PlottedCurve], picture: str) -> str:
    return f"<div><h2>{escape(title)}</h2>{picture}<div>{legend(curves)}</div></div>"


def _nine(share: float) -> float:
    """A share's place on an axis of nines: 0.9, 0.99, 0.999 are equally far apart."""
    return 0.5 / (1 - min(share, _LAST_SHARE))


def _points(distribution: Distribution) -> list[tuple[float, float | None]]:
    return [
        (_nine(share), ms)
        for share, ms in zip(distribution.shares, distribution.ms, strict=True)
        if share >= _NINES[0][0]
    ]


def _slo_marks(report: BenchReport) -> list[tuple[float, str]]:
    found = [group.name for group in report.slos if group.name.endswith(" ms") and " to " not in group.name]
    return [(float(name.split()[0]), f"SLO {name}") for name in found] if len(found) <= _MARKS_MAX else []


def _time_axis(seconds: float) -> Axis:
    axis = linear("", [seconds])
    every = -(-len(axis.ticks) // _TICKS)
    ticks = [tick for tick in axis.ticks if tick[0] <= seconds][::every]
    return Axis("seconds since the start", 0.0, max(seconds, 1e-3), ticks)


def _table(columns: Sequence[str], rows: Sequence[Sequence[str]], *, total: bool = False) -> str:
    """``total``: the last row is the sum of the others."""
    kinds = ["" if name.startswith(">") else ' class="text"' for name in columns]
    head = "".join(
        f"<th{kind}>{escape(name.removeprefix('>'))}</th>" for kind, name in zip(kinds, columns, strict=True)
    )
    body = "".join(
        ('<tr class="total">' if total and row is rows[-1] else "<tr>")
        + "".join(f"<td{kind}>{escape(cell)}</td>" for kind, cell in zip(kinds, row, strict=True))
        + "</tr>"
        for row in rows
    )
    return f'<div class="wide"><table><tr>{head}</tr>{body}</table></div>'


def _ms(value: float | None) -> str:
    return "-" if value is None else f"{value:,.3g} ms"

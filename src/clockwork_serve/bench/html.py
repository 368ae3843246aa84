"""A report as one page that needs nothing else: no script, no network. It computes nothing."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from typing import Final

from clockwork_serve.bench import words
from clockwork_serve.bench.report import Curve as Distribution
from clockwork_serve.bench.report import Report
from clockwork_serve.bench.svg import Axis, Curve, legend, linear, logarithmic, plot

_GREEN, _RED, _AMBER, _GREY, _BLUE, _BLACK = (
    "#2b8a3e", "#c0392b", "#e0a100", "#8a8a8a", "#1f5fa8", "#222222",
)  # fmt: skip
_NINES: Final = ((0.5, "p50"), (0.9, "p90"), (0.99, "p99"), (0.999, "p99.9"), (0.9999, "p99.99"))
_LAST_SHARE: Final = 0.99995
"""Where the longest of all is drawn."""
_MARKS_MAX: Final = 6
_TICKS: Final = 8
_LEAST_PART: Final = 0.2
"""A last stretch that is shorter than such a part of the others tells no rate."""
_COLUMNS: Final = (*words.COLUMNS[1:-3], ">p99 ms", ">p99.9 ms", ">max ms")
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


def page(report: Report) -> str:
    """The whole page."""
    total = report.total
    figures = (
        (words.in_time(total), "answered in time"),
        (f"{words.rate(total.goodput_rps)} r/s", f"goodput, of {words.rate(total.offered_rps)} offered"),
        (f"{_ms(total.answers.p50_ms)} / {_ms(total.answers.p99_ms)}", "p50 and p99 of answers"),
        (f"{total.rejected + total.expired:,}", "refused"),
        (f"{total.late:,}", "late"),
        (f"{total.failed + words.lost(total):,}", "failed or lost"),
    )
    big = "".join(f"<div>{escape(value)}<small>{escape(name)}</small></div>" for value, name in figures)
    warned = "" if report.valid else f'<p class="invalid"><b>INVALID</b>: {escape(report.invalid)}</p>'
    if report.cut:
        warned += (
            '<p class="invalid"><b>CUT</b>: the run was ended early; the numbers are of what there was.</p>'
        )
    several = len(report.loads) > 1
    loads = words.group_rows([*report.loads, *([total] if several else [])])
    tables = [
        ("By load", _table(("load", *_COLUMNS), loads, total=several)),
        ("By SLO", _table(("SLO", *_COLUMNS), words.group_rows(report.slos))),
        ("By model", _table(("model", *_COLUMNS), words.group_rows(report.models))),
    ]
    if report.reasons:
        rows = words.reason_rows(report)
        tables.insert(1, ("Not answered", _table(words.REASON_COLUMNS, rows)))
    return (
        '<!doctype html><html lang="en"><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width,initial-scale=1">'
        f"<title>Load test: {escape(report.scenario)}</title><style>{_STYLE}</style>"
        f"<h1>Load test: {escape(report.scenario)}</h1>"
        f"<p>{escape(report.url)} over {escape(report.protocol)}; {words.seconds(report.measured_s)} s "
        "measured</p>"
        f'{warned}<div class="big">{big}</div><div class="plots">{"".join(_plots(report))}{_reading()}</div>'
        + "".join(f"<h2>{escape(title)}</h2>{content}" for title, content in tables)
        + f"<h2>The run</h2><pre>{escape(chr(10).join(_facts(report)))}</pre></html>\n"
    )


def _reading() -> str:
    terms = "".join(f"<dt>{escape(name)}</dt><dd>{escape(what)}</dd>" for name, what in _READING)
    return f"<div><h2>What the words mean</h2><dl>{terms}</dl></div>"


def _facts(report: Report) -> list[str]:
    return [*words.setup_lines(report), "", *words.closing_lines(report)]


def _plots(report: Report) -> list[str]:
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
        Curve(name, colour, _points(distribution))
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


def _counts(report: Report, end_s: float) -> tuple[list[Curve], Axis]:
    """Requests per second by what became of them; a last stretch may be short."""
    whole = report.stretch_s
    spans = [(one.from_s, min(whole, end_s - one.from_s), one) for one in report.stretches]
    if len(spans) > 1 and spans[-1][1] < whole * _LEAST_PART:
        spans.pop()
    spans = [(from_s, length if length > 0 else whole, one) for from_s, length, one in spans]

    def curve(name: str, colour: str, field: str, *, area: bool = False, dashed: bool = False) -> Curve:
        points = [(from_s + span / 2, getattr(one, field) / span) for from_s, span, one in spans]
        return Curve(name, colour, points, area=area, dashed=dashed)

    return [
        curve("offered", _BLACK, "offered", dashed=True),
        curve("answered in time", _GREEN, "good", area=True),
        curve("refused", _AMBER, "refused"),
        curve("late", _RED, "late"),
        curve("failed or lost", _GREY, "failed"),
    ], linear("requests per second", [one.offered / span for _, span, one in spans])


def _latencies(report: Report, end_s: float) -> list[Curve]:
    times = [((one.from_s + min(one.from_s + report.stretch_s, end_s)) / 2, one) for one in report.stretches]
    return [
        Curve("p99 of answers", _BLUE, [(at, one.p99_ms) for at, one in times]),
        Curve("p50 of answers", _GREEN, [(at, one.p50_ms) for at, one in times]),
        Curve("sent late, p99", _GREY, [(at, one.lateness_p99_ms) for at, one in times], dashed=True),
    ]


def _ms_axis(curves: Sequence[Curve], marks: Sequence[tuple[float, str]]) -> Axis:
    values = [value for curve in curves for _, value in curve.points if value]
    return logarithmic("ms (logarithmic)", [*values, *(value for value, _ in marks)])


def _figure(title: str, curves: Sequence[Curve], picture: str) -> str:
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


def _slo_marks(report: Report) -> list[tuple[float, str]]:
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

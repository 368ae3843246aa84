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
_MARKS_MAX: Final = 4
_TICKS: Final = 8
_STYLE: Final = """
body{font:14px/1.45 system-ui,sans-serif;color:#222;max-width:1080px;margin:2em auto;padding:0 1em}
h1{font-size:1.4em;margin:0 0 .2em}h2{font-size:1.05em;margin:1.8em 0 .4em}
table{border-collapse:collapse;font-variant-numeric:tabular-nums;width:100%}
th,td{padding:.2em .6em;text-align:right;border-bottom:1px solid #eee;white-space:nowrap}
th{font-weight:600;color:#555}td:first-child,th:first-child{text-align:left}
td.text,th.text{text-align:left;white-space:normal}
.invalid{background:#fdecea;border-left:4px solid #c0392b;padding:.7em 1em;margin:1em 0}
.big{display:flex;gap:2.2em;flex-wrap:wrap;margin:1em 0}.big div{font-size:1.6em;font-weight:600}
.big small{display:block;font-size:.5em;font-weight:400;color:#666}
.plots{display:grid;grid-template-columns:repeat(auto-fit,minmax(440px,1fr));gap:1.2em}
.key{margin-right:1em;font-size:.85em;color:#444}
.key i{display:inline-block;width:.8em;height:.8em;margin-right:.35em}
pre{color:#555;white-space:pre-wrap}svg{width:100%;height:auto}
"""


def page(report: Report) -> str:
    """The whole page."""
    total = report.total
    figures = (
        (f"{words.share(total.satisfaction)}", "answered in time"),
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
    tables = [
        ("By load", _table(("load", *words.COLUMNS[1:]), words.group_rows([*report.loads, total]))),
        ("By SLO", _table(("SLO", *words.COLUMNS[1:]), words.group_rows(report.slos))),
        ("By model", _table(("model", *words.COLUMNS[1:]), words.group_rows(report.models))),
    ]
    if report.reasons:
        rows = words.reason_rows(report)
        tables.insert(1, ("Not answered", _table(words.REASON_COLUMNS, rows)))
    return (
        f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{escape(report.scenario)}</title>'
        f"<style>{_STYLE}</style><h1>{escape(report.scenario)}</h1>"
        f"<p>{escape(report.url)} over {escape(report.protocol)}; {report.measured_s:g} s measured</p>"
        f'{warned}<div class="big">{big}</div><div class="plots">{"".join(_plots(report))}</div>'
        + "".join(f"<h2>{escape(title)}</h2>{content}" for title, content in tables)
        + f"<h2>The run</h2><pre>{escape(chr(10).join(_facts(report)))}</pre></html>\n"
    )


def _facts(report: Report) -> list[str]:
    return [*words.setup_lines(report), "", *words.closing_lines(report)]


def _plots(report: Report) -> list[str]:
    stretches, length = report.stretches, report.stretch_s
    times = [(one.from_s + length / 2, one) for one in stretches]
    x = _time_axis(report.seconds)
    counts = [
        Curve("offered", _BLACK, [(at, one.offered / length) for at, one in times], dashed=True),
        Curve("answered in time", _GREEN, [(at, one.good / length) for at, one in times], area=True),
        Curve("refused", _AMBER, [(at, one.refused / length) for at, one in times]),
        Curve("late", _RED, [(at, one.late / length) for at, one in times]),
        Curve("failed or lost", _GREY, [(at, one.failed / length) for at, one in times]),
    ]
    rates = linear("requests per second", [one.offered / length for one in stretches])
    latencies = [
        Curve("p99 of answers", _BLUE, [(at, one.p99_ms) for at, one in times]),
        Curve("p50 of answers", _GREEN, [(at, one.p50_ms) for at, one in times]),
        Curve("sent late, p99", _GREY, [(at, one.lateness_p99_ms) for at, one in times], dashed=True),
    ]
    values = [value for curve in latencies for _, value in curve.points if value]
    marks = _slo_marks(report)
    found = [
        _figure("What became of the requests that were due in each second", counts, plot(counts, x, rates)),
        _figure(
            "Latency, by when requests were due", latencies,
            plot(latencies, x, logarithmic("ms", [*values, *(value for value, _ in marks)]), marks),
        ),
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
        values = [value for curve in shares for _, value in curve.points if value]
        y = logarithmic("ms", [*values, *(value for value, _ in marks)])
        nines = Axis(
            "share of requests",
            1.0,
            0.5 / (1 - _LAST_SHARE),
            [(_nine(at), text) for at, text in _NINES],
            log=True,
        )
        found.append(_figure("How long it took, by share", shares, plot(shares, nines, y, marks)))
    return found


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
    axis = linear("seconds", [seconds])
    every = -(-len(axis.ticks) // _TICKS)
    return Axis(
        "seconds", 0.0, max(seconds, 1e-3), [tick for tick in axis.ticks if tick[0] <= seconds][::every]
    )


def _table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
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
    return f"<table><tr>{head}</tr>{body}</table>"


def _ms(value: float | None) -> str:
    return "-" if value is None else f"{value:,.3g} ms"

"""Shows what the headline runs found: the picture, the table, and the sentences of the README."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from statistics import median
from textwrap import fill
from typing import Any, Final

from comparison.chart import BOTTOM, HEIGHT, TOP, Chart, Curve, Spread, picture, round_step
from comparison.headline.plan import MODELS, NAMES, SERVERS, SHORT_NAMES, SLO_MS
from comparison.peers.peer import ROOT
from comparison.peers.record import shown, spread
from harness.report import page_row

KEPT: Final = ROOT / "docs" / "measured" / "headline.jsonl"
FIGURE: Final = ROOT / "docs" / "figures" / "headline.svg"
PAGE: Final = ROOT / "docs" / "figures" / "headline.md"
README: Final = ROOT / "README.md"
MARKS: Final = ("<!-- headline: begin -->", "<!-- headline: end -->")
COMMAND: Final = "python -m comparison.headline"
Line = dict[str, Any]
Value = Callable[[Line], float | None]

WIDTH: Final = 120
"""Of a line of the README."""


def read(path: Path = KEPT) -> list[Line]:
    """The runs that are kept; none before the first measurement."""
    return [json.loads(text) for text in path.read_text().splitlines()] if path.is_file() else []


# ------------------------------------------------------------
# What is read of a run.


def goodput(line: Line) -> float:
    """Answers within the SLO, a second."""
    return float(line["figures"]["in_time_per_s"])


def asked(line: Line) -> float:
    """Requests a second."""
    return float(line["figures"]["asked_per_s"])


def late_share(line: Line) -> float:
    """Answers after the SLO, of all requests."""
    return float(line["figures"]["late"] / line["figures"]["asked"])


def refusal_ms(line: Line) -> float | None:
    """How long after a request was due its client heard no: the median."""
    found: float | None = line["figures"]["no_p50_ms"]
    return found


def last_refusal_ms(line: Line) -> float | None:
    """The same, p99."""
    found: float | None = line["figures"]["no_p99_ms"]
    return found


def answer_ms(line: Line) -> float | None:
    """How long an answer took: the median."""
    found: float | None = line["figures"]["p50_ms"]
    return found


def cpu_ms(line: Line) -> float:
    """CPU of the server's processes a request."""
    return float(line["cpu_ms_per_request"])


def pss_mib(line: Line) -> float:
    """Memory of the server's processes."""
    return float(line["pss_bytes"]) / 2**20


def of(lines: Sequence[Line], server: str, share: float) -> list[Line]:
    """The runs of a point."""
    return [line for line in lines if line["server"] == server and line["share"] == share]


def shares(lines: Sequence[Line]) -> list[float]:
    """The rates that were measured, ascending."""
    return sorted({line["share"] for line in lines})


def servers(lines: Sequence[Line]) -> list[str]:
    """The servers that were measured."""
    there = {line["server"] for line in lines}
    return [name for name in SERVERS if name in there]


def middle(lines: Sequence[Line], value: Value) -> float | None:
    """The median of the runs that have one."""
    found = [number for line in lines if (number := value(line)) is not None]
    return median(found) if found else None


# ------------------------------------------------------------
# The picture.

PANEL: Final = HEIGHT - TOP - BOTTOM
GAP: Final = 84


def spreads(lines: Sequence[Line], server: str, value: Value) -> list[Spread]:
    """A server's points where there is anything to show; hollow if a run of it was disturbed."""
    found = []
    for share in shares(lines):
        runs = of(lines, server, share)
        if (height := spread(value(line) for line in runs)) is not None:
            x = median(asked(line) for line in runs)
            disturbed = any(line["noise"] for line in runs)
            found.append(Spread(x, height["least"], height["median"], height["most"], disturbed))
    return found


def drawing(lines: Sequence[Line]) -> str:
    """Goodput above, the age of refusals below, both against the load."""
    furthest = max(asked(line) for line in lines)
    x_step = round_step(furthest)
    x_max = x_step * -(-furthest // x_step)
    alone = 1e3 / lines[0]["image_ms"]
    upper = _panel(lines, goodput, alone, x_max, TOP)
    lower = _panel(lines, refusal_ms, SLO_MS, x_max, TOP + PANEL + GAP)
    setting = f"{MODELS} MobileNets on one core; bars: least to most of the runs"
    hollow = "; hollow: other programs disturbed a run" if any(line["noise"] for line in lines) else ""
    parts = [
        *upper.axes(f"Answers within {SLO_MS:.0f} ms, a second", setting + hollow, ""),
        *_curves(upper, lines, goodput, [(0, 0), (alone, alone), (x_max, alone)], "the model alone"),
        *lower.axes("Age of a no, ms", "from when a request was due until its client heard no: median",
                    "requests a second"),
        *_curves(lower, lines, refusal_ms, [(0, SLO_MS), (x_max, SLO_MS)], "SLO"),
    ]  # fmt: skip
    return picture("Goodput and the age of refusals against load", parts, TOP + 2 * PANEL + GAP + BOTTOM)


def _panel(lines: Sequence[Line], value: Value, least: float, x_max: float, top: int) -> Chart:
    """As high as what is shown, and as ``least``."""
    most = max(least, *(found for line in lines if (found := value(line)) is not None))
    step = round_step(most)
    return Chart(
        x_max, step * -(-most // step), step, x_step=round_step(x_max), top=top, bottom=top + PANEL
    )  # fmt: skip


def _curves(chart: Chart, lines: Sequence[Line], value: Value, limit: Curve, words: str) -> Iterator[str]:
    yield chart.line("limit", limit)
    ends = [("limit", words, limit[-1][1])]
    for server in servers(lines):
        if found := spreads(lines, server, value):
            yield from chart.spreads(server, found)
            ends.append((server, SHORT_NAMES[server], found[-1].median))
    yield from chart.labels(ends)


# ------------------------------------------------------------
# The table and its page.

_COLUMNS: Final[tuple[tuple[str, Value, str], ...]] = (
    ("in time/s", goodput, "{:.1f}"),
    ("late", lambda line: line["figures"]["late"], "{:.0f}"),
    ("no after ms (p50)", refusal_ms, "{:.0f}"),
    ("no after ms (p99)", last_refusal_ms, "{:.0f}"),
    ("answer after ms (p50)", answer_ms, "{:.0f}"),
    ("CPU ms/request", cpu_ms, "{:.2f}"),
    ("PSS MiB", pss_mib, "{:.0f}"),
    ("others %", lambda line: 100 * line["others_share"], "{:.1f}"),
)


def table(lines: Sequence[Line]) -> str:
    """A row for each rate and server, as Markdown: medians (least to most)."""
    head = ["load", "asked/s", "server", "runs", *(title for title, _, _ in _COLUMNS)]
    rows = [page_row(head), page_row(["---"] * len(head))]
    for share in shares(lines):
        for server in servers(lines):
            if not (runs := of(lines, server, share)):
                continue
            disturbed = sum(bool(line["noise"]) for line in runs)
            count = f"{len(runs)}, {disturbed} disturbed" if disturbed else str(len(runs))
            cells = [shown(spread(value(line) for line in runs), form) for _, value, form in _COLUMNS]
            rate = f"{median(asked(line) for line in runs):.0f}"
            rows.append(page_row([f"{share:g}", rate, NAMES[server], count, *cells]))
    return "\n".join(rows) + "\n"


_LEGEND: Final = (
    "Medians of the runs (least to most), after the warm-up. *asked/s* are requests sent a second. *late* "
    "are answers after the SLO, in one run. A *no* is a response that is no answer: refused, expired or "
    "failed; its age counts from when the request was due. *others* is the share of the two cores that other "
    "programs took."
)


def page(lines: Sequence[Line]) -> str:
    """The page of the figure: picture, table, how it was made."""
    first = lines[0]
    made = [
        f"- command: `{COMMAND}`; [how it measures](../develop/compare-method.md#the-figure-of-the-readme)",
        f"- machine: {first['machine']}",
        (f"- load 1: {1e3 / first['image_ms']:.0f} requests a second, which one core does with bare ONNX "
        f"Runtime, image by image ({first['image_ms']:.2f} ms each)"),
        *(f"- {NAMES[name]} {_version(lines, name)}: {_configured(name)}" for name in servers(lines)),
    ]  # fmt: skip
    return (
        "# Goodput and the age of refusals against load\n\n"
        "![Goodput and the age of refusals against load](headline.svg)\n\n"
        f"{table(lines)}\n{_LEGEND}\n\n## How it was made\n\n" + "\n".join(made) + "\n"
    )


def _version(lines: Sequence[Line], server: str) -> str:
    line = next(line for line in lines if line["server"] == server)
    return f"{line['version']}, ONNX Runtime {line['onnxruntime']}"


def _configured(server: str) -> str:
    peer = SERVERS[server]
    return f"{peer.configured}; {peer.note}" if peer.note else peer.configured


# ------------------------------------------------------------
# The sentences of the README.


def block(lines: Sequence[Line]) -> str:
    """What stands between the marks of the README: the picture and what it shows, where we lose included."""
    if not lines:
        return f"`{COMMAND}` draws the figure that belongs here.\n"
    told = f"{words(lines)} [All figures and how they were measured]({PAGE.relative_to(ROOT)})."
    return (
        f"![Goodput and the age of refusals against load]({FIGURE.relative_to(ROOT)})\n\n"
        f"{fill(told, WIDTH, break_long_words=False, break_on_hyphens=False)}\n\n{summary(lines)}"
    )


def words(lines: Sequence[Line]) -> str:
    """What was measured, and how to read the table below it."""
    noisy = sum(bool(line["noise"]) for line in lines)
    marked = f" Other programs disturbed {noisy} of {len(lines)} runs." if noisy else ""
    return (
        f"{MODELS} MobileNets on one core, SLO {SLO_MS:.0f} ms. A load of 1 is "
        f"{1e3 / lines[0]['image_ms']:.0f} requests a second, which is what the core does with the model "
        f"alone. Medians of {len(of(lines, 'clockwork', shares(lines)[0]))} runs; the best of each row is "
        f"bold.{marked}"
    )


def summary(lines: Sequence[Line]) -> str:
    """A row for each question and a column for each server, as Markdown: the best is bold, whoever it is."""
    low, top = shares(lines)[0], shares(lines)[-1]
    names = servers(lines)
    rows = [page_row(["", *(NAMES[name] for name in names)]), page_row(["---"] * (len(names) + 1))]
    questions: list[tuple[str, str, Value, bool, float]] = [
        *((f"answers in time a second, load {one:g}", "{:.1f}", goodput, True, one) for one in shares(lines)),
        (f"answers too late, of all requests, load {top:g}", "{:.1%}", late_share, False, top),
        (f"age of a no, load {top:g}", "{:.0f} ms", refusal_ms, False, top),
        (f"latency of an answer, load {low:g}", "{:.0f} ms", answer_ms, False, low),
        (f"CPU of a request, load {low:g}", "{:.1f} ms", cpu_ms, False, low),
        (f"memory, load {low:g}", "{:.0f} MiB", pss_mib, False, low),
    ]  # fmt: skip
    for what, form, value, more, share in questions:
        found = [middle(of(lines, name, share), value) for name in names]
        cells = ["-" if number is None else form.format(number) for number in found]
        there = [number for number in found if number is not None]
        best = form.format((max if more else min)(there)) if there else ""
        rows.append(page_row([what, *(f"**{cell}**" if cell == best else cell for cell in cells)]))
    return "\n".join(rows) + "\n"

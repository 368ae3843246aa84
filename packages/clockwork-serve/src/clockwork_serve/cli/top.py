"""``clockwork top``: what a running server does now, on a terminal."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from textwrap import wrap
from typing import TYPE_CHECKING, Final

import click

from clockwork_serve.cli.operate import METRICS_PORT, Target, another_port, error_in, exchange
from clockwork_serve.cli.options import json_flag
from clockwork_serve.cli.screen import interruptible, printable_lines, say, show_json, show_json_line
from clockwork_serve.errors import ClockworkError

if TYPE_CHECKING:
    from clockwork_serve.telemetry.top import DeviceNow, ModelNow, Reading, ServerNow

_WIDTH, _HEIGHT = 80, 24
_BAR: Final = 12
_REASON_LINES: Final = 3
_LOOK_S: Final = 0.05  # how soon Ctrl-C is noticed


@click.command(epilog="More, over time: clockwork docs monitoring (docs/operate/monitoring.md)")
@click.option(
    "--url", envvar="CLOCKWORK_METRICS_URL", default=f"http://127.0.0.1:{METRICS_PORT}", show_default=True,
    metavar="URL", help="The server's metrics port.",
)  # fmt: skip
@click.option(
    "--ca", envvar="CLOCKWORK_CA", metavar="FILE",
    help="PEM file of authorities for an https server; else those that the system trusts.",
)  # fmt: skip
@click.option(
    "--interval", type=click.FloatRange(0.1, 60), default=1.0, show_default=True, metavar="SECONDS",
    help="How often to look.",
)  # fmt: skip
@click.option("--once", is_flag=True, help="Look once, for one interval, and print that.")
@json_flag
def top(url: str, ca: str | None, interval: float, once: bool, as_json: bool) -> None:  # noqa: FBT001
    """Show what a running server does now: devices, queues, goodput, refusals, the busiest models.

    It reads the metrics port, every interval, until Ctrl-C; so it costs the server what a scrape costs. With
    --json each look is a line, or with --once one object. If the server requires an API key, it is read from
    CLOCKWORK_API_KEY.
    """
    target = Target.keyed(url, ca)
    with interruptible() as stopped:
        looks = _looks(target, interval, stopped)
        if once:
            for now in looks:
                if as_json:
                    show_json(now)
                else:
                    for line in frame(now, url, _WIDTH, len(now.devices) + len(now.busiest) + _HEIGHT):
                        say(line)
                return
        elif as_json:
            for now in looks:
                show_json_line(now)
        else:
            _watch(looks, url)


def _looks(target: Target, interval_s: float, stopped: Callable[[], bool]) -> Iterator[ServerNow]:
    from clockwork_serve.telemetry.top import server_now

    before, then = _reading(target), time.monotonic()
    while not stopped():
        while time.monotonic() < then + interval_s and not stopped():
            time.sleep(min(_LOOK_S, interval_s))
        if stopped():
            return
        after, now = _reading(target), time.monotonic()
        yield server_now(before, after, now - then)
        before, then = after, now


def _reading(target: Target) -> Reading:
    from clockwork_serve.telemetry.top import read_metrics

    status, phrase, body = exchange(target, "GET", "/metrics", METRICS_PORT)
    if status == 404:
        raise another_port(target.url, METRICS_PORT, f"{status}: {error_in(body, phrase)}")
    if status != 200:
        raise ClockworkError(f"the server answered {status}: {error_in(body, phrase)}")
    found = read_metrics(body.decode(errors="replace"))
    if "standing_by" in found:
        raise ClockworkError(
            f"the controller at {target.url} stands by: ask the one that leads, which its "
            "/v2/health/ready names"
        )
    return found


def _watch(looks: Iterator[ServerNow], url: str) -> None:
    """Redraw the screen at each look; where it cannot be redrawn, each is printed below the last."""
    from rich.console import Console
    from rich.live import Live
    from rich.text import Text

    console = Console()
    if not sys.stdout.isatty() or console.is_dumb_terminal:
        for now in looks:
            for line in frame(now, url, _WIDTH, _HEIGHT):
                say(line)
            say("")
        return
    with Live(console=console, screen=True, auto_refresh=False) as live:
        live.update(Text(f"reading {url} ..."), refresh=True)
        for now in looks:
            drawn = Text("\n").join(
                Text(
                    printable_lines(line),
                    style="bold" if at == 0 or line[:6] in ("DEVICE", "MODEL ") else "",
                    no_wrap=True,
                )
                for at, line in enumerate(frame(now, url, console.width, console.height))
            )
            live.update(drawn, refresh=True)


# ------------------------------------------------------------
# A frame: lines that fit the terminal.


def frame(now: ServerNow, url: str, width: int, height: int) -> list[str]:
    """The lines of a screen: the whole, devices, refusals, models; what does not fit is counted."""
    lines = [*_summary(now, url, width), ""]
    # A terminal of 24 lines shows eight devices and six models; the rest of a taller one is shared alike.
    left = height - len(lines) - 4
    most_devices = max(1, min(len(now.devices), left * 8 // 14))
    lines.append(f"{'DEVICE':<18}{'EXEC BUSY':<20}{'LOAD BUSY':<20}{'PAGES':>12}{'BATCHES/S':>10}")
    lines += [_device(each) for each in now.devices[:most_devices]]
    if len(now.devices) > most_devices:
        lines[-1] = f"and {len(now.devices) - most_devices + 1} more"
    lines += ["", f"{'MODEL':<34}{'GOOD/S':>10}{'REFUSED/S':>10}{'COLD/S':>8}{'OTHER/S':>9}{'QUEUED':>9}"]
    rows = max(1, height - len(lines))
    lines += [_model(each) for each in now.busiest[:rows]]
    if len(now.busiest) > rows:
        lines[-1] = f"and {len(now.busiest) - rows + 1} more"
    return [line[:width].rstrip() for line in lines[:height]]


def _summary(now: ServerNow, url: str, width: int) -> list[str]:
    models = f"{now.models:,} models, {now.models_resident:,}"
    ready = "ready" if now.ready else "NOT READY"
    waiting = f", {now.models_waiting:,} to be prepared" if now.models_waiting else ""
    leader = f"   epoch {now.epoch}, {now.standbys} standing by" if now.epoch > 1 or now.standbys else ""
    wanted = f"   devices wanted {now.devices_wanted}" if now.devices_wanted is not None else ""
    bad = sum(now.ends.values())
    share = f"{100 * bad / (bad + now.good_per_s):.1f} %" if bad else "0 %"
    # No line is broken between a reason and its rate.
    ends = ", ".join(f"{key.replace('rejected:', '')}\xa0{rate:,.1f}/s" for key, rate in now.ends.items())
    why = wrap(f"not answered well: {share}{f' ({ends})' if ends else ''}", width)[:_REASON_LINES]
    times = [f"{name} {_ms(value)}" for name, value in (("p50", now.p50_ms), ("p99", now.p99_ms))]
    return [
        f"{url.rpartition('//')[2]}   {ready}   {models} resident{waiting}{leader}{wanted}",
        f"goodput {now.good_per_s:,.1f}/s   {'   '.join(times)}   open {now.open:,}   queued {now.queued:,}",
        *[line.replace("\xa0", " ") for line in why],
    ]


def _ms(value: float | None) -> str:
    return "-" if value is None else f"<= {value:g} ms"


def _device(now: DeviceNow) -> str:
    if not now.up:
        return f"{now.device[:17]:<18}DOWN"
    lanes = "".join(f"{_bar(busy)} {100 * busy:>4.0f} % " for busy in (now.exec_busy, now.load_busy))
    pages = f"{now.pages_claimed:,}/{now.pages:,}"
    failing = f"  {now.not_ok_per_s:,.1f}/s not ok" if now.not_ok_per_s else ""
    return f"{now.device[:17]:<18}{lanes}{pages:>12}{now.batches_per_s:>10,.1f}{failing}"


def _bar(share: float) -> str:
    full = round(min(max(share, 0.0), 1.0) * _BAR)
    return "#" * full + "." * (_BAR - full)


def _model(now: ModelNow) -> str:
    name = f"{now.model}/{now.version}"
    name = name if len(name) <= 33 else f"{name[:30]}..."
    rates = (
        f"{now.good_per_s:>10,.1f}{now.refused_per_s:>10,.1f}{now.cold_per_s:>8,.1f}{now.other_per_s:>9,.1f}"
    )
    return f"{name:<34}{rates}{now.queued:>9,}"

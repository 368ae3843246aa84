"""``clockwork workload``: the user's own traffic as a scenario (``apps.traffic``)."""

from __future__ import annotations

import re
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import click

from clockwork_serve.cli.options import duration_ns, json_flag
from clockwork_serve.cli.screen import INTERRUPTED, Progress, interruptible, note, say, show_json
from clockwork_serve.errors import ConfigError
from clockwork_serve.units import NS_PER_S, counted, plain

if TYPE_CHECKING:
    from clockwork_serve.workload.transcript import Burst, TrafficChanges, Transcript

TIMES_MAX: Final = 1000.0
_BURST: Final = re.compile(r"(.+)@(.+)\+(.+)")


@click.group()
def workload() -> None:
    """Make a scenario of your own traffic."""


@workload.command("from", epilog="What each source tells: clockwork docs workloads (docs/use/workloads.md)")
@click.argument("source", metavar="SOURCE")
@click.option("--out", metavar="FILE", help="The scenario. [default: SOURCE's name, with .toml, here]")
@click.option(
    "--from", "from_", metavar="TIME", help="Leave out what came before: 90s, 2h, or a date and time."
)
@click.option("--to", metavar="TIME", help="Leave out what came from then on.")
@click.option("--scale", metavar="X", help="X times as many requests.")
@click.option(
    "--burst", "bursts", multiple=True, metavar="X@AT+FOR",
    help="X times as many from AT on, for so long: 3@10m+30s.",
)  # fmt: skip
@click.option(
    "--add-model",
    "added",
    multiple=True,
    metavar="NAME=RATE",
    help="RATE requests a second for another model.",
)
@click.option("--slo-ms", metavar="MS", help="The SLO of all requests, whatever SOURCE says.")
@click.option("--zoo", metavar="NAME|FILE", help="Table of models, of which each must have a row.")
@click.option(
    "--kind", "kinds", multiple=True, metavar="[MODEL=]KIND", help="Of which kind a model is, or all others."
)
@click.option("--model", default="", metavar="NAME", help="The model of rows that name none.")
@click.option(
    "--path", "paths", metavar="REGEX", help="Where a path names its model: the first group that matches."
)
@click.option("--quiet", is_flag=True, help="Show no progress.")
@json_flag
def from_source(
    *, source: str, out: str | None, zoo: str | None, model: str, paths: str | None, quiet: bool,
    as_json: bool, **asked: Any,
) -> int:  # fmt: skip
    """Write SOURCE down as a scenario, for `clockwork simulate`, `plan` and `bench`.

    SOURCE is a server's --journal, JSON lines, a CSV file of times, models and SLOs, or a folder of
    ServeGen's clients. What it does not tell is said.
    """
    from clockwork_serve.apps.traffic import transcribe
    from clockwork_serve.workload.traffic import USUAL_PATHS

    changes = _changes(**asked)
    try:
        path = Path(source)
        if not path.exists():
            raise ConfigError(f"source: expected a file, found none at {source}; correct the path")
        files = path.iterdir() if path.is_dir() else [path]
        total = 1 + (sum(file.stat().st_size for file in files) >> 20)
        with Progress("reading", quiet=quiet or as_json) as progress, interruptible() as stopped:

            def tell(done: int) -> None:
                progress.step(min(done >> 20, total), total, "MiB")
                if stopped():
                    raise KeyboardInterrupt  # noqa: TRY301 - raised where it is called

            made = transcribe(
                path, Path(out or f"{path.name.split('.')[0] or 'scenario'}.toml"), changes, zoo=zoo,
                model=model, paths=paths or USUAL_PATHS, tell=tell,
            )  # fmt: skip
    except KeyboardInterrupt:
        note("interrupted: nothing was written")
        return INTERRUPTED
    if as_json:
        show_json(made)
    else:
        for line in _told(made):
            say(line)
    return 0


def _told(made: Transcript) -> list[str]:
    size = f"{counted(made.requests, 'request')} for {counted(made.models, 'model')}"
    rate = made.requests / made.seconds if made.seconds else 0.0
    loads = ", ".join(f"{name} {count:,}" for name, count in made.loads.items())
    return [
        f"{made.scenario}: {size} in {made.seconds:,.1f} s ({rate:,.1f}/s)",
        f"  loads: {loads}",
        f"  beside it: {', '.join(made.files)}",
        *[f"  note: {one}" for one in made.notes],
    ]


def _changes(
    *, from_: str | None, to: str | None, scale: str | None, bursts: tuple[str, ...], added: tuple[str, ...],
    slo_ms: str | None, kinds: tuple[str, ...],
) -> TrafficChanges:  # fmt: skip
    """What is to be otherwise. Raises :class:`ConfigError`."""
    from clockwork_serve.workload.transcript import TrafficChanges

    edges = {name: _edge(name, text) for name, text in (("from", from_), ("to", to)) if text is not None}
    absolute = {dated for _, dated in edges.values()}
    if len(absolute) > 1:
        raise ConfigError(
            f"to: expected a time as --from has it, found {to!r}; give two dates, or two durations"
        )
    from_ns, to_ns = (edges.get(name, (None, False))[0] for name in ("from", "to"))
    if to_ns is not None and to_ns <= (from_ns if from_ns is not None else 0):
        raise ConfigError(f"to: expected a time after --from, found {to!r}; correct one of them")
    return TrafficChanges(
        from_ns=from_ns, to_ns=to_ns, absolute=True in absolute,
        scale=1.0 if scale is None else _number("scale", scale, TIMES_MAX),
        bursts=tuple(_burst(text) for text in bursts),
        added=tuple((name, _number("add_model", rate, 1e6)) for name, rate in _pairs("add_model", added)),
        slo_ms=None if slo_ms is None else _number("slo_ms", slo_ms, 86_400_000.0),
        kinds=dict(_pairs("kind", tuple(one if "=" in one else f"={one}" for one in kinds))),
    )  # fmt: skip


def _edge(name: str, text: str) -> tuple[int, bool]:
    """A duration, or a date and time, which is UTC unless it says otherwise; whether it is that."""
    if re.match(r"\d{4}-", text):
        try:
            found = datetime.fromisoformat(text)
        except ValueError:
            raise ConfigError(
                f"{name}: expected a date and time such as 2026-11-30T14:00, found {text!r:.40}; correct it"
            ) from None
        return round((found if found.tzinfo else found.replace(tzinfo=UTC)).timestamp() * NS_PER_S), True
    return duration_ns(name, text), False


def _burst(text: str) -> Burst:
    from clockwork_serve.workload.transcript import Burst

    found = _BURST.fullmatch(text)
    if found is None:
        raise ConfigError(f"burst: expected X@AT+FOR such as 3@10m+30s, found {text!r:.40}; correct it")
    return Burst(
        _number("burst", found[1], TIMES_MAX), duration_ns("burst", found[2]), duration_ns("burst", found[3])
    )


def _pairs(name: str, given: tuple[str, ...]) -> list[tuple[str, str]]:
    found = []
    for one in given:
        left, equals, right = one.rpartition("=")
        if not equals or not right:
            raise ConfigError(f"{name}: expected NAME=VALUE, found {one!r:.40}; correct it")
        found.append((left, right))
    return found


def _number(name: str, text: str, most: float) -> float:
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value <= most:
        raise ConfigError(
            f"{name}: expected a number above 0, up to {plain(most)}, found {text!r:.40}; correct it"
        )
    return value

"""``clockwork reproduce``: reproduces the paper's figures. Implemented by ``clockwork_lab.reproduce``."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

import click

from clockwork_serve.cli.options import STDOUT, TRACES_VARIABLE, output_option, write_output
from clockwork_serve.cli.screen import Progress, note, say, show_table
from clockwork_serve.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Callable

    from clockwork_lab.reproduce.figure import Figure
    from clockwork_lab.reproduce.run import FigureRun

_FOLDER = "figures"


@click.command()
@click.argument("figure", metavar="FIGURE")
@output_option("json", "Write the figure as JSON to FILE; - is standard output.")
@click.option(
    "--out", metavar="DIR",
    help=f"Folder for FIGURE.json, .svg and .md. [default: {_FOLDER}, or nothing with --json]",
)  # fmt: skip
@click.option(
    "--seed",
    type=click.IntRange(min=0),
    default=1,
    metavar="N",
    help="Seed of all random choices. [default: 1]",
)
@click.option(
    "--short",
    is_flag=True,
    help="Seconds instead of minutes, for a few points: a test that it works, without valid numbers.",
)
@click.option(
    "--policy", "policies", multiple=True, metavar="NAME",
    help="Compare this policy too, in fig5 to fig9 and fig11; may be repeated.",
)  # fmt: skip
def reproduce(
    *, figure: str, json_file: str | None, out: str | None, seed: int, short: bool,
    policies: tuple[str, ...],
) -> int:  # fmt: skip
    """Reproduce a figure of the Clockwork paper: fig2, fig5, ..., fig11, or all.

    The published curve, our policies and the limit, from one run: as JSON, as a picture and as a page.
    """
    from clockwork_lab.reproduce import ALL, NAMES, experiment
    from clockwork_lab.reproduce.write import check_folder
    from clockwork_serve.controller.policies import is_policy, unknown_policy

    if figure not in (*NAMES, ALL):
        raise ConfigError(f"figure: expected one of {', '.join((*NAMES, ALL))}; found {figure!r}")
    for policy in policies:
        if not is_policy(policy):
            raise unknown_policy(policy)
    chosen = NAMES if figure == ALL else (figure,)
    folder = Path(out) if out is not None else None if json_file is not None else Path(_FOLDER)
    if folder is not None:
        check_folder(folder)
    figures = []
    for name in chosen:
        made = _make(experiment(name), name, seed, short=short, quiet=json_file == STDOUT, policies=policies)
        figures.append(made)
        _show(made, folder, quiet=json_file == STDOUT)
    bodies = [made.to_json() for made in figures]  # one as an object, several as an array
    write_output(json_file, bodies[0] if len(bodies) == 1 else b"[\n" + b",\n".join(bodies) + b"\n]")
    return 0


def _make(
    make: Callable[[FigureRun], Figure], name: str, seed: int, *, short: bool, quiet: bool,
    policies: tuple[str, ...],
) -> Figure:  # fmt: skip
    from clockwork_lab.reproduce.run import FigureRun

    with Progress(name, quiet=quiet) as progress:
        folder = os.environ.get(TRACES_VARIABLE)
        traces = None if folder is None else Path(folder)
        return make(
            FigureRun(seed=seed, short=short, progress=progress.step, traces=traces, policies=policies)
        )


def _show(made: Figure, folder: Path | None, *, quiet: bool) -> None:
    from clockwork_lab.reproduce.write import number, write

    if folder is not None:
        paths = write(made, folder)
        if not quiet:
            note(f"wrote {', '.join(str(path) for path in paths)}")
    if quiet:
        return
    rows = [
        [claim.name, number(claim.paper), number(claim.ours), claim.wanted, "yes" if claim.met else "no"]
        for claim in made.claims
    ]
    if rows:
        show_table(["claim", ">published", ">ours", ">wanted", "met"], rows, f"{made.figure}: {made.title}")
    met = sum(claim.met for claim in made.claims)
    say(f"{made.figure}: {met} of {len(made.claims)} claims met")

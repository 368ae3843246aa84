"""``clockwork docs`` and ``clockwork examples``: the pages and examples of the version that is installed.

A wheel carries both; in a checkout they are its ``docs`` and ``examples``. Help and messages name a page as
``clockwork docs PAGE``.
"""

from __future__ import annotations

import shutil
import sys
from pathlib import Path
from typing import Final, NamedTuple

import click

from clockwork_serve.cli.options import json_flag
from clockwork_serve.cli.screen import say, show_json, show_table
from clockwork_serve.errors import ClockworkError, ConfigError, install_advice, printable
from clockwork_serve.units import counted

SECTIONS: Final = ("use", "operate", "develop")  # folders of pages, in the order of the list
_PACKAGE: Final = Path(__file__).parents[1]
_PLACES: Final = (_PACKAGE, *_PACKAGE.parents[1:4])
"""Whose ``docs`` these may be: the package's as a wheel has it; those above it in an sdist, in a checkout."""


class Page(NamedTuple):
    """A page: its name, its folder ("" for the index), its first heading, and its file."""

    page: str
    section: str
    title: str
    path: str


@click.command()
@click.argument("page", metavar="[PAGE]", required=False)
@json_flag
def docs(page: str | None, as_json: bool) -> None:  # noqa: FBT001
    """List the pages of the documentation, or show PAGE.

    A page is laid out on a terminal, and is Markdown elsewhere. PAGE may be a link, as pages have them.
    """
    pages = pages_there()
    if page is None:
        if as_json:
            show_json([one._asdict() for one in pages.values()])
        else:
            show_table(("page", "section", "title"), [one[:3] for one in pages.values()])
        return
    found = _found(page, pages)
    text = Path(found.path).read_text(encoding="utf-8")
    if as_json:
        show_json({**found._asdict(), "text": text})
    elif sys.stdout.isatty():
        from rich.console import Console
        from rich.markdown import Markdown

        # Links are shown as they are written: a terminal cannot open them, PAGE takes them.
        Console().print(Markdown(text, hyperlinks=False))
    else:
        click.echo(text, nl=False)


def pages_there() -> dict[str, Page]:
    """Every page by its name, the index first. Raises :class:`ClockworkError` where there are none."""
    folder = _carried("docs", "index.md")
    found = {"": [folder / "index.md"]}
    found |= {section: sorted(folder.glob(f"{section}/*.md")) for section in SECTIONS}
    return {
        path.stem: Page(path.stem, section, _title(path), str(path))
        for section, paths in found.items()
        for path in paths
    }


def _carried(name: str, file: str) -> Path:
    """The folder of that name that has that file. Raises :class:`ClockworkError` where there is none."""
    for place in _PLACES:
        if (place / name / file).is_file():
            return place / name
    raise ClockworkError(
        f"{name}: expected {file} in {_PACKAGE / name}, found none; install it again: "
        f"{install_advice('clockwork-serve')}"
    )


def _title(path: Path) -> str:
    with path.open(encoding="utf-8") as text:
        return text.readline().removeprefix("# ").strip()


def _found(page: str, pages: dict[str, Page]) -> Page:
    name = Path(page.partition("#")[0]).stem
    if name in pages:
        return pages[name]
    from difflib import get_close_matches

    near = " or ".join(repr(one) for one in get_close_matches(name, pages))
    what = f"did you mean {near}?" if near else "for the list: clockwork docs"
    raise click.UsageError(
        f"PAGE: expected a page of the documentation, found '{printable(page)}'; {what}",
        click.get_current_context(silent=True),
    )


@click.command()
@click.argument("folder", metavar="[FOLDER]", default="examples")
@json_flag
def examples(folder: str, as_json: bool) -> None:  # noqa: FBT001
    """Copy the examples that the documentation names into FOLDER, ./examples by default.

    Three tiny models, scenarios for simulations and load tests, a program for each client, a dashboard and
    alerts. What is there already stays; where it is not the same, nothing is copied.
    """
    source, target = _carried("examples", "keys.toml"), Path(folder)
    wanted = {path.relative_to(source): path.read_bytes() for path in _files(source)}
    try:
        for name, content in wanted.items():
            there = target / name
            if there.exists() and there.read_bytes() != content:
                raise ConfigError(
                    f"folder: expected a folder without other files of these names, found another {there}; "
                    "name another folder: clockwork examples FOLDER"
                )
        missing = [name for name in wanted if not (target / name).exists()]
        for name in missing:
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(source / name, target / name)
    except OSError as error:
        raise ConfigError(
            f"folder: expected one that can be written, found {error.strerror} at {error.filename}; "
            "name another: clockwork examples FOLDER"
        ) from None
    if as_json:
        show_json({"folder": str(target), "copied": sorted(map(str, missing)), "files": len(wanted)})
    else:
        say(f"{counted(len(missing), 'file')} copied to {target}; next: clockwork serve {target / 'models'}")


def _files(folder: Path) -> list[Path]:
    """All files below a folder but what Python has compiled."""
    return sorted(path for path in folder.rglob("*.*") if path.is_file() and path.suffix != ".pyc")

"""``clockwork docs``: the documentation of the version that is installed. It writes none.

A wheel carries the pages; in a checkout they are read from its ``docs``. Help and messages name a page as
``clockwork docs PAGE``.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Final, NamedTuple

import click

from clockwork_serve.cli.options import json_flag
from clockwork_serve.cli.screen import show_json, show_table
from clockwork_serve.errors import ClockworkError, printable

SECTIONS: Final = ("use", "operate", "develop")
"""Folders of pages, in the order of the list."""
_PACKAGE: Final = Path(__file__).parents[1]
_PLACES: Final = tuple(folder / "docs" for folder in (_PACKAGE, *_PACKAGE.parents[1:4]))
"""Where pages may be: in the package as a wheel has it; above it in an unpacked sdist, and in a checkout."""


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
    for folder in _PLACES:
        if (folder / "index.md").is_file():
            found = {"": [folder / "index.md"]}
            found |= {section: sorted(folder.glob(f"{section}/*.md")) for section in SECTIONS}
            return {
                path.stem: Page(path.stem, section, _title(path), str(path))
                for section, paths in found.items()
                for path in paths
            }
    raise ClockworkError(
        f"docs: expected the pages in {_PLACES[0]}, found none; install clockwork-serve again"
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

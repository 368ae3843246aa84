"""Writes the files of a figure: NAME.json, NAME.svg and NAME.md in one folder."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Any, Final

import msgspec

from clockwork_lab.reproduce.figure import Figure, PaperClaim
from clockwork_serve.errors import ConfigError, install_advice


def check_folder(folder: Path) -> None:
    """Check beforehand that pictures can be drawn and the folder is writable. ConfigError if not."""
    if find_spec("matplotlib") is None:
        raise ConfigError(
            "matplotlib: expected it to be installed, to draw the picture; "
            f"{install_advice('clockwork-lab[figures]')}, or ask for --json FILE alone"
        )
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"out: expected a folder, found {folder} ({error.strerror})") from error


def write(figure: Figure, folder: Path) -> list[Path]:
    """Write all three; their paths."""
    from clockwork_lab.reproduce.draw import draw

    paths = [folder / f"{figure.figure}.{ending}" for ending in ("json", "md", "svg")]
    paths[0].write_bytes(figure.to_json() + b"\n")
    paths[1].write_text(to_markdown(figure.record()), encoding="utf-8")
    draw(figure, paths[2])
    return paths


# ------------------------------------------------------------
# A figure's record as a Markdown page: question, picture, claims, and how it was made.


_DASH: Final = "-"
_ABOVE: Final = ("title", "question", "notes")  # the page has them in other places


def to_markdown(record: dict[str, Any]) -> str:
    """The whole page of a record; it names the picture and the JSON beside it.

    The points and the lists of the setup stay in the JSON.
    """
    name, setup = record["figure"], record["setup"]
    title, notes = setup["title"], setup["notes"]
    claims = msgspec.convert(record["claims"], list[PaperClaim])
    lines = [f"# {name}: {title}", "", setup["question"], "", f"![{title}]({name}.svg)", ""]
    if claims:
        lines += ["## Claims", "", f"Met: {sum(claim.met for claim in claims)} of {len(claims)}.", ""]
        lines += [*_claims_table(claims), ""]
    if notes:
        lines += ["## Notes", "", *(f"- {note}" for note in notes), ""]
    held = f"[{name}.json]({name}.json) holds every point of the picture, the claims, and all conditions."
    lines += ["## How it was made", "", f"By `clockwork reproduce {name.replace('_', ' --')}`. {held}", ""]
    lines += [
        f"- {key}: {each}" for key, each in setup.items() if key not in _ABOVE and not isinstance(each, list)
    ]
    return "\n".join(lines) + "\n"


def _claims_table(claims: list[PaperClaim]) -> list[str]:
    rows = ["| claim | published | ours | wanted | met |", "| --- | --: | --: | --: | --: |"]
    for claim in claims:
        met = "yes" if claim.met else "**no**"
        cells = claim.name.replace("|", "/"), number(claim.paper), number(claim.ours), claim.wanted, met
        rows.append(f"| {' | '.join(cells)} |")
    return rows


def number(value: float | None) -> str:
    """For people: 4 significant digits, no exponent below a billion."""
    if value is None:
        return _DASH
    if value == int(value) and abs(value) < 1e9:
        return f"{int(value):,}"
    if abs(value) >= 1000:
        return f"{value:,.0f}"
    return f"{value:.3f}" if 0.1 <= abs(value) < 1 else f"{value:.4g}"

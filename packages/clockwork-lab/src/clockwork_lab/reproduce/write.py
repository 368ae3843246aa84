"""Writes the files of a figure: NAME.json, NAME.svg and NAME.md in one folder."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

from clockwork_lab.reproduce.figure import Figure
from clockwork_lab.reproduce.table import to_markdown
from clockwork_serve.errors import ConfigError


def check_folder(folder: Path) -> None:
    """Check beforehand that pictures can be drawn and the folder is writable. ConfigError if not."""
    if find_spec("matplotlib") is None:
        raise ConfigError(
            "matplotlib: expected it to be installed, to draw the picture; "
            "pip install 'clockwork-serve[figures]', or ask for --json FILE alone"
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
    paths[1].write_text(to_markdown(figure), encoding="utf-8")
    draw(figure, paths[2])
    return paths

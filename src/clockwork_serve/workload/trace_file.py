"""Lines of a trace file, plain or gzipped, one at a time; it never holds a file or guesses at line ends."""

from __future__ import annotations

import gzip
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from clockwork_serve.errors import ConfigError
from clockwork_serve.workload.problems import found

_LONGEST: Final = 1 << 20
"""Bytes of a line; a row of the official Azure files (1,440 minutes) has some 5,000."""
_BOM: Final = b"\xef\xbb\xbf"


def wrong(path: Path, line: int, field: str, expected: str, value: object, remedy: str) -> ConfigError:
    """The error about one field of one line."""
    shown = value.decode("utf-8", "replace") if isinstance(value, bytes) else value
    return ConfigError(f"{path}:{line}: {field}: expected {expected}, found {found(shown)}; {remedy}")


def lines(path: Path) -> Iterator[tuple[int, bytes]]:
    r"""Number, from 1, and content of every line that is not blank.

    Lines may end in ``\n`` or ``\r\n``, in one file too; a lone ``\r`` is refused. Raises
    :class:`ConfigError`.
    """
    number = 0
    try:
        with gzip.open(path, "rb") if path.name.endswith(".gz") else path.open("rb") as file:
            while line := file.readline(_LONGEST):
                number += 1
                if len(line) == _LONGEST and not line.endswith(b"\n"):
                    ends = "a longer one with a lone \\r in it" if b"\r" in line[:-1] else "a longer one"
                    raise wrong(
                        path, number, "line", f"at most {_LONGEST} bytes", ends, "is this a CSV file?"
                    )
                line = line.removesuffix(b"\n").removesuffix(b"\r")
                if b"\r" in line:
                    raise wrong(
                        path, number, "line end", r"\n or \r\n", "a lone \\r", "convert the file's line ends"
                    )
                if number == 1:
                    line = line.removeprefix(_BOM)
                if line.strip():
                    yield number, line
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise wrong(path, number + 1, "file", "whole gzip data", str(error), "fetch the file again") from None
    except OSError as error:
        raise ConfigError(
            f"{path}: expected a readable trace file, found: {error.strerror or error}; check the path"
        ) from None


def header_of(path: Path) -> tuple[int, bytes]:
    """The first line. Raises :class:`ConfigError` if there is none."""
    for number, line in lines(path):
        return number, line
    raise ConfigError(
        f"{path}:1: header: expected a line of column names, found an empty file; is it cut off?"
    )

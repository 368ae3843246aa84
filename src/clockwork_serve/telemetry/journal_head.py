"""The first record of a run in a journal: all that a replay needs beside the steps. It opens no journal."""

from __future__ import annotations

import hashlib
import platform
import sys
from collections.abc import Iterable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final

import msgspec
from msgspec import Struct

import clockwork_serve
from clockwork_serve.controller import Controller, ControllerConfig
from clockwork_serve.errors import ConfigError

FORMAT: Final = 1
PYTHON, COMPILED = "python", "compiled"
DECIDES: Final = ("controller", "messages", "machine.py", "errors.py", "units.py")
"""What a decision follows from, beside the events and the configuration."""


class Head(Struct, frozen=True, kw_only=True, tag="clockwork journal", tag_field="record"):
    """Who decided what follows, and how it was set; a controller has no other start and rolls no dice.

    ``sources`` is a hash of the code that decides, ``build`` says whether it was compiled, ``config`` holds
    the fields of :class:`ControllerConfig`. Models, profiles, devices and quotas are events.
    """

    version: str
    sources: str
    build: str
    python: str
    started: str
    config: dict[str, Any]
    format: int = FORMAT

    def controller_config(self) -> ControllerConfig:
        """The controller's settings. Raises :class:`ConfigError` if this version does not know them."""
        if self.format != FORMAT:
            raise ConfigError(
                f"journal: expected format {FORMAT}; found {self.format}, of clockwork {self.version}; "
                "replay it with that version"
            )
        known = {field.name for field in msgspec.structs.fields(ControllerConfig)}
        if unknown := sorted(self.config.keys() - known):
            raise ConfigError(
                f"journal: expected settings that clockwork {clockwork_serve.__version__} knows; found "
                f"{', '.join(unknown)}, of clockwork {self.version}; replay it with that version"
            )
        try:
            return msgspec.convert(self.config, ControllerConfig)
        except msgspec.ValidationError as error:
            raise ConfigError(f"journal: its settings of the controller are wrong: {error}") from None

    def other_build(self) -> str:
        """How whoever wrote it differs from this process; empty if decisions must be the same."""
        here = head_of(self.controller_config())
        if self.version != here.version:
            return f"clockwork {self.version} wrote it, this is {here.version}"
        if self.sources != here.sources:
            return f"other code wrote it ({self.sources or 'unknown'}; this is {here.sources or 'unknown'})"
        return ""


def head_of(config: ControllerConfig, started: datetime | None = None) -> Head:
    """The head of a run that this process begins."""
    module = sys.modules[Controller.__module__]
    return Head(
        version=clockwork_serve.__version__,
        sources=sources_hash(Path(clockwork_serve.__file__).parent),
        build=PYTHON if str(module.__file__).endswith(".py") else COMPILED,
        python=platform.python_version(),
        started="" if started is None else started.astimezone(UTC).isoformat(timespec="milliseconds"),
        config=msgspec.to_builtins(config),
    )


def sources_hash(package: Path, parts: Iterable[str] = DECIDES) -> str:
    """A short hash of some sources, by default those that decide; empty if they are not there."""
    found = hashlib.sha256()
    count = 0
    for path in _sources(package, parts):
        found.update(f"{path.relative_to(package)}\n".encode() + path.read_bytes())
        count += 1
    return found.hexdigest()[:12] if count else ""


def _sources(package: Path, parts: Iterable[str]) -> Iterable[Path]:
    for name in parts:
        path = package / name
        yield from sorted(path.rglob("*.py")) if path.is_dir() else [path] if path.exists() else []

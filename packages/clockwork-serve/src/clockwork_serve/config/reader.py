"""Puts the sources of settings over one another: command line, environment, file, defaults.

It starts nothing. A message names the field, the source, what was expected and found, and what to do.
"""

from __future__ import annotations

import re
import tomllib
from collections.abc import Mapping
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from msgspec import Struct

from clockwork_serve.config.table import (
    PREFIX,
    SETTINGS,
    DeviceChoice,
    Setting,
    Unfit,
    default_cache,
    did_you_mean,
)
from clockwork_serve.errors import ConfigError

_OTHER_VARIABLES = {f"{PREFIX}{name}" for name in ("CONFIG", "TRACES", "MYPYC", "URL", "CA", "GRPC_AIO")}
_SERVICE_LINK = re.compile(rf"{PREFIX}(?:SERVE_)?(?:SERVICE_(?:HOST|PORT.*)|PORT(?:_\d+_TCP.*)?)")
"""What container platforms put into the environment for a service called clockwork or clockwork-serve."""
_LARGEST_FILE = 1 << 20


class Settings(Struct, frozen=True, kw_only=True):
    """All settings, each read and checked; ``sources`` tells where each one came from.

    ``warnings`` name variables of the environment that look like ours and are not.
    """

    repository: str
    host: str
    http_port: int
    grpc_port: int | None
    metrics_port: int | None
    gateways: int
    max_body: int
    max_message: int
    max_json: int
    gateway_memory: int
    model_control: bool
    shared_memory: str | None
    triton_codes: bool
    tls_certificate: str
    tls_key: str
    tls_client_ca: str
    api_keys: str
    max_connections: int
    max_head: int
    max_headers: int
    max_calls: int
    max_requests: int
    max_unsent: int
    head_s: float
    body_s: float
    send_s: float
    idle_s: float
    stream_s: float
    slo_ms: float | None
    policy: str
    reject: bool
    max_batch: int
    largest_batch: int
    look_ahead_ms: float
    slack_ms: float
    queue_limit: int
    retries: int
    quarantine_after: int
    hang_s: float
    hang_grace_s: float
    stuck_s: float
    device: tuple[DeviceChoice, ...]
    device_memory: int | float
    """Bytes, or a share (a float)."""
    page_size: int
    host_memory: int
    cuda_graphs: int
    workspace: int
    io_memory: int
    threads: int
    jitter: float
    seed: int
    pin: bool
    realtime: bool
    listen_machines: str
    controller: str
    machine_name: str
    cluster_certificate: str
    cluster_key: str
    cluster_ca: str
    silence_s: float
    cache: str
    compile_memory: int | float
    compile_s: float
    drain_s: float
    log_format: str
    log_level: str
    journal: str
    sources: dict[str, str] = {}
    warnings: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        """Check what concerns several settings. Raises :class:`ConfigError`."""
        ports = [("http_port", self.http_port), ("grpc_port", self.grpc_port)]
        ports.append(("metrics_port", self.metrics_port))
        seen: dict[int, str] = {}
        for name, number in ports:
            if not number:
                continue
            if number in seen:
                raise self._wrong(
                    name, f"another port than {seen[number]}'s", number, "choose a free one, or 0"
                )
            seen[number] = name
        if self.page_size % 4096:
            raise self._wrong("page_size", "a multiple of 4KiB", self.page_size, "write it like 256KiB")
        if isinstance(self.device_memory, int) and self.device_memory < self.page_size:
            raise self._wrong(
                "device_memory", f"at least one page of {self.page_size} bytes", self.device_memory,
                "write it like 1GB, or make page_size smaller",
            )  # fmt: skip

    def _wrong(self, name: str, expected: str, found: object, remedy: str) -> ConfigError:
        return wrong(name, self.sources.get(name, "default"), expected, found, remedy)


def wrong(name: str, source: str, expected: str, found: object, remedy: str) -> ConfigError:
    """The one form of our messages about settings."""
    shown = repr(found) if len(repr(found)) <= 80 else f"{repr(found)[:77]}..."
    return ConfigError(f"{name} (from {source}): expected {expected}, found {shown}; {remedy}")


def read_settings(given: Mapping[str, object], environment: Mapping[str, str], file: str | None) -> Settings:
    """Read all settings.

    ``given`` is the command line: values by name, None where it was silent. ``file`` is a TOML file; None:
    the one that ``CLOCKWORK_CONFIG`` names, else ``clockwork.toml`` of the model repository, if it is there.
    Raises :class:`ConfigError`.
    """
    flags = {name: value for name, value in given.items() if value is not None}
    values: dict[str, Any] = {}
    sources: dict[str, str] = {}
    chosen = file or environment.get(f"{PREFIX}CONFIG") or _beside(flags, environment)
    from_file = _read_file(Path(chosen).expanduser()) if chosen else {}
    for entry in SETTINGS:
        found, source = _find(entry, flags, environment, from_file, str(chosen))
        sources[entry.name] = source
        values[entry.name] = entry.default if source == "default" else _read(entry, found, source)
    values["cache"] = values["cache"] or default_cache(environment)
    return Settings(**values, sources=sources, warnings=_unknown_variables(environment))


def _find(
    entry: Setting,
    flags: Mapping[str, object],
    environment: Mapping[str, str],
    from_file: Mapping[str, object],
    file: str,
) -> tuple[object, str]:
    """What was written for a setting, and where."""
    if entry.name in flags:
        return flags[entry.name], entry.flag if entry.name != "repository" else "command line"
    if environment.get(entry.variable):
        return environment[entry.variable], entry.variable
    if entry.name in from_file:
        return from_file[entry.name], file
    return None, "default"


def _read(entry: Setting, found: object, source: str) -> object:
    try:
        return entry.read(found)
    except Unfit as unfit:
        raise wrong(entry.name, source, unfit.expected, found, unfit.remedy) from None


def _beside(flags: Mapping[str, object], environment: Mapping[str, str]) -> str | None:
    """The file of settings that lies in the model repository, if there is one."""
    repository = flags.get("repository") or environment.get(f"{PREFIX}REPOSITORY")
    if not isinstance(repository, str):
        return None
    file = Path(repository).expanduser() / "clockwork.toml"
    return str(file) if file.is_file() else None


def _read_file(file: Path) -> dict[str, object]:
    try:
        if file.stat().st_size > _LARGEST_FILE:
            raise wrong("config", str(file), f"at most {_LARGEST_FILE} bytes", "a larger file", "shorten it")
        values = tomllib.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise wrong(
            "config", str(file), "a readable file", error.strerror, "name a TOML file with --config"
        ) from None
    except (ValueError, RecursionError) as error:
        raise wrong("config", str(file), "valid TOML", str(error), "correct the line it names") from None
    known = {entry.name for entry in SETTINGS}
    for name in values:
        if name not in known:
            raise wrong(name, str(file), "a known setting", name, did_you_mean(name, known))
    return values


def _unknown_variables(environment: Mapping[str, str]) -> tuple[str, ...]:
    """Warnings, not errors: the environment is not ours alone."""
    known = {entry.variable for entry in SETTINGS} | _OTHER_VARIABLES
    warnings = []
    for name in sorted(environment):
        if not name.startswith(PREFIX) or name in known or _SERVICE_LINK.fullmatch(name):
            continue
        near = get_close_matches(name, sorted(known), n=1)
        advice = f"did you mean {near[0]}?" if near else "it is ignored"
        warnings.append(f"{name}: no setting has this name; {advice}")
    return tuple(warnings)

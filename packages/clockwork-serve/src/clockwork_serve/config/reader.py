"""Merges the sources of settings in order of precedence: command line, environment, file, defaults.

Error messages name the field, the source, what was expected and found, and what to do.
"""

from __future__ import annotations

import re
import tomllib
from collections.abc import Iterable, Mapping
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from clockwork_serve.config.former import FORMER_SETTINGS
from clockwork_serve.config.table import (
    PREFIX,
    SETTINGS,
    Setting,
    Settings,
    default_cache,
    parts,
    wrong,
)
from clockwork_serve.config.values import Unfit, path
from clockwork_serve.errors import NEAR, ConfigError, did_you_mean

_OTHER_VARIABLES = {f"{PREFIX}{name}" for name in ("CONFIG", "TRACES", "MYPYC", "URL", "METRICS_URL", "CA")}
_SERVICE_LINK = re.compile(
    rf"{PREFIX}(?:\w+_)?(?:SERVICE_(?:HOST|PORT(?:_\w+)?)|PORT_\d+_(?:TCP|UDP|SCTP)(?:_(?:PROTO|PORT|ADDR))?)"
)
"""Variables that Kubernetes sets in each pod for a Service called clockwork, clockwork-http and so on."""
_LINKED_ADDRESS = re.compile(r"(?:tcp|udp|sctp)://\S+")
"""The value of one more, ``..._PORT``. For some Services that is the name of a setting."""
_LARGEST_FILE = 1 << 20


def read_settings(given: Mapping[str, object], environment: Mapping[str, str], file: str | None) -> Settings:
    """Read all settings.

    ``given`` is the command line: values by name, None if an option was not given. ``file`` is a TOML file;
    None: the one that ``CLOCKWORK_CONFIG`` names, else ``clockwork.toml`` of the model repository, if it
    exists. Raises :class:`ConfigError`.
    """
    flags = {name: value for name, value in given.items() if value is not None}
    values: dict[str, Any] = {}
    sources: dict[str, str] = {}
    chosen = file or environment.get(f"{PREFIX}CONFIG") or _beside(flags, environment)
    from_file = _read_file(str(chosen)) if chosen else {}
    old = [(name, str(chosen)) for name in from_file if name in FORMER_SETTINGS]
    if old := old + former_variables(environment):
        raise former(old)
    for entry in SETTINGS:
        found, source = _find(entry, flags, environment, from_file, str(chosen))
        if source:
            sources[entry.name] = source
            values[entry.name] = _read(entry, found, source)
    if "cache" not in values:
        values["cache"] = default_cache(environment)
    return Settings(**values, **parts(values), sources=sources, warnings=_variable_warnings(environment))


def _find(
    entry: Setting, flags: Mapping[str, object], environment: Mapping[str, str],
    from_file: Mapping[str, object], file: str,
) -> tuple[object, str]:  # fmt: skip
    """What was written for a setting, and where; "" if nowhere."""
    if entry.name in flags:
        return flags[entry.name], entry.flag if entry.name != "repository" else "command line"
    written = environment.get(entry.variable)
    if written and not _is_service_link(entry.variable, written):
        return written, entry.variable
    return (from_file[entry.name], file) if entry.name in from_file else (None, "")


def _read(entry: Setting, found: object, source: str) -> object:
    try:
        return entry.read(found)
    except Unfit as unfit:
        shown = ",".join(found) if isinstance(found, tuple) else found  # an option that may be given again
        raise wrong(entry.name, source, unfit.expected, shown, unfit.remedy) from None


def _beside(flags: Mapping[str, object], environment: Mapping[str, str]) -> str | None:
    """The settings file in the model repository, if there is one."""
    repository = flags.get("repository") or environment.get(f"{PREFIX}REPOSITORY")
    if not isinstance(repository, str):
        return None
    try:
        folder = Path(path(repository))
    except Unfit:
        return None  # which will be said where it is read
    file = folder / "clockwork.toml"
    # Beside versions it is a model's: who gave that folder is told so when models are looked for.
    return str(file) if file.is_file() and not any(folder.glob("[1-9]*/model.*")) else None


def _read_file(named: str) -> dict[str, object]:
    try:
        file = Path(path(named))
        if file.stat().st_size > _LARGEST_FILE:
            raise wrong("config", str(file), f"at most {_LARGEST_FILE} bytes", "a larger file", "shorten it")
        values = tomllib.loads(file.read_text(encoding="utf-8"))
    except Unfit as unfit:
        raise wrong("config", named, unfit.expected, named, unfit.remedy) from None
    except OSError as error:
        raise wrong(
            "config", str(file), "a readable file", error.strerror, "name a TOML file with --config"
        ) from None
    except (ValueError, RecursionError) as error:
        raise wrong("config", str(file), "valid TOML", str(error), "correct the line it names") from None
    known = {entry.name for entry in SETTINGS}
    for name, value in values.items():
        if isinstance(value, dict):
            raise wrong(
                name,
                str(file),
                "settings at the top, without tables",
                f"[{name}]",
                "remove that line; every setting: clockwork docs configuration",
            )
        if name not in known and name not in FORMER_SETTINGS:
            raise wrong(name, str(file), "a known setting", name, did_you_mean(name, known))
    return values


def former(found: Iterable[tuple[str, str]]) -> ConfigError:
    """The error for settings of earlier versions: the name and the source of each."""
    expected = "a setting of this version"
    return ConfigError(
        ". ".join(str(wrong(name, source, expected, name, FORMER_SETTINGS[name])) for name, source in found)
    )


def former_variables(environment: Mapping[str, str]) -> list[tuple[str, str]]:
    """The settings of earlier versions that have a variable, and its name."""
    variables = [(name, PREFIX + name.upper()) for name in FORMER_SETTINGS]
    return [(name, variable) for name, variable in variables if environment.get(variable)]


def _is_service_link(name: str, value: str) -> bool:
    """Whether Kubernetes set this variable, for a Service whose name begins as ours do."""
    if name.endswith("_PORT") and _LINKED_ADDRESS.fullmatch(value):
        return True
    return _SERVICE_LINK.fullmatch(name) is not None


def _link_warning(name: str, value: str) -> str:
    setting, service = name.removeprefix(PREFIX).lower(), name.removesuffix("_PORT").lower().replace("_", "-")
    return (
        f"{name}: expected a port, found {value!r:.80}, as Kubernetes sets it for a Service {service}; "
        f"it is ignored: give {setting} on the command line or in a file, or set enableServiceLinks: false "
        "for the pod"
    )


def _variable_warnings(environment: Mapping[str, str]) -> tuple[str, ...]:
    """Warnings of variables that are no settings, rather than errors: other programs set variables too."""
    variables = {entry.variable for entry in SETTINGS}
    known = variables | _OTHER_VARIABLES
    warnings = []
    for name in sorted(environment):
        if not name.startswith(PREFIX) or not environment[name]:
            continue
        if _is_service_link(name, environment[name]):
            if name in variables:
                warnings.append(_link_warning(name, environment[name]))
        elif name not in known:
            bare = [each.removeprefix(PREFIX) for each in sorted(known)]
            near = get_close_matches(name.removeprefix(PREFIX), bare, n=1, cutoff=NEAR)
            advice = f"did you mean {PREFIX}{near[0]}?" if near else "it is ignored"
            warnings.append(f"{name}: no setting has this name; {advice}")
    return tuple(warnings)

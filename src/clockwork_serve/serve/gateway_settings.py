"""Trace and log settings as clients of the protocol see them: they can be read and not changed."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any, Final

from clockwork_serve.serve.gateway_endpoints import Endpoints, Refused

_TRACE: Final = {"trace_level": ["OFF"]}
_NO_TRACES: Final = "no traces are kept; `clockwork serve --journal FILE` keeps every decision"
_NO_LEVELS: Final = "start the server with another --log-level"


def trace_settings(
    endpoints: Endpoints, model: str, changes: Mapping[str, Any], version: str = ""
) -> dict[str, list[str]]:
    """The trace settings of a model or (``""``) of all.

    Raises :class:`UnknownModel`, and :class:`Refused` where ``changes`` would change them.
    """
    if model:
        endpoints.gateway.models.find(model, version)
    # Nothing, for Triton, takes back what was set for a model; here nothing ever was.
    listed = {
        name: value if isinstance(value, list) else [value]
        for name, value in changes.items()
        if value is not None and value != []
    }
    _check_unchanged("trace", _TRACE, listed, _NO_TRACES)
    return _TRACE


def log_settings(changes: Mapping[str, Any]) -> dict[str, bool | int | str]:
    """The log settings of all processes. Raises :class:`Refused` where ``changes`` would change them."""
    level = logging.getLogger().getEffectiveLevel()
    found: dict[str, bool | int | str] = {
        "log_file": "",
        "log_info": level <= logging.INFO,
        "log_warning": level <= logging.WARNING,
        "log_error": level <= logging.ERROR,
        "log_verbose_level": int(level <= logging.DEBUG),
    }
    _check_unchanged(
        "log", found, {name: value for name, value in changes.items() if value is not None}, _NO_LEVELS
    )
    return found


def _check_unchanged(what: str, current: Mapping[str, Any], changes: Mapping[str, Any], instead: str) -> None:
    for name, value in changes.items():
        if name not in current:
            raise Refused(501, f"{what} setting '{name}' is not supported: {instead}")
        # To Python False is 0.
        if value != current[name] or isinstance(value, bool) != isinstance(current[name], bool):
            raise Refused(
                501,
                f"{what} setting '{name}' cannot be changed from {current[name]!r} to {value!r}: {instead}",
            )

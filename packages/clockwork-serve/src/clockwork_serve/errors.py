"""Errors that a person can act on; no transport code appears here.

    ClockworkError
    ├── ConfigError        a setting, a file of settings or a command line is wrong
    ├── RepositoryError    a model repository or a model in it cannot be served
    ├── DeviceError        a device refused or failed an operation
    │   ├── ModelError     the model itself raised while it ran
    │   ├── DamageError    a compiled artefact is not what its name says
    │   └── DeviceGone     the device is lost to this process, which must end
    ├── InvalidRequest     a client's request does not fit the model
    ├── StateError         a controller's saved state cannot be restored by this version
    └── TransportError     a peer broke the protocol between our processes

Every message names the field, what was expected, what was found and what to do. Expected ends of a
request are values (:class:`~clockwork_serve.messages.Outcome`), never exceptions. A broken invariant is
an ``AssertionError``: a bug of ours.

Foreign text (what a model raises, names in files, a client's strings) passes through :func:`printable` or
:func:`described` where it enters; from there on it may be logged and sent anywhere.
"""

from __future__ import annotations

import errno
from collections.abc import Iterable
from difflib import get_close_matches
from typing import Final

from clockwork_client.errors import ClockworkError, encodable

__all__ = [
    "FORBIDDEN", "ClockworkError", "ConfigError", "DamageError", "DeviceError", "DeviceGone",
    "InvalidRequest", "ModelError", "RepositoryError", "TransportError", "described", "did_you_mean",
    "encodable", "install_advice", "printable",
]  # fmt: skip

TEXT_MAX: Final = 1000  # characters of foreign text in a message, which goes into logs, responses and headers
KNOWN_MOST: Final = 12
NEAR: Final = 0.7
"""How alike two words are, of 1, where one may be meant by the other."""
FORBIDDEN: Final = frozenset({errno.EACCES, errno.EPERM, errno.EROFS})
"""Of OSErrors: what was tried may not be done, and trying again will not help."""
_NAME_OF: Final = type.__dict__["__name__"].__get__


def printable(text: str, most: int = TEXT_MAX) -> str:
    """Foreign text as one printable line of at most ``most`` characters, which can be encoded.

    Lone surrogates, control characters and changes of direction are escaped. Idempotent.
    """
    whole = len(text) <= most
    text = text if whole else text[:most]
    if not text.isprintable():
        text = "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)
        whole = whole and len(text) <= most
    return text if whole else text[: most - 3] + "..."


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """Advice for an unknown word: the nearest known one, or those that are known."""
    names = sorted(known)
    by_key = {_plain(name): name for name in names}
    begun = [key for key in by_key if key.startswith(f"{_plain(word)}_")]  # ``rate`` is ``rate_rps``
    near = begun or get_close_matches(_plain(word), by_key, n=1, cutoff=NEAR)
    if near:
        return f"did you mean {by_key[near[0]]}?"
    shown = ", ".join(names[:KNOWN_MOST]) + (", ..." if len(names) > KNOWN_MOST else "")
    return f"known: {shown}" if names else "none is known"


def _plain(word: str) -> str:
    return word.lower().replace("-", "_")


def install_advice(distribution: str) -> str:
    """Advice to install one of our distributions, such as ``clockwork-serve[torch]``: it is in a clone."""
    return f"in a clone of Clockwork Serve's repository: pip install './packages/{distribution}'"


def described(error: BaseException, most: int = TEXT_MAX) -> str:
    """A foreign exception in one printable line, as a traceback ends.

    Raises nothing, whatever the exception's own methods do, and keeps no reference to it.
    """
    try:
        # An exact str, for the methods of a subclass are foreign code too; a piece, for it may be a gigabyte.
        text = str.__getitem__(str(error), slice(most + 1))
    except BaseException:  # noqa: BLE001 - foreign code raises what it likes, SystemExit too
        text = "(its text cannot be had)"
    name: str = _NAME_OF(type(error))
    text = " ".join(text.split())
    return printable(f"{name}: {text}" if text else name, most)


class ConfigError(ClockworkError):
    """A setting is wrong; the message names the field and where it was read from."""


class RepositoryError(ClockworkError):
    """A model repository, or one model in it, cannot be served; the message says why."""


class DeviceError(ClockworkError):
    """A device refused or failed an operation."""


class ModelError(DeviceError):
    """The model raised while it ran; the device is fine."""


class DamageError(DeviceError):
    """An artefact on disk is missing or damaged; ``what`` is ``code`` or ``weights``, ``name`` its id."""

    def __init__(self, message: str, *, what: str, name: str) -> None:
        super().__init__(message)
        self.what = what
        self.name = name


class DeviceGone(DeviceError):
    """The device is lost to this process (a CUDA context cannot be repaired), which must be restarted."""


class InvalidRequest(ClockworkError):
    """A client's request does not fit the model; the message, which quotes it, is shown to the client."""

    def __init__(self, message: str) -> None:
        super().__init__(printable(message))


class StateError(ClockworkError):
    """A controller's saved state cannot be restored: another version saved it, or it is damaged."""


class TransportError(ClockworkError):
    """A peer process broke the protocol or disconnected."""

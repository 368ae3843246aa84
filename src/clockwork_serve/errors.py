"""Errors that a person can act on; no transport code appears here.

    ClockworkError
    ├── ConfigError        a setting, a file of settings or a command line is wrong
    ├── RepositoryError    a model repository or a model in it cannot be served
    ├── DeviceError        a device refused or failed an operation
    │   ├── ModelError     the model itself raised while it ran
    │   ├── DamageError    a compiled artefact is not what its name says
    │   └── DeviceGone     the device is lost to this process, which must end
    ├── InvalidRequest     a client's request does not fit the model
    └── TransportError     a peer broke the protocol between our processes

Every message names the field, what was expected, what was found and what to do. Expected ends of a
request are values (:class:`~clockwork_serve.messages.Outcome`), never exceptions. A broken invariant is
an ``AssertionError``: a bug of ours.
"""

from __future__ import annotations


class ClockworkError(Exception):
    """The base of all errors raised on purpose."""


class ConfigError(ClockworkError):
    """A setting is wrong; the message names the field and where it was read from."""


class RepositoryError(ClockworkError):
    """A model repository, or one model in it, cannot be served; the message says why."""


class DeviceError(ClockworkError):
    """A device refused or failed an operation."""


class ModelError(DeviceError):
    """The model raised while it ran; the device is fine."""


class DamageError(DeviceError):
    """An artefact on disk is missing or damaged: ``what`` is ``code`` or ``weights``, ``name`` its id."""

    def __init__(self, message: str, *, what: str, name: str) -> None:
        super().__init__(message)
        self.what = what
        self.name = name


class DeviceGone(DeviceError):
    """The device is lost to this process (a CUDA context cannot be repaired): it must end and start anew."""


class InvalidRequest(ClockworkError):
    """A client's request does not fit the model; the message is shown to the client."""


class TransportError(ClockworkError):
    """A peer process broke the protocol or went away."""

"""Ways in which a client's request is wrong that need a status of their own; it knows no status."""

from __future__ import annotations

from clockwork_serve.errors import InvalidRequest


class UnknownModel(InvalidRequest):
    """No model, or no version, of that name is served."""


class TooLarge(InvalidRequest):
    """The request has more bytes than this server takes."""


class Unsupported(InvalidRequest):
    """The protocol has it, this server does not."""


class Forbidden(InvalidRequest):
    """This client may not have it."""


class UnknownRegion(InvalidRequest):
    """No shared memory region of that name is registered."""


class RegionExists(InvalidRequest):
    """A shared memory region of that name is registered already."""

"""What processes elsewhere and the bridge at the server tell each other beside what is said at home.

Tensors and artefacts travel in pieces, so that nothing else waits long behind them.
"""

from __future__ import annotations

from msgspec import Struct


class Machine(Struct, frozen=True, kw_only=True, tag="machine"):
    """A worker's first frame: what it runs.

    ``runtime`` is what artefacts depend on beside their model, ``kinds`` those of its devices.
    """

    worker: str
    version: str
    runtime: dict[str, str]
    kinds: tuple[str, ...]


class FarGateway(Struct, frozen=True, kw_only=True, tag="far_gateway"):
    """A gateway's first frame: what it runs."""

    gateway: str
    version: str


class Refused(Struct, frozen=True, kw_only=True, tag="refused"):
    """A worker or gateway may not join; ``final``: not later either, as it is."""

    why: str
    final: bool = True


class Piece(Struct, frozen=True, kw_only=True, tag="piece"):
    """Bytes of an INFER's tensors: inputs to the worker, outputs back.

    ``call`` is the place of the call in the action; ``at`` counts from the start of the call's inputs, or of
    its room for outputs.
    """

    action_id: int
    call: int
    at: int
    data: bytes


class RequestPiece(Struct, frozen=True, kw_only=True, tag="request_piece"):
    """Bytes of a request's tensors, in order: inputs from its gateway, outputs back.

    ``at`` counts from the start of its inputs, or of its room for outputs.
    """

    request_id: str
    at: int
    data: bytes


class Unheard(Struct, frozen=True, kw_only=True, tag="unheard"):
    """The controller never heard of a request: there was no room (``why``), or it was cancelled before."""

    request_id: str
    why: str = ""


class Fetch(Struct, frozen=True, kw_only=True, tag="fetch"):
    """A worker lacks an artefact: ``what`` is ``code`` or ``weights``, ``name`` its id."""

    what: str
    name: str


class Part(Struct, frozen=True, kw_only=True, tag="part"):
    """Bytes of an artefact that was asked for, in order.

    ``file`` is its name where there are several. ``last`` ends the whole artefact; ``error`` says why it
    does not come.
    """

    what: str
    name: str
    file: str = ""
    data: bytes = b""
    last: bool = False
    error: str = ""

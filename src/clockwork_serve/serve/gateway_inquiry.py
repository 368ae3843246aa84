"""A client's request as the core of a gateway sees it, and how one ended; it knows no protocol."""

from __future__ import annotations

from random import Random
from typing import Any, Protocol

from msgspec import Struct

from clockwork_serve.messages import Outcome, Reason
from clockwork_serve.oip import InferCall, OutputTensor, Served, Status
from clockwork_serve.oip.records import Buffer
from clockwork_serve.serve.gateway_slots import Body
from clockwork_serve.units import NS_PER_S


class Ending(Struct):
    """How a request ended. ``served`` and ``call`` are None where it was refused before they were known.

    With a ``deadline_ns`` the core is asked once more, when the response is given to the socket, whether that
    is in time (:meth:`Gateway.delivered`), or told that it never is (:meth:`Gateway.undelivered`).
    ``outputs`` refer to memory that is given back when :meth:`Inquiry.end` returns. ``retry_after_ns`` is
    exact, ``retry_after_s`` are whole seconds with dice in them. ``texts`` are the data of outputs that are
    JSON already.
    """

    outcome: Outcome
    reason: Reason
    status: Status
    message: str = ""
    request_id: str = ""
    served: Served | None = None
    call: InferCall | None = None
    retry_after_ns: int = 0
    retry_after_s: int = 0
    deadline_ns: int = 0
    outputs: list[OutputTensor] = []
    parameters: dict[str, Any] = {}
    texts: dict[str, Buffer] = {}

    @property
    def text(self) -> str:
        """What to tell the client: the reason's name first, for stock clients show nothing but this text."""
        name = self.reason or self.outcome
        if self.outcome is Outcome.INVALID:
            return self.message or name
        return f"{name}: {self.message}" if self.message else name


def spread_s(wait_ns: int, dice: Random) -> int:
    """A wait as whole seconds: rounded up, then up to half of that more, or a second if that is more.

    All who are told to come back "in a second" would else come at once.
    """
    least_s = -(-wait_ns // NS_PER_S)
    return least_s + dice.randint(0, max(1, least_s // 2)) if least_s > 0 else 0


class Inquiry(Protocol):
    """One inference request of a client, whatever protocol it came by.

    ``body`` is where its tensors were received, if in the region: the gateway takes that over. ``identity``
    is the tenant that the API key belongs to; empty where no keys are asked for.
    """

    model: str
    version: str
    identity: str
    arrival_ns: int
    slo_header: str | None
    remaining_s: float | None
    every_output_binary: bool
    body: Body | None

    @property
    def local(self) -> bool:
        """Whether its client is on this host."""

    def call(self, served: Served) -> InferCall:
        """Parse it. Raises :class:`InvalidRequest`."""

    def end(self, ending: Ending) -> None:
        """Answer the client, perhaps before :meth:`Gateway.infer` returns. Once; again only if it raised."""


class EarlyInquiry(Inquiry, Protocol):
    """One whose head is there before its body."""

    def foretold(self) -> None:
        """What becomes of it was asked: it may come, or it was ended."""

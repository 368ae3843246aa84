"""Asks about requests whose heads alone have come: hopeless ones need not be read. It decides nothing."""

from __future__ import annotations

from collections.abc import Callable
from typing import Generic, Protocol, TypeVar

from clockwork_serve.errors import InvalidRequest
from clockwork_serve.messages import Announced, Hopeless
from clockwork_serve.oip import requested_slo_ns
from clockwork_serve.serve.gateway_link import GatewayLink


class Head(Protocol):
    """What the head of a request says."""

    model: str
    version: str
    arrival_ns: int
    slo_header: str | None


Inquiry = TypeVar("Inquiry", bound=Head)


class Announcements(Generic[Inquiry]):
    """``in_vain`` is called with a request that the controller would reject, and what it says of it."""

    def __init__(self, in_vain: Callable[[Inquiry, Hopeless], None]) -> None:
        self._in_vain = in_vain
        self._open: dict[str, Inquiry] = {}  # all and only announced requests whose bodies are on the way
        self._count = 0

    def start(self, link: GatewayLink, prefix: str) -> None:
        """Over which link, and how ids begin."""
        self._link = link
        self._prefix = prefix

    def make(self, inquiry: Inquiry, gateway: str) -> str:
        """Ask whether a request is worth its body; its id until :meth:`withdraw`, or "" if nothing is asked.

        Nothing is asked where the head does not say how long the request may take: the body may.
        """
        if not self._link.ready or inquiry.slo_header is None:
            return ""
        try:
            served = self._link.models.find(inquiry.model, inquiry.version)
            slo_ns = requested_slo_ns({}, inquiry.slo_header)
        except InvalidRequest:
            return ""  # its client hears of it once the request is there
        if slo_ns is None:
            return ""
        self._count += 1
        announced_id = f"{self._prefix}a{self._count}"
        self._open[announced_id] = inquiry
        self._link.send(
            Announced(
                announced_id=announced_id, gateway=gateway, model=served.model.key,
                arrival_ns=inquiry.arrival_ns, deadline_ns=inquiry.arrival_ns + slo_ns,
            )
        )  # fmt: skip
        return announced_id

    def withdraw(self, announced_id: str) -> None:
        """The body is there, or never comes."""
        self._open.pop(announced_id, None)

    def on_hopeless(self, told: Hopeless) -> None:
        """The controller would reject it."""
        inquiry = self._open.pop(told.announced_id, None)
        if inquiry is not None:
            self._in_vain(inquiry, told)

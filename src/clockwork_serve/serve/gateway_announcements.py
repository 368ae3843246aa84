"""Asks about requests whose heads alone have come: hopeless ones need not be read. It decides nothing."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Generic, Protocol, TypeVar

from clockwork_serve.errors import InvalidRequest
from clockwork_serve.messages import Announced, Foretold
from clockwork_serve.oip import requested_slo_ns
from clockwork_serve.serve.gateway_link import GatewayLink
from clockwork_serve.serve.gateway_tenants import Caps
from clockwork_serve.serve.gateway_way import Way
from clockwork_serve.units import NS_PER_S


class Head(Protocol):
    """What the head of a request says. ``foretold`` is called once: it may come, or the gateway ended it."""

    model: str
    version: str
    identity: str
    arrival_ns: int
    slo_header: str | None

    def foretold(self) -> None:
        """The answer is there."""


Inquiry = TypeVar("Inquiry", bound=Head)


class Announcements(Generic[Inquiry]):
    """``in_vain`` is called with a request that the controller would reject, and what it says of it."""

    def __init__(
        self,
        name: str,
        prefix: str,
        in_vain: Callable[[Inquiry, Foretold], None],
        caps: Caps | None = None,
        way: Way | None = None,
    ) -> None:
        self._name = name
        self._prefix = prefix
        self._in_vain = in_vain
        self._caps = caps or Caps()
        self._way = way or Way()
        self._loop = asyncio.get_running_loop()
        # All and only requests that wait for what is foretold, with when they wait no longer.
        self._open: dict[str, tuple[Inquiry, asyncio.TimerHandle]] = {}
        self._count = 0
        self.refusing = False
        """Whether the last word was no: then bodies had better not be read before there is one."""

    def make(self, inquiry: Inquiry, link: GatewayLink) -> str:
        """Ask whether a request is worth its body; its id until it is told, or "" if nothing is asked.

        Nothing is asked where the head does not say how long the request may take: the body may.
        """
        if not link.ready or inquiry.slo_header is None:
            return ""
        try:
            served = link.models.find(inquiry.model, inquiry.version)
            slo_ns = requested_slo_ns({}, inquiry.slo_header)
        except InvalidRequest:
            return ""  # its client hears of it once the request is there
        if slo_ns is None:
            return ""
        slo_ns, _ = self._caps.of(inquiry.identity, slo_ns)
        self._count += 1
        announced_id = f"{self._prefix}a{self._count}"
        wait = self._loop.call_later(slo_ns / NS_PER_S, self._told, announced_id)
        self._open[announced_id] = inquiry, wait
        link.send(
            Announced(
                announced_id=announced_id, gateway=self._name, model=served.model.key,
                arrival_ns=inquiry.arrival_ns, deadline_ns=inquiry.arrival_ns + slo_ns,
                tenant=inquiry.identity, way_ns=self._way.of(slo_ns, inquiry.arrival_ns),
            )
        )  # fmt: skip
        return announced_id

    def withdraw(self, announced_id: str) -> None:
        """The body never comes."""
        if (known := self._open.pop(announced_id, None)) is not None:
            known[1].cancel()

    def on_foretold(self, told: Foretold) -> None:
        """The controller's answer."""
        self.refusing = bool(told.reason)
        known = self._open.get(told.announced_id)
        if known is not None and told.reason:
            self._in_vain(known[0], told)
        self._told(told.announced_id)

    def on_lost(self) -> None:
        """Nothing is foretold any more."""
        for announced_id in tuple(self._open):
            self._told(announced_id)

    def _told(self, announced_id: str) -> None:
        known = self._open.pop(announced_id, None)
        if known is not None:
            known[1].cancel()
            known[0].foretold()

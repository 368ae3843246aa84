"""Asks about requests whose heads alone have come: hopeless ones need not be read. It decides nothing.

While nothing is refused, the question waits a little, and is never asked where the body is there by then: it
wakes two processes for each request.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Final

from clockwork_serve.errors import InvalidRequest
from clockwork_serve.messages import AdmissionQuery, AdmissionReply
from clockwork_serve.oip import requested_slo_ns
from clockwork_serve.serve.gateway.access import Caps
from clockwork_serve.serve.gateway.controller_link import GatewayLink
from clockwork_serve.serve.gateway.requests import EarlyInquiry
from clockwork_serve.serve.gateway.timing import Way
from clockwork_serve.units import NS_PER_S

WARY_S: Final = 1.0
"""For so long after a refusal, others are to be expected: all are asked about at once."""
BODY_S: Final = 0.002
"""A large body that comes quickly is there within so long."""


class _Open:
    """One request that was announced, or is about to be. ``wait``: until it is asked, or told."""

    __slots__ = ("asked", "frame", "inquiry", "wait")

    def __init__(self, inquiry: EarlyInquiry, frame: AdmissionQuery) -> None:
        self.inquiry = inquiry
        self.frame = frame
        self.asked = False
        self.wait: asyncio.TimerHandle | None = None


class Announcements:
    """``in_vain`` is called with a request that the controller would reject, its word, and the deadline."""

    def __init__(
        self,
        name: str,
        prefix: str,
        in_vain: Callable[[EarlyInquiry, AdmissionReply, int], None],
        caps: Caps | None = None,
        way: Way | None = None,
    ) -> None:
        self._name = name
        self._prefix = prefix
        self._in_vain = in_vain
        self._caps = caps or Caps()
        self._way = way or Way()
        self._loop = asyncio.get_running_loop()
        # All and only requests that wait for what is foretold, or to be asked about.
        self._open: dict[str, _Open] = {}
        self._count = 0
        self._wary_until_s = 0.0
        self.refusing = False
        """Whether the last word was no: then bodies had better not be read before there is one."""

    def make(self, inquiry: EarlyInquiry, link: GatewayLink) -> str:
        """Ask whether a request is worth its body, now or soon; its id until it is told, "" if it never is.

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
        frame = AdmissionQuery(
            announced_id=announced_id, gateway=self._name, model=served.model.key,
            arrival_ns=inquiry.arrival_ns, deadline_ns=inquiry.arrival_ns + slo_ns,
            tenant=inquiry.identity, way_ns=self._way.of(slo_ns, inquiry.arrival_ns),
        )  # fmt: skip
        one = self._open[announced_id] = _Open(inquiry, frame)
        if self._loop.time() < self._wary_until_s:
            self._ask(one, link)
        else:
            self.refusing = False
            one.wait = self._loop.call_later(BODY_S, self._ask, one, link)
        return announced_id

    def refused(self) -> None:
        """A request was: more may be."""
        self._wary_until_s = self._loop.time() + WARY_S

    def awaited(self, announced_id: str) -> bool:
        """The body is there: whether it waits for what is foretold. Else it is not asked about any more."""
        one = self._open.get(announced_id)
        if one is not None and not one.asked:
            self.withdraw(announced_id)
        return one is not None and one.asked

    def withdraw(self, announced_id: str) -> None:
        """The body never comes, or nothing is to be asked about it."""
        one = self._open.pop(announced_id, None)
        if one is not None and one.wait is not None:
            one.wait.cancel()

    def on_foretold(self, told: AdmissionReply) -> None:
        """The controller's answer."""
        self.refusing = bool(told.reason)
        one = self._open.get(told.announced_id)
        if one is not None and told.reason:
            self._in_vain(one.inquiry, told, one.frame.deadline_ns)
        self._told(told.announced_id)

    def on_lost(self) -> None:
        """Nothing is foretold any more."""
        for announced_id in tuple(self._open):
            self._told(announced_id)

    def _ask(self, one: _Open, link: GatewayLink) -> None:
        if not link.ready:
            self._told(one.frame.announced_id)
            return
        one.asked = True
        # The loop's axis is that of arrivals: it may have come long ago.
        one.wait = self._loop.call_at(one.frame.deadline_ns / NS_PER_S, self._told, one.frame.announced_id)
        link.send(one.frame)

    def _told(self, announced_id: str) -> None:
        one = self._open.get(announced_id)
        if one is not None:
            self.withdraw(announced_id)
            one.inquiry.foretold()

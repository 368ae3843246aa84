"""Admission queries: ask the controller, from a request's head alone, whether its body is worth receiving.

A query wakes two processes. While nothing is being rejected, it is therefore delayed by :data:`BODY_WAIT_S`,
and not sent at all if the body is complete by then.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Final

from clockwork_serve.errors import InvalidRequest
from clockwork_serve.messages import AdmissionQuery, AdmissionReply, Reason
from clockwork_serve.oip import tightest
from clockwork_serve.serve.gateway.access import Caps
from clockwork_serve.serve.gateway.controller_link import GatewayLink
from clockwork_serve.serve.gateway.requests import EarlyExchange, missed_by
from clockwork_serve.serve.gateway.timing import GatewayDelay
from clockwork_serve.units import NS_PER_S

REJECTIONS_LIKELY_S: Final = 1.0
"""For this long after a rejection more rejections are expected, and queries are sent without delay."""
TIMER_S: Final = 0.001
"""Timers of the loop count milliseconds and may fire one early: no request goes on before its deadline."""
BODY_WAIT_S: Final = 0.002  # a large body from a fast sender arrives within this time


class _OpenQuery:
    """One query. ``wait`` is the timer that sends it, then the one that gives up on a reply."""

    __slots__ = ("exchange", "frame", "sent", "wait")

    def __init__(self, exchange: EarlyExchange, frame: AdmissionQuery) -> None:
        self.exchange = exchange
        self.frame = frame
        self.sent = False
        self.wait: asyncio.TimerHandle | None = None


class AdmissionQueries:
    """The open admission queries of one gateway; only for the running loop's thread.

    ``on_reject`` is called for a request that the controller would reject, with the reply and the request's
    deadline. In every other case the request goes on: see :meth:`EarlyExchange.query_done`.
    """

    def __init__(
        self, name: str, prefix: str, on_reject: Callable[[EarlyExchange, AdmissionReply, int], None],
        caps: Caps | None = None, delay: GatewayDelay | None = None,
    ) -> None:  # fmt: skip
        self._name = name
        self._prefix = prefix
        self._on_reject = on_reject
        self._caps = caps or Caps()
        self._delay = delay or GatewayDelay()
        self._loop = asyncio.get_running_loop()
        # By id: exactly the queries that wait for a reply, or to be sent.
        self._open: dict[str, _OpenQuery] = {}
        self._count = 0
        self._rejections_until_s = 0.0
        self.rejecting = False
        """Whether the last reply was a rejection. If so, bodies are not read until their own reply is
        there."""

    def start(self, exchange: EarlyExchange, link: GatewayLink) -> str:
        """Send a query for a request, now or after a delay; the query's id, or "" if there will be none.

        There is none without ``x-slo-ms`` in the head, because the SLO may then be in the body.
        """
        if not link.serves or exchange.slo_header is None:
            return ""
        try:
            served = link.models.find(exchange.model, exchange.version)
            slo_ns = tightest(None, exchange.slo_header, None)
        except InvalidRequest:
            return ""  # the error is reported when the request is complete
        if slo_ns is None:
            return ""
        slo_ns, _ = self._caps.of(exchange.identity, slo_ns)
        self._count += 1
        query_id = f"{self._prefix}a{self._count}"
        frame = AdmissionQuery(
            announced_id=query_id, gateway=self._name, model=served.model.key,
            arrival_ns=exchange.arrival_ns, deadline_ns=exchange.arrival_ns + slo_ns,
            tenant=exchange.identity, way_ns=self._delay.reserve_ns(slo_ns, exchange.arrival_ns),
        )  # fmt: skip
        one = self._open[query_id] = _OpenQuery(exchange, frame)
        if self._loop.time() < self._rejections_until_s:
            self._send(one, link)
        else:
            self.rejecting = False
            one.wait = self._loop.call_later(BODY_WAIT_S, self._send, one, link)
        return query_id

    def note_rejection(self) -> None:
        """A request was rejected, so more rejections are likely: send queries at once for a while."""
        self._rejections_until_s = self._loop.time() + REJECTIONS_LIKELY_S

    def must_wait(self, query_id: str) -> bool:
        """The body is complete: whether its request must wait for the reply to a query.

        A query that was not sent yet is withdrawn.
        """
        one = self._open.get(query_id)
        if one is not None and not one.sent:
            self.withdraw(query_id)
        return one is not None and one.sent

    def withdraw(self, query_id: str) -> None:
        """Forget a query: the client left, or the body is complete."""
        one = self._open.pop(query_id, None)
        if one is not None and one.wait is not None:
            one.wait.cancel()

    def on_admission_reply(self, reply: AdmissionReply) -> None:
        """Handle the controller's reply."""
        self.rejecting = bool(reply.reason)
        one = self._open.get(reply.announced_id)
        if one is not None and reply.reason:
            self._on_reject(one.exchange, reply, one.frame.deadline_ns)
        self._finish(reply.announced_id)

    def on_lost(self) -> None:
        """The link to the controller was lost: let all requests go on without a reply."""
        for query_id in tuple(self._open):
            self._finish(query_id)

    def _send(self, one: _OpenQuery, link: GatewayLink) -> None:
        if not link.serves:
            self._finish(one.frame.announced_id)
            return
        one.sent = True
        if reply := self._by_summary(one.frame, link):
            # Never before ``start`` has returned the id.
            self._loop.call_soon(self.on_admission_reply, reply)
            return
        # Arrivals and the loop use the same clock. The deadline may have passed already.
        over_s = one.frame.deadline_ns / NS_PER_S + TIMER_S
        one.wait = self._loop.call_at(over_s, self._finish, one.frame.announced_id)
        link.send(one.frame)

    def _by_summary(self, query: AdmissionQuery, link: GatewayLink) -> AdmissionReply | None:
        """The rejection that the controller's summary tells without a query; None if it tells none."""
        shortage_ns = link.shortage_ns(query.model, query.deadline_ns - query.way_ns, count=False)
        if shortage_ns <= 0:
            return None
        return AdmissionReply(
            announced_id=query.announced_id, gateway=query.gateway, reason=Reason.WOULD_MISS_DEADLINE,
            message=missed_by(shortage_ns), retry_after_ns=link.retry_after_ns(query.model, shortage_ns),
        )  # fmt: skip

    def _finish(self, query_id: str) -> None:
        one = self._open.get(query_id)
        if one is not None:
            self.withdraw(query_id)
            one.exchange.query_done()

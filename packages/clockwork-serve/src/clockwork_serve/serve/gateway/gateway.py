"""The core of a gateway: validates requests, submits them to the controller, and ends each exactly once.

Scheduling is the controller's task. The gateway ends a request itself only if it is invalid, there is no
memory for it, the controller is stuck, or the server does not serve.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import Counter
from collections.abc import Callable, Mapping
from random import Random
from typing import Final

import msgspec

from clockwork_serve.errors import InvalidRequest, printable
from clockwork_serve.messages import (
    AdmissionReply,
    Answer,
    Cancel,
    Outcome,
    Question,
    Reason,
    Release,
    Reply,
    Request,
    TensorsOffered,
)
from clockwork_serve.oip import (
    InferCall,
    InputTensor,
    Known,
    Served,
    StringsWalk,
    decide_ns_of,
    priority_of,
    reason_of_error,
    requested_slo_ns,
    status_of,
    tightest,
)
from clockwork_serve.serve.gateway.access import Caps
from clockwork_serve.serve.gateway.admission_queries import AdmissionQueries
from clockwork_serve.serve.gateway.client_shm import Regions, allowed
from clockwork_serve.serve.gateway.controller_link import (
    RESUBMITTED,
    AwaitingFailover,
    Connector,
    GatewayLink,
    GatewayModels,
    LinkListener,
    local_connector,
)
from clockwork_serve.serve.gateway.requests import (
    EXPIRE_WHEN_LATE,
    ROOM_RETRY_NS,
    Body,
    Copies,
    Copying,
    EarlyExchange,
    Exchange,
    InferResponse,
    OutputReserves,
    PendingRequest,
    Slot,
    Slots,
    gateway_response,
    invalid_response,
    late_response,
    missed_by,
    response_of,
    spread_s,
)
from clockwork_serve.serve.gateway.settings import GatewayConfig
from clockwork_serve.serve.gateway.timing import GatewayDelay, LoopTurns
from clockwork_serve.telemetry import GatewayCounters, Journal, outcome_key
from clockwork_serve.units import NS_PER_MS, NS_PER_S

# ------------------------------------------------------------
# Validation of a request against its model.


def check(
    exchange: Exchange, call: InferCall, served: Served, regions: Regions | None, slots: Slots
) -> Known:
    """Validate a request against its model. Raises :class:`InvalidRequest`.

    What is found is remembered for requests with the same header.
    """
    shared = allowed(regions, local=exchange.local) if call.shared else None
    if shared is not None:
        exchange.body = shared.read_inputs(call, slots, exchange.body)
    rows, signature = served.check(call, binary_only_allowed=exchange.every_output_binary)
    if shared is not None:
        shared.check_outputs(call, served, rows)
    priority = priority_of(call.parameters, served.model.priority)
    slo_ns = requested_slo_ns(call.parameters)
    decide_ns = decide_ns_of(call.parameters)
    return served.headers.remember(
        call, served.wanted(call), rows, signature, slo_ns, priority, decide_ns=decide_ns
    )


# ------------------------------------------------------------
# Requests that a stuck controller left without an answer, found soon after their deadlines.
#
# Enforcing deadlines is the controller's task. Only if its answer is missing as well does the gateway end the
# request, 40 to 45 ms after the deadline: with the response's way to the client that is less than 50 ms.


SWEEP_S, SWEEP_LEAST_S = 0.02, 0.005
"""The interval between sweeps; shorter, but no less than the second, if a request's grace period ends
sooner."""
READ_S: Final = 0.001  # within this time everything that was in the link's socket has been read


class OverdueSweep:
    """Periodic sweep for requests whose controller did not answer in time; runs while there are any.

    ``end`` ends one and must not change the mapping. ``awaiting`` sweeps the requests that await failover,
    and says whether any are left. ``grace_ns``: see :meth:`GatewayLink.grace_ns`.
    """

    def __init__(
        self, clock: Callable[[], int], open_requests: Callable[[], Mapping[str, PendingRequest]],
        end: Callable[[str, PendingRequest], None], awaiting: Callable[[], bool],
        grace_ns: Callable[[], int],
    ) -> None:  # fmt: skip
        self._clock, self._open, self._end, self._awaiting_failover = clock, open_requests, end, awaiting
        self._grace_ns = grace_ns
        self._loop = asyncio.get_running_loop()
        self.timer: asyncio.TimerHandle | None = None

    def watch(self) -> None:
        """Start the sweep if it is not running; to be called for each request."""
        if self.timer is None:
            self.timer = self._loop.call_later(SWEEP_S, self._sweep)

    def close(self) -> None:
        """Stop."""
        if self.timer is not None:
            self.timer.cancel()

    def _sweep(self) -> None:
        self.timer = None
        awaiting, pendings = self._awaiting_failover(), self._open()
        if not pendings and not awaiting:
            return
        due_before_ns = self._clock() - self._grace_ns()
        waiting = [one.deadline_ns for one in pendings.values() if one.exchange is not None]
        left_s = (min(waiting) - due_before_ns) / NS_PER_S if waiting else SWEEP_S
        if left_s < 0:
            # If this process was stopped until now, answers wait in the socket: read them first.
            self.timer = self._loop.call_later(READ_S, self._end_late, due_before_ns)
        else:
            self.timer = self._loop.call_later(min(SWEEP_S, max(SWEEP_LEAST_S, left_s)), self._sweep)

    def _end_late(self, due_before_ns: int) -> None:
        for request_id, pending in self._open().items():
            if pending.exchange is not None and pending.deadline_ns < due_before_ns:
                self._end(request_id, pending)
        self.timer = self._loop.call_later(SWEEP_LEAST_S, self._sweep)


# ------------------------------------------------------------
# The core of a gateway.
#
# Every request ends exactly once: by the controller's answer; at once, if it is invalid or there is no memory
# for it; soon after its deadline, if the controller is stuck; or when the link is lost, unless the next
# controller can still answer it. Its slot is freed only when the controller reports that no worker accesses
# it any more, or together with the whole region.


NO_ANSWER: Final = "no answer by the deadline"
UNREACHED: Final = "no worker has got tensors from this gateway yet"
UNREAD: Final = "the gateway failed to read the request; see its log"
OVER: Final = "its deadline passed before the gateway handled it"
NAME_CHARS: Final = 200  # longer names of models that nobody knows are cut where they are kept
SENT_NS: Final = 10 * NS_PER_MS  # a response reported as sent may have left up to this much earlier
PREPARED_NS: Final = 5 * NS_PER_S
"""The retry advice for a model that is still to be prepared: those asked for come first."""
RECOVERY_NS: Final = 500 * NS_PER_MS
"""The retry advice while the server does not serve: a controller that died has restarted by then."""

_log = logging.getLogger(__name__)


class Gateway:
    """All methods are for the running loop's thread, unless they say otherwise.

    ``connector`` replaces the way to the controller that ``config`` describes, for one on another machine.
    ``rng`` spreads retries.
    """

    def __init__(
        self, config: GatewayConfig, caps: Caps | None = None, connector: Connector | None = None
    ) -> None:
        self.name = config.name
        settings = self.settings = config.settings
        self.regions: Regions | None = None  # set where clients may use shared memory
        self.refusals: Journal | None = None  # set where what this gateway ends by itself is kept, for traces
        self.slots = Slots(self.settings.gateway_memory, elsewhere=config.elsewhere)
        self._reserves = OutputReserves()
        self.clock = clock = time.monotonic_ns
        self.rng = Random()
        self.connections = 0
        self.readiness_listeners: list[Callable[[], None]] = []
        self.batching = False
        """Whether more answers follow in this batch: responses may be held back and sent together."""
        self.batch_now_ns = 0
        """The clock at the batch's begin or at its last response; answers are compared with it first, for no
        call."""
        self.batch_listeners: list[Callable[[], None]] = []
        self._prefix = f"{config.name}-{time.time_ns() // NS_PER_MS:x}-"  # unique, also among past processes
        self._caps = caps or Caps()
        self._delay = GatewayDelay()
        self.admission_queries = AdmissionQueries(
            config.name, self._prefix, self._reject_early, self._caps, self._delay
        )
        self._awaiting_failover = AwaitingFailover(clock, standby=settings.has_standby)
        listener = LinkListener(
            self._on_answer, self._on_release, self._on_lost, self._on_readiness,
            self.admission_queries.on_admission_reply, self._on_batch, self._on_batch_end, self._on_refused,
            self._on_stuck, self._record_late, self._awaiting_failover.hand_over,
        )  # fmt: skip
        connect = connector or local_connector(config.controller, config.name)
        self.link = GatewayLink(
            connect, settings.default_slo_ns, listener, standby=settings.has_standby, offer=self._offer
        )
        if config.elsewhere:
            self.link.unreached = UNREACHED
        self.turns = LoopTurns(clock, self.link.report_delivered)
        self._pending: dict[str, PendingRequest] = {}  # exactly the requests submitted and not answered
        self._held: dict[str, Slot] = {}  # slots of answered requests that a worker may still access
        self._copies = Copies(self._on_filled, self._on_wrong)
        self._copying = Copying()  # of the next request that needs it; few do
        self._count = 0
        self._received = 0
        self._outcomes: Counter[str] = Counter()
        self._unused_answers = {"left": 0, "over": 0}
        self._invalid_by_model: Counter[str] = Counter()
        self._overdue = OverdueSweep(
            clock, lambda: self._pending, self._end_overdue, self._sweep_awaiting_failover, self.link.grace_ns
        )

    @property
    def models(self) -> GatewayModels:
        """The catalogue of served models."""
        return self.link.models

    def _offer(self) -> TensorsOffered | None:
        server = self.slots.server
        return TensorsOffered(gateway=self.name, server=server) if server else None

    def close(self) -> None:
        """Close the link, end all requests as not serving, and free the memory."""
        self.turns.close()
        self.link.close()
        self._copies.clear()
        self._pending |= self._awaiting_failover.release()
        self._end_all("the server is shutting down")
        self._overdue.close()
        self.slots.close()

    def infer(self, exchange: Exchange) -> str:
        """Validate a request and submit it; its id, or "" if it has ended already."""
        self._received += 1
        served: Served | None = None
        try:
            if not self._can_accept(exchange):
                return ""
            served = self.link.models.find(exchange.model, exchange.version)
            call = exchange.call(served)
            known = call.known or check(exchange, call, served, self.regions, self.slots)
            slo_ns = known.slo_ns
            if exchange.slo_header is not None or exchange.remaining_s is not None:
                slo_ns = tightest(slo_ns, exchange.slo_header, exchange.remaining_s)
        except InvalidRequest as error:
            self.drop_body(exchange)
            exchange.end(self.invalid(exchange, error, served))
            return ""
        except Exception:  # noqa: BLE001 - a bug that one request triggers must not end all others
            _log.exception("reading a request failed", extra={"model": exchange.model})
            self._refuse(exchange, Outcome.FAILED, Reason.NONE, UNREAD)
            return ""
        wanted_ns = served.default_slo_ns if slo_ns is None else slo_ns
        given_ns, priority = self._caps.of(exchange.identity, wanted_ns, known.priority)
        deadline_ns, other_ns = exchange.arrival_ns + given_ns, 0 if given_ns == wanted_ns else given_ns
        way_ns = self._delay.reserve_ns(given_ns, exchange.arrival_ns)
        usual = known.rows == 1 and not known.signature and priority == served.model.priority
        if self._ends_unsent(exchange, served.model.key, deadline_ns, way_ns, summarised=usual):
            return ""
        body, exchange.body = exchange.body, None
        output_bytes = self._reserves.room(served, known.rows, known.signature, self.slots.region)
        slot = self._fill(served.sent(call.inputs), output_bytes, body, call.strings)
        if slot is None:
            self._refuse_for_memory(exchange, served, call.inputs, output_bytes, deadline_ns)
            return ""
        request_id = self._next_id()
        request = Request(
            request_id=request_id, gateway=self.name, model=served.model.key, rows=known.rows,
            arrival_ns=exchange.arrival_ns, deadline_ns=deadline_ns, signature=known.signature, way_ns=way_ns,
            priority=priority, tensors=slot.encoded, tenant=exchange.identity, trace=exchange.trace,
            decide_ns=self._caps.decide_ns(exchange.identity, known.decide_ns, served.model.decide_ns),
        )  # fmt: skip
        self._pending[request_id] = PendingRequest(exchange, served, call, slot, request, other_ns)
        if self._copying.begun:
            copying, self._copying = self._copying, Copying()
            self._copies.begin(request_id, copying)
        else:
            self._submit(request)
        if self._overdue.timer is None:
            self._overdue.watch()
        return request_id

    def _next_id(self) -> str:
        self._count += 1
        return f"{self._prefix}{self._count}"

    def _fill(
        self, inputs: list[InputTensor], output_bytes: int, body: Body | None, strings: StringsWalk | None
    ) -> Slot | None:
        if strings is not None:
            self._copying.look(strings)
        slot = self.slots.fill(inputs, output_bytes, body, self._copying)
        if slot is None and self._copying.begun:
            copying, self._copying = self._copying, Copying()
            copying.release()
        return slot

    def _submit(self, request: Request) -> None:
        """Send an open request, or keep it for a controller that takes over, if one is about to."""
        if not self.link.serves and self._awaiting_failover.holding:
            self._awaiting_failover.add(request.request_id, self._pending.pop(request.request_id))
        else:
            self.link.submit(request)

    def cancel(self, request_id: str) -> None:
        """The client of an open request left: stop the request; :meth:`Exchange.end` is not called."""
        sent_id = request_id if request_id in self._pending else request_id + RESUBMITTED
        pending = self._pending.get(sent_id)
        if pending is not None and pending.exchange is not None:
            pending.exchange = None
            if self._copies.withdraw(sent_id) or self.link.withdraw(sent_id):
                self._drop(sent_id, Outcome.CANCELLED, Reason.NONE)
            else:
                self.link.send(Cancel(request_id=sent_id))
        elif (awaiting := self._awaiting_failover.withdraw(request_id)) is not None:
            self.slots.free(awaiting.slot)
            self._count_outcome(Outcome.CANCELLED, Reason.NONE)
            self._record(gateway_response(Outcome.CANCELLED, Reason.NONE, "", request_id), awaiting.request)

    def invalid(
        self, exchange: Exchange, error: InvalidRequest, served: Served | None = None
    ) -> InferResponse:
        """Count a request as invalid; how it ends."""
        response = self._count_invalid(error, served)
        self._record_unsent(exchange, response, "" if served is None else served.model.key)
        return response

    def _count_invalid(self, error: InvalidRequest, served: Served | None) -> InferResponse:
        self._count_outcome(Outcome.INVALID, reason_of_error(error))
        if served is not None:
            self._invalid_by_model[served.model.key] += 1
        return invalid_response(error, served=served)

    def check_delivery(self, response: InferResponse) -> InferResponse | None:
        """A response is about to be written to its client's socket.

        None if that is in time, else what to send instead. For any thread, like :meth:`discard`.
        """
        if self.clock() <= response.deadline_ns:
            self.link.in_time.append(response.request_id)
            return None
        return self.check_late(response)

    def check_late(self, response: InferResponse) -> InferResponse | None:
        """None if it is not late; else count it as late, and say what to send instead.

        For a response that is reported by :meth:`note_sent` once it was sent. For any thread.
        """
        if self.clock() <= response.deadline_ns:
            return None
        self.link.late.append(response.request_id)
        return self._with_triton_status(late_response(response.request_id, response.outcome, response.call))

    def note_sent(self, response: InferResponse) -> None:
        """Count a response whose transport reports only later that it was sent. For any thread."""
        in_time = self.clock() <= response.deadline_ns + SENT_NS
        (self.link.in_time if in_time else self.link.late).append(response.request_id)

    def discard(self, response: InferResponse) -> None:
        """The client left before its response was sent; nothing is to be counted as late."""
        self.link.in_time.append(response.request_id)

    def unreadable(self, exchange: Exchange, error: InvalidRequest) -> InferResponse:
        """Count a request whose body cannot be decoded; how it ends."""
        self._received += 1
        return self.invalid(exchange, error)

    def refuse_unread(self, exchange: Exchange, message: str, *, busy: bool) -> None:
        """End a request whose body was not decoded: the codec is overloaded (``busy``), or it failed."""
        self._received += 1
        if busy:
            self._refuse(exchange, Outcome.REJECTED, Reason.QUEUE_FULL, message, ROOM_RETRY_NS)
        else:
            self._refuse(exchange, Outcome.FAILED, Reason.NONE, message)

    def drop_body(self, exchange: Exchange) -> None:
        """Free the memory that a request's body was received into, if it is not passed on."""
        body, exchange.body = exchange.body, None
        if body is not None:
            self.slots.drop(body)

    async def ask(self, what: Question, body: bytes = b"{}", timeout_s: float = 5.0) -> Reply:
        """Ask the controller's process. The reply's code is 503 if that is impossible, 504 on timeout."""
        return await self.link.ask(what, body, timeout_s)

    def counters(self) -> GatewayCounters:
        """What this gateway counted itself, beside the controller's counters."""
        return GatewayCounters(
            gateway=self.name,
            ready=self.link.ready,
            received=self._received,
            outcomes=dict(self._outcomes),
            invalid=dict(self._invalid_by_model),
            open=sum(one.exchange is not None for one in self._pending.values())
            + len(self._awaiting_failover),
            connections=self.connections,
            region_bytes=self.slots.region.size,
            region_used_bytes=self.slots.used_bytes,
            received_in_place_bytes=self.slots.in_place_bytes,
            copied_bytes=self.slots.copied_bytes,
            unheard=dict(self._unused_answers),
            refused_by_summary=self.link.ends.refused,
        )

    def _can_accept(self, exchange: Exchange) -> bool:
        """Whether the server serves and has capacity; if not, the request is ended."""
        link = self.link
        if not link.serves and (link.unreached or not self._may_wait(exchange.model)):
            self._refuse(exchange, Outcome.REJECTED, Reason.NOT_SERVING, f"not ready: {link.why_not_ready}")
            return False
        if not link.ready and (why := link.why_waiting(exchange.model)):
            link.report_asked_for(exchange.model)
            self._refuse(exchange, Outcome.REJECTED, Reason.NOT_SERVING, why, PREPARED_NS)
            return False
        if len(self._pending) >= self.settings.max_requests:
            message = f"{self.settings.max_requests} requests wait for answers already; try again later"
            self._refuse(exchange, Outcome.REJECTED, Reason.QUEUE_FULL, message, ROOM_RETRY_NS)
            return False
        return True

    def _may_wait(self, model: str) -> bool:
        """Whether to accept a request although the server does not serve.

        For a model in the catalogue, the controller says why it is not served, or one takes over.
        """
        link, awaiting = self.link, self._awaiting_failover
        connected = link.is_open and not link.stuck
        takes_over = awaiting.holding and len(awaiting) < self.settings.max_requests
        return (connected or takes_over) and bool(link.models.versions(model))

    def _ends_unsent(
        self, exchange: Exchange, key: str, deadline_ns: int, way_ns: int, *, summarised: bool
    ) -> bool:
        """End a request for a model key that would only cost the controller time; whether it was one.

        ``summarised``: the controller's summary counts for it.
        """
        if self.clock() > deadline_ns:
            self._refuse(exchange, Outcome.EXPIRED, Reason.NONE, OVER, key=key, deadline_ns=deadline_ns)
            return True
        shortage_ns = self.link.shortage_ns(key, deadline_ns - way_ns) if summarised else 0
        if shortage_ns > 0:
            retry_ns = self.link.retry_after_ns(key, shortage_ns)
            reason, why = Reason.WOULD_MISS_DEADLINE, missed_by(shortage_ns)
            outcome = Outcome.REJECTED
            self._refuse(exchange, outcome, reason, why, retry_ns, key=key, deadline_ns=deadline_ns)
            return True
        return False

    # Callbacks of the link

    def _on_answer(self, answer: Answer) -> None:
        pending = self._pending.pop(answer.request_id, None)
        if pending is None:
            _log.error("answer to a request that is not open", extra={"request_id": answer.request_id})
            return
        exchange = pending.exchange
        if exchange is not None:
            if answer.exec_ns:
                self._delay.lane_ended(exchange.arrival_ns + answer.queue_ns + answer.exec_ns)
            self._deliver_answer(exchange, pending, answer)
        else:
            # A client that was told EXPIRED got no answer, however good this one is.
            over = pending.expired and answer.outcome in EXPIRE_WHEN_LATE
            (self.link.late if over else self.link.in_time).append(answer.request_id)
            if answer.outcome is Outcome.OK:
                self._unused_answers["over" if over else "left"] += 1
        if answer.release:
            self.slots.free(pending.slot)
        else:
            self._held[answer.request_id] = pending.slot

    def _on_filled(self, request_id: str) -> None:
        pending = self._pending[request_id]
        if pending.exchange is None:
            self._drop(request_id, Outcome.EXPIRED, Reason.NONE)
        else:
            self._submit(pending.request)

    def _on_wrong(self, request_id: str, error: InvalidRequest) -> None:
        exchange = self._pending[request_id].exchange
        if exchange is None:
            self._drop(request_id, Outcome.EXPIRED, Reason.NONE)
            return
        pending = self._pending.pop(request_id)
        response = self._count_invalid(error, pending.served)
        self._record(response, pending.request)
        self.slots.free(pending.slot)
        exchange.end(response)

    def _on_release(self, release: Release) -> None:
        slot = self._held.pop(release.request_id, None)
        if slot is None:
            _log.error("release of a request that is not held", extra={"request_id": release.request_id})
        else:
            self.slots.free(slot)

    def _on_refused(self, request: Request, waited_ns: int) -> None:
        waited = f"this one waited {waited_ns / NS_PER_MS:.1f} ms"
        why = f"more requests arrive than the server can schedule; {waited}"
        outcome, reason, retry_after_ns = Outcome.REJECTED, Reason.QUEUE_FULL, ROOM_RETRY_NS
        if silent := self.link.why_silent:  # it grants no credit for that reason
            reason, why = Reason.NOT_SERVING, f"{silent}; {waited}"
        if self.clock() > request.deadline_ns:
            outcome, reason, why, retry_after_ns = Outcome.EXPIRED, Reason.NONE, OVER, 0
        pending = self._drop(request.request_id, outcome, reason, why)
        if pending.exchange is not None:
            response = gateway_response(outcome, reason, why, request.request_id, pending)
            response.retry_after_ns = retry_after_ns
            self._deliver(pending.exchange, response)

    def _drop(self, request_id: str, outcome: Outcome, reason: Reason, why: str = "") -> PendingRequest:
        """End a request that never reached the controller; its slot is free at once."""
        pending = self._pending.pop(request_id)
        self.slots.free(pending.slot)
        self._count_outcome(outcome, reason)
        self._record(gateway_response(outcome, reason, why, request_id), pending.request)
        return pending

    def _reject_early(self, exchange: EarlyExchange, told: AdmissionReply, deadline_ns: int) -> None:
        self._received += 1
        if self.clock() > deadline_ns:
            self._refuse(exchange, Outcome.EXPIRED, Reason.NONE, OVER, deadline_ns=deadline_ns)
            return
        outcome, reason, wait_ns = Outcome.REJECTED, told.reason, told.retry_after_ns
        self._refuse(exchange, outcome, reason, told.message, wait_ns, deadline_ns=deadline_ns)

    def _on_lost(self, why: str) -> None:
        # Workers may still write outputs for requests of the lost controller. Its region is left to them.
        for request_id in self._copies.clear():
            self._pending[request_id].resubmitted = True  # do not resubmit it: its inputs are incomplete
        self._pending = self._awaiting_failover.keep(self._pending, self.slots)
        self._end_all(why)
        self.admission_queries.on_lost()

    def _on_stuck(self) -> None:
        self._awaiting_failover.stuck()
        self.admission_queries.on_lost()

    def _resubmit(self) -> None:
        """There is a new controller: submit the requests that await failover to it."""
        for request_id, pending in self._awaiting_failover.release().items():
            self._pending[request_id] = pending
            pending.request = msgspec.structs.replace(
                pending.request, tensors=pending.slot.encoded, awaited=True
            )
            self.link.submit(pending.request)

    def _on_batch(self) -> None:
        self.batching = True
        self.batch_now_ns = self.clock()

    def _on_batch_end(self) -> None:
        self.batching = False
        for listener in self.batch_listeners:
            listener()
        self._delay.answers_written(self.clock())

    def _on_readiness(self) -> None:
        if self.link.serves and len(self._awaiting_failover):
            self._resubmit()
        for listener in self.readiness_listeners:
            listener()

    # Requests that the gateway ends

    def _end_overdue(self, request_id: str, pending: PendingRequest) -> None:
        """The controller's answer is overdue: tell the client.

        The outcome is counted later, with the answer or when the link is lost.
        """
        exchange, pending.exchange, pending.expired = pending.exchange, None, True
        if exchange is not None:
            self._deliver(
                exchange, gateway_response(Outcome.EXPIRED, Reason.NONE, NO_ANSWER, request_id, pending)
            )

    def _sweep_awaiting_failover(self) -> bool:
        if len(self._awaiting_failover):
            self._end_awaiting_failover(self._awaiting_failover.overdue())
        return len(self._awaiting_failover) > 0

    def _end_awaiting_failover(self, awaiting: dict[str, PendingRequest]) -> None:
        why = "the link to the controller was lost, and no controller took over in time"
        if self.link.is_open:
            why = f"not ready in time: {self.link.why_not_ready}"
        for request_id, pending in awaiting.items():
            self.slots.free(pending.slot)
            if pending.exchange is not None:
                self._end_unserved(pending.exchange, request_id, pending, why)

    def _end_unserved(self, exchange: Exchange, request_id: str, pending: PendingRequest, why: str) -> None:
        outcome, reason = Outcome.REJECTED, Reason.NOT_SERVING
        if self.clock() >= pending.deadline_ns:
            outcome, reason = Outcome.EXPIRED, Reason.NONE
        self._count_outcome(outcome, reason)
        response = gateway_response(outcome, reason, why, request_id, pending)
        self._record(response, pending.request)
        self._deliver(exchange, response)

    def _end_all(self, why: str) -> None:
        pendings, self._pending = self._pending, {}
        self._held.clear()
        for request_id, pending in pendings.items():
            if pending.exchange is not None:
                self._end_unserved(pending.exchange, request_id, pending, why)
            else:
                outcome = Outcome.EXPIRED if pending.expired else Outcome.CANCELLED
                self._count_outcome(outcome, Reason.NONE)
                self._record(gateway_response(outcome, Reason.NONE, why, request_id), pending.request)

    def _refuse(
        self, exchange: Exchange, outcome: Outcome, reason: Reason, message: str, retry_after_ns: int = 0,
        *, key: str = "", deadline_ns: int = 0,
    ) -> None:  # fmt: skip
        self.drop_body(exchange)
        self._count_outcome(outcome, reason)
        response = gateway_response(outcome, reason, message)
        response.retry_after_ns = retry_after_ns
        self._record_unsent(exchange, response, key, deadline_ns)
        self._deliver(exchange, response)

    def _record_unsent(
        self, exchange: Exchange, response: InferResponse, key: str, deadline_ns: int = 0
    ) -> None:
        """Give a request that never had an id one, by which traces have it."""
        if self.refusals is None:
            return
        response.request_id = self._next_id()
        arrival_ns = exchange.arrival_ns or self.clock()
        model = key or printable(f"{exchange.model}/{exchange.version}", NAME_CHARS)
        request = Request(
            request_id=response.request_id, gateway=self.name, model=model, arrival_ns=arrival_ns,
            deadline_ns=deadline_ns or arrival_ns, tenant=exchange.identity, trace=exchange.trace,
        )  # fmt: skip
        self._record(response, request)

    def _record(self, response: InferResponse, request: Request) -> None:
        """Keep what became of a request, for the controller will not."""
        if self.refusals is not None:
            answer = Answer(
                request_id=request.request_id, gateway=self.name, outcome=response.outcome,
                reason=response.reason, message=response.message, retry_after_ns=response.retry_after_ns,
            )  # fmt: skip
            if request.tensors:
                request = msgspec.structs.replace(request, tensors=b"")
            self.refusals.on_step(self.clock(), (request,), (answer,))

    def _record_late(self, request_ids: tuple[str, ...]) -> None:
        if self.refusals is not None:
            late = [late_response(request_id, Outcome.OK, None) for request_id in request_ids]
            answers = [
                Answer(
                    request_id=each.request_id, gateway=self.name, outcome=each.outcome, reason=each.reason,
                    message=each.message,
                )
                for each in late
            ]  # fmt: skip
            self.refusals.on_step(self.clock(), (), answers)

    def _refuse_for_memory(
        self,
        exchange: Exchange,
        served: Served,
        inputs: list[InputTensor],
        output_bytes: int,
        deadline_ns: int,
    ) -> None:
        size, needed = self.slots.region.size, self.slots.bytes_for(inputs, output_bytes)
        if needed > size:
            error = InvalidRequest(
                f"the request needs {needed} bytes for its inputs and outputs, expected at most {size}; "
                "send fewer rows at once, or raise the server's gateway_memory"
            )
            exchange.end(self.invalid(exchange, error, served))
            return
        message = (
            f"no room for {needed} bytes of one more request's tensors among the {size} of gateway_memory; "
            "raise it if this is often so"
        )
        self._refuse(
            exchange, Outcome.REJECTED, Reason.QUEUE_FULL, message, ROOM_RETRY_NS, key=served.model.key,
            deadline_ns=deadline_ns,
        )  # fmt: skip

    def _deliver_answer(self, exchange: Exchange, pending: PendingRequest, answer: Answer) -> None:
        if answer.outcome in EXPIRE_WHEN_LATE and self.batch_now_ns > pending.request.deadline_ns:
            self.link.late.append(answer.request_id)
            self._deliver(exchange, late_response(answer.request_id, answer.outcome, pending.call))
            return
        try:
            response = response_of(pending, answer, self.slots)
            if pending.served.outputs_open and response.outcome is Outcome.OK:
                self._reserves.learn(pending.request, response.outputs)
            if not response.deadline_ns:
                self.link.in_time.append(answer.request_id)
            if pending.call.shared and self.regions is not None and response.outcome is Outcome.OK:
                self.regions.write_outputs(pending.call, response.outputs)
            self._deliver(exchange, response)
        except InvalidRequest as error:
            # The controller has counted it as answered.
            self.link.in_time.append(answer.request_id)
            response = invalid_response(error, answer.request_id)
            self._record(response, pending.request)
            exchange.end(response)
        except Exception:  # noqa: BLE001 - a bug that one answer triggers must not end all others
            _log.exception("delivering an answer failed", extra={"request_id": answer.request_id})
            self.link.in_time.append(answer.request_id)
            why = "the answer could not be delivered; see the gateway's log"
            response = gateway_response(Outcome.FAILED, Reason.NONE, why, answer.request_id, pending)
            self._record(response, pending.request)
            exchange.end(response)

    def _deliver(self, exchange: Exchange, response: InferResponse) -> None:
        if response.outcome is not Outcome.OK:
            if response.outcome is Outcome.REJECTED:
                self.admission_queries.note_rejection()
            if response.reason is Reason.NOT_SERVING and not response.retry_after_ns:
                response.retry_after_ns = RECOVERY_NS
            response.retry_after_s = spread_s(response.retry_after_ns, self.rng)
            response = self._with_triton_status(response)
        exchange.end(response)

    def _with_triton_status(self, response: InferResponse) -> InferResponse:
        if self.settings.triton and response.outcome is not Outcome.OK:
            response.status = status_of(response.outcome, response.reason, triton=True)
        return response

    def _count_outcome(self, outcome: Outcome, reason: Reason) -> None:
        self._outcomes[outcome_key(outcome, reason)] += 1

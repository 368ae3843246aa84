"""The core of a gateway: requests in, one end each out, over a link to the controller.

It checks requests against their models and answers for a stuck controller; it schedules nothing.
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

from clockwork_serve.errors import InvalidRequest
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
    Undelivered,
)
from clockwork_serve.oip import (
    Checked,
    InferCall,
    Known,
    Served,
    priority_of,
    reason_of_error,
    requested_slo_ns,
    status_of,
    tightest,
)
from clockwork_serve.serve.gateway.access import Caps
from clockwork_serve.serve.gateway.admission_queries import Announcements
from clockwork_serve.serve.gateway.client_shm import Regions, allowed
from clockwork_serve.serve.gateway.controller_link import (
    AGAIN,
    AwaitingFailover,
    GatewayLink,
    GatewayModels,
    LinkListener,
    Reach,
    at_home,
)
from clockwork_serve.serve.gateway.requests import (
    ROOM_RETRY_NS,
    TIMELY,
    Copies,
    Copying,
    EarlyInquiry,
    Ending,
    Inquiry,
    Pending,
    Slot,
    Slots,
    crowded,
    ending_of,
    no_room,
    own_ending,
    spread_s,
    too_late,
    wrong,
)
from clockwork_serve.serve.gateway.settings import GatewayConfig
from clockwork_serve.serve.gateway.timing import Turns, Way
from clockwork_serve.telemetry import GatewayCounters, outcome_key
from clockwork_serve.units import NS_PER_MS, NS_PER_S

# ------------------------------------------------------------
# Whether a request fits the model that it asks for, and what it asks for.


def check(inquiry: Inquiry, call: InferCall, served: Served, regions: Regions | None, slots: Slots) -> Known:
    """What a request asks for, remembered for those like it. Raises :class:`InvalidRequest`."""
    if call.shared:
        rows, signature = _check_shared(inquiry, call, served, allowed(regions, local=inquiry.local), slots)
    else:
        rows, signature = served.check(call, binary_only_allowed=inquiry.every_output_binary)
    priority = priority_of(call.parameters, served.model.priority)
    slo_ns = requested_slo_ns(call.parameters)
    return served.headers.remember(call, served.wanted(call), rows, signature, slo_ns, priority)


def _check_shared(
    inquiry: Inquiry, call: InferCall, served: Served, regions: Regions, slots: Slots
) -> Checked:
    inquiry.body = regions.read_inputs(call, slots, inquiry.body)
    checked = served.check(call, binary_only_allowed=inquiry.every_output_binary)
    regions.check_outputs(call, served, checked.rows)
    return checked


# ------------------------------------------------------------
# Requests that a stuck controller leaves without an answer: found soon after their deadlines; it ends none.
#
# A deadline is the controller's to keep. Only where its answer does not come either is the client told here,
# 40 to 45 ms after it: less than 50, with the way to the client.


GRACE_NS: Final = 40 * NS_PER_MS
"""How long after a deadline the controller's answer is waited for."""
LOOK_S, LOOK_LEAST_S = 0.02, 0.005
"""Who waits is looked at so often; where somebody's grace is over sooner, then, but no sooner than that."""
READ_S: Final = 0.001
"""After so long all has been read that was in the link's socket."""


class Overdue:
    """See the module. ``end`` changes no mapping; ``stranded`` looks after its own: whether any is left."""

    def __init__(
        self,
        clock: Callable[[], int],
        open_requests: Callable[[], Mapping[str, Pending]],
        end: Callable[[str, Pending], None],
        stranded: Callable[[], bool],
    ) -> None:
        self._clock, self._open, self._end, self._stranded = clock, open_requests, end, stranded
        self._loop = asyncio.get_running_loop()
        self.timer: asyncio.TimerHandle | None = None

    def watch(self) -> None:
        """There is a request."""
        if self.timer is None:
            self.timer = self._loop.call_later(LOOK_S, self._look)

    def close(self) -> None:
        """Look no more."""
        if self.timer is not None:
            self.timer.cancel()

    def _look(self) -> None:
        self.timer = None
        stranded, pendings = self._stranded(), self._open()
        if not pendings and not stranded:
            return
        due_before_ns = self._clock() - GRACE_NS
        waiting = [one.deadline_ns for one in pendings.values() if one.inquiry is not None]
        left_s = (min(waiting) - due_before_ns) / NS_PER_S if waiting else LOOK_S
        if left_s < 0:
            # Who slept till now finds answers in the socket: they are read first.
            self.timer = self._loop.call_later(READ_S, self._end_late, due_before_ns)
        else:
            self.timer = self._loop.call_later(min(LOOK_S, max(LOOK_LEAST_S, left_s)), self._look)

    def _end_late(self, due_before_ns: int) -> None:
        for request_id, pending in self._open().items():
            if pending.inquiry is not None and pending.deadline_ns < due_before_ns:
                self._end(request_id, pending)
        self.timer = self._loop.call_later(LOOK_LEAST_S, self._look)


# ------------------------------------------------------------
# The core of a gateway: requests in, one end each out, over a link to the controller. It chooses nothing.
#
# Every request ends exactly once: by the controller's answer; at once, where it is wrong or has no room; by
# itself soon after its deadline, if the controller is stuck; or when the link is lost, unless the
# next controller can still answer it. Its slot is given back only when the controller says that no worker
# touches it any more, or with the whole region.


NO_ANSWER: Final = "no answer by the deadline"
UNREAD: Final = "the gateway failed to read the request; see its log"
OVER: Final = "its deadline was over before the gateway came round to it"
SENT_NS: Final = 10 * NS_PER_MS
"""What is told to have been sent may have been sent so much earlier."""
BACK_NS: Final = 500 * NS_PER_MS
"""When to come again if the server does not serve: a controller that died is back by then."""

_log = logging.getLogger(__name__)


class Gateway:
    """All methods are for the running loop's own thread. ``dice`` spread those who come back.

    ``reach``: the controller is elsewhere, and not where ``config`` says.
    """

    def __init__(
        self,
        config: GatewayConfig,
        clock: Callable[[], int] = time.monotonic_ns,
        caps: Caps | None = None,
        reach: Reach | None = None,
    ) -> None:
        self.name = config.name
        self._settings = config.settings
        self.regions: Regions | None = None  # set where clients may use shared memory
        self.slots = Slots(self._settings.gateway_memory)
        self.clock = clock
        self.dice = Random()
        self.connections = 0
        self.readiness_listeners: list[Callable[[], None]] = []
        self.batching = False
        """Whether more answers follow at once: responses may wait for them, to be sent together."""
        self.looked_ns = 0
        """The instant of the batch's begin, or of its last response: none of them is looked at for less."""
        self.batch_listeners: list[Callable[[], None]] = []
        self._prefix = f"{config.name}-{time.time_ns() // NS_PER_MS:x}-"  # unlike any earlier process's
        self._caps = caps or Caps()
        self._way = Way()
        self.announcements = Announcements(
            config.name, self._prefix, self._on_announced_in_vain, self._caps, self._way
        )
        listener = LinkListener(
            self._on_answer, self._on_release, self._on_lost, self._on_readiness,
            self.announcements.on_foretold, self._on_batch, self._on_batch_end, self._on_refused,
            self._on_unheard, self.announcements.on_lost,
        )  # fmt: skip
        reach = reach or at_home(config.controller, config.name)
        self.link = GatewayLink(reach, self._settings.default_slo_ns, listener)
        self.turns = Turns(clock, self.link.tell_delivered)
        self._pending: dict[str, Pending] = {}  # all and only requests sent and not answered
        self._stranded = AwaitingFailover(clock)
        self._held: dict[str, Slot] = {}  # slots of answered requests that a worker may still touch
        self._copies = Copies(self._on_filled)
        self._copying = Copying()  # the next one's that needs it, which few do
        self._count = 0
        self._received = 0
        self._outcomes: Counter[str] = Counter()
        self._unheard = {"left": 0, "over": 0}
        self._invalid_by_model: Counter[str] = Counter()
        self._overdue = Overdue(clock, lambda: self._pending, self._end_overdue, self._look_after_stranded)

    @property
    def models(self) -> GatewayModels:
        """What is served."""
        return self.link.models

    def close(self) -> None:
        """End everything: waiting clients are told, memory is given up."""
        self.turns.close()
        self.link.close()
        self._copies.clear()
        self._pending |= self._stranded.release()
        self._end_all("the server is shutting down")
        self._overdue.close()
        self.slots.close()

    def infer(self, inquiry: Inquiry) -> str:
        """Have a request answered; its id, or "" if it ended already."""
        self._received += 1
        served: Served | None = None
        try:
            if not self._may_enter(inquiry):
                return ""
            served = self.link.models.find(inquiry.model, inquiry.version)
            call = inquiry.call(served)
            known = call.known or check(inquiry, call, served, self.regions, self.slots)
            slo_ns = known.slo_ns
            if inquiry.slo_header is not None or inquiry.remaining_s is not None:
                slo_ns = tightest(slo_ns, inquiry.slo_header, inquiry.remaining_s)
        except InvalidRequest as error:
            self.drop_body(inquiry)
            inquiry.end(self.invalid(error, served))
            return ""
        except Exception:  # noqa: BLE001 - one request that our own code trips over must not end all others
            _log.exception("reading a request failed", extra={"model": inquiry.model})
            self._refuse(inquiry, Outcome.FAILED, Reason.NONE, UNREAD)
            return ""
        asked_ns = served.default_slo_ns if slo_ns is None else slo_ns
        given_ns, priority = self._caps.of(inquiry.identity, asked_ns, known.priority)
        deadline_ns, told_ns = inquiry.arrival_ns + given_ns, 0 if given_ns == asked_ns else given_ns
        if self.clock() > deadline_ns:
            self._refuse(inquiry, Outcome.EXPIRED, Reason.NONE, OVER)
            return ""
        body, inquiry.body = inquiry.body, None
        output_bytes = served.model.output_bytes * known.rows
        slot = self.slots.fill(call.inputs, output_bytes, body, self._copying)
        if slot is None:
            self._refuse_for_room(inquiry, served, self.slots.bytes_for(call.inputs, output_bytes))
            return ""
        self._count += 1
        request_id = f"{self._prefix}{self._count}"
        request = Request(
            request_id=request_id, gateway=self.name, model=served.model.key, rows=known.rows,
            arrival_ns=inquiry.arrival_ns, deadline_ns=deadline_ns, signature=known.signature,
            priority=priority, tensors=slot.encoded, tenant=inquiry.identity,
            way_ns=self._way.of(given_ns, inquiry.arrival_ns),
        )  # fmt: skip
        self._pending[request_id] = Pending(inquiry, served, call, slot, request, told_ns)
        if self._copying.begun:
            self._copy_first(request_id)
        else:
            self.link.submit(request)
        if self._overdue.timer is None:
            self._overdue.watch()
        return request_id

    def _copy_first(self, request_id: str) -> None:
        copying, self._copying = self._copying, Copying()
        self._copies.begin(request_id, copying)

    def cancel(self, request_id: str) -> None:
        """The client of an open request went away; it is not told of the end."""
        sent_id = request_id if request_id in self._pending else request_id + AGAIN
        pending = self._pending.get(sent_id)
        if pending is not None and pending.inquiry is not None:
            pending.inquiry = None
            if self._copies.withdraw(sent_id) or self.link.withdraw(sent_id):
                self._drop(sent_id, Outcome.CANCELLED, Reason.NONE)
            else:
                self.link.send(Cancel(request_id=sent_id))
        elif (stranded := self._stranded.withdraw(request_id)) is not None:
            self.slots.free(stranded.slot)
            self._count_outcome(Outcome.CANCELLED, Reason.NONE)

    def invalid(self, error: InvalidRequest, served: Served | None = None) -> Ending:
        """Count a request that is wrong, and say how it ends."""
        self._count_outcome(Outcome.INVALID, reason_of_error(error))
        if served is not None:
            self._invalid_by_model[served.model.key] += 1
        return wrong(error, served=served)

    def delivered(self, ending: Ending) -> Ending | None:
        """A response is given to its client's socket now: None if in time, else how the request ends instead.

        For any thread, like :meth:`undelivered`.
        """
        if self.clock() <= ending.deadline_ns:
            self.link.in_time.append(ending.request_id)
            return None
        return self.late(ending)

    def late(self, ending: Ending) -> Ending | None:
        """The same, where it is told later that it was :meth:`sent`, if it is in time."""
        if self.clock() <= ending.deadline_ns:
            return None
        self.link.late.append(ending.request_id)
        return self._shown(too_late(ending.request_id, ending.outcome, ending.call))

    def sent(self, ending: Ending) -> None:
        """A response has been sent by who tells that some time after it."""
        in_time = self.clock() <= ending.deadline_ns + SENT_NS
        (self.link.in_time if in_time else self.link.late).append(ending.request_id)

    def undelivered(self, ending: Ending) -> None:
        """The client is gone, and gets no response."""
        self.link.in_time.append(ending.request_id)

    def unreadable(self, error: InvalidRequest) -> Ending:
        """Count a request whose body cannot be had, and say how it ends."""
        self._received += 1
        return self.invalid(error)

    def refuse_unread(self, inquiry: Inquiry, message: str, *, crowded: bool) -> None:
        """End a request that was not read: too many wait for that, or it failed."""
        self._received += 1
        if crowded:
            self._refuse(inquiry, Outcome.REJECTED, Reason.QUEUE_FULL, message, ROOM_RETRY_NS)
        else:
            self._refuse(inquiry, Outcome.FAILED, Reason.NONE, message)

    def drop_body(self, inquiry: Inquiry) -> None:
        """Give back where an inquiry that is not passed on was received."""
        body, inquiry.body = inquiry.body, None
        if body is not None:
            self.slots.drop(body)

    async def ask(self, what: Question, body: bytes = b"{}", patience_s: float = 5.0) -> Reply:
        """The controller process's reply; one that says 503 if there can be none, 504 if none comes."""
        return await self.link.ask(what, body, patience_s)

    def counters(self) -> GatewayCounters:
        """What this gateway saw and the controller did not."""
        return GatewayCounters(
            gateway=self.name,
            received=self._received,
            outcomes=dict(self._outcomes),
            open=sum(one.inquiry is not None for one in self._pending.values()) + len(self._stranded),
            connections=self.connections,
            region_bytes=self.slots.region.size,
            region_used_bytes=self.slots.used_bytes,
            received_in_place_bytes=self.slots.in_place_bytes,
            copied_bytes=self.slots.copied_bytes,
            unheard=dict(self._unheard),
        )

    def invalid_requests(self, key: str) -> int:
        """How many requests of a model were wrong."""
        return self._invalid_by_model.get(key, 0)

    def _may_enter(self, inquiry: Inquiry) -> bool:
        """Whether a request may be read; if not, it is ended."""
        link = self.link
        # Of a model that it has, the controller itself says best why it is not served.
        if not link.ready and (not link.is_open or link.stuck or not link.models.versions(inquiry.model)):
            self._refuse(inquiry, Outcome.REJECTED, Reason.NOT_SERVING, f"not ready: {link.why_not_ready}")
            return False
        if len(self._pending) >= self._settings.max_requests:
            message = f"{self._settings.max_requests} requests wait for answers already; raise max_requests"
            self._refuse(inquiry, Outcome.REJECTED, Reason.QUEUE_FULL, message, ROOM_RETRY_NS)
            return False
        return True

    # What the link tells

    def _on_answer(self, answer: Answer) -> None:
        pending = self._pending.pop(answer.request_id, None)
        if pending is None:
            _log.error("answer to a request that is not open", extra={"request_id": answer.request_id})
            return
        inquiry = pending.inquiry
        if inquiry is not None:
            if answer.exec_ns:
                self._way.ended(inquiry.arrival_ns + answer.queue_ns + answer.exec_ns)
            self._pass_on(inquiry, pending, answer)
        else:
            # Who was told that the deadline is over was not answered, however good the answer.
            over = pending.expired and answer.outcome in TIMELY
            (self.link.late if over else self.link.in_time).append(answer.request_id)
            if answer.outcome is Outcome.OK:
                self._unheard["over" if over else "left"] += 1
        if answer.release:
            self.slots.free(pending.slot)
        else:
            self._held[answer.request_id] = pending.slot

    def _on_filled(self, request_id: str) -> None:
        pending = self._pending[request_id]
        if pending.inquiry is None:
            self._drop(request_id, Outcome.EXPIRED, Reason.NONE)
        else:
            self.link.submit(pending.request)

    def _on_release(self, release: Release) -> None:
        slot = self._held.pop(release.request_id, None)
        if slot is None:
            _log.error("release of a request that is not held", extra={"request_id": release.request_id})
        else:
            self.slots.free(slot)

    def _on_refused(self, request: Request, waited_ns: int) -> None:
        self._refuse_unheard(
            request.request_id, lambda pending: crowded(request.request_id, pending, waited_ns)
        )

    def _on_unheard(self, unheard: Undelivered) -> None:
        request_id = unheard.request_id
        pending = self._pending.get(request_id)
        if pending is None:
            _log.error("unheard, and not open", extra={"request_id": request_id})
        elif pending.inquiry is None:
            self._drop(request_id, Outcome.EXPIRED if pending.expired else Outcome.CANCELLED, Reason.NONE)
        else:
            self._refuse_unheard(request_id, lambda pending: no_room(request_id, pending, unheard.why))

    def _refuse_unheard(self, request_id: str, ending_of: Callable[[Pending], Ending]) -> None:
        """End a request that the controller never heard of, and whose client waits."""
        over = self.clock() > self._pending[request_id].deadline_ns
        outcome, reason = (Outcome.EXPIRED, Reason.NONE) if over else (Outcome.REJECTED, Reason.QUEUE_FULL)
        pending = self._drop(request_id, outcome, reason)
        if pending.inquiry is not None:
            ending = own_ending(outcome, reason, OVER, request_id, pending) if over else ending_of(pending)
            self._tell(pending.inquiry, ending)

    def _drop(self, request_id: str, outcome: Outcome, reason: Reason) -> Pending:
        """End a request that the controller never heard of."""
        pending = self._pending.pop(request_id)
        self.slots.free(pending.slot)
        self._count_outcome(outcome, reason)
        return pending

    def _on_announced_in_vain(self, inquiry: EarlyInquiry, told: AdmissionReply, deadline_ns: int) -> None:
        self._received += 1
        if self.clock() > deadline_ns:
            self._refuse(inquiry, Outcome.EXPIRED, Reason.NONE, OVER)
            return
        self._refuse(inquiry, Outcome.REJECTED, told.reason, told.message, told.retry_after_ns)

    def _on_lost(self, why: str) -> None:
        # Workers may still write for requests of this controller: to memory that is theirs alone from now on.
        for request_id in self._copies.clear():
            self._pending[request_id].asked_again = True  # not once more: its inputs are not there
        self._pending = self._stranded.take(self._pending, self.slots)
        self._end_all(why)
        self.announcements.on_lost()

    def _ask_again(self) -> None:
        """There is another controller: what waited for it is its to answer."""
        for request_id, pending in self._stranded.release().items():
            self._pending[request_id] = pending
            pending.request = msgspec.structs.replace(pending.request, tensors=pending.slot.encoded)
            self.link.submit(pending.request)

    def _on_batch(self) -> None:
        self.batching = True
        self.looked_ns = self.clock()

    def _on_batch_end(self) -> None:
        self.batching = False
        for listener in self.batch_listeners:
            listener()
        self._way.left(self.clock())

    def _on_readiness(self) -> None:
        if self.link.ready and len(self._stranded):
            self._ask_again()
        for listener in self.readiness_listeners:
            listener()

    # Ends that the controller does not decide

    def _end_overdue(self, request_id: str, pending: Pending) -> None:
        """The controller counts it when it wakes up; we do if it never does."""
        inquiry, pending.inquiry, pending.expired = pending.inquiry, None, True
        if inquiry is not None:
            self._tell(inquiry, own_ending(Outcome.EXPIRED, Reason.NONE, NO_ANSWER, request_id, pending))

    def _look_after_stranded(self) -> bool:
        if len(self._stranded):
            self._end_stranded(self._stranded.overdue())
        return len(self._stranded) > 0

    def _end_stranded(self, stranded: dict[str, Pending]) -> None:
        why = "the controller went away, and none is back"
        for request_id, pending in stranded.items():
            self.slots.free(pending.slot)
            if pending.inquiry is not None:
                self._end_unserved(pending.inquiry, request_id, pending, why)

    def _end_unserved(self, inquiry: Inquiry, request_id: str, pending: Pending, why: str) -> None:
        self._count_outcome(Outcome.REJECTED, Reason.NOT_SERVING)
        self._tell(inquiry, own_ending(Outcome.REJECTED, Reason.NOT_SERVING, why, request_id, pending))

    def _end_all(self, why: str) -> None:
        pendings, self._pending = self._pending, {}
        self._held.clear()
        for request_id, pending in pendings.items():
            if pending.inquiry is not None:
                self._end_unserved(pending.inquiry, request_id, pending, why)
            else:
                self._count_outcome(Outcome.EXPIRED if pending.expired else Outcome.CANCELLED, Reason.NONE)

    def _refuse(
        self, inquiry: Inquiry, outcome: Outcome, reason: Reason, message: str, retry_after_ns: int = 0
    ) -> None:
        self.drop_body(inquiry)
        self._count_outcome(outcome, reason)
        ending = own_ending(outcome, reason, message)
        ending.retry_after_ns = retry_after_ns
        self._tell(inquiry, ending)

    def _refuse_for_room(self, inquiry: Inquiry, served: Served, needed: int) -> None:
        size = self.slots.region.size
        if needed > size:
            error = InvalidRequest(
                f"the request needs {needed} bytes for its inputs and outputs, expected at most {size}; "
                "send fewer rows at once, or raise the server's gateway_memory"
            )
            inquiry.end(self.invalid(error, served))
            return
        message = f"no room among {size} bytes for the tensors of one more request"
        self._refuse(inquiry, Outcome.REJECTED, Reason.QUEUE_FULL, message, ROOM_RETRY_NS)

    def _pass_on(self, inquiry: Inquiry, pending: Pending, answer: Answer) -> None:
        if answer.outcome in TIMELY and self.looked_ns > pending.request.deadline_ns:
            self.link.late.append(answer.request_id)
            self._tell(inquiry, too_late(answer.request_id, answer.outcome, pending.call))
            return
        try:
            ending = ending_of(pending, answer)
            if not ending.deadline_ns:
                self.link.in_time.append(answer.request_id)
            if pending.call.shared and self.regions is not None and ending.outcome is Outcome.OK:
                self.regions.write_outputs(pending.call, ending.outputs)
            self._tell(inquiry, ending)
        except InvalidRequest as error:
            # The controller has counted it as answered.
            self.link.in_time.append(answer.request_id)
            inquiry.end(wrong(error, answer.request_id))
        except Exception:  # noqa: BLE001 - one answer that cannot be told must not end all others
            _log.exception("telling an answer failed", extra={"request_id": answer.request_id})
            self.link.in_time.append(answer.request_id)
            why = "the answer could not be told; see the gateway's log"
            inquiry.end(own_ending(Outcome.FAILED, Reason.NONE, why, answer.request_id, pending))

    def _tell(self, inquiry: Inquiry, ending: Ending) -> None:
        if ending.outcome is not Outcome.OK:
            if ending.outcome is Outcome.REJECTED:
                self.announcements.refused()
            if ending.reason is Reason.NOT_SERVING and not ending.retry_after_ns:
                ending.retry_after_ns = BACK_NS
            ending.retry_after_s = spread_s(ending.retry_after_ns, self.dice)
            ending = self._shown(ending)
        inquiry.end(ending)

    def _shown(self, ending: Ending) -> Ending:
        if self._settings.triton_codes and ending.outcome is not Outcome.OK:
            ending.status = status_of(ending.outcome, ending.reason, triton=True)
        return ending

    def _count_outcome(self, outcome: Outcome, reason: Reason) -> None:
        self._outcomes[outcome_key(outcome, reason)] += 1

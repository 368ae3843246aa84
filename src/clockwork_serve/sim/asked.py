"""Which requests are open and how each may end, by what the controller was told. It never answers."""

from __future__ import annotations

from clockwork_serve.controller import ControllerConfig
from clockwork_serve.messages import (
    Answer,
    Cancel,
    ControllerEvent,
    Drain,
    GatewayLost,
    ModelAdded,
    ModelRemoved,
    Outcome,
    QuotasSet,
    Reason,
    Request,
    WorkerLost,
)


class Asked:
    """What was asked and not answered, and what happened that may end it."""

    def __init__(self, config: ControllerConfig) -> None:
        self._config = config
        self.open: dict[str, Request] = {}
        """All and only requests without an answer."""
        self.served: set[str] = set()
        """Keys of all and only models that are served."""
        self._orphans: set[str] = set()
        """Open requests whose models were removed."""
        self._cancelled: set[str] = set()
        """Open requests whose clients went away."""
        self._lost_gateways: set[str] = set()
        self._limited: set[str] = set()
        """Tenants that have a quota."""
        self._draining = False
        self.stranded: set[str] = set()
        """Open requests that their gateways may ask again, for the controller died."""
        self._controller_lost = False
        self._worker_lost = False
        self.hung = False
        """A worker was said to hang."""
        self.quarantined: set[str] = set()
        """Keys of models that the controller said are in quarantine."""

    def observe(self, event: ControllerEvent) -> None:
        """The controller is told something."""
        match event:
            case Request():
                assert event.request_id not in self.open.keys() - self.stranded, f"{event} came twice"
                self.stranded.discard(event.request_id)
                self.open[event.request_id] = event
            case Cancel():
                if event.request_id in self.open:
                    self._cancelled.add(event.request_id)
            case GatewayLost():
                self._lost_gateways.add(event.gateway)
            case ModelAdded():
                self.served.add(event.model.key)
            case ModelRemoved():
                self.served.discard(event.model)
                self._orphans.update([one for one, asked in self.open.items() if asked.model == event.model])
            case QuotasSet():
                self._limited = {quota.tenant for quota in event.quotas}
            case Drain():
                self._draining = True
            case WorkerLost():
                self._worker_lost = True
            case _:
                pass

    def controller_died(self) -> None:
        """Another one will be told all again."""
        self.stranded = set(self.open)
        self.quarantined.clear()
        self._controller_lost = self._worker_lost = True

    def answer(self, answer: Answer, now_ns: int) -> None:
        """The controller answers: for the first time, and as the story allows."""
        request = self.open.pop(answer.request_id, None)
        assert request is not None, f"{answer} of what nobody asks, or for the second time"
        self.stranded.discard(answer.request_id)
        cancelled = answer.request_id in self._cancelled
        orphan = answer.request_id in self._orphans or request.model not in self.served
        self._cancelled.discard(answer.request_id)
        self._orphans.discard(answer.request_id)
        match answer.outcome:
            case Outcome.OK:
                good = now_ns <= request.deadline_ns
            case Outcome.EXPIRED:
                good = now_ns >= self._expires_ns(request)
            case Outcome.CANCELLED:
                good = cancelled or request.gateway in self._lost_gateways
            case Outcome.INVALID:
                good = request.model not in self.served
            case Outcome.REJECTED:
                good = self._may_reject(request, answer.reason, orphan=orphan)
            case Outcome.FAILED if answer.reason is Reason.QUARANTINED:
                good = request.model in self.quarantined
            case Outcome.FAILED:
                # No device fails here; what a worker holds may differ from belief after its link was cut.
                good = (self._worker_lost or self.hung) and answer.reason is not Reason.MODEL_RAISED
        assert good, f"{answer} at {now_ns} to {request}"

    def _expires_ns(self, request: Request) -> int:
        """From when on a request may hear that it expired: as released, that is when its plan has failed."""
        config = self._config
        if not config.released:
            return request.deadline_ns
        due_ns = request.deadline_ns - config.slack_ns
        return min(request.deadline_ns, max(due_ns, request.arrival_ns + config.floor_ns))

    def _may_reject(self, request: Request, reason: Reason, *, orphan: bool) -> bool:
        if reason is Reason.TENANT_QUOTA:
            return request.tenant in self._limited
        if reason is Reason.DRAINING:
            return self._draining
        if reason is Reason.NOT_SERVING:
            return self._config.reject_infeasible or orphan or self._controller_lost
        return reason is Reason.WOULD_MISS_DEADLINE and self._config.reject_infeasible

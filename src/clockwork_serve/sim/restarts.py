"""The controller dies and another one comes, in a simulation; and what gateways do meanwhile.

What is on its way to the controller is lost, and what it sent arrives, until the links end. Its successor is
told the catalogue; workers join it, each with what it holds, once they have noticed. Gateways refuse what
comes meanwhile, and ask the successor, once it is ready, for what was open and can wait.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Final, Protocol, runtime_checkable

import numpy as np
from msgspec.structs import replace

from clockwork_serve.controller import Controller, ControllerConfig
from clockwork_serve.messages import (
    Answer,
    Cancel,
    ControllerEffect,
    ControllerEvent,
    Drain,
    GatewayLost,
    Lane,
    Model,
    ModelAdded,
    Outcome,
    QuotasSet,
    Readiness,
    Reason,
    Request,
)
from clockwork_serve.sim.host import TO_CONTROLLER, Host
from clockwork_serve.sim.trouble import Trouble, is_cut
from clockwork_serve.units import NS_PER_MS, NS_PER_S
from clockwork_serve.workload.tables import FaultTable

if TYPE_CHECKING:
    from clockwork_serve.sim.simulation import Simulation

LEAST_NS: Final = 100 * NS_PER_MS
PATIENCE_NS: Final = 3 * NS_PER_S
"""As in ``serve.gateway_stranded``."""

Events = Sequence[ControllerEvent]


@runtime_checkable
class Follower(Protocol):
    """A watcher that is to know when another controller decides."""

    def on_controller(self, config: ControllerConfig) -> None:
        """It is set like that."""


Later = Callable[[int, Callable[[], Events]], None]


class Restarts:
    """A watcher of the simulation, too.

    ``later`` has something happen so long from now; ``served`` are the models served; ``unlinked`` is done
    when a worker notices that its link is gone.
    """

    def __init__(
        self, simulation: Simulation, dice: np.random.Generator, later: Later, served: Mapping[str, Model],
        unlinked: Callable[[Host, object], Events], executed: Counter[str],
    ) -> None:  # fmt: skip
        self._simulation = simulation
        self._dice = dice
        self._in = later
        self._served = served
        self._unlinked = unlinked
        self._executed = executed
        self._requests: dict[str, Request] = {}
        """All and only those that the controller that is up was asked."""
        self._again: set[str] = set()
        """Those that a second controller was asked."""
        self.stranded: dict[str, Request] = {}
        """All and only those that wait for a controller."""
        self._draining = False

    def dies(self, table: FaultTable) -> Events:
        """The controller dies, if there is one."""
        simulation = self._simulation
        if simulation.down is not None:
            return ()
        self._executed["controller"] += 1
        simulation.down = self.while_down
        now_ns = simulation.now_ns
        for host in simulation.hosts.values():
            simulation.world.forget(host, (TO_CONTROLLER,))
            if not is_cut(host):
                link = host.trouble = Trouble(self._dice, _nothing)
                link.cut = True
                ends_ns = max(now_ns + simulation.world.delay_ns(), host.heard_ns)
                self._in(ends_ns - now_ns, partial(self._unlinked, host, link))
        simulation.hosts.clear()
        simulation.by_device.clear()
        if simulation.checks is not None:
            simulation.checks.controller_died()
        self._strand(now_ns)
        usual_ns = simulation.constants.faults.controller_ns
        self._in(usual_ns if table.for_s is None else round(table.for_s * NS_PER_S), self._comes)
        return ()

    def _strand(self, now_ns: int) -> None:
        asked, self._requests = self._requests, {}
        for request_id, request in asked.items():
            left_ns = request.deadline_ns - now_ns
            if request_id in self._again or left_ns < LEAST_NS:
                self._end(request, Outcome.REJECTED, Reason.NOT_SERVING)
                continue
            self.stranded[request_id] = request
            self._in(min(left_ns, PATIENCE_NS), partial(self._given_up, request))

    def _given_up(self, request: Request) -> Events:
        if self.stranded.pop(request.request_id, None) is not None:
            self._end(request, Outcome.REJECTED, Reason.NOT_SERVING)
        return ()

    def _end(self, request: Request, outcome: Outcome, reason: Reason) -> None:
        """A request ends by its gateway's own finding."""
        simulation = self._simulation
        answer = Answer(
            request_id=request.request_id, gateway=request.gateway, outcome=outcome, reason=reason
        )
        simulation.hear(answer, simulation.now_ns)
        if simulation.checks is not None:
            simulation.checks.asked.answer(answer, simulation.now_ns)

    def while_down(self, events: Events) -> None:
        """What would be told to the controller, and who does without it."""
        checks = self._simulation.checks
        for event in events:
            if checks is not None:
                checks.asked.observe(event)
            if isinstance(event, Request):
                self._end(event, Outcome.REJECTED, Reason.NOT_SERVING)
            else:
                self._told(event)

    def _told(self, event: ControllerEvent) -> None:
        """Stranded requests whose clients or gateways leave wait no more."""
        if isinstance(event, Drain):
            self._draining = True
        elif isinstance(event, Cancel):
            if (request := self.stranded.pop(event.request_id, None)) is not None:
                self._end(request, Outcome.CANCELLED, Reason.NONE)
        elif isinstance(event, GatewayLost):
            for request in [one for one in self.stranded.values() if one.gateway == event.gateway]:
                del self.stranded[request.request_id]
                self._end(request, Outcome.CANCELLED, Reason.NONE)

    def _comes(self) -> Events:
        """A new controller is up, and told the catalogue by the keeper."""
        simulation = self._simulation
        config = replace(simulation.controller.config, first_id=simulation.now_ns)
        simulation.controller = Controller(config)
        simulation.down = None
        for watcher in simulation.watchers:
            if isinstance(watcher, Follower):
                watcher.on_controller(config)
        added = [ModelAdded(model=model) for model in self._served.values()]
        events: list[ControllerEvent] = [*simulation.codes, *added]
        if simulation.workload.quotas:
            events.append(QuotasSet(quotas=simulation.workload.quotas))
        if self._draining:
            events.append(Drain())
        return events

    def on_step(
        self, now_ns: int, events: Sequence[ControllerEvent], effects: Sequence[ControllerEffect]
    ) -> None:
        """See what is open, and whether there is a controller to ask."""
        for event in events:
            if isinstance(event, Request):
                self._requests[event.request_id] = event
            else:
                self._told(event)
        for effect in effects:
            if isinstance(effect, Answer):
                self._requests.pop(effect.request_id, None)
                self._again.discard(effect.request_id)
            elif isinstance(effect, Readiness) and effect.ready and self.stranded:
                self._in(self._simulation.constants.network.gateway_ns, self._ask_again)

    def _ask_again(self) -> Events:
        if self._simulation.down is not None:
            return ()
        asked, self.stranded = self.stranded, {}
        self._again.update(asked)
        return tuple(asked.values())


def taken_over(controller: Controller, known: set[int]) -> Counter[tuple[str, int]]:
    """How many INFERs of others a controller believes to run, by device and version; ``known``: all ids."""
    found: Counter[tuple[str, int]] = Counter()
    running = controller._inheritance.running  # noqa: SLF001 - a book to be checked
    for (device, action_id), one in running.items():
        assert action_id in known, f"{action_id} is taken over, and nobody sent it"
        if one.residency is not None and one.lane is Lane.EXEC:
            found[device, one.residency.version] += 1
    return found


def _nothing() -> None:
    """The link is cut already."""

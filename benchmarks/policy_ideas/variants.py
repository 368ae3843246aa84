"""Policy ``default`` without some of its ideas, for measurements; the product knows no such switches.

Each idea is taken away by a small subclass that does in its place what policy ``paper`` does. Without any
of them (but with rejection, which is a setting) what is left decides exactly as ``paper`` mended.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from clockwork_serve.controller import ControllerConfig, placement
from clockwork_serve.controller.belief import Belief
from clockwork_serve.controller.cluster import Agenda, DeviceBelief, Queue, ServedModel, Strategy
from clockwork_serve.controller.estimates import Timings
from clockwork_serve.controller.placement import Candidates, make_room
from clockwork_serve.controller.policies import SCHEDULERS, DefaultScheduler, PaperScheduler, default
from clockwork_serve.controller.policies.base import SchedulerFactory
from clockwork_serve.controller.policies.default import Choice

CAP = 16
"""Largest batch, the same for all."""


class Unmeasured(DefaultScheduler):
    """A fixed slack of 2 ms and a fixed network delay."""

    def __init__(self, belief: Belief) -> None:
        super().__init__(belief)
        belief.measures = False


class Early(DefaultScheduler):
    """Lanes are topped up 5 ms ahead."""

    def _load_ahead_ns(self, _: Agenda) -> int:
        return self._look_ahead_ns

    def _top_up_exec(self, agenda: Agenda, now_ns: int) -> None:
        margin_ns = default.MARGIN_NS
        vars(default)["MARGIN_NS"] = self._look_ahead_ns - agenda.device.exec.network_ns
        try:
            super()._top_up_exec(agenda, now_ns)
        finally:
            vars(default)["MARGIN_NS"] = margin_ns


class LargestFull(DefaultScheduler):
    """The largest batch that can be filled with requests in time, whoever is passed over for it."""

    def _best(self, strategy: Strategy, start_ns: int) -> Choice | None:
        fit = self._choose(strategy, start_ns)
        if fit is None:
            return None
        batch, first, latest_ns = fit
        choice = Choice(strategy, first, batch, strategy.queue.dues[first])
        choice.latest_ns = latest_ns
        return choice


class MostUrgent(DefaultScheduler):
    """The most urgent runs first, whatever that costs others."""

    def _least_loss(self, agenda: Agenda, urgent: Choice, start_ns: int) -> Choice:
        return urgent


class Partial(DefaultScheduler):
    """The most urgent runs although less of its queue is served than another's batch serves for its time."""

    def _better(self, agenda: Agenda, choice: Choice, start_ns: int, now_ns: int) -> Choice:
        return choice


class InOrder(DefaultScheduler):
    """Of models wanted equally, the one that was served first is loaded, if a LOAD can save a request."""

    def __init__(self, belief: Belief) -> None:
        super().__init__(belief)
        self._candidates = Candidates(belief)

    def _load_one(self, agenda: Agenda, now_ns: int) -> bool:
        return super(DefaultScheduler, self)._load_one(agenda, now_ns)


class Sacrificing(DefaultScheduler):
    """Requests that hold their queue's batch small are passed over wherever the larger one serves more."""

    def _fuller(self, choice: Choice, start_ns: int) -> Choice:
        strategy, batch = choice.strategy, choice.batch
        fit = self._choose(strategy, start_ns)
        if fit is None or fit[0].count * choice.lasts_ns <= batch.count * fit[0].samples.estimate_ns:
            return choice
        larger, first, _ = fit
        return Choice(strategy, first, larger, strategy.queue.dues[first])


class Sparing(DefaultScheduler):
    """Requests that hold their queue's batch small are never passed over."""

    def _fuller(self, choice: Choice, start_ns: int) -> Choice:
        return choice


class Long(DefaultScheduler):
    """Relaxed work takes its full batch."""

    def _relaxed(self, agenda: Agenda, choice: Choice, now_ns: int) -> Choice:
        return choice


class AtOnce(DefaultScheduler):
    """LOADs wait for no INFERs, whosever time they take."""

    def _infers_first(self, agenda: Agenda, now_ns: int) -> bool:
        return False


class ForWaiters(DefaultScheduler):
    """LOADs only for requests that wait and can be saved."""

    def _for_others(self, queues: list[Queue], timings: Timings, load_ns: int) -> bool:
        return False


class ByUse(DefaultScheduler):
    """The least recently used weights make room."""

    def __init__(self, belief: Belief) -> None:
        super().__init__(belief)
        self._by_popularity = False


class Uncopied(DefaultScheduler):
    """Idle memory stays empty until demand exceeds what those with the weights can serve."""

    def _find_roomy(self, device: DeviceBelief) -> None:
        pass


class Alike(DefaultScheduler):
    """A further copy is worth as much as the only one."""

    def _load(self, agenda: Agenda, model: ServedModel, now_ns: int) -> bool:
        usual = placement.COPY_LOSS
        vars(placement)["COPY_LOSS"] = 0
        try:
            return super()._load(agenda, model, now_ns)
        finally:
            vars(placement)["COPY_LOSS"] = usual


class Everywhere(DefaultScheduler):
    """An idle device leaves nothing to others."""

    def _left_to_others(self, choice: Choice, now_ns: int) -> bool:
        return False


class Popular(DefaultScheduler):
    """Not kept: weights are loaded only if the model is asked for more than the one they would displace."""

    def _timely(self, agenda: Agenda, model: ServedModel, start_ns: int, now_ns: int) -> bool:
        if not super()._timely(agenda, model, start_ns, now_ns):
            return False
        room = make_room(agenda.device, model, self._candidates.priority(model), by_popularity=True)
        return room is None or all(other.model.popularity < model.popularity for other in room.evicted)


class Deferred(DefaultScheduler):
    """Not kept: a batch waits to grow, until ``SPARE`` of the SLO before a larger one could no longer run."""

    SPARE = 0.3

    def __init__(self, belief: Belief) -> None:
        super().__init__(belief)
        self._deferred: dict[Agenda, list[Strategy]] = {}

    def _top_up_exec(self, agenda: Agenda, now_ns: int) -> None:
        for strategy in self._deferred.pop(agenda, ()):
            if strategy.queue.dues and strategy in strategy.queue.strategies:
                self._enqueue(strategy)
        super()._top_up_exec(agenda, now_ns)

    def _best(self, strategy: Strategy, start_ns: int) -> Choice | None:
        choice = super()._best(strategy, start_ns)
        if choice is None:
            return None
        larger = next((one for one in strategy.batches if one.count > choice.batch.count), None)
        queue, agenda = strategy.queue, strategy.agenda
        if larger is None or len(queue.dues) - choice.first > choice.batch.count:
            return choice
        request = queue.waiters[choice.first].request
        spare_ns = round(self.SPARE * request.slo_ns)
        until_ns = queue.dues[choice.first] - larger.samples.estimate_ns - spare_ns
        if start_ns >= until_ns:
            return choice
        self._deferred.setdefault(agenda, []).append(strategy)
        wake_ns = until_ns - agenda.device.exec.network_ns
        if wake_ns < agenda.exec_timer.at_ns:
            self._timers.set(agenda.exec_timer, wake_ns)
        return None


class DeferredLong(Deferred):
    """As above, up to a moment nearer the last."""

    SPARE = 0.1


class DeferredShort(Deferred):
    """As above, up to a moment further from the last."""

    SPARE = 0.6


@dataclass(frozen=True, slots=True)
class Idea:
    """One idea of policy ``default``.

    ``without`` takes it away (None: it is the setting ``reject_infeasible``). Alone it is measured on top of
    ``needs``, the ideas without which it has no meaning.
    """

    name: str
    without: type[DefaultScheduler] | None
    needs: tuple[str, ...] = ()


REJECT, BEST = "reject when infeasible", "best batch for the head"
IDEAS = (
    Idea("measured delays", Unmeasured),
    Idea(REJECT, None),
    Idea("late choices", Early),
    Idea(BEST, LargestFull),
    Idea("least loss", MostUrgent),
    Idea("no sacrifice without need", Sacrificing, needs=(BEST,)),
    Idea("full batches while time is short", Partial),
    Idea("relaxed work stays short", Long),
    Idea("loads by need", InOrder),
    Idea("INFERs first", AtOnce),
    Idea("loads ahead", ForWaiters),
    Idea("least missed first", ByUse),
    Idea("copies into idle memory", Uncopied),
    Idea("last copies stay", Alike, needs=("least missed first",)),
    Idea("few devices where little is to do", Everywhere),
)
NAMES = tuple(idea.name for idea in IDEAS)
NOT_KEPT: dict[str, type[DefaultScheduler]] = {
    "never pass over": Sparing,
    "deferred, 0.1 of the SLO spare": DeferredLong,
    "deferred, 0.3 of the SLO spare": Deferred,
    "deferred, 0.6 of the SLO spare": DeferredShort,
    "admission by popularity": Popular,
}


@dataclass(frozen=True, slots=True)
class Variant:
    """A policy to measure: the scheduler that stands in for ``default``, and whether it may reject."""

    name: str
    scheduler: SchedulerFactory
    rejects: bool = True

    @property
    def config(self) -> ControllerConfig:
        """Its settings; valid while ``installed``."""
        return ControllerConfig(policy="default", reject_infeasible=self.rejects, max_batch=CAP)

    @contextmanager
    def installed(self) -> Iterator[None]:
        """The controllers made meanwhile have it as ``default``."""
        usual = SCHEDULERS["default"]
        SCHEDULERS["default"] = self.scheduler
        try:
            yield
        finally:
            SCHEDULERS["default"] = usual


def having(name: str, ideas: Iterable[str]) -> Variant:
    """A variant with these ideas and no others."""
    has = set(ideas)
    lacks = tuple(idea.without for idea in IDEAS if idea.name not in has and idea.without is not None)
    scheduler = type("Variation", lacks, {}) if lacks else DefaultScheduler
    return Variant(name, scheduler, rejects=REJECT in has)


def without(name: str) -> Variant:
    """``default`` without an idea, and without those that mean nothing then."""
    gone = {name, *(idea.name for idea in IDEAS if name in idea.needs)}
    return having(f"default - {name}", set(NAMES) - gone)


def alone(idea: Idea) -> Variant:
    """``paper`` mended with one idea, and with those that it needs."""
    return having(f"paper + {idea.name}", {REJECT, idea.name, *idea.needs})


def base(idea: Idea) -> str:
    """The name of the variant that ``alone`` is compared with; ``paper`` has rejection already."""
    return f"paper + {idea.needs[0]}" if idea.needs else "paper"


def variants() -> list[Variant]:
    """All of them: both policies, ``default`` less one idea each, ``paper`` and one idea each, not kept."""
    return [
        Variant("paper", PaperScheduler),
        Variant("default", DefaultScheduler),
        *[without(idea.name) for idea in IDEAS],
        *[alone(idea) for idea in IDEAS if idea.name != REJECT],
        having(f"paper - {REJECT}", ()),
        *[Variant(f"default, {name}", scheduler) for name, scheduler in NOT_KEPT.items()],
    ]

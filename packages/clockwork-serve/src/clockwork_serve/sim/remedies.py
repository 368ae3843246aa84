"""What would have changed a request's outcome: each remedy is tried by playing its surroundings again.

The smallest SLO from which on it would have been met is searched for; the others are tried as they are. A
remedy *helps* if the request gets a good answer in time. Where that depends on how long actions take that
were not recorded, several lucks are tried, and it may be neither sure to help nor sure not to.
"""

from __future__ import annotations

import enum
from collections import Counter
from collections.abc import Callable
from typing import Final

from msgspec import Struct

from clockwork_serve.messages import Infer, Load, Request
from clockwork_serve.sim.counterfactual import Change, PlayedScene, Scene, play
from clockwork_serve.units import NS_PER_MS


class RemedyKind(enum.StrEnum):
    """What is different."""

    SLO = "slo"
    DEVICE = "device"
    MEMORY = "memory"
    MODEL = "model"
    PRIORITY = "priority"


MOST_URGENT: Final = 1
STEPS_UP: Final = (1.05, 1.1, 1.2)
"""An SLO is enough if it is, and if so many times as much is, too."""
CLOSE: Final = 1.004
"""The search ends where an SLO that is enough is at most so many times one that is not."""
ABOVE: Final = 1.01
"""The SLO that is named is so many times the one that was found: between it and 2 % less lies the limit."""
BELOW: Final = 0.98
GROWTH: Final = 1.3
"""SLOs that are not enough are tried by so many times as much, up to ``SLO_TIMES``."""
SLO_TIMES: Final = 16.0
SEARCHES_MAX: Final = 6
"""Where more is not enough again, the search goes on above that; so often at most."""
MODELS_TRIED: Final = 3
NEAR_SLOS: Final = 4
NEAR_LEAST_NS: Final = 250 * NS_PER_MS
"""A device or memory is there, and a model is not, from so many SLOs before the request on, and from so long
before it at least: time for LOADs. The longer ago a change is, the less is known of what followed."""
LUCKS: Final = 10
SURE: Final = 4
"""A remedy is tried with so many lucks, or with ``SURE`` if these agree."""
LIKELY: Final = 0.85
UNLIKELY: Final = 0.15
"""It helps if the request is met with this share of them, and does not if with less than that."""
LEAST_SLO_NS: Final = NS_PER_MS // 10


class Remedy(Struct, frozen=True, kw_only=True):
    """One change that was tried, and with what share of lucks the request is met by it: its ``chance``.

    ``change`` is from the beginning of the case's scene for that ``kind`` on. ``slo_ns``, ``pages`` (more of
    them on each device), ``model`` and ``priority`` are set by its kind. ``from_ns`` is when anything becomes
    different by it. ``rests_on``: what the duration of the request's own INFER rests on.
    """

    kind: RemedyKind
    chance: float
    change: Change
    slo_ns: int = 0
    pages: int = 0
    model: str = ""
    priority: int = 0
    from_ns: int | None = None
    rests_on: str = ""

    @property
    def helps(self) -> bool:
        """Whether it is as good as sure that the request is met by it."""
        return self.chance >= LIKELY

    @property
    def may_help(self) -> bool:
        """Whether it depends on luck."""
        return UNLIKELY <= self.chance < LIKELY


class RequestCase:
    """A request in its surroundings; ``good``: it got a good answer in time.

    Its scenes begin some time before it (``early``: what was measured then is known), shortly before it
    (``near``), and with its arrival (``late``), which is step ``arrived`` of the early one.
    """

    def __init__(self, request: Request, early: Scene, arrived: int, *, good: bool) -> None:
        self.request = request
        self.good = good
        self.early = early
        from_ns = request.arrival_ns - max(NEAR_SLOS * request.slo_ns, NEAR_LEAST_NS)
        near = next(at for at, step in enumerate(early.steps) if at == arrived or step.now_ns >= from_ns)
        self.near = early.later(near)
        self.late = self.near.later(arrived - near)

    def scene(self, kind: RemedyKind) -> Scene:
        """The scene that a remedy of a kind is tried in."""
        return self.late if kind in {RemedyKind.SLO, RemedyKind.PRIORITY} else self.near


def smallest_slo(case: RequestCase, limit_ns: int, check: Callable[[], None]) -> Remedy | None:
    """The smallest SLO from which on the request is met; None if it is none below ``limit_ns``.

    ``check`` is called now and then, and may raise.
    """
    search = _SloSearch(case, limit_ns, check)
    slo_ns = search.find()
    if slo_ns is None:
        return None
    change, played = search.played(slo_ns)
    return Remedy(
        kind=RemedyKind.SLO, chance=1.0, change=change, slo_ns=slo_ns, from_ns=played.from_ns,
        rests_on=played.rests_on(case.request.request_id),
    )  # fmt: skip


class _SloSearch:
    """Tries SLOs of one request."""

    def __init__(self, case: RequestCase, limit_ns: int, check: Callable[[], None]) -> None:
        self._case, self._limit_ns, self._check = case, limit_ns, check
        self._found: dict[int, tuple[Change, PlayedScene]] = {}

    def played(self, slo_ns: int) -> tuple[Change, PlayedScene]:
        """The change to that SLO, and what came of it."""
        found = self._found.get(slo_ns)
        if found is None:
            self._check()
            request = self._case.request
            change = Change(edits={request.request_id: {"deadline_ns": request.arrival_ns + slo_ns}})
            found = change, play(self._case.late, change, until=request.request_id)
            self._found[slo_ns] = found
        return found

    def met(self, slo_ns: int) -> bool:
        """Whether the request is met with that SLO."""
        return self.played(slo_ns)[1].good(self._case.request.request_id)

    def find(self) -> int | None:
        """The smallest SLO from which on it is met, rounded up by about 1 %."""
        slo_ns = self._case.request.slo_ns
        met = self.met(slo_ns)
        if met and not self._case.good:
            return None  # played again it is met as it was: a shorter SLO than its own is no advice
        low_ns, high_ns = (LEAST_SLO_NS, slo_ns) if met else (slo_ns, None)
        if high_ns is not None:
            low_ns = self._bad_below(high_ns)
        for _ in range(SEARCHES_MAX):
            if high_ns is None:
                low_ns, high_ns = self._first_above(low_ns)
                if high_ns is None:
                    return None
            while high_ns > low_ns * CLOSE and high_ns - low_ns > 1:
                mean_ns = round((low_ns * high_ns) ** 0.5)
                if self.met(mean_ns):
                    high_ns = mean_ns
                else:
                    low_ns = mean_ns
            for enough_ns in (round(high_ns * ABOVE), max(high_ns, int(low_ns / BELOW))):
                bad = [one for one in (1.0, *STEPS_UP) if not self.met(round(enough_ns * one))]
                if not bad and not self.met(round(enough_ns * BELOW)):
                    return enough_ns
            if not bad:
                return enough_ns
            low_ns, high_ns = round(enough_ns * max(bad)), None
        return None

    def _bad_below(self, high_ns: int) -> int:
        while high_ns > LEAST_SLO_NS:
            low_ns = round(high_ns / GROWTH)
            if not self.met(low_ns):
                return low_ns
            high_ns = low_ns
        return LEAST_SLO_NS

    def _first_above(self, low_ns: int) -> tuple[int, int | None]:
        """The last SLO of a row that is not enough, and the first that is."""
        while True:
            high_ns = round(low_ns * GROWTH)
            if high_ns > self._limit_ns:
                return low_ns, None
            if self.met(high_ns):
                return low_ns, high_ns
            low_ns = high_ns


def other_remedies(case: RequestCase, check: Callable[[], None]) -> list[Remedy]:
    """One device more, more memory, a model that is not there, another priority: each that was tried."""
    found = [_tried(case, RemedyKind.DEVICE, Change(devices=1), check), *_memory(case, check)]
    found += [
        _tried(case, RemedyKind.MODEL, Change(without=(model,)), check, model=model)
        for model in models_beside(case)[:MODELS_TRIED]
    ]
    if case.request.priority != MOST_URGENT:
        edits = {case.request.request_id: {"priority": MOST_URGENT}}
        found.append(_tried(case, RemedyKind.PRIORITY, Change(edits=edits), check, priority=MOST_URGENT))
    return found


def _tried(
    case: RequestCase, kind: RemedyKind, change: Change, check: Callable[[], None], *, pages: int = 0,
    model: str = "", priority: int = 0,
) -> Remedy:  # fmt: skip
    scene, request_id = case.scene(kind), case.request.request_id
    met: list[bool] = []
    played = PlayedScene()
    while len(met) < SURE or (len(met) < LUCKS and len(set(met)) > 1):
        check()
        again = play(scene, change, until=request_id, seed=len(met))
        played = played if met else again
        met.append(again.good(request_id))
    return Remedy(
        kind=kind, change=change, chance=sum(met) / len(met), pages=pages, model=model, priority=priority,
        from_ns=played.from_ns, rests_on=played.rests_on(request_id),
    )  # fmt: skip


def _memory(case: RequestCase, check: Callable[[], None]) -> list[Remedy]:
    """The smallest of a few sizes that helps, or the largest of them, that does not."""
    controller = case.early.controller
    specs = [spec for one in controller.workers() for spec in one.devices]
    model = controller.model(case.request.model)
    if not specs or model is None:
        return []
    each = specs[0].pages_of(model.weights.size)
    sizes = sorted({each, 2 * each, 4 * each, max(spec.pages for spec in specs)})
    best = _tried(case, RemedyKind.MEMORY, Change(pages=sizes[-1]), check, pages=sizes[-1])
    if best.helps:
        for pages in sizes[:-1]:
            smaller = _tried(case, RemedyKind.MEMORY, Change(pages=pages), check, pages=pages)
            if smaller.helps:
                return [smaller]
    return [best]


def models_beside(case: RequestCase) -> list[str]:
    """Other models that took device time shortly before the request was due, by how much, most first."""
    request = case.request
    began_ns, end_ns = request.arrival_ns - request.slo_ns, request.deadline_ns
    took_ns: Counter[str] = Counter()
    for one in case.early.recording.actions.values():
        action = one.action
        if isinstance(action, Infer | Load) and began_ns <= one.sent_ns <= end_ns:
            took_ns[action.model] += one.lasted_ns or action.expected_ns
    took_ns.pop(request.model, None)
    return [model for model, _ in took_ns.most_common()]

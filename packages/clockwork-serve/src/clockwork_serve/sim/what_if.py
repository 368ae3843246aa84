"""A whole journal played again with something changed, and what became of requests in both worlds.

Each run is decided again first, as it was: only where this version decides the same can it tell what it would
have decided otherwise. Then it is played with the change from its first request on (``counterfactual``).
Nothing is kept of requests that both sides have answered, but the ids of a few whose outcome changes.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from itertools import chain
from pathlib import Path
from typing import Final, NamedTuple

from msgspec import Struct, structs

from clockwork_serve.controller import Controller
from clockwork_serve.controller.policies import is_policy, known_policies
from clockwork_serve.errors import ConfigError, did_you_mean
from clockwork_serve.messages import (
    Answer,
    CodeAdded,
    ControllerEffect,
    ControllerEvent,
    ModelAdded,
    Outcome,
    Profile,
    Request,
)
from clockwork_serve.sim.counterfactual import Change, FirstDifference, LongScene, Traffic, play_on
from clockwork_serve.sim.replay import Replayed, decided_again, replay
from clockwork_serve.sim.tally import DurationHistogram
from clockwork_serve.telemetry import JournalHead, Step, read_records
from clockwork_serve.telemetry.journal import journal_bytes
from clockwork_serve.units import NS_PER_S, to_ms
from clockwork_serve.workload.zoo import Zoo

IDS: Final = 10
"""So many requests whose outcome changes are named."""
TELL_EVERY: Final = 256

Tell = Callable[[int, int], None]
"""Called with (bytes read, decisions so far)."""


class RunStart(NamedTuple):
    """A run from its first request on; the models and profiles that it begins with."""

    scene: LongScene
    models: tuple[str, ...]
    profiles: dict[tuple[str, str], Profile]


class AskedWorld(Struct, frozen=True, kw_only=True):
    """What is to be different in all of a journal; models are called by name, or by key.

    ``slos``: by model, in ns. ``rate``: so many times the requests. ``without_tenants``: nothing of theirs.
    ``profiles``: durations that models of its names have.
    """

    devices: int = 0
    policy: str = ""
    slos: dict[str, int] = {}
    rate: float = 1.0
    without_tenants: tuple[str, ...] = ()
    profiles: Zoo | None = None

    def change(self, start: RunStart) -> Change:
        """For a run. Raises :class:`ConfigError`."""
        count = sum(len(one.devices) for one in start.scene.controller.workers())
        if self.devices and count + self.devices < 1:
            raise ConfigError(
                f"devices: expected to leave at least one of the {count} that the first request met; found "
                f"{self.devices:+d}; take fewer away"
            )
        if self.policy and not is_policy(self.policy):
            raise ConfigError(f"policy: expected one of {known_policies()}; found {self.policy!r:.80}")
        slos = {
            key: slo_ns for name, slo_ns in self.slos.items() for key in _keys("slo_ms", name, start.models)
        }
        traffic = [Traffic(times=self.rate)] if self.rate != 1.0 else []
        traffic += [Traffic(times=0.0, tenant=tenant) for tenant in self.without_tenants]
        times, profiles = _profiled(self.profiles, start) if self.profiles else ({}, {})
        return Change(
            devices=self.devices, policy=self.policy, slos=slos, traffic=tuple(traffic), times=times,
            profiles=profiles,
        )  # fmt: skip


def _keys(what: str, name: str, models: Sequence[str]) -> list[str]:
    found = [key for key in models if name in {key, key.rpartition("/")[0]}]
    if not found:
        advice = did_you_mean(name, models)
        raise ConfigError(f"{what}: expected a model that the journal has, found {name!r}; {advice}")
    return found


def _profiled(
    zoo: Zoo, start: RunStart
) -> tuple[dict[str, dict[int, float]], dict[str, tuple[Profile, ...]]]:
    """By code, how many times as long it takes by a table, and profiles that say so."""
    times: dict[str, dict[int, float]] = {}
    profiles: dict[str, tuple[Profile, ...]] = {}
    for key in start.models:
        model = start.scene.controller.model(key)
        row = zoo.models.get(key.rpartition("/")[0]) or zoo.models.get(key.replace("/", "."))
        if model is None or row is None or model.code_id in times:
            continue
        for (code_id, _), profile in start.profiles.items():
            if code_id != model.code_id:
                continue
            infer = {batch: row.infer_ns.get(batch, 0) / took for batch, took in profile.infer_ns.items()}
            infer = {batch: share or infer[1] for batch, share in infer.items()}
            load = row.load_ns / max(1, profile.load_ns(model.weights.size))
            times[code_id] = {0: load, **infer}
            changed = structs.replace(
                profile, infer_ns={one: round(took * infer[one]) for one, took in profile.infer_ns.items()},
                load_base_ns=row.load_ns, load_ns_per_mib=0,
            )  # fmt: skip
            profiles[code_id] = (*profiles.get(code_id, ()), changed)
    if not times:
        raise ConfigError(
            f"profile: expected a row for a model that the journal has ({', '.join(start.models[:IDS])}), "
            f"found {', '.join(list(zoo.models)[:IDS])}; name its rows as the models are"
        )
    return times, profiles


class WorldSide(Struct, kw_only=True):
    """What became of requests in one world; latencies are of answers in time, None without one."""

    requests: int = 0
    in_time: int = 0
    satisfaction: float = 1.0
    p50_ms: float | None = None
    p99_ms: float | None = None


class Compared(Struct, frozen=True, kw_only=True):
    """The requests for a model, of a tenant, or all: as it was, and as it would have been."""

    name: str
    recorded: WorldSide
    changed: WorldSide


class ChangedRequests(Struct, kw_only=True):
    """Requests whose outcome is another with the change: how many, and the first of them."""

    count: int = 0
    first: list[str] = []

    def add(self, request_id: str) -> None:
        """One more."""
        self.count += 1
        if len(self.first) < IDS:
            self.first.append(request_id)


class WhatIf(Struct, frozen=True, kw_only=True):
    """How a journal went, and how it would have gone.

    ``replayed``: as it was, decided again; where that differs, or nothing is changed, nothing else is told.
    ``first``: the first decision that differs by the change, so long after the first request of its run.
    ``gained`` are met by it, ``lost`` are met no more, ``left_out`` do not come, ``added`` come besides.
    ``rests``: on what the durations of so many answers rest.
    """

    replayed: Replayed
    first: FirstDifference | None
    first_after_s: float
    all: Compared | None
    models: tuple[Compared, ...]
    tenants: tuple[Compared, ...]
    gained: ChangedRequests
    lost: ChangedRequests
    left_out: int
    added: int
    rests: dict[str, int]
    decisions: int


class _Count:
    """Requests of one group in one world."""

    __slots__ = ("in_time", "requests", "waits")

    def __init__(self) -> None:
        self.requests = self.in_time = 0
        self.waits = DurationHistogram()

    def side(self) -> WorldSide:
        p50_ms, p99_ms = (
            to_ms(self.waits.quantile_ns(part)) if self.in_time else None for part in (0.5, 0.99)
        )
        share = self.in_time / self.requests if self.requests else 1.0
        return WorldSide(
            requests=self.requests, in_time=self.in_time, satisfaction=share, p50_ms=p50_ms, p99_ms=p99_ms
        )


class _World:
    """One side: its open requests, and counts of ended ones by group. Calls ``ended`` with each, once."""

    def __init__(self, ended: Callable[[Request, bool], None]) -> None:
        self.open: dict[str, Request] = {}
        self.counts: dict[tuple[str, str], _Count] = {}
        self._ended = ended

    def take(
        self, now_ns: int, events: Sequence[ControllerEvent], effects: Sequence[ControllerEffect]
    ) -> None:
        """A step."""
        for event in events:
            if type(event) is Request:
                self.open[event.request_id] = event
        for effect in effects:
            if type(effect) is Answer and (request := self.open.pop(effect.request_id, None)) is not None:
                self.end(request, effect.outcome is Outcome.OK, now_ns)

    def end(self, request: Request, good: bool, now_ns: int) -> None:  # noqa: FBT001 - how it ended
        """A request ended."""
        self.count(request, good)
        for count in self._of(request) if good else ():
            count.waits.add(max(0, now_ns - request.arrival_ns))
        self._ended(request, good)

    def count(self, request: Request, good: bool, number: int = 1) -> None:  # noqa: FBT001
        """Count it; by -1, as if it had not been."""
        for count in self._of(request):
            count.requests += number
            count.in_time += number * good

    def _of(self, request: Request) -> list[_Count]:
        groups = (("all", "all"), ("model", request.model), ("tenant", request.tenant))
        return [self.counts.setdefault(group, _Count()) for group in groups]


class _Comparison:
    """Both worlds, step by step; a request is forgotten once both have ended it."""

    def __init__(self) -> None:
        self.recorded, self.changed = _World(self._as_it_was), _World(self._as_changed)
        self.gained, self.lost = ChangedRequests(first=[]), ChangedRequests(first=[])
        self.left_out = self.added = self.decisions = 0
        self.change = Change()
        self._half: tuple[dict[str, bool], dict[str, bool]] = ({}, {})

    def on_recorded(self, step: Step) -> None:
        """A step as it was; each is here before the changed world comes to it."""
        self.recorded.take(step.now_ns, step.events, step.effects)

    def on_changed(
        self, now_ns: int, events: Sequence[ControllerEvent], effects: Sequence[ControllerEffect]
    ) -> None:
        """A step of the changed world."""
        self.decisions += 1
        self.changed.take(now_ns, events, effects)

    def close(self) -> None:
        """A run ends: what it left without an answer does not count; what the change leaves so is lost."""
        for request_id, request in self.recorded.open.items():
            if (good := self._half[1].pop(request_id, None)) is not None:
                self.changed.count(request, good, -1)
            self.changed.open.pop(request_id, None)
        for request in self.changed.open.values():
            self.changed.end(request, False, 0)  # noqa: FBT003
        for each in (self.recorded.open, self.changed.open, *self._half):
            each.clear()

    def _as_it_was(self, request: Request, good: bool) -> None:  # noqa: FBT001 - how it ended
        if self.change.traffic and not self.change.copies(request):
            self.left_out += 1
        else:
            self._meet(0, request.request_id, good)

    def _as_changed(self, request: Request, good: bool) -> None:  # noqa: FBT001
        request_id = request.request_id
        if request_id in self._half[0] or request_id in self.recorded.open:
            self._meet(1, request_id, good)
        else:
            self.added += 1

    def _meet(self, side: int, request_id: str, good: bool) -> None:  # noqa: FBT001
        other = self._half[1 - side].pop(request_id, None)
        if other is None:
            self._half[side][request_id] = good
        elif other is not good:
            (self.gained if good is (side == 1) else self.lost).add(request_id)

    def groups(self, what: str) -> tuple[Compared, ...]:
        """The groups of a kind, those with the most requests first."""
        sides = (self.recorded.counts, self.changed.counts)
        names = {name for counts in sides for kind, name in counts if kind == what}
        found = []
        for name in names:
            recorded, changed = (counts.get((what, name), _Count()).side() for counts in sides)
            found.append(Compared(name=name, recorded=recorded, changed=changed))
        return tuple(sorted(found, key=lambda one: (-one.recorded.requests, one.name)))


def what_if(path: Path, asked: AskedWorld, tell: Tell = lambda done, decisions: None) -> WhatIf:
    """Play a journal with a change; without any, only decide it again. ``tell`` may raise, to end it.

    Raises :class:`ConfigError` for a change that cannot be, or a file that is no journal.
    """
    total = journal_bytes(path)
    replayed = replay(path, tell=tell)
    both, rests, starts = _Comparison(), Counter[str](), 0
    first: FirstDifference | None = None
    first_after_s = 0.0
    plays = asked != AskedWorld() and replayed.difference is None
    for number, (head, steps) in enumerate(
        _runs(path, lambda done: tell(total + done, both.decisions)) if plays else ()
    ):
        start = _start(Controller(head.controller_config()), steps, both, replayed.runs[number].late_ns)
        if start is None:
            continue
        starts += 1
        both.change = asked.change(start)
        played = play_on(start.scene, both.change, both.on_changed)
        both.close()
        rests += played.rests
        if first is None and played.first is not None:
            first, first_after_s = played.first, (played.first.now_ns - start.scene.began_ns) / NS_PER_S
    if plays and not starts:
        raise ConfigError(f"journal: expected requests; found none in {path}; let the server run on")
    everything = both.groups("all")
    return WhatIf(
        replayed=replayed, first=first, first_after_s=first_after_s,
        all=everything[0] if everything else None, models=both.groups("model"), tenants=both.groups("tenant"),
        gained=both.gained, lost=both.lost, left_out=both.left_out, added=both.added, rests=dict(rests),
        decisions=both.decisions,
    )  # fmt: skip


def _runs(path: Path, tell: Callable[[int], None]) -> Iterator[tuple[JournalHead, Iterator[Step]]]:
    """The runs of a journal: the head of each, and its steps until a gap."""
    records = read_records(path)
    heads: list[JournalHead] = []

    def steps() -> Iterator[Step]:
        gap = False
        for number, (done, record) in enumerate(records):
            if number % TELL_EVERY == 0:
                tell(done)
            if isinstance(record, JournalHead) and not record.continues:
                heads.append(record)
                return
            gap = gap or (isinstance(record, Step) and record.dropped > 0)
            if isinstance(record, Step) and not gap:
                yield record

    deque(steps(), maxlen=0)
    while heads:
        rest = steps()
        yield heads.pop(), rest
        deque(rest, maxlen=0)


def _start(controller: Controller, steps: Iterator[Step], both: _Comparison, late_ns: int) -> RunStart | None:
    """A run from its first request on; None if it has none."""
    models: dict[str, None] = {}
    profiles: dict[tuple[str, str], Profile] = {}

    def seen(first: Step) -> Iterator[Step]:
        for step in chain((first,), steps):
            both.on_recorded(step)
            yield step

    for step in steps:
        if any(isinstance(event, Request) for event in step.events):
            scene = LongScene(controller, seen(step), late_ns=late_ns)
            return RunStart(scene, tuple(models), profiles)
        for event in step.events:
            if isinstance(event, ModelAdded):
                models[event.model.key] = None
            elif isinstance(event, CodeAdded):
                profiles.update(((one.code_id, one.device_kind), one) for one in event.profiles)
        decided_again(controller, step)
    return None

"""What a journal tells of actions, and workers that take as long in another course of events.

A *recording* knows of each action when it was sent, when it ran, and when its result came. A worker of a
counterfactual is the real worker's brain on lanes that take what was recorded: of the same action (device,
batch, first request, or a LOAD at about that time) its own duration, else that of others of its code and
batch nearby, else what the controller expected.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Iterable, Sequence
from statistics import median_low
from typing import Final

from msgspec.structs import replace

from clockwork_serve.messages import (
    Action,
    Code,
    CodeAdded,
    CodeRemoved,
    DeviceSpec,
    Infer,
    Load,
    Resident,
    Result,
    RetainWeights,
    Status,
    Unload,
    Window,
)
from clockwork_serve.sim.host import FAR_NS, LEAST_NS, TO_CONTROLLER, TO_WORKER, SimulatedWorker, World
from clockwork_serve.units import NS_PER_MS, NS_PER_S, NS_PER_US
from clockwork_serve.worker.events import WorkerEffect

# ruff: noqa: PLR1730 - as in host.py

RECORDED: Final = "recorded"
NEARBY: Final = "nearby"
EXPECTED: Final = "expected"
"""What the duration of an action rests on, from the best down."""

NEARBY_COUNT: Final = 5
"""So many recorded durations or delays, the nearest in time, of which the median counts."""
ABOUT_NS: Final = 100 * NS_PER_MS
"""A LOAD or UNLOAD is the same one if it was sent so much sooner or later at most."""
USUAL_DELAY_NS: Final = 100 * NS_PER_US
"""The delay of a message to or from a worker of which nothing was recorded."""
LONGEST_NS: Final = 3600 * NS_PER_S
SILENT_NS: Final = 10 * NS_PER_MS
"""A worker was stopped where a result came so much later than usual, or an action took so much longer."""
PACE_UNIT: Final = 1 << 16
PACE_COUNT: Final = 3
"""A device is as fast as the median of so many actions, the nearest in time, says."""
PACES: Final = 1.25
"""A recorded duration is corrected where the device was so many times as fast or slow as it is."""


Profiled = Callable[[Infer], int]
"""What an INFER's profile says that it takes; 0 without one."""


class Luck:
    """Choices among what was measured nearby, in place of its median; the same ones for the same seed."""

    __slots__ = ("_state",)

    def __init__(self, seed: int) -> None:
        self._state = seed

    def below(self, count: int) -> int:
        """A number from 0, less than ``count``."""
        self._state = (self._state * 1_103_515_245 + 12_345) & 0x7FFF_FFFF
        return (self._state >> 12) % count


class Nearby:
    """Values by instant, and the median of those that are nearest to one."""

    __slots__ = ("_sorted", "_times", "_values")

    def __init__(self) -> None:
        self._times: list[int] = []
        self._values: list[int] = []
        self._sorted = True

    def add(self, at_ns: int, value: int) -> None:
        """Add a value."""
        self._sorted = self._sorted and (not self._times or self._times[-1] <= at_ns)
        self._times.append(at_ns)
        self._values.append(value)

    def at(self, at_ns: int, count: int = NEARBY_COUNT, luck: Luck | None = None) -> int:
        """The median of the nearest, or one of them by luck; there is at least one."""
        low, high = self._range(at_ns, count)
        if luck is not None:
            return self._values[low + luck.below(high - low)]
        return median_low(self._values[low:high])

    def nearest(self, at_ns: int) -> tuple[int, int]:
        """The instant of the nearest value, and the value."""
        low, _ = self._range(at_ns, 1)
        return self._times[low], self._values[low]

    def level(self, at_ns: int, count: int, times: float, luck: Luck | None = None) -> int:
        """The level that values have at an instant, where it may have changed at once by so many times.

        The median of some before it and after it; where these two differ, that of the nearer side, or of one
        of them by luck.
        """
        self._sort()
        at = bisect_left(self._times, at_ns)
        before, after = self._values[max(0, at - count) : at], self._values[at : at + count]
        if not before or not after:
            return median_low(before or after)
        one, other = median_low(before), median_low(after)
        if one / times < other < one * times:
            return median_low(before + after)
        if luck is not None:
            return other if luck.below(2) else one
        return one if at_ns - self._times[at - 1] < self._times[at] - at_ns else other

    def _sort(self) -> None:
        if not self._sorted:
            both = sorted(zip(self._times, self._values, strict=True))
            self._times, self._values = [one for one, _ in both], [value for _, value in both]
            self._sorted = True

    def _range(self, at_ns: int, count: int) -> tuple[int, int]:
        self._sort()
        times = self._times
        high = low = bisect_left(times, at_ns)
        while high - low < count and (low > 0 or high < len(times)):
            if high == len(times) or (low > 0 and at_ns - times[low - 1] <= times[high] - at_ns):
                low -= 1
            else:
                high += 1
        return low, high


class RecordedAction:
    """An action of a recording, and its result, if there is one.

    ``idle``: its lane had nothing to do when it was sent.
    """

    __slots__ = ("action", "arrived_ns", "idle", "result", "sent_ns")

    def __init__(self, action: Action, sent_ns: int, *, idle: bool) -> None:
        self.action = action
        self.sent_ns = sent_ns
        self.idle = idle
        self.result: Result | None = None
        self.arrived_ns = FAR_NS

    @property
    def lasted_ns(self) -> int:
        """How long it took; 0 if it was refused, or has no result."""
        return 0 if self.result is None else self.result.ended_ns - self.result.started_ns

    def is_same(self, action: Action) -> bool:
        """Whether another action that is sent then does the same with the same requests, and ends so."""
        mine, window, result = self.action, action.window, self.result
        if window != mine.window and not (
            result is not None
            and result.status is Status.OK
            and window.earliest_ns <= result.started_ns <= window.latest_ns
        ):
            return False  # it could start no more, or could start now
        if type(mine) is not type(action) or mine.device != action.device or mine.model != action.model:
            return False
        if isinstance(mine, Infer) and isinstance(action, Infer):
            calls = mine.calls
            return (
                mine.batch == action.batch
                and mine.extent == action.extent
                and len(calls) == len(action.calls)
                and [one.request_id for one in calls] == [one.request_id for one in action.calls]
            )  # fmt: skip
        return mine.extent == action.extent


class Recording:
    """All actions of a stretch of a run.

    ``in_flight`` were sent before it, in this order. :meth:`sent` and :meth:`ended` are called as the stretch
    is read.
    """

    def __init__(self, in_flight: Sequence[Action], began_ns: int, seed_ns: Profiled) -> None:
        self._seed_ns = seed_ns
        self.silences: list[tuple[str, int, int]] = []
        """(device, from, until) where its worker did nothing, as far as that can be seen."""
        self._paces: dict[str, Nearby] = {}
        """By device: durations in parts (1 / ``PACE_UNIT``) of what profiles say."""
        self.actions: dict[int, RecordedAction] = {}
        """By id."""
        self._infers: dict[tuple[str, str, int, str], list[RecordedAction]] = {}
        self._moves: dict[tuple[str, str, bool], list[RecordedAction]] = {}
        self._durations: dict[tuple[str, str, int], Nearby] = {}
        self._of_code: dict[tuple[str, int], Nearby] = {}
        self._out: dict[str, Nearby] = {}
        self._back: dict[str, Nearby] = {}
        self._open: dict[tuple[str, bool], int] = {}
        for action in in_flight:
            self.sent(action, began_ns - 1)
            self.actions[action.action_id].idle = False

    def sent(self, action: Action, now_ns: int) -> None:
        """The controller sent an action."""
        lane = action.device, isinstance(action, Infer)
        count = self._open.get(lane, 0)
        self._open[lane] = count + 1
        one = self.actions[action.action_id] = RecordedAction(action, now_ns, idle=not count)
        if isinstance(action, Infer):
            self._infers.setdefault(_infer_key(action), []).append(one)
        else:
            key = action.device, action.model, isinstance(action, Load)
            self._moves.setdefault(key, []).append(one)

    def ended(self, result: Result, now_ns: int) -> None:
        """A result came; what it tells of an action that was sent before the stretch is its end only."""
        one = self.actions.get(result.action_id)
        if one is None or one.result is not None:
            return
        one.result, one.arrived_ns = result, now_ns
        action = one.action
        lane = action.device, isinstance(action, Infer)
        self._open[lane] = max(0, self._open.get(lane, 0) - 1)
        if result.status is not Status.OK:
            return
        started_ns, lasted_ns = result.started_ns, one.lasted_ns
        if isinstance(action, Infer):
            seed_ns = self._seed_ns(action)
            if lasted_ns > 2 * max(seed_ns, action.expected_ns) + SILENT_NS:
                usual_ns, _ = self.lasts_ns(action, started_ns)
                if lasted_ns > 2 * usual_ns + SILENT_NS:
                    self.silences.append((action.device, started_ns + usual_ns, now_ns))
                    return
            self._delayed(one, result, now_ns)
            if seed_ns:
                paces = self._paces.setdefault(action.device, Nearby())
                paces.add(started_ns, PACE_UNIT * lasted_ns // seed_ns)
        if not isinstance(action, Unload):
            batch = action.batch if isinstance(action, Infer) else 0
            found = self._durations.setdefault((action.device, action.code_id, batch), Nearby())
            found.add(started_ns, lasted_ns)
            self._of_code.setdefault((action.code_id, batch), Nearby()).add(started_ns, lasted_ns)

    def _delayed(self, one: RecordedAction, result: Result, now_ns: int) -> None:
        """Learn how long messages took; where its worker was stopped, that it was."""
        device, started_ns = result.device, result.started_ns
        after_ns = now_ns - result.ended_ns
        if after_ns > SILENT_NS:
            _, back_delay_ns, _ = self.link_delays(device, started_ns)
            if after_ns > SILENT_NS + 2 * back_delay_ns:
                self.silences.append((device, result.ended_ns + back_delay_ns, now_ns))
                return
        self._back.setdefault(device, Nearby()).add(started_ns, after_ns)
        if one.idle and started_ns - one.sent_ns <= SILENT_NS + max(0, after_ns):
            self._out.setdefault(device, Nearby()).add(started_ns, started_ns - one.sent_ns)

    def device_lost(self, device: str) -> None:
        """What is in flight there has no result."""
        self._open[device, True] = self._open[device, False] = 0

    def like(self, action: Action, now_ns: int) -> RecordedAction | None:
        """The recorded action that is the same as one that is sent now, if there is one."""
        infers = isinstance(action, Infer)
        if isinstance(action, Infer):
            found = self._infers.get(_infer_key(action))
        else:
            found = self._moves.get((action.device, action.model, isinstance(action, Load)))
        if not found:
            return None
        best = min(found, key=lambda one: abs(one.sent_ns - now_ns))
        return best if infers or abs(best.sent_ns - now_ns) <= ABOUT_NS else None

    def lasts_ns(self, action: Infer | Load, now_ns: int, luck: Luck | None = None) -> tuple[int, str]:
        """How long an action that was not recorded takes if it starts now, and what that rests on."""
        batch = action.batch if isinstance(action, Infer) else 0
        pace = self._pace(action.device, now_ns, luck)
        nearby = self._durations.get((action.device, action.code_id, batch))
        if nearby is not None:
            measured_ns, lasted_ns = nearby.nearest(now_ns)
            other_ns = self._at_pace(action.device, lasted_ns, measured_ns, pace)
            return (nearby.at(now_ns, luck=luck) if other_ns == lasted_ns else other_ns), NEARBY
        seed_ns = self._seed_ns(action) if isinstance(action, Infer) else 0
        if pace and seed_ns:
            return seed_ns * pace // PACE_UNIT, NEARBY
        nearby = self._of_code.get((action.code_id, batch))
        return (action.expected_ns, EXPECTED) if nearby is None else (nearby.at(now_ns), NEARBY)

    def again_ns(self, recorded: RecordedAction, now_ns: int, luck: Luck | None = None) -> int:
        """How long the same action takes if it starts at another time."""
        assert recorded.result is not None
        started_ns = recorded.result.started_ns
        device = recorded.action.device
        return self._at_pace(device, recorded.lasted_ns, started_ns, self._pace(device, now_ns, luck))

    def _at_pace(self, device: str, lasted_ns: int, measured_ns: int, pace: int) -> int:
        """A duration that was measured at one instant, where the device has that pace."""
        before = self._pace(device, measured_ns)
        if pace and before and not before / PACES < pace < before * PACES:
            return lasted_ns * pace // before
        return lasted_ns

    def _pace(self, device: str, at_ns: int, luck: Luck | None = None) -> int:
        """How long everything takes on a device, in parts of what profiles say; 0: unknown."""
        paces = self._paces.get(device)
        return 0 if paces is None else paces.level(at_ns, PACE_COUNT, PACES, luck)

    def link_delays(self, device: str, now_ns: int, luck: Luck | None = None) -> tuple[int, int, int]:
        """How long a message takes to a device, and back; and by how much the device's clock is ahead.

        Where that is more than a message takes, both ways are taken to be as long.
        """
        out = self._out.get(device) or next(iter(self._out.values()), None)
        back = self._back.get(device) or next(iter(self._back.values()), None)
        out_delay_ns = USUAL_DELAY_NS if out is None else out.at(now_ns, luck=luck)
        back_delay_ns = USUAL_DELAY_NS if back is None else back.at(now_ns, luck=luck)
        if out is not None and back is not None:
            # A busy lane tells of one way alone: what changed on the way back did so on the way out.
            measured_ns, value_ns = out.nearest(now_ns)
            extra_ns = back_delay_ns - back.at(measured_ns)
            if abs(extra_ns) > USUAL_DELAY_NS:
                out_delay_ns = value_ns + extra_ns
        if out_delay_ns >= 0 and back_delay_ns >= 0:
            return out_delay_ns, back_delay_ns, 0
        way_ns = max(0, out_delay_ns + back_delay_ns) // 2
        return way_ns, way_ns, out_delay_ns - way_ns


def _infer_key(action: Infer) -> tuple[str, str, int, str]:
    return action.device, action.model, action.batch, action.calls[0].request_id


class ActionPlan:
    """How an action of a counterfactual goes: as ``recorded``, exactly or for about as long."""

    __slots__ = ("exact", "recorded", "rests_on", "track")

    def __init__(self, track: _Track, recorded: RecordedAction | None, *, exact: bool) -> None:
        self.track = track
        self.recorded = recorded
        self.exact = exact
        self.rests_on = RECORDED


class _Track:
    """What was sent to a lane: how much of it is ``open``, and whether all of that goes as recorded."""

    __slots__ = ("exact", "open", "until_ns")

    def __init__(self) -> None:
        self.exact = True
        self.open = 0
        self.until_ns = 0
        """When the last action reaches it: the next one not sooner."""


class RecordedWorker(SimulatedWorker):
    """A worker of a counterfactual.

    An action that is sent at the same instant as in the recording, to a lane on which all went as recorded,
    runs as recorded; its result is not sent here, for it comes with the recorded events (``passing``). Any
    other is executed by the brain.
    """

    __slots__ = ("luck", "passing", "plans", "recording", "tracks")

    def __init__(
        self, name: str, specs: tuple[DeviceSpec, ...], world: World, recording: Recording,
        passing: dict[int, int], luck: Luck | None,
    ) -> None:  # fmt: skip
        super().__init__(name, specs, world)
        self.cores_busy_until_ns = {}  # recorded durations have that in them
        self.recording = recording
        self.luck = luck
        self.passing = passing
        """By id of a recorded action: the id of the action whose result its result is."""
        self.plans: dict[int, ActionPlan] = {}
        """By id, of actions without a result."""
        self.tracks = {(spec.device, infers): _Track() for spec in specs for infers in (True, False)}

    def hold(self, device: str, codes: Iterable[Code], weights: Iterable[Resident]) -> None:
        """It has prepared codes, and holds weights."""
        machine = self.machine
        machine.resume(device, [code for code in codes if not machine.prepared(device, code.code_id)], ())
        machine.resume(device, (), [one for one in weights if machine.prepared(device, one.code_id)])

    def send(self, message: Action | CodeAdded | CodeRemoved | RetainWeights, now_ns: int) -> None:
        """Send it a message from the controller; codes come as recorded."""
        if isinstance(message, RetainWeights):
            self.world.at(now_ns, TO_WORKER, self, message)
        elif isinstance(message, Infer | Load | Unload):
            self._send_action(message, now_ns)

    def _send_action(self, action: Action, now_ns: int) -> None:
        track = self.tracks[action.device, isinstance(action, Infer)]
        recorded = self.recording.like(action, now_ns)
        exact = (
            recorded is not None
            and recorded.sent_ns == now_ns
            and (track.exact or (not track.open and recorded.idle))
            and recorded.is_same(action)
        )
        track.exact = exact
        if recorded is not None and exact:
            self.passing[recorded.action.action_id] = action.action_id
            self.run_as(recorded, action, now_ns)
            return
        track.open += 1
        self.plans[action.action_id] = ActionPlan(track, recorded, exact=False)
        out_delay_ns, _, skew_ns = self.recording.link_delays(action.device, now_ns, self.luck)
        arrival_ns = now_ns + out_delay_ns
        if arrival_ns < track.until_ns:
            arrival_ns = track.until_ns
        track.until_ns = arrival_ns
        if skew_ns:
            window = action.window
            window = Window(window.earliest_ns - skew_ns, window.latest_ns - skew_ns)
            self.world.at(arrival_ns, TO_WORKER, self, replace(action, window=window))
        else:
            self.world.at(arrival_ns, TO_WORKER, self, action)

    def run_as(self, recorded: RecordedAction, action: Action, now_ns: int) -> None:
        """Have an action run at the instants that were recorded: its lane is occupied until then."""
        result = recorded.result
        track = self.tracks[action.device, isinstance(action, Infer)]
        start_ns = now_ns
        if result is not None:
            if result.status is not Status.OK or recorded.arrived_ns < now_ns:
                return  # it was refused, or failed: nothing changes by it
            # A clock that is off says that it ran after its result was here.
            last_ns = recorded.arrived_ns - recorded.lasted_ns
            start_ns = max(now_ns, min(result.started_ns, last_ns))
        track.open += 1
        self.plans[action.action_id] = ActionPlan(track, recorded, exact=True)
        window = Window(min(action.window.earliest_ns, start_ns), max(action.window.latest_ns, start_ns))
        track.until_ns = max(track.until_ns, start_ns)
        self.world.at(start_ns, TO_WORKER, self, replace(action, window=window))

    def lasts_ns(self, action: Action, now_ns: int) -> int:
        """How long an action that starts now takes."""
        plan = self.plans.get(action.action_id)
        if plan is None:  # the worker's own UNLOAD
            return LEAST_NS
        recorded = plan.recorded
        if recorded is not None and recorded.result is None and plan.exact:
            return LONGEST_NS
        if recorded is not None and recorded.result is not None and recorded.result.status is Status.OK:
            if plan.exact:
                return min(recorded.result.ended_ns, recorded.arrived_ns) - now_ns
            if self.luck is None or not isinstance(action, Load):  # LOADs at another time may last as others
                return self.recording.again_ns(recorded, now_ns, self.luck)
        if isinstance(action, Unload):
            return LEAST_NS
        lasts_ns, plan.rests_on = self.recording.lasts_ns(action, now_ns, self.luck)
        return lasts_ns

    def _send_to_controller(self, message: WorkerEffect, now_ns: int) -> None:
        if not isinstance(message, Result):
            return  # as recorded
        plan = self.plans.pop(message.action_id, None)
        if plan is None:
            return
        plan.track.open -= 1
        if plan.exact:
            if plan.recorded is not None and plan.recorded.result is not None:
                self.from_worker_until_ns = max(self.from_worker_until_ns, plan.recorded.arrived_ns)
            return
        _, back_delay_ns, skew_ns = self.recording.link_delays(message.device, now_ns, self.luck)
        if skew_ns:
            started_ns, ended_ns = message.started_ns + skew_ns, message.ended_ns + skew_ns
            message = replace(message, started_ns=started_ns, ended_ns=ended_ns)
        arrival_ns = max(now_ns + back_delay_ns, self.from_worker_until_ns)
        self.from_worker_until_ns = arrival_ns
        self.world.at(arrival_ns, TO_CONTROLLER, self, message)

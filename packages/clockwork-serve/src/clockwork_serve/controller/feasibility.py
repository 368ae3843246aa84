"""Feasibility: whether any schedule can meet a deadline, and where a request would end first if none can.

``admission`` rejects by it (``reject_infeasible`` switches that off).
"""

from __future__ import annotations

from heapq import heappop, heappush
from typing import Final

from clockwork_serve.controller.belief import Belief
from clockwork_serve.controller.cluster import DeviceBelief, Queue, ServedModel
from clockwork_serve.controller.estimates import Samples, drop_outliers
from clockwork_serve.controller.lanes import LaneBelief, Watch
from clockwork_serve.controller.life import READY
from clockwork_serve.controller.placement import ahead_ns, usual_cost_ns
from clockwork_serve.controller.record import Record
from clockwork_serve.controller.timers import NEVER_NS
from clockwork_serve.messages import SoonestEnd

# ------------------------------------------------------------
# Devices by when their load lanes are free, soonest first.


SORTED_MIN: Final = 4
"""At least this many devices are sorted when one is needed."""


class Loaders(Record):
    """All devices in a lazy heap by when their load lanes are free.

    Each has one live entry, whose key is a lower bound and is corrected when it surfaces.
    """

    __slots__ = ("_count", "_heap", "_soonest", "_until_ns")

    def __init__(self) -> None:
        self._count = 0
        self._heap: list[tuple[int, int, DeviceBelief]] = []
        """(instant, index, device); stale where the device's ``load_key_ns`` differs."""
        self._soonest: list[DeviceBelief] = []
        """Cache: the first devices in order."""
        self._until_ns = 0
        """The cache is valid until this instant, for until then none of these lanes is late."""

    def joined(self, device: DeviceBelief) -> None:
        """Add a device."""
        self._count += 1
        self.forget()
        self.lower(device, 0)

    def lost(self, device: DeviceBelief) -> None:
        """Remove a device."""
        self._count -= 1
        self.forget()
        device.load_key_ns = NEVER_NS

    def lower(self, device: DeviceBelief, free_ns: int) -> None:
        """Lower the key of a device whose load lane may be free sooner."""
        if free_ns < device.load_key_ns:
            device.load_key_ns = free_ns
            heappush(self._heap, (free_ns, device.index, device))

    def forget(self) -> None:
        """Drop the cache: load lanes changed."""
        self._until_ns = -1

    def __len__(self) -> int:
        return self._count

    def get(self, at: int, now_ns: int) -> DeviceBelief | None:
        """The device whose load lane is free as the ``at``-th, from 0; None if there are fewer devices."""
        if at >= self._count:
            return None
        if at >= len(self._soonest) or now_ns > self._until_ns:
            self._soonest = self._find_soonest(min(self._count, max(at + 1, SORTED_MIN)), now_ns)
        return self._soonest[at]

    def _find_soonest(self, count: int, now_ns: int) -> list[DeviceBelief]:
        heap = self._heap
        found: list[tuple[int, int, DeviceBelief]] = []
        while len(found) < count:
            entry = heappop(heap)
            free_ns, index, device = entry
            if device.load_key_ns != free_ns:
                continue
            actual_ns = device.load.available_ns(now_ns)
            if actual_ns > free_ns and device.load.busy(now_ns):
                device.load_key_ns = actual_ns
                heappush(heap, (actual_ns, index, device))
                continue
            device.load_key_ns = NEVER_NS
            found.append(entry)
        for entry in found:
            entry[2].load_key_ns = entry[0]
            heappush(heap, entry)
        self._until_ns = NEVER_NS
        for entry in found:
            self._until_ns = min(self._until_ns, entry[2].load.head_end_ns)
        return [device for _, _, device in found]


# ------------------------------------------------------------
# Infeasible requests.
#
# A request is infeasible if on every device the earliest possible start, plus the estimate of the least
# batch, is after its due time; weights that are not resident add their LOAD. Only each queue's head is
# watched (the others are due later), on one lane where it is feasible. It is rechecked when that lane has
# been given so much work, or so much time has passed, that it may not be feasible there any more.


LOADERS_MAX: Final = 4
"""At most this many devices that lack the weights are tried, in the order in which load lanes are free."""

PROBED_RANK: Final = 7
"""The rank of the load lane that is tried first, if there are more than ``LOADERS_MAX``: the policy uses it
late, so a queue that is watched there is rarely rechecked."""


class EarliestFinish:
    """The earliest possible end of a queue's head on one lane.

    It ends at ``end_ns`` if it starts on ``lane`` of ``device`` as soon as that is free, and needs
    ``rest_ns`` from then. ``samples`` is the estimate that contributes most.
    """

    __slots__ = ("device", "end_ns", "lane", "rest_ns", "samples")

    def __init__(
        self, device: DeviceBelief, lane: LaneBelief, end_ns: int, rest_ns: int, samples: Samples
    ) -> None:
        self.device = device
        self.lane = lane
        self.end_ns = end_ns
        self.rest_ns = rest_ns
        self.samples = samples


class Feasibility(Record):
    """Watches the heads of queues, and finds those that become infeasible."""

    def __init__(self, belief: Belief) -> None:
        self._belief = belief
        self._timers = belief.timers
        self._look_ahead_ns = belief.config.look_ahead_ns
        self._loaders = Loaders()
        self._load_moves = 0
        """``Belief.load_moves`` when ``_loaders`` was last brought up to date."""

    def device_joined(self, device: DeviceBelief) -> None:
        """Create the watches of a device's lanes."""
        device.exec.watch = Watch(device.exec, 2 * device.index)
        device.load.watch = Watch(device.load, 2 * device.index + 1)
        self._loaders.joined(device)

    def device_lost(self, device: DeviceBelief) -> None:
        """Have the queues rechecked that were watched on a lost device."""
        self._loaders.lost(device)
        for lane in (device.exec, device.load):
            watch, lane.watch = lane.watch, None
            if watch is not None:
                self._timers.set(watch, NEVER_NS)
                for queue in watch.clear():
                    self._belief.recheck(queue)

    def load_ended(self, device: DeviceBelief, now_ns: int) -> None:
        """A LOAD ended: its lane may be free sooner than predicted."""
        self._loaders.lower(device, device.load.available_ns(now_ns))
        self._belief.load_moves += 1

    def check_lanes(self, now_ns: int) -> None:
        """Have the queues rechecked whose heads may be infeasible on lanes that were given work."""
        for lane in self._belief.dirty_lanes:
            lane.dirty = False
            if lane.watch is not None:
                self.check_watch(lane.watch, now_ns)
        self._belief.dirty_lanes.clear()

    def check_watch(self, watch: Watch, now_ns: int) -> None:
        """Have the queues of a watch rechecked whose heads can no longer start there in time."""
        if watch.heap:
            for queue in watch.surface(watch.lane.available_ns(now_ns)):
                self._belief.recheck(queue)
        if watch.heap:
            self._arm(watch, watch.heap[0][0], now_ns)
        else:
            watch.first_ns = NEVER_NS
            self._timers.set(watch, NEVER_NS)

    def _arm(self, watch: Watch, first_ns: int, now_ns: int) -> None:
        """Set the timer to before the first head becomes infeasible, early enough for some more work."""
        behind_ns = max(watch.lane.behind_ns, watch.lane.network_ns)
        if behind_ns < self._look_ahead_ns < first_ns - now_ns:
            behind_ns = self._look_ahead_ns
        watch.first_ns = first_ns
        watch.behind_ns = behind_ns
        self._timers.set(watch, first_ns - behind_ns + 1)

    def feasible(self, queue: Queue, due_ns: int, now_ns: int) -> bool:
        """Whether a device that has, or is loading, the weights can end the head by ``due_ns``.

        If so, the queue is watched on that lane from now on.
        """
        for strategy in queue.strategies:
            lane = strategy.lane
            latest_ns = due_ns - strategy.least.estimate_ns
            if lane.available_ns(now_ns) <= latest_ns:
                watch = lane.watch
                if (
                    watch is not None and (queue.watch is not watch or queue.place_ns > latest_ns)
                    and watch.place(queue, latest_ns)
                ):  # fmt: skip
                    self._arm(watch, latest_ns, now_ns)
                return True
        for residency in queue.model.residencies.values():
            if residency.state != READY:
                infer_ns = residency.code.timings.infer(queue.least, queue.signature).estimate_ns
                latest_ns = due_ns - infer_ns
                lane = residency.device.exec
                if residency.ready_ns <= latest_ns and lane.available_ns(now_ns) <= latest_ns:
                    self._watch(queue, lane, latest_ns, now_ns)
                    return True
        return False

    def mark_slow(self, queue: Queue) -> bool:
        """Mark the residencies where the least batch takes longer than the head's whole SLO allows.

        The head is feasible by a LOAD elsewhere. Marked residencies count as serving no demand; otherwise the
        policy would rate that LOAD as needless. True if one was marked: the policy is to schedule again.
        """
        found = False
        request = queue.waiters[0].request
        given_ns = self._belief.due_ns(request) - request.arrival_ns
        for strategy in queue.strategies:
            residency = strategy.residency
            if not residency.slow and strategy.least.estimate_ns + strategy.lane.network_ns > given_ns:
                residency.slow = found = True
                self._belief.mark_dirty(residency.model)
        return found

    def later_feasible(self, queue: Queue, given_ns: int) -> bool:
        """Whether some device could serve requests that have this time, once it has the weights.

        Then a request that is too late for the LOAD is worth one: without it, all later ones would be
        refused like it.
        """
        model = queue.model
        size = model.model.weights.size
        for device in self._belief.devices.values():
            code = device.code_of(model)
            if code is None or size > device.room_bytes:
                continue
            infer_ns = code.timings.infer(queue.least, queue.signature).estimate_ns
            if infer_ns + device.exec.network_ns <= given_ns:
                return True
        return False

    def earliest_finish(self, queue: Queue, due_ns: int, now_ns: int) -> EarliestFinish | None:
        """The earliest finish of a request that would join a queue now, if that is too late.

        For admission queries: nothing is watched, and requests that are due before it run first. None if it
        is feasible, or if no device can serve the model at all.
        """
        best: EarliestFinish | None = None
        for residency in queue.model.residencies.values():
            samples = residency.code.timings.infer(queue.least, queue.signature)
            lane = residency.device.exec
            start_ns = lane.available_ns(now_ns)
            if residency.state == READY:
                room_ns = due_ns - samples.estimate_ns - start_ns
                if room_ns >= 0:
                    start_ns += ahead_ns(residency.device.agenda, queue.level, due_ns, room_ns)
            else:
                start_ns = max(start_ns, residency.ready_ns)
            finish = _finish_where_loaded(residency.device, samples, start_ns)
            if finish.end_ns <= due_ns:
                return None
            if best is None or finish.end_ns < best.end_ns:
                best = finish
        loadable, soonest = self.feasible_after_load(queue, due_ns, now_ns, watch=False)
        if loadable:
            return None
        return best or self.best(queue, soonest, now_ns)

    def soonest_end(self, queue: Queue, now_ns: int) -> SoonestEnd | None:
        """When a request could end at the soonest that is due after all of a queue; None if it is empty.

        For gateways: a lower bound of what ``earliest_finish`` finds. Nothing changes.
        """
        if not queue.dues:
            return None
        due_ns = queue.dues[-1]
        soonest_ns = other_end_ns = NEVER_NS
        each_ns = NEVER_NS
        for residency in queue.model.residencies.values():
            infer_ns = residency.code.timings.infer(queue.least, queue.signature).estimate_ns
            free_ns = residency.device.exec.available_ns(now_ns)
            if residency.state == READY:
                # The later a request is due, the more is due before it.
                end_ns = free_ns + ahead_ns(residency.device.agenda, queue.level, due_ns, NEVER_NS) + infer_ns
                soonest_ns = min(soonest_ns, end_ns)
            else:
                other_end_ns = min(other_end_ns, max(free_ns, residency.ready_ns) + infer_ns)
        for strategy in queue.strategies:
            each_ns = min(each_ns, usual_cost_ns(strategy.batches) // len(queue.strategies))
        for device in self._belief.devices.values():
            other_end_ns = min(other_end_ns, self._end_after_load(queue, device, now_ns)[0])
        if not queue.strategies:
            return None
        slack_ns = self._belief.slack_ns
        return SoonestEnd(
            due_ns=due_ns + slack_ns, end_ns=soonest_ns + slack_ns, each_ns=each_ns,
            other_end_ns=min(other_end_ns + slack_ns, NEVER_NS),
        )  # fmt: skip

    def feasible_after_load(
        self, queue: Queue, due_ns: int, now_ns: int, *, watch: bool = True
    ) -> tuple[bool, DeviceBelief | None]:
        """Whether a device that lacks the weights can load them and end by ``due_ns``.

        If one can, the queue is watched there, on the load lane that is free last: the policy uses it last.
        If none can, the second value is the device that would end soonest.
        """
        if self._load_moves != self._belief.load_moves:
            self._load_moves = self._belief.load_moves
            self._loaders.forget()
        soonest: DeviceBelief | None = None
        soonest_ns = NEVER_NS
        probe = min(PROBED_RANK, len(self._loaders) - 1)
        if probe >= LOADERS_MAX:
            # See PROBED_RANK.
            probed = self._loaders.get(probe, now_ns)
            if probed is not None:
                end_ns, rest_ns = self._end_after_load(queue, probed, now_ns)
                if end_ns <= due_ns:
                    if watch:
                        self._watch(queue, self._lane(queue, probed), due_ns - rest_ns, now_ns)
                    return True, None
        at = looked_at = latest_ns = 0
        lane: LaneBelief | None = None
        while looked_at < LOADERS_MAX and (device := self._loaders.get(at, now_ns)) is not None:
            at += 1
            end_ns, rest_ns = self._end_after_load(queue, device, now_ns)
            if end_ns <= due_ns:
                # Lanes are tried in the order in which they are free, so the last one found is free last.
                lane, latest_ns = self._lane(queue, device), due_ns - rest_ns
            if end_ns != NEVER_NS:  # devices that have the weights, or cannot hold them, do not count
                looked_at += 1
                if end_ns < soonest_ns:
                    soonest, soonest_ns = device, end_ns
        if watch and lane is not None:
            self._watch(queue, lane, latest_ns, now_ns)
        return lane is not None, soonest

    def _end_after_load(self, queue: Queue, device: DeviceBelief, now_ns: int) -> tuple[int, int]:
        """When the head could end on a device that lacks the weights, and how long that takes on a free lane.

        ``NEVER_NS`` if the device cannot serve the model. One that is still preparing the code counts as if
        it had the weights.
        """
        model = queue.model
        weights = model.model.weights
        if device.name in model.residencies or weights.size > device.room_bytes:
            return NEVER_NS, 0
        if weights.weights_id in device.failed_weights:
            return NEVER_NS, 0
        if device.pending_codes and model.code_id in device.pending_codes:
            samples = self._pending_samples(queue, device)
            if samples is not None:
                return device.exec.available_ns(now_ns) + samples.estimate_ns, samples.estimate_ns
        code = device.codes.get(model.code_id)
        if code is None:
            return NEVER_NS, 0
        infer_ns = code.timings.infer(queue.least, queue.signature).estimate_ns
        load_ns = code.timings.load(weights.size).estimate_ns
        ready_ns = device.load.available_ns(now_ns) + load_ns
        exec_free_ns = device.exec.available_ns(now_ns)
        return max(exec_free_ns, ready_ns) + infer_ns, load_ns + infer_ns

    def _pending_samples(self, queue: Queue, device: DeviceBelief) -> Samples | None:
        estimator, code_id, kind = self._belief.estimator, queue.model.code_id, device.spec.kind
        if estimator.profile(code_id, kind) is None:
            return None
        return estimator.timings(device.name, kind, code_id).infer(queue.least, queue.signature)

    def _lane(self, queue: Queue, device: DeviceBelief) -> LaneBelief:
        """The lane that limits a device that lacks the weights; cf. ``_end_after_load``."""
        return device.exec if queue.model.code_id in device.pending_codes else device.load

    def _watch(self, queue: Queue, lane: LaneBelief, latest_ns: int, now_ns: int) -> None:
        watch = lane.watch
        assert watch is not None
        if (queue.watch is not watch or queue.place_ns > latest_ns) and watch.place(queue, latest_ns):
            self._arm(watch, latest_ns, now_ns)

    def try_unmeasured(self, queue: Queue, left_ns: int) -> None:
        """Where the least batch of a queue was never run, expect it to be done within ``left_ns``.

        Its estimate is derived from other batches and shapes. If it refused requests, nothing would ever be
        measured.
        """
        model, slack_ns = queue.model, self._belief.slack_ns
        for device in self._belief.devices.values():
            code = device.codes.get(model.code_id)
            if code is not None and (queue.signature or queue.least in code.profile.extrapolated):
                needed_ns = slack_ns + device.exec.network_ns
                if device.name not in model.residencies:
                    needed_ns += code.timings.load(model.model.weights.size).estimate_ns
                code.timings.infer(queue.least, queue.signature).try_within(left_ns - needed_ns)

    def reset_estimates(
        self, queue: Queue, finish: EarliestFinish, due_ns: int, given_ns: int, now_ns: int
    ) -> None:
        """A head is infeasible: drop and reset the estimates that may be why, and are outliers or stale."""
        if not finish.lane.outstanding:
            start_ns = now_ns + finish.rest_ns - finish.samples.estimate_ns
            drop_outliers(finish.samples, due_ns - start_ns, now_ns, at_once=True)
        self._reset_stale(queue, finish, given_ns, now_ns)

    def _reset_stale(self, queue: Queue, finish: EarliestFinish, given_ns: int, now_ns: int) -> None:
        """Reset stale estimates that make every request with ``given_ns`` to its deadline infeasible."""
        given_ns -= self._belief.slack_ns
        for strategy in queue.strategies:
            allowed_ns = given_ns - strategy.lane.network_ns
            for batch in strategy.batches:
                if batch.samples.estimate_ns > allowed_ns:
                    strategy.residency.code.timings.reset_stale(batch.samples, allowed_ns, now_ns)
        allowed_ns = given_ns - finish.lane.network_ns - (finish.rest_ns - finish.samples.estimate_ns)
        timings = self._belief.estimator.timings(
            finish.device.name, finish.device.spec.kind, queue.model.code_id
        )
        timings.reset_stale(finish.samples, allowed_ns, now_ns)

    def best(self, queue: Queue, soonest: DeviceBelief | None, now_ns: int) -> EarliestFinish | None:
        """The earliest finish on any device; None if none can serve the model at all.

        Of devices that lack the weights, only ``soonest`` is considered.
        """
        best: EarliestFinish | None = None
        for residency in queue.model.residencies.values():
            device = residency.device
            start_ns = device.exec.available_ns(now_ns)
            if residency.state != READY:
                start_ns = max(start_ns, residency.ready_ns)
            samples = residency.code.timings.infer(queue.least, queue.signature)
            finish = _finish_where_loaded(device, samples, start_ns)
            if best is None or finish.end_ns < best.end_ns:
                best = finish
        if soonest is not None:
            end_ns, rest_ns = self._end_after_load(queue, soonest, now_ns)
            if best is None or end_ns < best.end_ns:
                best = self._finish_after_load(queue, soonest, end_ns, rest_ns)
        return best

    def _finish_after_load(
        self, queue: Queue, device: DeviceBelief, end_ns: int, rest_ns: int
    ) -> EarliestFinish:
        """The result of ``_end_after_load`` as an EarliestFinish."""
        lane = self._lane(queue, device)
        samples = self._pending_samples(queue, device) if lane is device.exec else None
        if samples is None:
            timings = device.codes[queue.model.code_id].timings
            load = timings.load(queue.model.model.weights.size)
            infer = timings.infer(queue.least, queue.signature)
            samples = load if load.estimate_ns > infer.estimate_ns else infer
        return EarliestFinish(device, lane, end_ns, rest_ns, samples)

    def why_unservable(self, model: ServedModel) -> str:
        """The message where no device can serve a model."""
        devices = self._belief.devices
        if not devices:
            hung = ", ".join(self._belief.hung)
            return f"no worker answers: {hung} hung" if hung else "no worker is up"
        size = model.model.weights.size
        backend = model.code.backend
        able = [device for device in devices.values() if device.spec.runs(backend)]
        if not able:
            return f"no device is up that runs {backend} models"
        for device in able:
            failure = device.failed_codes.get(model.code_id)
            if failure is not None:
                return f"device {device.name} could not prepare the model: {failure}"
            failure = device.failed_weights.get(model.model.weights.weights_id)
            if failure is not None:
                return f"device {device.name} has no weights of the model: {failure}"
        largest = max(device.room_bytes for device in able)
        return f"the model's {size} bytes of weights fit no device; the largest has {largest}"

    def check(self) -> None:
        """Assert that every waiting queue is watched."""
        for model in self._belief.models.values():
            for queue in model.queues.values():
                watch = queue.watch
                assert not queue.waiters or queue.to_recheck or watch is not None
                assert watch is None or (queue.place_ns, queue.order, queue) in watch.heap
                assert watch is None or watch.first_ns <= queue.place_ns


def _finish_where_loaded(device: DeviceBelief, samples: Samples, start_ns: int) -> EarliestFinish:
    """An INFER at ``start_ns`` on a device that has, or will have, the weights."""
    return EarliestFinish(device, device.exec, start_ns + samples.estimate_ns, samples.estimate_ns, samples)

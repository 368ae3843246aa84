"""Estimates of durations, delays and the popularity of models, and the reset of stale ones."""

from __future__ import annotations

from math import log2
from typing import Final

from clockwork_serve.controller.record import Record
from clockwork_serve.messages import Profile
from clockwork_serve.units import NS_PER_MS, NS_PER_S, NS_PER_US

# ------------------------------------------------------------
# Quantiles of what was measured, from counts.


class Spread(Record):
    """Quantiles of a value, from counts by its size; recent values count most.

    A count covers a 32nd of a power of two of microseconds, so quantiles are up to 3 % or 1 us too long;
    negative values count as 0. All counts are halved whenever ``size`` values are there: the quantile follows
    drift, and holds for a mixture of two modes as well.
    """

    __slots__ = ("_counts", "_size", "total")

    _counts: dict[int, int]
    _size: int
    total: int

    def __init__(self, size: int) -> None:
        self._size = size
        self._counts = {}
        self.total = 0

    def clear(self) -> None:
        """Forget all values."""
        self._counts.clear()
        self.total = 0

    def add(self, value_ns: int) -> None:
        """Add a value, in ns."""
        at = value_ns >> 10 if value_ns > 0 else 0
        if at >= 64:
            shift = at.bit_length() - 6
            at = (shift << 5) + (at >> shift)
        counts = self._counts
        counts[at] = counts.get(at, 0) + 1
        self.total += 1
        while self.total >= self._size:
            self._counts = {at: count >> 1 for at, count in self._counts.items() if count > 1}
            self.total >>= 1

    def quantile_ns(self, share: float) -> int:
        """The value that this share of all does not exceed; 0 without values."""
        allowed, counts = int((1.0 - share) * self.total), self._counts
        for at in sorted(counts, reverse=True):
            allowed -= counts[at]
            if allowed < 0:
                return ((at & 31) + 33 << (at >> 5) - 1 if at >= 64 else at + 1) << 10
        return 0


# ------------------------------------------------------------
# Durations of actions: a high quantile, linearly interpolated, of the last ten measured ones (paper section
# 5.3 and the released code).


GUESS_NS: Final = NS_PER_MS
"""The estimate where the profile is a guess: with a higher one all requests might be rejected, and nothing
would ever be measured."""
UNIT_BITS: Final = 10
UNIT: Final = 1 << UNIT_BITS
"""A pace of one."""
SIGNATURES_MAX: Final = 1024
"""Windows of one code on one device for shapes that requests choose; bounded, for clients choose them."""


FIRST_SAMPLES: Final = 2
"""With no more samples than these, a seed among them, an estimate is a first one."""


PREDICTIONS: Final = 1 << 12
"""Durations of one kind that count in full; see ``Spread``. Enough for a share of 99.9 %."""
MEAN_BITS: Final = 4
"""The mean is over about ``2 ** MEAN_BITS`` of them."""
FAR_BITS: Final = 2
"""A duration is far from its seed if they differ by more than a quarter (1 / 2 ** ``FAR_BITS``) of that."""


class Samples(Record):
    """The last ``size`` samples of one duration, and their quantile.

    The seed (from the profile) is the first sample, so that the first measurement alone does not make the
    estimate; but a seed that is a guess is replaced by the first measurement.
    """

    __slots__ = (
        "_errors", "_second_ns", "_trial_ns", "estimate_ns", "guessed", "mean_ns", "measured_ns", "quantile",
        "samples", "seed_ns", "size", "trial_failed", "usual_ns",
    )  # fmt: skip

    _errors: Spread | None
    _second_ns: int
    _trial_ns: int
    estimate_ns: int
    guessed: bool
    mean_ns: int
    measured_ns: int
    quantile: float
    samples: list[int]
    seed_ns: int
    size: int
    trial_failed: bool
    usual_ns: int

    def __init__(self, seed_ns: int, size: int, quantile: float, *, guessed: bool = False) -> None:
        self.guessed = guessed
        self.samples = [seed_ns]
        self.size = size
        self.quantile = quantile
        self.usual_ns = self.seed_ns = self.estimate_ns = seed_ns
        """The profile's duration; that as other batches of the code corrected it; the estimate."""
        self.measured_ns = 0
        """When the last sample was measured."""
        self.trial_failed = False
        """The last trial measured a longer duration than it was allowed."""
        self.mean_ns = 0
        """The mean of about the last sixteen measured durations; 0 without one."""
        self._errors = None
        """By how much measured durations exceeded that mean, once there are some."""
        self._trial_ns = 0
        """The duration allowed to the trial for which longer samples were dropped, until the next
        measurement; 0: no trial."""
        self._second_ns = 0
        """The second largest sample, where the estimate depends on the two largest of a full window only."""

    def learn(self, lasted_ns: int, now_ns: int) -> bool:
        """Add a measured duration, from a result that is observed now; true if it is far from its seed."""
        self.measured_ns = now_ns
        if self._trial_ns:
            self.trial_failed = lasted_ns > self._trial_ns
            self._trial_ns = 0
        errors = self._errors
        if errors is None:
            self._errors = Spread(PREDICTIONS)
            self.mean_ns = lasted_ns
        else:
            over_ns = lasted_ns - self.mean_ns
            self.mean_ns += over_ns >> MEAN_BITS
            if over_ns > 0:
                errors.add(over_ns)
            else:
                errors.total += 1  # quantiles below the least count are 0
        samples, dropped_ns = self.samples, -1
        if self.guessed or len(samples) >= self.size:
            dropped_ns = samples.pop(0)
        self.guessed = False
        samples.append(lasted_ns)
        if lasted_ns != dropped_ns and (lasted_ns > self._second_ns or not -1 < dropped_ns < self._second_ns):
            self._update()
        over_ns, limit_ns = lasted_ns - self.seed_ns, self.seed_ns >> FAR_BITS
        return over_ns > limit_ns or -over_ns > limit_ns

    def quantile_ns(self, share: float) -> int:
        """The duration that this share of executions is expected not to exceed, for a promise.

        The mean of the last few and, of what durations exceeded it by, the quantile over the last
        ``PREDICTIONS`` or so: it moves with the mean. Of fewer than 1 / (1 - ``share``) results that is the
        largest. The estimate where none was measured.
        """
        errors = self._errors
        return self.estimate_ns if errors is None else self.mean_ns + errors.quantile_ns(share)

    def forget_above(self, most_ns: int) -> None:
        """Drop all samples above ``most_ns`` for a trial; at least one sample must remain."""
        self.samples = [sample_ns for sample_ns in self.samples if sample_ns <= most_ns]
        self._trial_ns = most_ns
        self._update()

    def restart(self, most_ns: int) -> None:
        """Return to the seed for a trial of at most ``most_ns``; the next measurement replaces the seed.

        To the profile, if the seed is longer than that.
        """
        self.guessed = True
        self.samples = [self.seed_ns if self.seed_ns <= most_ns else self.usual_ns]
        self._trial_ns = most_ns
        self._update()

    def try_within(self, allowed_ns: int) -> None:
        """Expect little of what was never run and would be refused: only a run shows what it takes."""
        if self.guessed and not self.measured_ns and self.estimate_ns > allowed_ns:
            self.samples = [min(self.seed_ns, GUESS_NS)]
            self._update()

    def reseed(self, seed_ns: int, now_ns: int) -> None:
        """Change the seed; samples that are far from it give way to it, unless measured a moment ago."""
        self.seed_ns = seed_ns
        if not self.measured_ns or (now_ns > self.measured_ns + VALID_NS and self.far(self.median_ns)):
            self.guessed = self.guessed or self.measured_ns > 0
            self.samples = [seed_ns]
            self._update()

    def far(self, lasted_ns: int) -> bool:
        """Whether a duration is far from the seed."""
        over_ns, limit_ns = lasted_ns - self.seed_ns, self.seed_ns >> FAR_BITS
        return over_ns > limit_ns or -over_ns > limit_ns

    @property
    def unproven(self) -> bool:
        """Whether it has one sample only: its seed, or a first measurement in place of a guess."""
        return len(self.samples) < 2

    @property
    def median_ns(self) -> int:
        """The middle sample (of an even number, the lower one)."""
        return sorted(self.samples)[(len(self.samples) - 1) // 2]

    def _update(self) -> None:
        ordered = sorted(self.samples)
        last = len(ordered) - 1
        rank = self.quantile * last
        low = int(rank)
        high = min(low + 1, last)
        self.estimate_ns = round(ordered[low] + (rank - low) * (ordered[high] - ordered[low]))
        self._second_ns = ordered[last - 1] if last and low >= last - 1 and last + 1 == self.size else 0


class Timings(Record):
    """Durations of one code on one device: a window per (batch size, signature), and one for LOAD.

    Windows are created at first use. Models that share a code share them. Of windows with a signature only
    the most recently used are kept.
    """

    __slots__ = ("_code_id", "_estimator", "_infer", "_kind", "_load", "_plain", "pace")

    def __init__(self, estimator: Estimator, code_id: str, kind: str) -> None:
        self._estimator = estimator
        self._code_id = code_id
        self._kind = kind
        self._plain: dict[int, Samples] = {}
        """Windows of INFERs without a signature, by batch size."""
        self._infer: dict[tuple[int, str], Samples] = {}
        self._load: Samples | None = None
        self.pace = self._pace_of(UNIT)
        """How much time the device needs, in parts (1 / ``UNIT``) of what the code's first profile says."""

    def _pace_of(self, times: int) -> int:
        """The pace where everything takes so many times (in parts of ``UNIT``) what its profile says."""
        profile = self._estimator.profile(self._code_id, self._kind)
        base_ns = self._estimator.base_ns(self._code_id)
        if profile is None or profile.guessed or not base_ns:
            return UNIT
        return max(1, times * profile.infer_ns[1] // base_ns)

    def infer(self, batch: int, signature: str) -> Samples:
        """The window of an INFER."""
        if signature:
            return self._infer_of_shape((batch, signature))
        window = self._plain.get(batch)
        if window is None:
            known = next(iter(self._plain.values()), None)
            window = self._plain[batch] = self._seeded(batch)
            if known is not None and known.seed_ns != known.usual_ns:
                window.reseed(max(1, known.seed_ns * window.usual_ns // known.usual_ns), 0)
        return window

    def load(self, size: int) -> Samples:
        """The window of a LOAD of ``size`` bytes (models of one code have one size)."""
        if self._load is None:
            profile = self._profile()
            self._load = self._estimator.seeded(profile, profile.load_ns(size))
        return self._load

    def rescale(self, samples: Samples, now_ns: int) -> None:
        """Expect of all batches what a window has seen: as many times the profile as its median duration is.

        Call it where a duration was far from its seed: the device is not as fast as the one that was
        profiled, or not any more.
        """
        seed_ns, usual_ns = samples.median_ns, samples.usual_ns
        if samples.far(seed_ns) and not self._profile().guessed:
            for window in self._plain.values():
                window.reseed(max(1, seed_ns * window.usual_ns // usual_ns), now_ns)
            self.pace = self._pace_of(UNIT * seed_ns // usual_ns)

    def reset_stale(self, samples: Samples, allowed_ns: int, now_ns: int) -> None:
        """Reset an estimate that is stale and longer than a rejected request was allowed, for a trial.

        Not if other batches were measured a moment ago, and by those it would take too long as well.
        """
        least_ns = min(samples.seed_ns, samples.usual_ns)
        if not least_ns <= allowed_ns < samples.estimate_ns or drop_outliers(samples, allowed_ns, now_ns):
            return
        if samples.seed_ns > allowed_ns:
            for other in self._plain.values():
                if other is not samples and other.measured_ns and now_ns < other.measured_ns + VALID_NS:
                    return
        if _is_old(samples, now_ns):
            samples.restart(allowed_ns)

    def _infer_of_shape(self, key: tuple[int, str]) -> Samples:
        windows = self._infer
        window = windows.pop(key, None)
        if window is None:
            window = self._seeded(*key)
            if len(windows) >= SIGNATURES_MAX:
                del windows[next(iter(windows))]
        windows[key] = window
        return window

    def _seeded(self, batch: int, signature: str = "") -> Samples:
        """A window for an INFER: a guess where that batch, or requests of that shape, were never run."""
        profile = self._profile()
        ran = not signature and batch not in profile.extrapolated
        return self._estimator.seeded(profile, _infer_seed_ns(profile, batch), ran=ran)

    def _profile(self) -> Profile:
        profile = self._estimator.profile(self._code_id, self._kind)
        assert profile is not None, f"there is no profile of {self._code_id} on {self._kind}"
        return profile


class Estimator(Record):
    """Timings by device and code, seeded from profiles."""

    def __init__(self, window: int, quantile: float) -> None:
        self._size = window
        self._quantile = quantile
        self._profiles: dict[tuple[str, str], Profile] = {}
        """Profiles by (code, device kind): the seeds of windows."""
        self._first_kinds: dict[str, str] = {}
        """By code: the kind of device of its first profile, by which demand is counted."""
        self._timings: dict[str, dict[str, Timings]] = {}
        """By device and code: created at first use."""

    def learn_profile(self, profile: Profile) -> None:
        """Use a profile as the seed of windows that are created from now on."""
        self._profiles[profile.code_id, profile.device_kind] = profile
        self._first_kinds.setdefault(profile.code_id, profile.device_kind)

    def base_ns(self, code_id: str) -> int:
        """The duration of batch 1 in the code's first profile; 0 without one."""
        kind = self._first_kinds.get(code_id)
        return 0 if kind is None else self._profiles[code_id, kind].infer_ns[1]

    def profile(self, code_id: str, kind: str) -> Profile | None:
        """The profile of a code on a kind of device, if one was measured."""
        return self._profiles.get((code_id, kind))

    def forget_device(self, device: str) -> None:
        """Drop the windows of a lost device; the next one of that name may be different hardware."""
        self._timings.pop(device, None)

    def timings(self, device: str, kind: str, code_id: str) -> Timings:
        """The durations of a code on a device of a kind; the object stays valid while the device is up."""
        codes = self._timings.setdefault(device, {})
        timings = codes.get(code_id)
        if timings is None:
            timings = codes[code_id] = Timings(self, code_id, kind)
        return timings

    def seeded(self, profile: Profile, seed_ns: int, *, ran: bool = True) -> Samples:
        """A window with a seed from the profile; for a guess, a low one, so that a first request is tried.

        ``ran``: the profile measured just this.
        """
        if profile.guessed:
            seed_ns = min(seed_ns, GUESS_NS)
        return Samples(seed_ns, self._size, self._quantile, guessed=profile.guessed or not ran)


def _infer_seed_ns(profile: Profile, batch: int) -> int:
    """The profile's duration, or, for a batch it lacks, in proportion to the nearest one it has."""
    known = profile.infer_ns.get(batch)
    if known is not None:
        return known
    nearest = min(profile.infer_ns, key=lambda size: (abs(size - batch), size))
    return profile.infer_ns[nearest] * batch // nearest if batch > nearest else profile.infer_ns[nearest]


# ------------------------------------------------------------
# Measured delays of a device, so that plans leave enough slack and no more.
#
# Two delays are measured at each result: from sending an action to an idle lane until it started (the
# *reach*), and from the predicted end until the result was observed (the *error*). The largest of about the
# last hundred is used; a measurement expires after ``VALID_NS``.


# ruff: noqa: FURB136, PLR1730 - max() and min() cost 100 ns more than a condition


BLOCK: Final = 16
BLOCKS: Final = 8
"""The maximum of the last 113 to 128 values is kept, in eight blocks of sixteen."""

VALID_NS: Final = NS_PER_S
"""How long a measurement is valid."""

FIRST_SLACK_NS: Final = 500 * NS_PER_US
"""The slack before the first measurement: with a larger one, requests of a tight SLO would never be tried."""

LEAST_SLACK_NS: Final = 100 * NS_PER_US
LEAST_REACH_NS: Final = 20 * NS_PER_US
"""Lower bounds of slack and reach."""

IN_TIME: Final = 0.97
"""The share of results whose error the slack covers."""
ERRORS: Final = 256
"""Errors that count in full; see ``Spread``."""
UPDATE_EVERY: Final = 16
"""The slack is computed again after so many results, and when one of them needed more."""

ANSWER_NS: Final = 50 * NS_PER_US
"""Delay from the controller to the gateway, which results do not measure; part of the slack."""

TRANSFER_BITS: Final = 3
"""A mean transfer time is over about ``2 ** TRANSFER_BITS`` of them."""
FIRST_TRANSFER_NS: Final = 20 * NS_PER_MS
"""The most that the first one counts."""

DRIFT_BITS: Final = 20
DRIFT_LEAST: Final = 1 << DRIFT_BITS - 7
DRIFT_MOST: Final = 1 << DRIFT_BITS - 1
"""Bounds of ``Delays.drift``, of which ``2 ** DRIFT_BITS`` is a whole SLO."""
DRIFT_FIRST: Final = 1 << DRIFT_BITS - 3
"""What it begins with on a device that shares its cores: how long a batch takes there, others decide."""
DRIFT_UP: Final = 1 << DRIFT_BITS - 7
DRIFT_DOWN: Final = DRIFT_UP // 2000
"""What a broken promise adds to it, and a kept one takes off: in balance where one of 2,000 is broken."""

HEADROOM_MOST: Final = 4 << DRIFT_BITS
HEADROOM_UP: Final = 3 << DRIFT_BITS - 7
HEADROOM_DOWN: Final = HEADROOM_UP // 1500
"""As for drift, of ``Delays.headroom``: at most four fifths of the lane are left to more urgent classes. With
smaller steps goodput is higher, and more promises are broken (``benchmarks.promises``)."""


class WindowMax(Record):
    """The maximum of the last values."""

    __slots__ = ("_blocks", "_count", "value")

    def __init__(self) -> None:
        self.clear()

    def clear(self) -> None:
        """Forget all values."""
        self._blocks = [0]
        self._count = 0
        self.value = 0

    def add(self, value: int) -> None:
        """Add a value."""
        if self._count == BLOCK:
            self._count = 0
            self._blocks.append(0)
            if len(self._blocks) > BLOCKS:
                del self._blocks[0]
                self.value = max(self._blocks)
        self._count += 1
        if value > self._blocks[-1]:
            self._blocks[-1] = value
            if value > self.value:
                self.value = value


def _mean(mean_ns: int, value_ns: int) -> int:
    """A mean that one value which was stopped on its way hardly changes, for that would shut requests out."""
    if not mean_ns:
        return min(value_ns, FIRST_TRANSFER_NS)
    return mean_ns + (min(value_ns, 2 * mean_ns + NS_PER_MS) - mean_ns >> TRANSFER_BITS)


class Delays(Record):
    """Measured delays of one device; plans use ``reach_ns`` and ``slack_ns``."""

    __slots__ = (
        "_due", "_errors", "_reach", "_slack_max_ns", "_usual_ns", "drift", "extra_ns", "headroom",
        "measured_ns", "reach_ns", "slack_ns", "transfer_in_ns", "transfer_out_ns",
    )  # fmt: skip

    def __init__(self, network_ns: int, slack_ns: int, *, shares_cores: bool = False) -> None:
        self._usual_ns = network_ns
        self._slack_max_ns = slack_ns
        self._errors = Spread(ERRORS)
        self._due = 0
        """After so many more results the slack is computed again."""
        self._reach = WindowMax()
        self.measured_ns = 0
        """When the last delay was measured."""
        self.reach_ns = network_ns
        self.slack_ns = min(FIRST_SLACK_NS, slack_ns)
        self.transfer_in_ns = self.transfer_out_ns = 0
        """The mean time that tensors take over a network; reach and slack may be longer by twice that."""
        self.extra_ns = 0
        """By how much it is longer than that of the device with the shortest: see ``Measured.slack_ns``."""
        self.drift = DRIFT_FIRST if shares_cores else DRIFT_LEAST
        """By which share of an SLO plans of promises end early, for each batch may take longer than planned
        and delays all after it. Learned from promises that were broken for that: a quantile of what would
        have been enough, by stochastic approximation (Robbins and Monro, 1951)."""
        self.headroom: dict[int, int] = {}
        """By class of priority: how much time a promise leaves to more urgent ones when it is made, for that
        until it is planned to end. Learned in the same way, from promises that those outranked."""

    def measured(
        self, error_ns: int, reach_ns: int, now_ns: int, transfer_in_ns: int = 0, transfer_out_ns: int = 0
    ) -> None:
        """Add the delays of a result that arrived ``error_ns`` after its predicted end.

        ``reach_ns`` is below 0 if it was not measured. The others are the result's.
        """
        if now_ns > self.measured_ns + VALID_NS:
            self.forget()
        self.measured_ns = now_ns
        self.transfer_in_ns = _mean(self.transfer_in_ns, transfer_in_ns)
        self.transfer_out_ns = _mean(self.transfer_out_ns, transfer_out_ns)
        way_ns = 2 * (self.transfer_in_ns + self.transfer_out_ns)
        self._errors.add(error_ns)
        self._due -= 1
        if self._due < 0 or error_ns + ANSWER_NS > self.slack_ns:
            self._due = UPDATE_EVERY
            slack_ns = self._errors.quantile_ns(IN_TIME) + ANSWER_NS
            if slack_ns < LEAST_SLACK_NS:
                slack_ns = LEAST_SLACK_NS
            most_ns = self._slack_max_ns + way_ns
            self.slack_ns = slack_ns if slack_ns < most_ns else most_ns
        if reach_ns >= 0:
            self._reach.add(reach_ns)
        if reach_ns >= 0 or transfer_in_ns:  # a lane that is always busy measures no reach, but transfers
            most_ns, least_ns = 5 * self._usual_ns + way_ns, LEAST_REACH_NS + self.transfer_in_ns
            reach_ns = self._reach.value if self._reach.value < most_ns else most_ns
            self.reach_ns = reach_ns if reach_ns > least_ns else least_ns

    def kept_promises(self, count: int, level: int) -> None:
        """So many promises of a class were kept."""
        if level in self.headroom:
            self.headroom[level] = max(0, self.headroom[level] - count * HEADROOM_DOWN)
        drift = self.drift - count * DRIFT_DOWN
        self.drift = drift if drift > DRIFT_LEAST else DRIFT_LEAST

    def broke_promise(self) -> None:
        """A promise was broken because the device took longer than planned."""
        drift = self.drift + DRIFT_UP
        self.drift = drift if drift < DRIFT_MOST else DRIFT_MOST

    def outranked_promise(self, level: int) -> None:
        """A promise of a class was broken because a more urgent one needed its time."""
        self.headroom[level] = min(HEADROOM_MOST, self.headroom.get(level, 0) + HEADROOM_UP)

    def headroom_ns(self, ahead_ns: int, level: int) -> int:
        """How much earlier than it has to a promise of a class ends that is planned to end after so long."""
        return ahead_ns * self.headroom.get(level, 0) >> DRIFT_BITS

    def drift_ns(self, slo_ns: int) -> int:
        """How much earlier plans end requests of an SLO."""
        return slo_ns * self.drift >> DRIFT_BITS

    def forget(self) -> None:
        """Return to the delays assumed without measurements, but for what few tell of: promises broken."""
        self._errors.clear()
        self._due = self.transfer_in_ns = self.transfer_out_ns = 0
        self._reach.clear()
        self.reach_ns = self._usual_ns
        self.slack_ns = min(FIRST_SLACK_NS, self._slack_max_ns)


# ------------------------------------------------------------
# Reset of stale estimates, which would otherwise stay too high for ever.
#
# A device that stopped for a moment, or was slow, leaves samples that are longer than any deadline allows.
# Then nothing runs there, nothing is measured, and the estimate never falls. So an estimate that makes a
# request infeasible, and was not measured for a while, is reset for a trial: if the median is short enough,
# the longer samples are dropped; else the estimate returns to the profile until the next measurement.
#
# An estimate that makes no request infeasible is never reset: for a rare action the tail is what matters.


RARELY: Final = 5
"""After a failed trial, the next one waits for this many times the estimate: trials cost lane time."""


def drop_outliers(samples: Samples, allowed_ns: int, now_ns: int, *, at_once: bool = False) -> bool:
    """Drop the samples above ``allowed_ns`` if they alone make a request infeasible and are old; true if so.

    ``at_once``: they need not be old, unless the last trial failed.
    """
    if samples.estimate_ns <= allowed_ns or samples.median_ns > allowed_ns:
        return False
    if not (at_once and not samples.trial_failed) and not _is_old(samples, now_ns):
        return False
    samples.forget_above(allowed_ns)
    return True


def _is_old(samples: Samples, now_ns: int) -> bool:
    wait_ns = max(VALID_NS, RARELY * samples.estimate_ns) if samples.trial_failed else VALID_NS
    return now_ns >= samples.measured_ns + wait_ns


# ------------------------------------------------------------
# Popularity of a model: its requests in an exponentially decaying window, as a number that compares without
# a clock.
#
# A request of age t counts 2**(-t / HALF_LIFE). The logarithm of the sum, scaled to time zero, changes only
# when a request arrives, and two such numbers compare as the sums do at any instant:
# log2(sum over requests of 2**(arrival / HALF_LIFE)).


HALF_LIFE_NS: Final = 30 * NS_PER_S

ONE: Final = 1 << 20
"""A factor of two, in fixed point."""

BASE: Final = 1 << 50
"""Above any use counter, so that a popularity is never below a key of least-recently-used order."""

LOST: Final = 40 * ONE
"""A difference beyond which the smaller term of a sum is negligible."""


def popularity_after(popularity: int, arrival_ns: int) -> int:
    """The popularity after one more request."""
    one = BASE + arrival_ns * ONE // HALF_LIFE_NS
    less = popularity - one if popularity > one else one - popularity
    more = popularity if popularity > one else one  # max() costs 100 ns more
    return more if less > LOST else more + int(ONE * log2(1.0 + 2.0 ** (-less / ONE)))

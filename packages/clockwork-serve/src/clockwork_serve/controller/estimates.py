"""Estimates: durations of actions, delays, resetting what is stale, how much a model is asked for."""

from __future__ import annotations

from math import log2
from typing import Final

from clockwork_serve.controller.record import Record
from clockwork_serve.messages import Profile
from clockwork_serve.units import NS_PER_MS, NS_PER_S, NS_PER_US

# ------------------------------------------------------------
# Predicts how long an action will take, from the last durations measured; it never asks what time it is.
#
# Source: paper section 5.3 and the released code: a high quantile, linearly interpolated, of the last ten.


GUESS_NS: Final = NS_PER_MS
"""The estimate of what could not be measured; a high one would refuse all requests that could mend it."""
SIGNATURES_MAX: Final = 1024
"""Windows of one code on one device for shapes that requests choose: clients could choose for ever."""


class Samples(Record):
    """The last ``size`` samples of one duration, and their quantile.

    A seed (the profile) counts as the first sample, so that a first measurement alone decides nothing; unless
    it is a guess, which the first measurement replaces.
    """

    __slots__ = (
        "_second_ns",
        "_trial_ns",
        "estimate_ns",
        "guessed",
        "measured_ns",
        "quantile",
        "samples",
        "seed_ns",
        "size",
        "trial_failed",
    )  # fmt: skip

    def __init__(self, seed_ns: int, size: int, quantile: float, *, guessed: bool = False) -> None:
        self.guessed = guessed
        self.samples: list[int] = [seed_ns]
        self.size = size
        self.quantile = quantile
        self.seed_ns = self.estimate_ns = seed_ns
        self.measured_ns = 0
        """When one was measured last."""
        self.trial_failed = False
        """The last trial measured a longer duration again."""
        self._trial_ns = 0
        """Longer ones were dropped for a trial that is not measured yet: what it may take; 0: no trial."""
        self._second_ns = 0
        """Where the estimate rests on the two largest samples of a full window: the smaller of the two."""

    def copy(self) -> Samples:
        """The same samples apart, for a fork; field by field, for there are thousands."""
        new = Samples.__new__(Samples)
        new._trial_ns = self._trial_ns  # noqa: SLF001 - it is one of us
        new._second_ns = self._second_ns  # noqa: SLF001
        new.estimate_ns = self.estimate_ns
        new.guessed = self.guessed
        new.trial_failed = self.trial_failed
        new.measured_ns = self.measured_ns
        new.quantile = self.quantile
        new.samples = self.samples.copy()
        new.seed_ns = self.seed_ns
        new.size = self.size
        return new

    def learn(self, lasted_ns: int, now_ns: int) -> None:
        """Take one measured duration, from a result that is observed now."""
        self.measured_ns = now_ns
        if self._trial_ns:
            self.trial_failed = lasted_ns > self._trial_ns
            self._trial_ns = 0
        self.add(lasted_ns)

    def add(self, sample_ns: int) -> None:
        """Take one more sample."""
        samples = self.samples
        oldest_ns = -1
        if self.guessed or len(samples) >= self.size:
            oldest_ns = samples.pop(0)
        self.guessed = False
        samples.append(sample_ns)
        if sample_ns != oldest_ns and (sample_ns > self._second_ns or not -1 < oldest_ns < self._second_ns):
            self._update()

    def forget_above(self, most_ns: int) -> None:
        """Forget all samples above ``most_ns``; one at least is not."""
        self.samples = [sample_ns for sample_ns in self.samples if sample_ns <= most_ns]
        self._trial_ns = most_ns
        self._update()

    def restart(self, most_ns: int) -> None:
        """Return to the seed, for a trial of at most ``most_ns``; the next measurement replaces it."""
        self.guessed = True
        self.samples = [self.seed_ns]
        self._trial_ns = most_ns
        self._update()

    @property
    def unproven(self) -> bool:
        """Whether it rests on its seed alone, or on one measurement in place of a guess."""
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
    """How long one code takes on one device: a window per (batch size, signature), and one for LOAD.

    Windows are made at first use. Models that share a code share them. Of those with a signature the ones
    used last are kept.
    """

    __slots__ = ("_code_id", "_estimator", "_infer", "_kind", "_load", "_plain")

    def __init__(self, estimator: Estimator, code_id: str, kind: str) -> None:
        self._estimator = estimator
        self._code_id = code_id
        self._kind = kind
        self._plain: dict[int, Samples] = {}
        """Windows of INFERs without a signature, by batch size."""
        self._infer: dict[tuple[int, str], Samples] = {}
        self._load: Samples | None = None

    def infer(self, batch: int, signature: str) -> Samples:
        """The window of an INFER."""
        if signature:
            return self._infer_of_shape((batch, signature))
        window = self._plain.get(batch)
        if window is None:
            window = self._plain[batch] = self._seeded(batch)
        return window

    def load(self, size: int) -> Samples:
        """The window of a LOAD of ``size`` bytes (models of one code have one size)."""
        if self._load is None:
            profile = self._profile()
            self._load = self._estimator.seeded(profile, profile.load_ns(size))
        return self._load

    def _infer_of_shape(self, key: tuple[int, str]) -> Samples:
        windows = self._infer
        window = windows.pop(key, None)
        if window is None:
            window = self._seeded(key[0])
            if len(windows) >= SIGNATURES_MAX:
                del windows[next(iter(windows))]
        windows[key] = window
        return window

    def _seeded(self, batch: int) -> Samples:
        profile = self._profile()
        return self._estimator.seeded(profile, _infer_seed_ns(profile, batch))

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
        """Profile by (code, device kind): where a window starts from."""
        self._timings: dict[str, dict[str, Timings]] = {}
        """By device and code: created at first use."""

    def learn_profile(self, profile: Profile) -> None:
        """Take a profile as the seed of windows not yet started."""
        self._profiles[profile.code_id, profile.device_kind] = profile

    def profile(self, code_id: str, kind: str) -> Profile | None:
        """The profile of a code on a kind of device, if one was measured."""
        return self._profiles.get((code_id, kind))

    def forget_device(self, device: str) -> None:
        """A device is gone; one of that name may be another next time."""
        self._timings.pop(device, None)

    def timings(self, device: str, kind: str, code_id: str) -> Timings:
        """How long a code takes on a device of a kind; keep it while the device is up."""
        codes = self._timings.setdefault(device, {})
        timings = codes.get(code_id)
        if timings is None:
            timings = codes[code_id] = Timings(self, code_id, kind)
        return timings

    def seeded(self, profile: Profile, seed_ns: int) -> Samples:
        """A window that starts from the profile; a guess starts it low, so that a first request is tried."""
        if profile.guessed:
            seed_ns = min(seed_ns, GUESS_NS)
        return Samples(seed_ns, self._size, self._quantile, guessed=profile.guessed)


def _infer_seed_ns(profile: Profile, batch: int) -> int:
    """The profile's duration, or, for a batch it lacks, in proportion to the nearest one it has."""
    known = profile.infer_ns.get(batch)
    if known is not None:
        return known
    nearest = min(profile.infer_ns, key=lambda size: (abs(size - batch), size))
    return profile.infer_ns[nearest] * batch // nearest if batch > nearest else profile.infer_ns[nearest]


# ------------------------------------------------------------
# How long messages and small delays really take on a device, so that plans leave room enough and no more.
#
# Two delays are measured at each result: from sending an action to an idle lane until it started (the
# *reach*), and from the predicted end until the result was observed (the *error*). What counts is the
# largest of about the last hundred, and only for a second: what nobody measures any more is not believed
# either.


# ruff: noqa: FURB136, PLR1730 - max() and min() cost 100 ns more than a condition


BLOCK: Final = 16
BLOCKS: Final = 8
"""The largest of the last 113 to 128 values is kept, as that of eight blocks of sixteen."""

LASTS_NS: Final = NS_PER_S
"""What was measured counts for so long."""

FIRST_SLACK_NS: Final = 500 * NS_PER_US
"""The slack before anything was measured: with a large one, requests of a tight SLO were never tried."""

LEAST_SLACK_NS: Final = 100 * NS_PER_US
LEAST_REACH_NS: Final = 20 * NS_PER_US
"""Less is never assumed."""

ANSWER_NS: Final = 50 * NS_PER_US
"""From the controller to the client's gateway, which no result measures."""


class Worst(Record):
    """The largest of the last values."""

    __slots__ = ("_blocks", "_count", "value")

    def __init__(self) -> None:
        self.clear()

    def clear(self) -> None:
        """Forget all of them."""
        self._blocks = [0]
        self._count = 0
        self.value = 0

    def add(self, value: int) -> None:
        """Take one more."""
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


class Delays(Record):
    """Of one device; ``reach_ns`` and ``slack_ns`` are what to plan with."""

    __slots__ = ("_error", "_reach", "_slack_max_ns", "_usual_ns", "measured_ns", "reach_ns", "slack_ns")

    def __init__(self, network_ns: int, slack_ns: int) -> None:
        self._usual_ns = network_ns
        self._slack_max_ns = slack_ns
        self._error = Worst()
        self._reach = Worst()
        self.measured_ns = 0
        """When something was measured last."""
        self.reach_ns = network_ns
        self.slack_ns = min(FIRST_SLACK_NS, slack_ns)

    def measured(self, error_ns: int, reach_ns: int, now_ns: int) -> None:
        """A result came ``error_ns`` after its believed end; ``reach_ns`` is below 0 if not measured."""
        if now_ns > self.measured_ns + LASTS_NS:
            self.forget()
        self.measured_ns = now_ns
        self._error.add(error_ns)
        slack_ns = self._error.value + ANSWER_NS
        if slack_ns < LEAST_SLACK_NS:
            slack_ns = LEAST_SLACK_NS
        self.slack_ns = slack_ns if slack_ns < self._slack_max_ns else self._slack_max_ns
        if reach_ns >= 0:
            self._reach.add(reach_ns)
            most_ns = 5 * self._usual_ns
            reach_ns = self._reach.value if self._reach.value < most_ns else most_ns
            self.reach_ns = reach_ns if reach_ns > LEAST_REACH_NS else LEAST_REACH_NS

    def forget(self) -> None:
        """Nothing was measured for a while."""
        self._error.clear()
        self._reach.clear()
        self.reach_ns = self._usual_ns
        self.slack_ns = min(FIRST_SLACK_NS, self._slack_max_ns)


# ------------------------------------------------------------
# Estimates that would stay too high for ever, because of what is past.
#
# A device that stopped for a moment, or was slow, leaves durations that no deadline allows. So nothing runs
# there any more, nothing is measured, and it would be believed slow without end. What is in a request's way,
# and was not measured for a while, is stale, so that the next ones are tried: longer durations than it
# allows are forgotten where the usual one is none of them; where it is one, the profile is believed until
# something is measured.
#
# It never touches an estimate that is in nobody's way: of what is asked for once in a while, the tail counts.


RARELY: Final = 5
"""After a failed trial the next one waits so many times as long as it would take: it costs others a lane."""


def drop_outliers(samples: Samples, allowed_ns: int, now_ns: int, *, at_once: bool = False) -> bool:
    """A request may take ``allowed_ns`` at most: forget what alone is in its way, if it is old; whether so.

    ``at_once``: it need not be old, unless the last trial failed.
    """
    if samples.estimate_ns <= allowed_ns or samples.median_ns > allowed_ns:
        return False
    if not (at_once and not samples.trial_failed) and not _is_old(samples, now_ns):
        return False
    samples.forget_above(allowed_ns)
    return True


def reset_stale(samples: Samples, allowed_ns: int, now_ns: int) -> None:
    """A request that may take ``allowed_ns`` was rejected: if the estimate is stale, have the next tried."""
    if (
        samples.seed_ns <= allowed_ns < samples.estimate_ns
        and not drop_outliers(samples, allowed_ns, now_ns)
        and _is_old(samples, now_ns)
    ):
        samples.restart(allowed_ns)


def _is_old(samples: Samples, now_ns: int) -> bool:
    wait_ns = max(LASTS_NS, RARELY * samples.estimate_ns) if samples.trial_failed else LASTS_NS
    return now_ns >= samples.measured_ns + wait_ns


# ------------------------------------------------------------
# How much a model is asked for, as one number that needs no clock to compare; it decides nothing.
#
# Requests count by an exponential window: one of age t counts 2**(-t / HALF_LIFE). Kept as the logarithm of
# the sum as it would be at time zero, a number changes only when a request comes, and any two compare as the
# windows do at any instant: log2(sum over requests of 2**(arrival / HALF_LIFE)).


HALF_LIFE_NS: Final = 30 * NS_PER_S

ONE: Final = 1 << 20
"""A factor of two."""

BASE: Final = 1 << 50
"""Above any count of uses, so that heat is never below what least-recently-used order put there."""

LOST: Final = 40 * ONE
"""A difference beyond which the smaller adds nothing."""


def hotter(heat: int, arrival_ns: int) -> int:
    """The heat with one more request."""
    one = BASE + arrival_ns * ONE // HALF_LIFE_NS
    less = heat - one if heat > one else one - heat
    more = heat if heat > one else one  # max() costs 100 ns more
    return more if less > LOST else more + int(ONE * log2(1.0 + 2.0 ** (-less / ONE)))

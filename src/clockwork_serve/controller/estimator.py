"""Predicts how long an action will take, from the last durations measured; it never asks what time it is.

Source: paper section 5.3 and the released code: a high quantile, linearly interpolated, of the last ten.
"""

from __future__ import annotations

from typing import Final

from clockwork_serve.messages import Profile
from clockwork_serve.units import NS_PER_MS

GUESS_NS: Final = NS_PER_MS
"""The estimate of what could not be measured; a high one would refuse all requests that could mend it."""
SIGNATURES_MAX: Final = 1024
"""Windows of one code on one device for shapes that requests choose: clients could choose for ever."""


class Samples:
    """The last ``size`` samples of one duration, and their quantile.

    A seed (the profile) counts as the first sample, so that a first measurement alone decides nothing; unless
    it is a guess, which the first measurement replaces.
    """

    __slots__ = (
        "_hoped_ns", "_second_ns", "estimate_ns", "guessed", "in_vain", "measured_ns", "quantile", "samples",
        "seed_ns", "size",
    )  # fmt: skip

    def __init__(self, seed_ns: int, size: int, quantile: float, *, guessed: bool = False) -> None:
        self.guessed = guessed
        self.samples: list[int] = [seed_ns]
        self.size = size
        self.quantile = quantile
        self.seed_ns = self.estimate_ns = seed_ns
        self.measured_ns = 0
        """When one was measured last."""
        self.in_vain = False
        """When longer ones were forgotten last, the next measurement was longer again."""
        self._hoped_ns = 0
        """They were forgotten, and nothing was measured since: what it was hoped to take at most."""
        self._second_ns = 0
        """Where the estimate rests on the two largest samples of a full window: the smaller of the two."""

    def learn(self, lasted_ns: int, now_ns: int) -> None:
        """One duration was measured, and is heard now."""
        self.measured_ns = now_ns
        if self._hoped_ns:
            self.in_vain = lasted_ns > self._hoped_ns
            self._hoped_ns = 0
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
        self._hoped_ns = most_ns
        self._update()

    def restart(self, most_ns: int) -> None:
        """Return to the seed, in the hope of ``most_ns``; the next measurement replaces it, as if a guess."""
        self.guessed = True
        self.samples = [self.seed_ns]
        self._hoped_ns = most_ns
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


class Timings:
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


class Estimator:
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

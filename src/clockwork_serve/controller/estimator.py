"""Predicts how long an action will take, from the last durations measured; it never asks what time it is.

Source: paper section 5.3 and the released code: a high quantile, linearly interpolated, of the last ten.
"""

from __future__ import annotations

from clockwork_serve.messages import Profile
from clockwork_serve.units import NS_PER_MS

LOAD_KEY = 0
"""Stands for LOAD where a batch size stands for INFER."""

GUESS_NS = NS_PER_MS
"""The estimate of what could not be measured; a high one would refuse all requests that could mend it."""


class Samples:
    """The last ``size`` samples of one duration, and their quantile.

    A seed (the profile) counts as the first sample, so that a first measurement alone decides nothing; unless
    it is a guess, which the first measurement replaces.
    """

    __slots__ = ("estimate_ns", "guessed", "quantile", "samples", "size")

    def __init__(self, seed_ns: int, size: int, quantile: float, *, guessed: bool = False) -> None:
        self.guessed = guessed
        self.samples: list[int] = [seed_ns]
        self.size = size
        self.quantile = quantile
        self.estimate_ns = seed_ns

    def add(self, sample_ns: int) -> None:
        """Learn one measured duration."""
        samples = self.samples
        if self.guessed or len(samples) >= self.size:
            del samples[0]
        self.guessed = False
        samples.append(sample_ns)
        self._update()

    def doubt(self) -> None:
        """Forget the largest sample, if there is another to rest on."""
        if len(self.samples) > 1:
            self.samples.remove(max(self.samples))
            self._update()

    @property
    def median_ns(self) -> int:
        """The middle sample (of an even number, the lower one)."""
        return sorted(self.samples)[(len(self.samples) - 1) // 2]

    def _update(self) -> None:
        ordered = sorted(self.samples)
        rank = self.quantile * (len(ordered) - 1)
        low = int(rank)
        high = min(low + 1, len(ordered) - 1)
        self.estimate_ns = round(ordered[low] + (rank - low) * (ordered[high] - ordered[low]))


class Estimator:
    """Estimates per (device, code, batch size, shape signature); models that share a code share them."""

    def __init__(self, window: int, quantile: float) -> None:
        self._size = window
        self._quantile = quantile
        self._profiles: dict[tuple[str, str], Profile] = {}
        """Profile by (code, device kind): where a window starts from."""
        self._windows: dict[tuple[str, str, int, str], Samples] = {}
        """Samples by (device, code, batch or LOAD_KEY, signature): created at first use."""

    def learn_profile(self, profile: Profile) -> None:
        """Take a profile as the seed of windows not yet started."""
        self._profiles[profile.code_id, profile.device_kind] = profile

    def profile(self, code_id: str, kind: str) -> Profile | None:
        """The profile of a code on a kind of device, if one was measured."""
        return self._profiles.get((code_id, kind))

    def forget_device(self, device: str) -> None:
        """A device is gone; one of that name may be another next time."""
        for key in [key for key in self._windows if key[0] == device]:
            del self._windows[key]

    def infer_samples(self, device: str, kind: str, code_id: str, batch: int, signature: str) -> Samples:
        """The window of an INFER."""
        key = (device, code_id, batch, signature)
        window = self._windows.get(key)
        if window is None:
            profile = self._profiles[code_id, kind]
            window = self._seeded(profile, _infer_seed_ns(profile, batch))
            self._windows[key] = window
        return window

    def load_samples(self, device: str, kind: str, code_id: str, size: int) -> Samples:
        """The window of a LOAD of ``size`` bytes (models of one code have one size)."""
        key = (device, code_id, LOAD_KEY, "")
        window = self._windows.get(key)
        if window is None:
            profile = self._profiles[code_id, kind]
            window = self._seeded(profile, profile.load_ns(size))
            self._windows[key] = window
        return window

    def _seeded(self, profile: Profile, seed_ns: int) -> Samples:
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

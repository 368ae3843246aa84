"""Codes that a device has prepared, and the batches that they allow."""

from __future__ import annotations

from clockwork_serve.controller.config import ControllerConfig
from clockwork_serve.controller.estimates import Samples, Timings
from clockwork_serve.controller.record import Record
from clockwork_serve.messages import Code, DeviceSpec, Profile


class BatchChoice(Record):
    """A batch that a device allows: ``count`` requests run at batch size ``size``."""

    __slots__ = ("count", "samples", "size")

    count: int
    samples: Samples
    size: int

    def __init__(self, count: int, size: int, samples: Samples) -> None:
        self.count = count
        self.size = size
        self.samples = samples
        """Its durations there; ``samples.estimate_ns`` is the estimate."""


class CodeOnDevice(Record):
    """A code that a device has prepared: its profile there and its useful batch sizes."""

    __slots__ = ("_batches", "misfits", "profile", "sizes", "timings")

    def __init__(
        self, profile: Profile, sizes: frozenset[int], timings: Timings, misfits: dict[int, str]
    ) -> None:
        self.profile = profile
        self.sizes = sizes
        self.misfits = misfits
        """Batch sizes that the device has no room for, and why."""
        self.timings = timings
        self._batches: dict[tuple[tuple[int, int], ...], tuple[BatchChoice, ...]] = {}
        """Cache of ``batches`` by a queue's sizes, for queues without a signature."""

    def batches(self, signature: str, sizes: tuple[tuple[int, int], ...]) -> tuple[BatchChoice, ...]:
        """The batches of a queue with these sizes here: the useful ones, and always one request alone."""
        if signature:
            return self._ways(signature, sizes)  # not cached: clients choose how many signatures there are
        batches = self._batches.get(sizes)
        if batches is None:
            batches = self._batches[sizes] = self._ways("", sizes)
        return batches

    def _ways(self, signature: str, sizes: tuple[tuple[int, int], ...]) -> tuple[BatchChoice, ...]:
        return tuple(
            [
                BatchChoice(count, size, self.timings.infer(size, signature))
                for count, size in sizes
                if count == 1 or size in self.sizes
            ]
        )


def misfit(profile: Profile, spec: DeviceSpec, size: int) -> str:
    """Why a device has no room for a batch of that size, and what to set; empty if it has."""
    return spec.shortage(size, profile.workspace_bytes.get(size, 0), profile.io_bytes.get(size, 0))


def useful_sizes(code: Code, profile: Profile, spec: DeviceSpec, config: ControllerConfig) -> frozenset[int]:
    """Batch sizes that fit the device and the limits, and that save time per request.

    A size has to save ``min_batch_gain`` against every size at most half as large, and must not be slower per
    request than those in between.
    """
    least = code.batch_sizes[0]
    row_ns = {least: profile.infer_ns.get(least, 0) / least}
    for size in code.batch_sizes[1:]:
        infer_ns = profile.infer_ns.get(size)
        if infer_ns is None or size > config.max_batch or infer_ns > config.max_exec_ns:
            continue
        if misfit(profile, spec, size):
            continue
        half_ns = min([ns for smaller, ns in row_ns.items() if 2 * smaller <= size])
        each_ns = infer_ns / size
        if each_ns <= half_ns * (1 - config.min_batch_gain) and each_ns <= min(row_ns.values()):
            row_ns[size] = each_ns
    return frozenset(row_ns)

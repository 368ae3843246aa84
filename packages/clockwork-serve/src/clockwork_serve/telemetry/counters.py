"""Counters of a server, and Triton's statistics made from them."""

from __future__ import annotations

from bisect import bisect_left
from pathlib import Path
from typing import Any, Final

import msgspec
from msgspec import Struct, field, structs

from clockwork_serve.units import NS_PER_MS, NS_PER_S

# ------------------------------------------------------------
# Counters, which ``recorder`` updates.
#
# All of them are :class:`msgspec.Struct`, so one ``msgspec.json.encode`` of :class:`Counters` is the snapshot
# that crosses processes: a gateway renders it for Prometheus, never the controller's process.


_RENARD_20: Final = (
    100, 112, 125, 140, 160, 180, 200, 224, 250, 280, 315, 355, 400, 450, 500, 560, 630, 710, 800, 900,
)  # fmt: skip

BOUNDS_NS: Final[tuple[int, ...]] = (
    *(step * 10**decade for decade in range(1, 9) for step in _RENARD_20),
    100_000_000_000,
)
"""Upper ends of histogram buckets, 1 us to 100 s: Renard's R20 series, so a quantile is within 15 % and the
usual 1-2-5 bounds are among them."""


def bucket_of(duration_ns: int) -> int:
    """The bucket that counts a duration: its place in ``BOUNDS_NS``, or one above all of them."""
    return bisect_left(BOUNDS_NS, duration_ns)


class Histogram(Struct):
    """Durations in ns, by bucket: ``counts[i]`` are those up to ``BOUNDS_NS[i]``, the last one all above."""

    counts: list[int] = field(default_factory=lambda: [0] * (len(BOUNDS_NS) + 1))
    sum_ns: int = 0

    def add(self, duration_ns: int) -> None:
        """Count one duration (below zero counts as zero)."""
        self.counts[bisect_left(BOUNDS_NS, duration_ns)] += 1
        if duration_ns > 0:
            self.sum_ns += duration_ns

    @property
    def count(self) -> int:
        """How many durations were counted."""
        return sum(self.counts)

    def quantile_ns(self, share: float) -> int | None:
        """The duration that ``share`` (0 to 1) of all do not exceed, within 15 %; None without any."""
        assert 0 <= share <= 1, share
        total = self.count
        if total == 0:
            return None
        wanted, seen = share * total, 0
        for index, count in enumerate(self.counts):
            if count and seen + count >= wanted:
                low = BOUNDS_NS[index - 1] if index else 0
                high = BOUNDS_NS[min(index, len(BOUNDS_NS) - 1)]
                return round(low + (high - low) * max(0.0, wanted - seen) / count)
            seen += count
        raise AssertionError("the buckets hold fewer durations than their sum")


class Exemplar(Struct, frozen=True, array_like=True):
    """A request that a bucket of a histogram counts, by its trace; it ended then, by the journal's clock."""

    trace_id: str
    duration_ns: int
    ended_ns: int


class Durations(Struct):
    """A number of durations and their sum: Triton's ``{"count", "ns"}``."""

    count: int = 0
    ns: int = 0

    def add(self, ns: int, count: int = 1) -> None:
        """Count ``count`` durations of ``ns`` each."""
        self.count += count
        self.ns += ns * count


class BatchCounters(Struct):
    """Executions of one batch size, and their phases."""

    executions: int = 0
    input_ns: int = 0
    run_ns: int = 0
    output_ns: int = 0


class ModelCounters(Struct):
    """Counters of one model's requests.

    ``outcomes`` counts by ``outcome`` or ``outcome:reason``. ``open`` requests have no answer yet; ``queued``
    of them are not in an INFER. ``rows`` counts executed rows, ``overruns`` batches that took longer than
    expected. ``promises`` are over, and ``broken`` counts those not kept, by cause. ``resident`` is bytes of
    weights by device.
    ``last_ns`` is when the last answer was good, on the controller's axis (0: never). ``quarantined`` tells
    that it is served to nobody, for it takes devices down.
    """

    name: str
    version: str
    received: int = 0
    outcomes: dict[str, int] = {}
    late: int = 0
    open: int = 0
    queued: int = 0
    rows: int = 0
    overruns: int = 0
    cold_starts: int = 0
    promises: int = 0
    broken: dict[str, int] = {}
    loads: int = 0
    last_ns: int = 0
    quarantined: bool = False
    success: Durations = field(default_factory=Durations)
    fail: Durations = field(default_factory=Durations)
    queue: Durations = field(default_factory=Durations)
    compute_input: Durations = field(default_factory=Durations)
    compute_infer: Durations = field(default_factory=Durations)
    compute_output: Durations = field(default_factory=Durations)
    batches: dict[int, BatchCounters] = {}
    resident: dict[str, int] = {}


class DeviceCounters(Struct):
    """What one device did. ``actions`` counts results by ``action:status``; ``pages_used`` are claimed now.

    ``lost_actions`` are those that its worker took along when it died. ``up`` tells that its worker is there.
    ``numbers`` are what the device last said of itself, ``kind`` is what selects its profiles.
    """

    worker: str
    kind: str = ""
    up: bool = True
    pages: int = 0
    page_bytes: int = 0
    pages_used: int = 0
    actions: dict[str, int] = {}
    lost_actions: int = 0
    exec_busy_ns: int = 0
    load_busy_ns: int = 0
    numbers: dict[str, int] = {}


class ErrorCounters(Struct):
    """Actual less expected lane time of one kind of action, over- and under-prediction apart."""

    under: Histogram = field(default_factory=Histogram)  # it took longer than expected
    over: Histogram = field(default_factory=Histogram)  # it took as long as expected, or less

    def quantile_ns(self, share: float) -> int | None:
        """The ``share`` quantile of the error's size, either way; None if nothing was measured."""
        pairs = zip(self.under.counts, self.over.counts, strict=True)
        return Histogram([a + b for a, b in pairs]).quantile_ns(share)


class TenantCounters(Struct):
    """What became of the requests of one tenant that has a quota, what it may use and what it was charged.

    0 stands for no quota. ``device_ns`` and ``loaded_bytes`` are the controller's own accounts.
    """

    received: int = 0
    outcomes: dict[str, int] = {}
    late: int = 0
    device_ns: int = 0
    device_ns_per_s: int = 0
    loaded_bytes: int = 0
    loaded_bytes_per_s: int = 0


WANTED_FILE: Final = "devices-wanted"
"""In the server's private folder: what its observer said last about devices, as JSON."""
WANTED_NS: Final = 120 * NS_PER_S  # that counts for so long


class DevicesWanted(Struct, frozen=True):
    """How many devices are wanted, as said at an instant of this machine's clock; the cause in a word."""

    at_ns: int
    wanted: int
    cause: str
    model: str = ""

    @staticmethod
    def read(file: Path, now_ns: int) -> DevicesWanted | None:
        """What was said last; None if that is too old, or nothing was said."""
        try:
            found = msgspec.json.decode(file.read_bytes(), type=DevicesWanted)
        except (OSError, msgspec.MsgspecError):
            return None
        return found if now_ns - found.at_ns < WANTED_NS else None


class Counters(Struct):
    """Everything that a controller's driver has observed and decided since it started.

    ``received`` equals the sum of ``outcomes`` plus ``open``. ``unmatched`` counts answers to requests that
    were not open: it stays 0 unless a request was answered twice. ``latency`` is by outcome, arrival to
    answer. ``queue`` is arrival to start, ``execution`` the lane time, of requests that were answered well.
    ``wakeup`` is how much later than it had asked the controller came to decide. ``processes_ended`` are
    those that did not answer, by name, since the server's start. ``damaged_files`` of the cache are counted
    by what they are; ``models_lost`` could not be made again from the repository. ``exemplars`` are recent
    ones of ``latency``, by outcome and bucket, where requests are traced. ``epoch`` is the controller's own,
    ``standbys`` how many others would take over at once; ``wanted`` is what the observer says of devices.
    """

    received: int = 0
    outcomes: dict[str, int] = {}
    late: int = 0
    open: int = 0
    queued: int = 0
    unmatched: int = 0
    workers_lost: int = 0
    workers_hung: int = 0
    workers_ended: int = 0
    processes_ended: dict[str, int] = {}
    quarantines: int = 0
    damaged_files: dict[str, int] = {}
    artefacts_remade: int = 0
    models_lost: int = 0
    gateways_lost: int = 0
    ready: bool = False
    models_waiting: int = 0
    keeper_up: bool = False
    epoch: int = 0
    standbys: int = 0
    wanted: DevicesWanted | None = None
    latency: dict[str, Histogram] = {}
    exemplars: dict[str, dict[int, Exemplar]] = {}
    queue: Histogram = field(default_factory=Histogram)
    execution: Histogram = field(default_factory=Histogram)
    load: Histogram = field(default_factory=Histogram)
    wakeup: Histogram = field(default_factory=Histogram)
    batches: dict[int, int] = {}
    prediction: dict[str, ErrorCounters] = field(
        default_factory=lambda: {"infer": ErrorCounters(), "load": ErrorCounters()}
    )
    models: dict[str, ModelCounters] = {}
    tenants: dict[str, TenantCounters] = {}
    devices: dict[str, DeviceCounters] = {}


class GatewayCounters(Struct):
    """What a gateway saw and the controller did not: ``outcomes`` it decided itself (INVALID, not serving).

    ``received`` counts every inference request that came in, passed on or not. ``invalid`` ones are counted
    by model (``name/version``) where they name one that is served. ``received_in_place_bytes`` of input
    tensors went from the socket to where workers read them; ``copied_bytes`` were copied there.
    ``unheard`` are good answers that came when nobody waited for them any more, by why: their clients had
    ``left``, or the gateway had told them that the deadline was ``over``.
    Of ``outcomes``, ``refused_by_summary`` would have been late by what the controller had published.
    ``ready`` is what its probe says.
    """

    gateway: str
    ready: bool = True
    received: int = 0
    outcomes: dict[str, int] = {}
    invalid: dict[str, int] = {}
    open: int = 0
    connections: int = 0
    region_bytes: int = 0
    region_used_bytes: int = 0
    received_in_place_bytes: int = 0
    copied_bytes: int = 0
    unheard: dict[str, int] = {}
    refused_by_summary: int = 0


def outcome_key(outcome: str, reason: str) -> str:
    """How an end is named among ``outcomes``: ``ok``, ``rejected:would_miss_deadline``."""
    return f"{outcome}:{reason}" if reason else str(outcome)


_decoder = msgspec.json.Decoder(Counters)


def encode(counters: Counters) -> bytes:
    """The counters as JSON; about 2 us a model."""
    return msgspec.json.encode(counters)


def decode(body: bytes) -> Counters:
    """What :func:`encode` wrote. Raises :class:`msgspec.ValidationError` for anything else."""
    return _decoder.decode(body)


# ------------------------------------------------------------
# Triton's model statistics records, made from counters.


def model_statistics(counters: Counters, model: str | None, wall_offset_ns: int) -> dict[str, Any]:
    """``{"model_stats": [...]}`` for a model key (``name/version``), all versions of a name, or all (None).

    An unknown model gives an empty list. Times are ns, ``last_inference`` is ms since 1970;
    ``wall_offset_ns`` is wall clock less the controller's axis.
    """
    if model is None:
        chosen = list(counters.models.values())
    elif model in counters.models:
        chosen = [counters.models[model]]
    else:
        chosen = [known for known in counters.models.values() if known.name == model]
    return {"model_stats": [_record(known, wall_offset_ns) for known in chosen]}


def _record(model: ModelCounters, wall_offset_ns: int) -> dict[str, Any]:
    """One entry, in Triton's order of fields; requests that were refused count as failed there."""
    last_ms = (model.last_ns + wall_offset_ns) // NS_PER_MS if model.last_ns else 0
    return {
        "name": model.name,
        "version": model.version,
        "last_inference": last_ms,
        "inference_count": model.rows,
        "execution_count": sum(batch.executions for batch in model.batches.values()),
        "inference_stats": {
            "success": structs.asdict(model.success),
            "fail": structs.asdict(model.fail),
            "queue": structs.asdict(model.queue),
            "compute_input": structs.asdict(model.compute_input),
            "compute_infer": structs.asdict(model.compute_infer),
            "compute_output": structs.asdict(model.compute_output),
            "cache_hit": structs.asdict(Durations()),
            "cache_miss": structs.asdict(Durations()),
        },
        "response_stats": {},
        "batch_stats": [_batch(size, model.batches[size]) for size in sorted(model.batches)],
        "memory_usage": [
            {"type": "CPU", "id": index, "byte_size": size}
            for index, (_, size) in enumerate(sorted(model.resident.items()))
        ],
    }


def _batch(size: int, batch: BatchCounters) -> dict[str, Any]:
    return {
        "batch_size": size,
        "compute_input": {"count": batch.executions, "ns": batch.input_ns},
        "compute_infer": {"count": batch.executions, "ns": batch.run_ns},
        "compute_output": {"count": batch.executions, "ns": batch.output_ns},
    }

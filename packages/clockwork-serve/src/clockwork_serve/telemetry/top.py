"""What a server does now, from two readings of its metrics: for a screen, or for machines."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Mapping
from typing import Final

from msgspec import Struct

from clockwork_serve.telemetry.metrics import PREFIX

# ------------------------------------------------------------
# Metrics as ``metrics`` writes them.


_SAMPLE: Final = re.compile(r"([A-Za-z_:][A-Za-z0-9_:]*)(?:\{(.*)\})? (\S+)(?: # .*)?")
_LABEL: Final = re.compile(r'([A-Za-z_][A-Za-z0-9_]*)="((?:[^"\\]|\\.)*)"')
_ESCAPE: Final = re.compile(r"\\(.)")

Labels = Mapping[str, str]
Reading = dict[str, list[tuple[dict[str, str], float]]]
"""Samples by the name of their metric, without its prefix."""


def read_metrics(text: str) -> Reading:
    """The samples of a page of metrics; lines of another form, and metrics of others, are left out."""
    found: Reading = defaultdict(list)
    for line in text.splitlines():
        sample = None if line.startswith("#") else _SAMPLE.fullmatch(line)
        if sample is not None and sample[1].startswith(PREFIX):
            labels = {name: _unescaped(value) for name, value in _LABEL.findall(sample[2] or "")}
            try:
                found[sample[1].removeprefix(PREFIX)].append((labels, float(sample[3])))
            except ValueError:
                continue
    return found


def _unescaped(value: str) -> str:
    return _ESCAPE.sub(lambda escape: "\n" if escape[1] == "n" else escape[1], value)


# ------------------------------------------------------------
# Rates between two readings.


class DeviceNow(Struct, frozen=True):
    """A device: shares of the time that its lanes were taken, and pages of memory."""

    device: str
    up: bool
    exec_busy: float
    load_busy: float
    pages_claimed: int
    pages: int
    batches_per_s: float
    not_ok_per_s: float


class ModelNow(Struct, frozen=True):
    """A model's requests a second, by how they ended; ``queued`` wait now."""

    model: str
    version: str
    good_per_s: float
    refused_per_s: float
    other_per_s: float
    cold_per_s: float
    queued: int

    @property
    def rate(self) -> float:
        """All that ended, a second."""
        return self.good_per_s + self.refused_per_s + self.other_per_s


class ServerNow(Struct, frozen=True):
    """A server in the ``seconds`` between two readings. Milliseconds are of good answers; None without any.

    ``ends`` are all requests a second that did not end well, by outcome and reason, as
    ``rejected:queue_full``; those that the gateway which was asked ended by itself are among them.
    ``epoch`` is that of the controller that leads, ``standbys`` others that would take over at once.
    ``devices_wanted``: how many the server says that its load wants; None: it does not say.
    """

    seconds: float
    ready: bool
    models: int
    models_resident: int
    models_waiting: int
    good_per_s: float
    received_per_s: float
    open: int
    queued: int
    p50_ms: float | None
    p99_ms: float | None
    ends: dict[str, float]
    devices: list[DeviceNow]
    busiest: list[ModelNow]
    epoch: int = 0
    standbys: int = 0
    devices_wanted: int | None = None


def server_now(before: Reading, after: Reading, seconds: float, most: int = 1000) -> ServerNow:
    """What a server did between two readings; of models, the ``most`` that were asked most."""
    rates = _Rates(before, after, seconds)
    ends: dict[str, float] = defaultdict(float)
    for name in ("requests_total", "gateway_requests_total"):
        for labels, rate in rates.each(name):
            ends[":".join(filter(None, (labels.get("outcome", ""), labels.get("reason", ""))))] += rate
    good = ends.pop("ok", 0.0)
    bad = dict(sorted(((key, rate) for key, rate in ends.items() if rate), key=lambda one: (-one[1], one[0])))
    busiest = sorted(_models(rates), key=lambda one: (-one.rate, -one.queued, one.model, one.version))
    return ServerNow(
        seconds=seconds, ready=bool(rates.now("ready")), models=int(rates.now("models")),
        models_resident=int(rates.now("models_resident")), models_waiting=int(rates.now("models_waiting")),
        good_per_s=good, received_per_s=rates.sum("requests_received_total"),
        open=int(rates.now("requests_open")), queued=int(rates.now("requests_queued")),
        p50_ms=rates.quantile_ms("request_seconds", 0.5), p99_ms=rates.quantile_ms("request_seconds", 0.99),
        ends=bad, devices=_devices(rates), busiest=busiest[:most],
        epoch=int(rates.now("controller_epoch")), standbys=int(rates.now("controllers_standing_by")),
        devices_wanted=int(rates.now("devices_wanted")) if rates.after["devices_wanted"] else None,
    )  # fmt: skip


def _devices(rates: _Rates) -> list[DeviceNow]:
    found = []
    for labels, up in sorted(rates.after["device_up"], key=lambda one: one[0].get("device", "")):
        device = labels.get("device", "")
        actions = rates.each("actions_total", device=device)
        found.append(
            DeviceNow(
                device=device, up=bool(up),
                exec_busy=rates.sum("lane_busy_seconds_total", device=device, lane="exec"),
                load_busy=rates.sum("lane_busy_seconds_total", device=device, lane="load"),
                pages_claimed=int(rates.now("device_pages", device=device, state="claimed")),
                pages=int(rates.now("device_pages", device=device, state="all")),
                batches_per_s=sum(
                    rate for which, rate in actions if (which["action"], which["status"]) == ("infer", "ok")
                ),
                not_ok_per_s=sum(rate for which, rate in actions if which["status"] != "ok"),
            )
        )  # fmt: skip
    return found


def _models(rates: _Rates) -> list[ModelNow]:
    ended: dict[tuple[str, str], list[float]] = {}
    for labels, rate in rates.each("model_requests_total"):
        outcome = labels.get("outcome", "")
        counts = ended.setdefault(_key(labels), [0.0, 0.0, 0.0])
        counts[0 if outcome == "ok" else 1 if outcome == "rejected" else 2] += rate
    queued = {_key(labels): int(value) for labels, value in rates.after["model_queued"]}
    cold = {_key(labels): rate for labels, rate in rates.each("model_cold_starts_total")}
    return [
        ModelNow(
            model=key[0], version=key[1], good_per_s=counts[0], refused_per_s=counts[1],
            other_per_s=counts[2], cold_per_s=cold.get(key, 0.0), queued=queued.get(key, 0),
        )
        for key in queued.keys() | ended.keys() for counts in [ended.get(key, [0.0, 0.0, 0.0])]
    ]  # fmt: skip


def _key(labels: Labels) -> tuple[str, str]:
    return labels.get("model", ""), labels.get("version", "")


class _Rates:
    """Counters' rates; one that is smaller than before began anew, with its controller."""

    def __init__(self, before: Reading, after: Reading, seconds: float) -> None:
        self.after = defaultdict(list, after)
        self._seconds = max(seconds, 1e-9)
        self._before = {
            (name, tuple(sorted(labels.items()))): value
            for name, samples in before.items() for labels, value in samples
        }  # fmt: skip

    def now(self, name: str, **wanted: str) -> float:
        """The sum of a gauge's samples that have these labels."""
        return sum(value for labels, value in self.after[name] if wanted.items() <= labels.items())

    def each(self, name: str, **wanted: str) -> list[tuple[dict[str, str], float]]:
        """The rate of each of a counter's samples that have these labels."""
        found = []
        for labels, value in self.after[name]:
            if wanted.items() <= labels.items():
                gained = value - self._before.get((name, tuple(sorted(labels.items()))), 0.0)
                found.append((labels, (gained if gained >= 0 else value) / self._seconds))
        return found

    def sum(self, name: str, **wanted: str) -> float:
        """The rate of all of them together."""
        return sum(rate for _, rate in self.each(name, **wanted))

    def quantile_ms(self, name: str, share: float) -> float | None:
        """A quantile of a histogram's good answers between the readings: the upper end of its bucket."""
        buckets = sorted(
            (float(labels["le"]), rate) for labels, rate in self.each(f"{name}_bucket", outcome="ok")
        )
        if not buckets or not buckets[-1][1]:
            return None
        return next(end for end, below in buckets if below >= share * buckets[-1][1]) * 1000

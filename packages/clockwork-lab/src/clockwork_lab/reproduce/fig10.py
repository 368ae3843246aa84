"""Fig 10: how well durations and ends of actions are predicted, on a real server with a CPU device."""

from __future__ import annotations

import logging
import os
import tempfile
import time
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Final

import numpy as np
from msgspec import Struct, field, structs

from clockwork_client import Client, ServingError
from clockwork_lab.reproduce.fig2 import INPUT_SHAPE, write_model
from clockwork_lab.reproduce.figure import Figure, Panel, PaperClaim, Series, SeriesRole, curve, points
from clockwork_lab.reproduce.run import FigureRun
from clockwork_serve.config import Settings
from clockwork_serve.controller import POLICIES, ControllerConfig
from clockwork_serve.controller.lanes import LaneBelief
from clockwork_serve.devices import DeviceConfig
from clockwork_serve.messages import Infer, Load, Result, Status
from clockwork_serve.serve.supervisor.processes import pinned_cores, running_on
from clockwork_serve.serve.supervisor.server import ServerConfig, running_server
from clockwork_serve.store import StoreConfig
from clockwork_serve.telemetry import Step, read_journal
from clockwork_serve.units import MIB, NS_PER_MS

MODELS, MEMORY_BYTES = 12, 24 * MIB
"""Weights of about 4 MB each, so half of the models are on the device at a time."""
CLIENTS, THINK_S, SLO_MS = 6, 0.02, 250.0
SECONDS, SHORT_SECONDS = 120.0, 1.5
KINDS = ("INFER", "LOAD")
PUBLISHED_MS = {"INFER": 2.9, "LOAD": 8.32}  # the duration of ResNet50 on the paper's GPU
SHARE_MOST = 10.0
NINES = {99.0: 2.0, 99.9: 3.0, 99.99: 4.0, 99.999: 5.0, 100.0: 6.0}
NINES_LABEL = "nines of the percentile (2: p99; 6: the largest)"
NOTES = (
    "Over: predicted longer than it took. Percentiles are over all actions; the other sign counts as 0.",
    "A prediction is about the largest of the last ten durations, so it is over on purpose.",
    "Published values are by the figure's axis; by the paper's text they stand one nine lower.",
    "In hindsight: predicted by the median of the ten durations before and ten after, of that batch size.",
    "Where that misses, durations are too uneven to be predicted from others.",
    "What else runs on this machine is part of the error: the device is a core, not a GPU.",
)
SIDES = (("over", True), ("under", False))


def fig10(run: FigureRun) -> Figure:
    """Serve, send requests, and compare predictions and measurements in the journal."""
    run.plan(1)
    policy = "default" if "default" in POLICIES else "paper"
    config = ControllerConfig(policy=policy)
    with tempfile.TemporaryDirectory() as folder:
        counts = serve_and_ask(run, Path(folder), config)
        errors = errors_of(read_journal(Path(folder) / "journal"), config.network_ns)
    return Figure(
        figure="fig10",
        title="errors of prediction, on a real CPU device",
        question="How well are the durations and the ends of actions predicted?",
        setup=run.setup(
            simulated=False,
            experiment=f"{MODELS} copies of a network of 8 convolutions on one CPU device with room for "
            f"{MEMORY_BYTES // MIB} MiB of weights{' and a core of its own' if has_own_core() else ''}, "
            f"policy {policy}; {CLIENTS} clients by HTTP for "
            f"{_seconds(run):g} s, {THINK_S * 1e3:g} ms between an answer and the "
            f"next request, SLO {SLO_MS:g} ms: {counts.asked:,} requests, {counts.good:,} answered in time; "
            + ", ".join(f"{len(errors[kind].took_ns):,} {kind}s" for kind in KINDS),
        ),
        panels=tuple(
            _panel(kind, what, errors[kind])
            for what in ("duration", "completion", "share") for kind in KINDS
        ),
        claims=tuple(_claims(errors)),
        notes=NOTES,
    )  # fmt: skip


def _seconds(run: FigureRun) -> float:
    return SHORT_SECONDS if run.short else SECONDS


def has_own_core() -> bool:
    """Whether the device has a core of its own here: all else, clients too, runs on another."""
    return len(os.sched_getaffinity(0)) > 1


def serve_and_ask(run: FigureRun, folder: Path, config: ControllerConfig) -> RequestCounts:
    """Start a server with a journal, send requests, stop it."""
    names = [f"convolutions_{number:02d}" for number in range(MODELS)]
    for number, name in enumerate(names):
        write_model(folder / "models", name, run.seed + number)
    server_config = ServerConfig(
        settings=Settings(
            repository=str(folder / "models"), http_port=0, grpc_port=None, metrics_port=None,
            journal=str(folder / "journal"), log_level="warning",
            isolate="cores" if has_own_core() else "off",
        ),
        store=StoreConfig(cache_dir=str(folder / "cache")),
        devices=(DeviceConfig(device="cpu:0", memory_bytes=MEMORY_BYTES),), controller=config,
    )  # fmt: skip
    run.report(0.0, "starting a server")
    with (
        running_server(server_config, on_line=logging.getLogger(__name__).debug) as server,
        running_on(pinned_cores(server_config.settings, 1)[1]),
    ):
        counts = ask(server.http_url, names, _seconds(run), run)
    run.finished("asked a real server")
    return counts


def _panel(kind: str, what: str, errors: Errors) -> Panel:
    """``what``: errors of the ``duration`` or ``completion`` in ms, or of durations as a ``share``."""
    share = what == "share"
    found: Iterable[float] = errors.shares() if share else getattr(errors, f"{what}_ns")
    series = []
    for variant, (side, over) in enumerate(SIDES):
        name = f"{kind} {'duration' if share else what} {side}"
        published = curve("fig10", name, "error_ms", name=f"published: {side}", variant=variant)
        ours = tail(found, over=over, unit=0.01 if share else NS_PER_MS)
        series += [
            _at_nines(published, 100 / PUBLISHED_MS[kind] if share else 1.0),
            _real(f"ours: {side}", variant, ours),
        ]
        if share:
            limit = tail(errors.shares_in_hindsight(), over=over, unit=0.01)
            series.append(_real(f"in hindsight: {side}", variant, limit, SeriesRole.LIMIT))
    return Panel(
        name=f"{kind} duration, share" if share else f"{kind} {what}", x_label=NINES_LABEL,
        y_label="% of the duration" if share else "ms", series=tuple(series), y_log=True,
    )  # fmt: skip


def _at_nines(series: Series, unit: float) -> Series:
    pairs = ((NINES[point.x], unit * (point.y or 0.0)) for point in series.points)
    return structs.replace(series, points=points(pairs))


def _real(
    name: str, variant: int, found: list[tuple[float, float]], role: SeriesRole = SeriesRole.REAL
) -> Series:
    pairs = points((NINES[share], error or None) for share, error in found)
    return Series(name=name, role=role, variant=variant, points=pairs)


def _claims(errors: dict[str, Errors]) -> list[PaperClaim]:
    """Tails as a share of the duration; the published ones against ResNet50's."""
    claims = []
    for kind in KINDS:
        for side, over in SIDES:
            published = curve("fig10", f"{kind} duration {side}", "error_ms").at(99.0)
            assert published is not None
            share = dict(tail(errors[kind].shares(), over=over, unit=0.01)).get(99.0)
            claims.append(
                PaperClaim(name=f"{kind} duration, p99 {side}, % of the duration", ours=share, sense="<=",
                      paper=100 * published / PUBLISHED_MS[kind], target=SHARE_MOST)
            )  # fmt: skip
    return claims


# ------------------------------------------------------------
# How well actions were predicted, from a journal of the controller.


AROUND: Final = 10
PERCENTILES: Final = (99.0, 99.9, 99.99, 99.999, 100.0)


class Errors(Struct):
    """Actions of one kind, in ns: errors (measured minus predicted) of duration and end, and the duration.

    ``batches``: 0 for a LOAD.
    """

    duration_ns: list[int] = field(default_factory=list)
    completion_ns: list[int] = field(default_factory=list)
    took_ns: list[int] = field(default_factory=list)
    batches: list[int] = field(default_factory=list)

    def shares(self) -> list[float]:
        """Errors of the duration as a share of it."""
        return [error / max(1, took) for error, took in zip(self.duration_ns, self.took_ns, strict=True)]

    def shares_in_hindsight(self) -> list[float]:
        """The same errors, had the median of the durations before and after each been predicted.

        Those are of the same batch size, ``AROUND`` before and as many after.
        """
        batches, took = np.array(self.batches), np.array(self.took_ns, dtype=float)
        found: list[float] = []
        for batch in np.unique(batches):
            alike = took[batches == batch]
            for at, one in enumerate(alike):
                others = np.concatenate((alike[max(0, at - AROUND) : at], alike[at + 1 : at + 1 + AROUND]))
                found.append((one - np.median(others)) / max(1, one) if others.size else 0.0)
        return found


class InFlight(Struct, frozen=True):
    """An action in flight."""

    action: Infer | Load
    ends_ns: int


def errors_of(steps: Iterable[Step], network_ns: int) -> dict[str, Errors]:
    """Errors by kind, ``INFER`` and ``LOAD``, of all actions that were done.

    The predicted end of an action is that of the controller's own belief about its lane, reconstructed from
    the journal; ``network_ns`` is the network delay that it was configured with.
    """
    found = {"INFER": Errors(), "LOAD": Errors()}
    lanes: dict[tuple[str, str], LaneBelief] = {}
    pending: dict[int, InFlight] = {}
    for step in steps:
        for event in step.events:
            if isinstance(event, Result) and (sent := pending.pop(event.action_id, None)) is not None:
                kind = _kind(sent.action)
                lanes[sent.action.device, kind].end(event.action_id, event.ended_ns)
                if event.status is Status.OK:
                    _add(found[kind], sent, event)
        for effect in step.effects:
            if isinstance(effect, Infer | Load):
                lane = lanes.setdefault((effect.device, _kind(effect)), LaneBelief(network_ns))
                ends_ns = lane.available_ns(step.now_ns) + effect.expected_ns
                lane.send(effect.action_id, effect.expected_ns, step.now_ns)
                pending[effect.action_id] = InFlight(effect, ends_ns)
    return found


def _kind(action: Infer | Load) -> str:
    return "INFER" if isinstance(action, Infer) else "LOAD"


def _add(errors: Errors, sent: InFlight, result: Result) -> None:
    errors.duration_ns.append(result.lane_ns - sent.action.expected_ns)
    errors.completion_ns.append(result.ended_ns - sent.ends_ns)
    errors.took_ns.append(result.lane_ns)
    errors.batches.append(sent.action.batch if isinstance(sent.action, Infer) else 0)


def tail(errors: Iterable[float], *, over: bool, unit: float = NS_PER_MS) -> list[tuple[float, float]]:
    """(percentile, error) of over- or under-prediction, over all actions; those of the other sign count as 0.

    ``over``: predicted longer than measured. Percentiles for which there are too few actions are left out.
    """
    values = np.array(list(errors), dtype=float)
    if not values.size:
        return []
    signed = np.maximum(0.0, -values if over else values) / unit
    return [
        (share, float(np.percentile(signed, share)))
        for share in PERCENTILES
        if share == max(PERCENTILES) or values.size * (1 - share / 100) >= 1
    ]


# ------------------------------------------------------------
# The load: closed-loop clients, by HTTP.


ZIPF = 0.9  # exponent of the models' popularity
REPORT_S = 0.5


class RequestCounts(Struct, frozen=True):
    """How many requests were sent, and how many of them were good."""

    asked: int
    good: int


def ask(url: str, models: Sequence[str], seconds: float, run: FigureRun) -> RequestCounts:
    """Send requests until the time is over."""
    end_s = time.monotonic() + seconds
    with Client(url) as client, ThreadPoolExecutor(CLIENTS) as pool:
        clients = [pool.submit(_ask, client, models, [run.seed, number], end_s) for number in range(CLIENTS)]
        while (left_s := end_s - time.monotonic()) > 0:
            run.report(1 - left_s / seconds, "asking a real server")
            time.sleep(min(REPORT_S, left_s))
        counts = [each.result() for each in clients]
    return RequestCounts(sum(each.asked for each in counts), sum(each.good for each in counts))


def _ask(client: Client, models: Sequence[str], seed: list[int], end_s: float) -> RequestCounts:
    rng = np.random.default_rng(seed)
    popularity = np.arange(1, len(models) + 1) ** -ZIPF
    popularity /= popularity.sum()
    picture = rng.standard_normal((1, *INPUT_SHAPE), dtype=np.float32)
    asked = good = 0
    while time.monotonic() < end_s:
        model = models[int(rng.choice(len(models), p=popularity))]
        asked += 1
        with suppress(ServingError):
            client.infer(model, {"x": picture}, slo_ms=SLO_MS)
            good += 1
        time.sleep(rng.exponential(THINK_S))
    return RequestCounts(asked, good)

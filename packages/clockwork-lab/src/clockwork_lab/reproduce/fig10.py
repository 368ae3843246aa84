"""Fig 10: how well durations and ends of actions are predicted, on a real server with a CPU device."""

from __future__ import annotations

import logging
import tempfile
from pathlib import Path

from clockwork_lab.reproduce.figure import Claim, Figure, Panel, Role, Series, points
from clockwork_lab.reproduce.paper_curves import curve
from clockwork_lab.reproduce.prediction import Errors, errors_of, tail
from clockwork_lab.reproduce.real_load import Asking, RequestCounts, ask
from clockwork_lab.reproduce.real_model import write_model
from clockwork_lab.reproduce.run import Run
from clockwork_serve.config import Settings
from clockwork_serve.controller import POLICIES, ControllerConfig
from clockwork_serve.devices import DeviceConfig
from clockwork_serve.serve.supervisor.server import ServerConfig, running_server
from clockwork_serve.store import StoreConfig
from clockwork_serve.telemetry.journal import read_journal
from clockwork_serve.units import MIB

MODELS, MEMORY_BYTES = 12, 24 * MIB
"""Weights of about 4 MB each, so half of the models are on the device at a time."""
CLIENTS, THINK_S, SLO_MS = 6, 0.02, 250.0
SECONDS, SHORT_SECONDS = 120.0, 1.5
KINDS = ("INFER", "LOAD")
PUBLISHED_MS = {"INFER": 2.9, "LOAD": 8.32}
"""The duration of ResNet50 on the paper's GPU."""
SHARE_MOST = 10.0
NINES = {99.0: 2.0, 99.9: 3.0, 99.99: 4.0, 99.999: 5.0, 100.0: 6.0}
NINES_LABEL = "nines of the percentile (2: p99; 6: the largest)"
NOTES = (
    "Over: predicted longer than it took. Percentiles are over all actions; the other sign counts as 0.",
    "A prediction is about the largest of the last ten durations, so it is over on purpose.",
    "Published values are by the figure's axis; by the paper's text they stand one nine lower.",
    "What else runs on this machine is part of the error: the device is a core, not a GPU.",
)
SIDES = (("over", True), ("under", False))


def fig10(run: Run) -> Figure:
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
        setup=run.setup(
            simulated=False,
            experiment=f"{MODELS} copies of a network of 8 convolutions on one CPU device with room for "
            f"{MEMORY_BYTES // MIB} MiB of weights, policy {policy}; {CLIENTS} clients by HTTP for "
            f"{SHORT_SECONDS if run.short else SECONDS:g} s, {THINK_S * 1e3:g} ms between an answer and the "
            f"next request, SLO {SLO_MS:g} ms: {counts.asked:,} requests, {counts.good:,} answered in time; "
            + ", ".join(f"{len(errors[kind].took_ns):,} {kind}s" for kind in KINDS),
        ),
        panels=(
            *(_panel(kind, what, errors) for what in ("duration", "completion") for kind in KINDS),
            *(_share_panel(kind, errors[kind]) for kind in KINDS),
        ),
        claims=tuple(_claims(errors)),
        notes=NOTES,
    )  # fmt: skip


def serve_and_ask(run: Run, folder: Path, config: ControllerConfig) -> RequestCounts:
    """Start a server with a journal, send requests, stop it."""
    names = [f"convolutions_{number:02d}" for number in range(MODELS)]
    for number, name in enumerate(names):
        write_model(folder / "models", name, run.seed + number)
    server_config = ServerConfig(
        settings=Settings(
            repository=str(folder / "models"), http_port=0, grpc_port=None, metrics_port=None,
            journal=str(folder / "journal"), log_level="warning",
        ),
        store=StoreConfig(cache_dir=str(folder / "cache")),
        devices=(DeviceConfig(device="cpu:0", memory_bytes=MEMORY_BYTES),), controller=config,
    )  # fmt: skip
    asking = Asking(
        models=names, clients=CLIENTS, think_s=THINK_S, seconds=SHORT_SECONDS if run.short else SECONDS,
        slo_ms=SLO_MS, seed=run.seed,
    )  # fmt: skip
    run.report(0.0, "starting a server")
    with running_server(server_config, on_line=logging.getLogger(__name__).debug) as server:
        counts = ask(server.http_url, asking, lambda part: run.report(part, "asking a real server"))
    run.finished("asked a real server")
    return counts


def _panel(kind: str, what: str, errors: dict[str, Errors]) -> Panel:
    found = errors[kind].duration_ns if what == "duration" else errors[kind].completion_ns
    series = []
    for variant, (side, over) in enumerate(SIDES):
        name = f"{kind} {what} {side}"
        published = curve("fig10", name, "error_ms", name=f"published: {side}", variant=variant)
        series += [_at_nines(published), _real(f"ours: {side}", variant, tail(found, over=over))]
    return Panel(
        name=f"{kind} {what}",
        x_label=NINES_LABEL,
        y_label="ms",
        series=tuple(series),
        y_log=True,
    )


def _share_panel(kind: str, errors: Errors) -> Panel:
    series = []
    for variant, (side, over) in enumerate(SIDES):
        name = f"{kind} duration {side}"
        published = curve("fig10", name, "error_ms", name=f"published: {side}", variant=variant)
        series += [
            _at_nines(published, 100 / PUBLISHED_MS[kind]),
            _real(f"ours: {side}", variant, tail(errors.shares(), over=over, unit=0.01)),
        ]
    return Panel(
        name=f"{kind} duration, share",
        x_label=NINES_LABEL,
        y_label="% of the duration",
        series=tuple(series),
        y_log=True,
    )


def _at_nines(series: Series, unit: float = 1.0) -> Series:
    pairs = points((NINES[point.x], unit * (point.y or 0.0)) for point in series.points)
    return Series(name=series.name, role=series.role, points=pairs, variant=series.variant)


def _real(name: str, variant: int, found: list[tuple[float, float]]) -> Series:
    pairs = points((NINES[share], error or None) for share, error in found)
    return Series(name=name, role=Role.REAL, variant=variant, points=pairs)


def _claims(errors: dict[str, Errors]) -> list[Claim]:
    """Tails as a share of the duration; the published ones against ResNet50's."""
    claims = []
    for kind in KINDS:
        for side, over in SIDES:
            published = curve("fig10", f"{kind} duration {side}", "error_ms").at(99.0)
            assert published is not None
            share = dict(tail(errors[kind].shares(), over=over, unit=0.01)).get(99.0)
            claims.append(
                Claim(name=f"{kind} duration, p99 {side}, % of the duration", ours=share, sense="<=",
                      paper=100 * published / PUBLISHED_MS[kind], target=SHARE_MOST)
            )  # fmt: skip
    return claims

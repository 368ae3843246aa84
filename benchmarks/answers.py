"""Every demo model's answers against a plain ONNX Runtime session, through the public client, HTTP and gRPC.

Each model is asked with real inputs: alone, as a request of as many rows as each batch size the server uses,
and as many requests at once that share batches (the server's statistics say which batch sizes ran). The
error is max|a - b| / max|b|; recurrent models, whose fused kernels differ between batch sizes, are allowed
more.
"""

from __future__ import annotations

import os
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from queue import SimpleQueue
from typing import Any

import numpy as np
import tritonclient.grpc
import tritonclient.http

from clockwork_lab.demo.client import inputs_of, outputs_of
from clockwork_lab.demo.fetch import Files
from clockwork_lab.demo.judgement import RecordedSend, Send, Tensors, open_plain, relative_error
from clockwork_lab.demo.stage import settings
from clockwork_lab.demo.zoo import RECURRENT, DemoModel, available
from clockwork_serve.config import default_cache
from clockwork_serve.controller import ControllerConfig
from clockwork_serve.units import GIB
from harness import repositories
from harness.report import Outcome, finish, parser, table
from harness.serving import Serving, serve

SLO_MS = 60_000
TOGETHER = 6
"""Requests at once where they cannot share a batch; else as many as each batch size in turn."""
BLOCKER, BLOCKED_S = "blocker", 0.15
"""A model that sleeps: while it is asked, requests meet in the queue."""
ROUNDS = 12
"""Tries until requests shared every batch size: short models are often done before the next request."""


@dataclass(slots=True)
class Row:
    """What was found of one model; errors by how it was asked."""

    name: str
    tolerance: float
    batch_sizes: list[int] = field(default_factory=list)
    ran: list[int] = field(default_factory=list)
    mixed: list[int] = field(default_factory=list)
    """Batch sizes that ran while requests of one row waited together."""
    errors: dict[str, float] = field(default_factory=dict)

    def note(self, how: str, error: float) -> None:
        """Keep the worst."""
        self.errors[how] = max(error, self.errors.get(how, 0.0))

    @property
    def good(self) -> bool:
        """Whether all errors are allowed, every batch size ran, for one request and shared."""
        all_ran = set(self.ran) >= set(self.batch_sizes) and set(self.mixed) >= set(self.batch_sizes[1:])
        return max(self.errors.values()) <= self.tolerance and all_ran


def write_repository(files: Files, models: Sequence[DemoModel], root: Path) -> None:
    """Each model once, as it is."""
    for model in models:
        folder = root / model.name / "1"
        folder.mkdir(parents=True)
        (folder / "model.onnx").write_bytes(model.build(files))
        (folder.parent / "clockwork.toml").write_text(settings(model))


def real_inputs(model: DemoModel, files: Files, session: Send) -> list[Tensors]:
    """What the demo asks of it."""
    recorder = RecordedSend(session)
    model.ask(files, recorder)
    return [inputs for inputs, _ in recorder.calls]


def varied(inputs: Sequence[Tensors], rows: int) -> list[Tensors]:
    """``rows`` requests of one row and one shape that differ where numbers may: scaled by factors near 1."""
    first = next(iter(inputs))
    alike = [one for one in inputs if all(one[name].shape == array.shape for name, array in first.items())]
    return [
        {
            name: np.asarray(array * array.dtype.type(1 + 0.01 * index)) if array.dtype.kind == "f" else array
            for name, array in alike[index % len(alike)].items()
        }
        for index in range(rows)
    ]


def stacked(requests: Sequence[Tensors]) -> Tensors:
    """One request with the rows of all."""
    return {name: np.concatenate([one[name] for one in requests]) for name in requests[0]}


class Asker:
    """Sends requests through both public clients."""

    def __init__(self, serving: Serving) -> None:
        self._address = address = serving.http_url.removeprefix("http://")
        self._http = tritonclient.http.InferenceServerClient(address, concurrency=64, network_timeout=120.0)
        self._grpc = tritonclient.grpc.InferenceServerClient(serving.grpc_url)

    def http(self, model: str, tensors: Tensors) -> Tensors:
        """One request by HTTP."""
        inputs = inputs_of(tensors, tritonclient.http)
        return outputs_of(self._http.infer(model, inputs, parameters={"slo_ms": SLO_MS}), http=True)

    def grpc(self, model: str, tensors: Tensors) -> Tensors:
        """One request by gRPC."""
        inputs = inputs_of(tensors, tritonclient.grpc)
        return outputs_of(self._grpc.infer(model, inputs, parameters={"slo_ms": SLO_MS}), http=False)

    def together(self, model: str, requests: Sequence[Tensors]) -> list[Tensors]:
        """All at once, by HTTP and gRPC in turn, while the device is blocked."""
        ended: SimpleQueue[tuple[int, Any, Any]] = SimpleQueue()
        by_http = [inputs_of(one, tritonclient.http) for one in requests[::2]]
        by_grpc = [inputs_of(one, tritonclient.grpc) for one in requests[1::2]]
        blocker = inputs_of({"x": np.zeros((1, 4), np.float32)}, tritonclient.grpc)
        self._send(BLOCKER, blocker, lambda result, error: None)
        time.sleep(BLOCKED_S / 5)
        for index, inputs in enumerate(by_grpc):
            self._send(model, inputs, lambda result, error, index=index: ended.put((index, result, error)))
        handles = [self._http.async_infer(model, inputs, parameters={"slo_ms": SLO_MS}) for inputs in by_http]
        found = {2 * index: outputs_of(one.get_result(), http=True) for index, one in enumerate(handles)}
        for _ in by_grpc:
            index, result, error = ended.get(timeout=120.0)
            if error is not None:
                raise error
            found[2 * index + 1] = outputs_of(result, http=False)
        return [found[index] for index in range(len(requests))]

    def _send(self, model: str, inputs: Sequence[Any], on_end: Callable[..., None]) -> None:
        self._grpc.async_infer(model, inputs, on_end, parameters={"slo_ms": SLO_MS})

    def close(self) -> None:
        """Close both clients."""
        self._http.close()
        self._grpc.close()


def batches_run(serving: Serving, model: str) -> dict[int, int]:
    """Executions by batch size so far."""
    (record,) = serving.get(f"/v2/models/{model}/stats")["model_stats"]
    return {batch["batch_size"]: batch["compute_infer"]["count"] for batch in record["batch_stats"]}


def examine(model: DemoModel, files: Files, root: Path, serving: Serving, asker: Asker) -> Row:
    """All ways of asking one model."""
    session = open_plain(root / model.name / "1")
    inputs = real_inputs(model, files, session)
    row = Row(model.name, model.tolerance)
    for one in inputs:
        expected = session(one)
        row.note("alone, HTTP", relative_error(asker.http(model.name, one), expected))
        row.note("alone, gRPC", relative_error(asker.grpc(model.name, one), expected))
    config: dict[str, Any] = serving.get(f"/v2/models/{model.name}/config")
    largest = int(config["max_batch_size"])
    row.batch_sizes = [size for size in (1, 2, 4, 8, 16) if size <= max(1, largest)]
    for size in row.batch_sizes[1:] if largest else []:
        rows = stacked(varied(inputs, size))
        expected = session(rows)
        row.note("as rows", relative_error(asker.http(model.name, rows), expected))
        row.note("as rows", relative_error(asker.grpc(model.name, rows), expected))
    ask_together(row, model.name, inputs, session, serving, asker)
    return row


def ask_together(
    row: Row, model: str, inputs: Sequence[Tensors], session: Send, serving: Serving, asker: Asker
) -> None:
    """As many requests at once as each batch size in turn, until every size was shared."""
    sizes = row.batch_sizes[1:]
    before = batches_run(serving, model)
    for turn in range(ROUNDS):
        requests = varied(inputs, sizes[turn % len(sizes)] if sizes else TOGETHER)
        for one, found in zip(requests, asker.together(model, requests), strict=True):
            row.note("together", relative_error(found, session(one)))
        after = batches_run(serving, model)
        row.ran = sorted(after)
        row.mixed = [size for size in sizes if after.get(size, 0) > before.get(size, 0)]
        if row.mixed == sizes:
            return


def conclude(rows: Sequence[Row]) -> Outcome:
    """The table and the promise."""
    ways = ("alone, HTTP", "alone, gRPC", "as rows", "together")
    print(
        table(
            ("model", *ways, "allowed", "batch sizes run", "shared"),
            [
                (
                    row.name, *(f"{row.errors[way]:.0e}" if way in row.errors else "-" for way in ways),
                    f"{row.tolerance:.0e}", " ".join(map(str, row.ran)),
                    " ".join(map(str, row.mixed)) or "-",
                )
                for row in rows
            ],
        )
    )  # fmt: skip
    outcome = Outcome("benchmarks.answers")
    bad = [row.name for row in rows if not row.good]
    recurrent = ", ".join(row.name for row in rows if row.tolerance == RECURRENT)
    outcome.judge(
        "models whose answers are a plain session's", asked=f"all {len(rows)} (5e-4: {recurrent or 'none'})",
        found=f"{len(rows) - len(bad)}{', not ' + ', '.join(bad) if bad else ''}",
        good=not bad and bool(rows),
    )  # fmt: skip
    outcome.figures = {
        row.name: {
            "errors": row.errors,
            "allowed": row.tolerance,
            "batch_sizes": row.ran,
            "shared": row.mixed,
        }
        for row in rows
    }
    return outcome


def main() -> int:
    """Run it; returns the exit status."""
    options = parser(__doc__)
    options.add_argument(
        "--files",
        type=Path,
        default=Path(default_cache(os.environ)) / "demo",
        help="where the demo keeps its files",
    )
    options.add_argument("--models", nargs="*", metavar="NAME", help="only these")
    given = options.parse_args()
    files = Files(given.files)
    models = [model for model in available(files) if not given.models or model.name in given.models]
    if not models:
        options.error(
            f"--files: expected the files that `clockwork demo` fetches; found none in {given.files}"
        )
    with tempfile.TemporaryDirectory() as name:
        root = Path(name) / "models"
        write_repository(files, models, root)
        repositories.sleeper(root, BLOCKER, BLOCKED_S)
        # Batches are used here even where they save no time, to see their answers.
        controller = ControllerConfig(min_batch_gain=-1.0)
        with serve(root, memory_bytes=GIB // 2, controller=controller) as serving:
            asker = Asker(serving)
            rows = [examine(model, files, root, serving, asker) for model in models]
            asker.close()
    return finish(conclude(rows), given.json)


if __name__ == "__main__":
    sys.exit(main())

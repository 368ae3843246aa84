"""The demo from beginning to end: set-up, serving, functional requests, load, comparison, results."""

from __future__ import annotations

import asyncio
import logging
import os
import sys
import time
from collections import defaultdict, deque
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

from rich.console import Console
from rich.progress import Progress as Bars
from tritonclient.utils import InferenceServerException

from clockwork_lab.demo.client import Answers, DemoClient, DemoLoad, DemoPlan, Mix, plan
from clockwork_lab.demo.judgement import Judgement, RecordedSend, Tensors, open_plain, relative_error
from clockwork_lab.demo.report import DemoReport, Meters, model_row, percentile, prediction_error, scrape
from clockwork_lab.demo.screen import progress_bar, show
from clockwork_lab.demo.stage import Stage, set_up
from clockwork_lab.demo.start import DemoOptions
from clockwork_serve.config import Settings
from clockwork_serve.devices import DeviceConfig
from clockwork_serve.serve.supervisor.server import RunningServer, ServerConfig, StartProgress, running_server
from clockwork_serve.store import StoreConfig
from clockwork_serve.units import KIB, align

UTILISATION = 0.55  # the share of the device that the load would use without batching

MEMORY_SHARE = 0.2  # device memory as a share of all weights' bytes

PAGE_BYTES, PAGES_MIN = 64 * KIB, 16  # small pages, since most of the demo's models are small

LINES_SHOWN = 20
START_S = 180.0
CASES = 8  # different requests of one model in the load, at most


class Demo:
    """One run of the demo."""

    def __init__(self, options: DemoOptions, console: Console | None = None) -> None:
        self._options = options
        self._console = console or Console()
        self._busy = 0.0
        self._log: deque[str] = deque(maxlen=200)
        self._recorders: dict[str, RecordedSend] = {}
        self._batch_1_ms: dict[str, float] = {}
        self._judgements: dict[str, Judgement] = {}
        self._errors: defaultdict[str, list[float]] = defaultdict(list)

    def run(self) -> int:
        """Run everything; the exit status."""
        started = time.monotonic()
        self._busy = os.getloadavg()[0] / (os.cpu_count() or 1)
        with _quiet(self._log), progress_bar(self._console) as bars:
            stage = set_up(self._options, self._console, bars)
            device = _device(stage)
            self._ask_plain(stage, bars)
            with running_server(
                _server_config(stage, device),
                timeout_s=START_S,
                on_progress=_on_progress(bars),
                on_line=self._log.append,
            ) as server:
                self._ask_served(stage, server, bars)
                mixes = self._mixes(stage)
                planned = plan(mixes, self._options.seconds, UTILISATION, self._options.seed)
                answers = self._send(planned, mixes, server, bars)
                meters = scrape(server.metrics_url, stage.base_of)
            self._compare(stage, answers, bars)
        duration_s = time.monotonic() - started - stage.fetched_s
        report = self._report(stage, device, planned, answers, meters, duration_s)
        show(report, self._console)
        if self._options.json is not None:
            self._options.json.write_bytes(report.to_json())
        return 0 if report.good else 1

    def _ask_plain(self, stage: Stage, bars: Bars) -> None:
        """Run plain sessions first, for results to compare with and durations to size the load by."""
        task = bars.add_task("asking plain ONNX Runtime", total=len(stage.models), note="")
        for model in stage.models:
            bars.update(task, note=model.name)
            recorder = RecordedSend(open_plain(stage.root / model.name / "1"))
            model.ask(stage.files, recorder)
            self._recorders[model.name] = recorder
            self._batch_1_ms[model.name] = recorder.typical_ms()
            bars.advance(task)
        bars.remove_task(task)

    def _ask_served(self, stage: Stage, server: RunningServer, bars: Bars) -> None:
        """Send the same requests to the server, alternating between HTTP and gRPC."""
        task = bars.add_task("asking the server", total=len(stage.models), note="")
        with DemoClient(server.http_url, server.grpc_url) as client:
            for model in stage.models:
                bars.update(task, note=model.name)
                expected = iter(self._recorders[model.name].calls)

                def send(inputs: Tensors, name: str = model.name, calls: object = expected) -> Tensors:
                    outputs = client.ask(name, inputs)
                    _, wanted = next(calls)  # type: ignore[call-overload]
                    self._errors[name].append(relative_error(outputs, wanted))
                    return outputs

                try:
                    self._judgements[model.name] = model.ask(stage.files, send)
                except InferenceServerException as error:
                    self._judgements[model.name] = Judgement(f"no answer: {error}", ok=False)
                bars.advance(task)
        bars.remove_task(task)

    def _mixes(self, stage: Stage) -> list[Mix]:
        mixes = []
        for model in stage.models:
            calls = self._recorders[model.name].calls
            cases = tuple(inputs for inputs, _ in calls[:: -(-len(calls) // CASES)])
            instances = tuple(each.name for each in stage.instances if each.base == model.name)
            mixes.append(Mix(model.name, instances, cases, self._batch_1_ms[model.name]))
        return mixes

    def _send(self, planned: DemoPlan, mixes: list[Mix], server: RunningServer, bars: Bars) -> Answers:
        task = bars.add_task("open-loop load", total=len(planned.shots), note="")

        def on_progress(answers: Answers) -> None:
            good = sum(hit.outcome == "ok" for hit in answers.hits)
            note = f"{planned.rate:.0f} requests/s, {good} in time, {len(answers.hits) - good} not"
            bars.update(task, completed=len(answers.hits), note=note)

        load = DemoLoad(mixes, on_progress)
        answers = asyncio.run(load.send(planned.shots, server.http_url, server.grpc_url))
        bars.remove_task(task)
        return answers

    def _compare(self, stage: Stage, answers: Answers, bars: Bars) -> None:
        """Compare the results under load with a plain session of every instance's own file."""
        base_of = stage.base_of
        task = bars.add_task("comparing every instance", total=len(answers.first), note="")
        cases = {mix.name: mix.cases for mix in self._mixes(stage)}

        def error_of(instance: str) -> float:
            case, found = answers.first[instance]
            expected = open_plain(stage.root / instance / "1")(cases[base_of[instance]][case])
            bars.advance(task)
            return relative_error(found, expected)

        with ThreadPoolExecutor(2, "compare") as pool:
            for instance, error in zip(answers.first, pool.map(error_of, answers.first), strict=True):
                self._errors[base_of[instance]].append(error)
        bars.remove_task(task)

    def _report(
        self, stage: Stage, device: DeviceConfig, planned: DemoPlan, answers: Answers,
        meters: Meters, duration_s: float,
    ) -> DemoReport:  # fmt: skip
        hits = {
            model.name: [hit for hit in answers.hits if hit.shot.model == model.name]
            for model in stage.models
        }
        return DemoReport(
            models=tuple(
                model_row(
                    model, self._judgements[model.name], hits[model.name], self._errors[model.name],
                    meters.by_base[model.name],
                )
                for model in stage.models
            ),
            instances=len(stage.instances),
            loads=meters.loads,
            unloads=meters.unloads,
            prediction_error=prediction_error(answers.lanes),
            duration_s=round(duration_s, 1),
            device_bytes=device.memory_bytes,
            weights_bytes=stage.weights_bytes,
            rate=round(planned.rate, 1),
            utilisation=round(planned.utilisation, 3),
            load_s=self._options.seconds,
            slo_floor_ms=round(planned.floor_ms, 1),
            client_lag_p99_ms=percentile(answers.lags_ms, 99) or 0.0,
            busy=round(self._busy, 2),
            offline=stage.offline,
        )  # fmt: skip


@contextmanager
def _quiet(lines: deque[str]) -> Iterator[None]:
    """Keep our own process's log off the screen; if the demo fails, the last lines are shown."""

    class Keep(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            lines.append(self.format(record))

    handler = Keep()
    loggers = [logging.getLogger(name) for name in ("clockwork_serve", "asyncio")]
    for logger in loggers:
        logger.addHandler(handler)
        logger.propagate = False
    try:
        yield
    except Exception:
        for line in list(lines)[-LINES_SHOWN:]:
            print(line, file=sys.stderr)
        raise
    finally:
        for logger in loggers:
            logger.removeHandler(handler)
            logger.propagate = True


def _device(stage: Stage) -> DeviceConfig:
    """One CPU device whose memory holds a fifth of the weights, and at least the largest model."""
    largest = max(served.model.weights.size for served in stage.served)
    wanted = max(round(MEMORY_SHARE * stage.weights_bytes), largest, PAGES_MIN * PAGE_BYTES)
    return DeviceConfig(device="cpu:0", page_bytes=PAGE_BYTES, memory_bytes=align(wanted, PAGE_BYTES))


def _server_config(stage: Stage, device: DeviceConfig) -> ServerConfig:
    return ServerConfig(
        settings=Settings(
            repository=str(stage.root), http_port=0, grpc_port=0, metrics_port=0, log_level="warning"
        ),
        store=StoreConfig(cache_dir=str(stage.cache)),
        devices=(device,),
    )


def _on_progress(bars: Bars) -> Callable[[StartProgress], None]:
    """Show the server's own steps, one bar for each stage."""
    tasks: dict[str, int] = {}

    def progress(step: StartProgress) -> None:
        task = tasks.get(step.stage)
        if task is None:
            words = {"prepare": "preparing models", "start": "starting"}
            task = tasks[step.stage] = bars.add_task(words.get(step.stage, step.stage), total=None, note="")
        visible = step.done < step.total
        bars.update(task, completed=step.done, total=step.total, note=step.text, visible=visible)  # type: ignore[arg-type]

    return progress

"""TorchServe, archived by its makers: a front end in Java, a worker process per model."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Sequence
from typing import Final

from comparison.peers.peer import Answer, Floats, Peer, Request, Setup, raw

QUEUE: Final = 16
"""Requests of a model that may wait, by hand: two batches."""


class TorchServe(Peer):
    """Requests whose time is up in the queue get no answer at all."""

    name = "torchserve"
    package = "torchserve"
    configured = f"batches of 8 (`maxBatchDelay` 1 ms), `jobQueueSize` {QUEUE}, `clientTimeoutInMills` = SLO"
    source = "https://docs.pytorch.org/serve/batch_inference_with_ts.html"
    per_model = True
    ready_path = "/ping"
    start_s = 300.0
    stop_s = 20.0

    @property
    def note(self) -> str:
        """Its makers stopped."""
        return "archived by its makers in 2025"

    def why_not(self, setup: Setup | None = None, *, isolated: bool = True) -> str:
        """It needs Java."""
        if shutil.which("java") is None:
            return "it needs Java 11 or later, and there is no java here"
        return super().why_not(setup, isolated=isolated)

    def command(self, setup: Setup) -> Sequence[str]:
        """An archive per model, made by its own tool; it holds the handler, which finds its model by name."""
        store = setup.folder / "store"
        store.mkdir()
        settings = setup.folder / "model-config.yaml"
        settings.write_text(
            f"minWorkers: 1\nmaxWorkers: 1\nbatchSize: {setup.batch}\nmaxBatchDelay: 1\n"
            f"jobQueueSize: {QUEUE}\n"
            f"clientTimeoutInMills: {setup.slo_ms:.0f}\nresponseTimeout: 120\nstartupTimeout: 120\n"
        )
        for name in setup.names:
            subprocess.run(
                [str(self.home / "bin" / "torch-model-archiver"), "--model-name", name, "--version", "1",
                 "--handler", str(self.folder / "any_model.py"), "--config-file", str(settings),
                 "--export-path", str(store), "--archive-format", "no-archive"],
                check=True, capture_output=True, env=self.environment(setup),
            )  # fmt: skip
        (setup.folder / "config.properties").write_text(
            f"inference_address=http://127.0.0.1:{setup.port}\n"
            f"management_address=http://127.0.0.1:{setup.port + 1}\n"
            f"metrics_address=http://127.0.0.1:{setup.port + 2}\ngrpc_inference_port={setup.port + 3}\n"
            f"grpc_management_port={setup.port + 4}\nnumber_of_netty_threads=1\nnetty_client_threads=1\n"
            "disable_token_authorization=true\nenable_envvars_config=false\nmetrics_mode=log\n"
            "disable_system_metrics=true\nmax_request_size=65535000\n"
        )
        (setup.folder / "log4j2.xml").write_text(_QUIET)
        return [
            str(self.home / "bin" / "torchserve"), "--foreground", "--model-store", str(store),
            "--models", *(f"{name}={name}" for name in setup.names),
            "--ts-config", str(setup.folder / "config.properties"), "--disable-token-auth",
            "--no-config-snapshots",
            "--log-config", str(setup.folder / "log4j2.xml"),
        ]  # fmt: skip

    def environment(self, setup: Setup) -> dict[str, str]:
        """Logs beside the rest."""
        return {
            **super().environment(setup), "LOG_LOCATION": str(setup.folder),
            "METRICS_LOCATION": str(setup.folder),
        }  # fmt: skip

    def request(self, setup: Setup, x: Floats) -> Request:
        """The bytes as they are."""
        return Request("/predictions/{model}", (("Content-Type", "application/octet-stream"),), x.tobytes())

    def output(self, answer: Answer) -> Floats:
        """The bytes as they are."""
        return raw(answer)


_QUIET: Final = """<?xml version="1.0" encoding="UTF-8"?>
<Configuration><Appenders><Console name="c"><PatternLayout pattern="%d %p %c - %m%n"/></Console></Appenders>
<Loggers><Root level="warn"><AppenderRef ref="c"/></Root></Loggers></Configuration>
"""
"""By itself it writes ten lines per request."""

PEER = TorchServe()

"""``clockwork serve``: starts a server and tells where it listens. It serves no request itself."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from clockwork_serve.cli.options import (
    all_but,
    json_flag,
    repository_argument,
    setting_options,
    settings_from,
)
from clockwork_serve.cli.repository import counted
from clockwork_serve.cli.screen import Progress, say, show_json_line

if TYPE_CHECKING:
    from collections.abc import Callable

    from clockwork_serve.serve.supervisor.server import Server

_SHOWN = (
    "device", "slo_ms", "host", "http_port", "grpc_port", "metrics_port", "gateways", "tls_certificate",
    "tls_key", "api_keys", "device_memory", "page_size", "policy", "reject", "drain_s", "cache",
    "model_control", "pin", "realtime", "listen_machines", "cluster_certificate", "cluster_key", "cluster_ca",
    "log_format", "log_level",
)  # fmt: skip
_STAGES = {"compile": "compiling", "profile": "profiling", "start": "starting"}


@click.command(
    epilog="More settings, and their names in a file and in the environment: docs/operate/configuration.md"
)
@repository_argument
@setting_options(*_SHOWN, hidden=all_but(*_SHOWN, "controller", "machine_name"))
@json_flag
def serve(repository: str | None, config: str | None, as_json: bool, **flags: Any) -> int:  # noqa: FBT001
    """Serve the models in REPO until told to stop.

    Ctrl-C or SIGTERM once: finish what waits, then stop. Twice: stop at once.
    """
    settings = settings_from(repository, config, flags)

    from clockwork_serve.config.records import server_config
    from clockwork_serve.serve import child as logs
    from clockwork_serve.serve.supervisor.server import run

    logs.configure("keeper", settings.log_level, settings.log_format)
    shown = Stages(quiet=as_json)
    try:
        return run(
            server_config(settings), on_progress=shown.step, on_ready=_announcer(shown, as_json=as_json)
        )
    finally:
        shown.close()


class Stages:
    """The stages of a start, each with its own progress."""

    def __init__(self, *, quiet: bool) -> None:
        self._quiet = quiet
        self._stage = ""
        self._progress: Progress | None = None

    def step(self, progress: Any) -> None:
        """Show a ``serve.preparation.Progress``."""
        if progress.stage != self._stage:
            self.close()
            self._stage = progress.stage
            self._progress = Progress(_STAGES.get(progress.stage, progress.stage), quiet=self._quiet)
        if self._progress is not None:
            self._progress.step(progress.done, progress.total, progress.text)

    def close(self) -> None:
        """Leave the terminal as it was."""
        if self._progress is not None:
            self._progress.close()
            self._progress = None


def _announcer(shown: Stages, *, as_json: bool) -> Callable[[Server], None]:
    def announce(server: Server) -> None:
        shown.close()
        facts = {
            "http": server.http_url,
            "grpc": server.grpc_url,
            "metrics": server.metrics_url,
            "models": len(server.catalogue.models),
        }
        if as_json:
            show_json_line({"ready": True, **facts})
            return
        say(f"ready: {counted(len(server.catalogue.models), 'model')}")
        for name in ("http", "grpc", "metrics"):
            say(f"  {name:<8} {facts[name] or 'off'}")

    return announce

"""``clockwork worker``: joins a server on another machine with this machine's devices."""

from __future__ import annotations

from typing import Any

import click

from clockwork_serve.cli.options import setting_options, settings_from, taken_by
from clockwork_serve.config.table import WORKER

_SHOWN = (
    "controller", "device", "machine_name", "cluster_certificate", "cluster_key", "cluster_ca", "cache",
    "device_memory", "page_size", "threads", "pin", "realtime", "silence_s", "log_format", "log_level",
)  # fmt: skip


@click.command(epilog="How to set up several machines: clockwork docs machines")
@setting_options(*_SHOWN, hidden=taken_by(WORKER, *_SHOWN))
def worker(config: str | None, **flags: Any) -> int:
    """Join the server at --controller with this machine's devices, and serve until told to stop.

    The server was started with --listen-machines. Models are fetched from it into the cache here.
    """
    settings = settings_from(None, config, flags, needs_repository=False)

    from clockwork_serve.serve import child as logs
    from clockwork_serve.serve.supervisor.children import run_workers

    logs.configure("worker", settings.log_level, settings.log_format)
    return run_workers(settings)

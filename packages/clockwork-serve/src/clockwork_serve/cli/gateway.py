"""``clockwork gateway``: serves clients on this machine for a server on another machine."""

from __future__ import annotations

from typing import Any

import click

from clockwork_serve.cli.options import json_flag, setting_options, settings_from, taken_by
from clockwork_serve.cli.screen import say, show_json_line
from clockwork_serve.config.table import GATEWAY

_SHOWN = (
    "controller", "machine_name", "cluster_certificate", "cluster_key", "cluster_ca", "host", "http_port",
    "grpc_port", "metrics_port", "gateways", "slo_ms", "tls_certificate", "tls_key", "api_keys",
    "model_control", "drain_s", "silence_s", "log_format", "log_level",
)  # fmt: skip


@click.command(epilog="How to set up several machines: clockwork docs machines")
@setting_options(*_SHOWN, hidden=taken_by(GATEWAY, *_SHOWN))
@json_flag
def gateway(config: str | None, as_json: bool, **flags: Any) -> int:  # noqa: FBT001
    """Serve clients on this machine for the server at --controller, until told to stop.

    The server was started with --listen-machines. It executes all requests; nothing is executed here.
    """
    settings = settings_from(None, config, flags, needs_repository=False)

    from clockwork_serve.serve import child as logs
    from clockwork_serve.serve.supervisor.children import run_gateways

    logs.configure("gateway", settings.log_level, settings.log_format)

    def announce(at: dict[str, str]) -> None:
        if as_json:
            show_json_line({"listening": True, **at})
            return
        say(f"for the server at {settings.controller}:")
        for name, address in at.items():
            say(f"  {name:<8} {address or 'off'}")

    return run_gateways(settings, announce)

"""``clockwork gateway``: serves clients here for a server on another machine. It has no device."""

from __future__ import annotations

from typing import Any

import click

from clockwork_serve.cli.options import json_flag, setting_options, settings_from
from clockwork_serve.cli.screen import say, show_json_line

_SHOWN = (
    "controller", "machine_name", "cluster_certificate", "cluster_key", "cluster_ca", "host", "http_port",
    "grpc_port", "metrics_port", "gateways", "slo_ms", "tls_certificate", "tls_key", "api_keys",
    "model_control", "drain_s", "silence_s", "log_format", "log_level",
)  # fmt: skip
_HIDDEN = (
    "gateway_memory", "max_body", "max_message", "max_json", "shared_memory", "triton_codes", "tls_client_ca",
    "max_connections", "max_head", "max_headers", "max_calls", "max_requests", "max_unsent", "head_s",
    "body_s", "send_s", "idle_s", "stream_s", "stuck_s",
)  # fmt: skip


@click.command(epilog="How to set up several machines: docs/operate/machines.md")
@setting_options(*_SHOWN, hidden=_HIDDEN)
@json_flag
def gateway(config: str | None, as_json: bool, **flags: Any) -> int:  # noqa: FBT001
    """Serve clients on this machine for the server at --controller, until told to stop.

    The server was started with --listen-machines. It executes all requests; nothing is executed here.
    """
    settings = settings_from(None, config, flags, needs_repository=False)

    from clockwork_serve.config.records import far_gateways_config
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

    return run_gateways(far_gateways_config(settings), announce)

"""``clockwork serve`` starts a server; workers and gateways elsewhere join it, or a ``controller``."""

from __future__ import annotations

import json
import math
import shlex
from typing import TYPE_CHECKING, Any, Final

import click

from clockwork_serve.cli.options import (
    all_but,
    json_flag,
    repository_argument,
    setting_options,
    settings_from,
    taken_by,
)
from clockwork_serve.cli.screen import Stages, say, show_json_line
from clockwork_serve.config.table import GATEWAY, WORKER
from clockwork_serve.messages import DATATYPES, Code, Model
from clockwork_serve.units import counted

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from clockwork_serve.config import Settings
    from clockwork_serve.serve.supervisor.config import ServerConfig
    from clockwork_serve.serve.supervisor.server import Server

    Told = tuple[dict[str, Any], list[str]]

_OF_SERVERS = (
    "device", "slo_ms", "host", "http_port", "grpc_port", "metrics_port", "gateways", "tls_certificate",
    "tls_key", "api_keys", "device_memory", "policy", "drain_s", "cache", "store", "model_control",
    "isolate", "listen_machines", "cluster_certificate", "cluster_key", "cluster_ca",
    "log_format", "log_level",
)  # fmt: skip
_OF_GATEWAYS = (
    "controller", "machine_name", "cluster_certificate", "cluster_key", "cluster_ca", "host", "http_port",
    "grpc_port", "metrics_port", "gateways", "slo_ms", "tls_certificate", "tls_key", "api_keys",
    "model_control", "drain_s", "log_format", "log_level",
)  # fmt: skip
_OF_WORKERS = (
    "controller", "device", "machine_name", "cluster_certificate", "cluster_key", "cluster_ca", "cache",
    "store", "device_memory", "threads", "isolate", "log_format", "log_level",
)  # fmt: skip
_OF_CONTROLLERS = (
    "store", "listen_machines", "lease", "lease_s", "cluster_certificate", "cluster_key", "cluster_ca",
    "host", "metrics_port", "slo_ms", "policy", "controllers", "cache", "journal",
    "log_format", "log_level",
)  # fmt: skip
_NOT_OF_CONTROLLERS = (
    "controller", "machine_name", "device", "http_port", "grpc_port", "gateways", "isolate",
)  # fmt: skip
FEW_ELEMENTS: Final = 32  # the most elements that the sample request spells out
_ONLY_BINARY: Final = frozenset({"FP16", "BF16"})
_ZEROS: Final[dict[str, object]] = {"BOOL": False, "BYTES": ""}


@click.command(
    epilog="More settings, and their names in a file and in the environment: clockwork docs configuration"
)
@repository_argument
@setting_options(*_OF_SERVERS, hidden=all_but(*_OF_SERVERS, "controller", "machine_name"))
@json_flag
def serve(repository: str | None, config: str | None, as_json: bool, **flags: Any) -> int:  # noqa: FBT001
    """Serve the models in REPO, or the one in a file NAME.onnx or NAME.pt2, until told to stop.

    Without REPO, those of the catalogue in --store.

    Ctrl-C, SIGTERM or SIGHUP once: finish what waits, then stop. Twice: stop at once.
    """
    settings = settings_from(repository, config, flags, or_store=True)

    from clockwork_serve.serve.supervisor.config import server_config

    return _supervise(settings, server_config, _ready, as_json=as_json)


def _supervise(
    settings: Settings, config: Callable[[Settings], ServerConfig], told: Callable[[Server], Told], *,
    as_json: bool,
) -> int:  # fmt: skip
    """Run the processes of a server in the foreground, with a progress bar for each stage of the start."""
    from clockwork_serve.serve import child as logs
    from clockwork_serve.serve.supervisor.server import run

    logs.configure("keeper", settings.log_level, settings.log_format)
    shown = Stages(quiet=as_json)

    def announce(server: Server) -> None:
        shown.close()
        _tell(*told(server), as_json=as_json)

    try:
        return run(config(settings), on_progress=shown.step, on_ready=announce)
    finally:
        shown.close()


def _tell(record: dict[str, Any], lines: Sequence[str], *, as_json: bool) -> None:
    if as_json:
        show_json_line(record)
    else:
        say("\n".join(lines))


def _addresses(at: dict[str, str], settings: Settings) -> list[str]:
    """Lines for people. Where it listens at every address, a URL has one that can be asked from here."""
    note = f" (listens on {settings.host})" if settings.host in {"0.0.0.0", "::"} else ""
    return [
        f"  {name:<8} {address}{note if name != 'machines' else ''}" if address else f"  {name:<8} off"
        for name, address in at.items()
    ]


def sample_request(url: str, model: Model, code: Code, *, key: bool) -> str:
    """A shell command that sends a request with zeros as inputs, by curl.

    ``key``: the server requires an API key, for which there is a placeholder.
    """
    inputs: list[dict[str, Any]] = []
    for spec in code.inputs:
        if not spec.optional:
            shape = [1 if size < 0 else size for size in ([1] if code.batched else []) + list(spec.shape)]
            inputs.append({"name": spec.name, "datatype": spec.datatype, "shape": shape})
    body: dict[str, Any] = {"inputs": inputs}
    asking = f"curl -s {url}/v2/models/{model.name}/infer" + (" -H 'x-api-key: KEY'" if key else "")
    if any(spec.datatype in _ONLY_BINARY for spec in code.outputs):
        body["parameters"] = {"binary_data_output": True}
        asking += " -o answer.bin"
    counts = [math.prod(each["shape"]) for each in inputs]
    if sum(counts) <= FEW_ELEMENTS and not any(each["datatype"] in _ONLY_BINARY for each in inputs):
        for each, count in zip(inputs, counts, strict=True):
            each["data"] = [_ZEROS.get(each["datatype"], 0)] * count
        return f"{asking} -d {shlex.quote(json.dumps(body))}"
    # Too many to spell out: a head with the size, and as many zero bytes from /dev/zero.
    for each, count in zip(inputs, counts, strict=True):
        # Each string is preceded by its length in four bytes.
        each["parameters"] = {"binary_data_size": count * (DATATYPES[each["datatype"]] or 4)}
    nbytes = sum(each["parameters"]["binary_data_size"] for each in inputs)
    head = json.dumps(body)
    return (
        f"(printf %s {shlex.quote(head)}; head -c {nbytes} /dev/zero) | {asking} "
        f"-H 'Inference-Header-Content-Length: {len(head)}' --data-binary @-"
    )


def _ready(server: Server) -> Told:
    from clockwork_serve.store.repository import is_model_file

    settings, models = server.settings, server.catalogue.models
    at = {"http": server.http_url, "grpc": server.grpc_url, "metrics": server.metrics_url}
    page = server.metrics_url.removesuffix("metrics") if settings.live_page and settings.journal else ""
    idle = len(server.unservable)
    lines = [
        f"ready: {counted(len(models) - idle, 'model')}{f', {idle} fit no device' if idle else ''}",
        *_addresses(at | {"page": page} if page else at, settings),
    ]
    if is_model_file(settings.repository):
        code = server.catalogue.code_of(models[0])
        key = bool(settings.api_keys)
        lines.append(f"  ask      {sample_request(server.http_url, models[0], code, key=key)}")
    known = {"devices_wanted": server.wanted_file, "models": len(models)}
    return {"ready": True, **at, "page": page, **known}, lines


# ------------------------------------------------------------
# Processes of this machine that join a server on another, which was started with --listen-machines.


@click.command(epilog="How to set up several machines: clockwork docs machines")
@setting_options(*_OF_CONTROLLERS, hidden=all_but(*_OF_CONTROLLERS, *_NOT_OF_CONTROLLERS))
@json_flag
def controller(config: str | None, as_json: bool, **flags: Any) -> int:  # noqa: FBT001
    """Lead workers and gateways that join at --listen-machines, until told to stop.

    It serves what is in the catalogue of --store. Of several with one store, on any hosts, one leads by a
    lease there; the others stand by and take over.
    """
    settings = settings_from(None, config, flags, needs_repository=False)

    from clockwork_serve.serve.supervisor.config import controller_alone

    return _supervise(settings, controller_alone, _leading, as_json=as_json)


def _leading(server: Server) -> Told:
    models = len(server.catalogue.models)
    at = {"machines": server.settings.listen_machines, "metrics": server.metrics_url}
    does = "leads" if server.leader else "stands by, or takes the lead soon"
    lines = [f"{does}: {counted(models, 'model')}", *_addresses(at, server.settings)]
    return {"listening": True, **at, "devices_wanted": server.wanted_file, "models": models}, lines


@click.command(epilog="How to set up several machines: clockwork docs machines")
@setting_options(*_OF_GATEWAYS, hidden=taken_by(GATEWAY, *_OF_GATEWAYS))
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
        lines = [f"for the server at {settings.controller}:", *_addresses(at, settings)]
        _tell({"listening": True, **at}, lines, as_json=as_json)

    return run_gateways(settings, announce)


@click.command(epilog="How to set up several machines: clockwork docs machines")
@setting_options(*_OF_WORKERS, hidden=taken_by(WORKER, *_OF_WORKERS))
def worker(config: str | None, **flags: Any) -> int:
    """Join the server at --controller with this machine's devices, and serve until told to stop.

    The server was started with --listen-machines. Models are copied from --store into the cache here.
    """
    settings = settings_from(None, config, flags, needs_repository=False)

    from clockwork_serve.serve import child as logs
    from clockwork_serve.serve.supervisor.children import run_workers

    logs.configure("worker", settings.log_level, settings.log_format)
    return run_workers(settings)

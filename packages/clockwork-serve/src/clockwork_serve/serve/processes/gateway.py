"""A gateway process: HTTP, gRPC and metrics on one loop, one link to the controller. It runs no model."""

from __future__ import annotations

import asyncio
import errno
import gc
import logging
import os
import resource
import sys
from collections.abc import Callable, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Final

import msgspec
from msgspec import Struct

from clockwork_serve.errors import ConfigError
from clockwork_serve.serve import child
from clockwork_serve.serve.child import keep_small
from clockwork_serve.serve.gateway.access import Caps, Door, DoorConfig
from clockwork_serve.serve.gateway.client_shm import Regions
from clockwork_serve.serve.gateway.gateway import Gateway
from clockwork_serve.serve.gateway.settings import GatewaySettings
from clockwork_serve.serve.http.routes import Endpoints, find_metrics_route
from clockwork_serve.serve.http.server import HttpServer, Share
from clockwork_serve.serve.os_scheduling import run_patiently
from clockwork_serve.serve.processes.controller import SOCKET_NAME
from clockwork_serve.serve.remote.config import FarServer
from clockwork_serve.serve.remote.gateway import FarReach
from clockwork_serve.units import MIB

if TYPE_CHECKING:
    from clockwork_serve.serve.grpc.service import GatewayGrpc

EXIT_CONFIG: Final = 78
"""Exit status where a setting or the host does not allow to start (sysexits' EX_CONFIG)."""
DRAIN_S: Final = 2.0
"""Unless a setting says otherwise: the keeper drains before it sends SIGTERM."""

_log = logging.getLogger(__name__)


class GatewayConfig(Struct, frozen=True, kw_only=True):
    """A port of 0 is chosen by the system; ``grpc_port`` and ``metrics_port`` may be None for off.

    ``default_slo_ns``: of requests and models that name none (None: from the model's profile).
    ``region_bytes`` holds the tensors of all requests in flight. ``reuse_port``: other processes of ours
    listen there too. ``number`` is this gateway's among all ``gateways``, from 0. ``shared_memory``: the
    prefix of keys of shared memory that local clients may use. ``triton_codes``: what is refused or expired
    gets Triton's status. ``server``: that is on another machine. ``drain_s``: how long requests in flight may
    still end after SIGTERM.
    """

    run_dir: str
    name: str
    host: str = "127.0.0.1"
    http_port: int = 8000
    grpc_port: int | None = 8001
    metrics_port: int | None = 8002
    default_slo_ns: int | None = None
    region_bytes: int = 256 * MIB
    max_body_bytes: int = 64 * MIB
    reuse_port: bool = False
    gateways: int = 1
    number: int = 0
    model_control: bool = True
    shared_memory: str | None = None
    triton_codes: bool = False
    door: DoorConfig = DoorConfig()
    server: FarServer | None = None
    drain_s: float = DRAIN_S
    log_level: str = "info"
    log_format: str = "text"

    def __post_init__(self) -> None:
        """Check what the parts do not. Raises :class:`ConfigError`."""
        if self.max_body_bytes < 1 or self.region_bytes < 2 * self.max_body_bytes:
            raise ConfigError(
                f"region_bytes: expected at least twice max_body_bytes ({self.max_body_bytes}), "
                f"for inputs and outputs; found {self.region_bytes}"
            )


class GatewayServers:
    """A running gateway with its servers. ``port_by_name`` are the ports that it listens on."""

    def __init__(self, config: GatewayConfig) -> None:
        """Raises :class:`ConfigError` for a file of TLS or keys that will not do."""
        self.config = config
        self.door = Door(config.door, config.max_body_bytes, config.region_bytes)
        settings = GatewaySettings(
            name=config.name,
            controller=str(Path(config.run_dir) / SOCKET_NAME),
            region_bytes=config.region_bytes,
            default_slo_ns=config.default_slo_ns,
            triton_codes=config.triton_codes,
            requests=config.door.limits.requests,
        )
        keys = self.door.keys
        self.far = None if config.server is None else FarReach(config.name, config.server)
        self.gateway = Gateway(settings, caps=None if keys is None else Caps(keys.tenants), reach=self.far)
        if config.shared_memory is not None:
            self.gateway.regions = Regions(config.shared_memory, Path(config.run_dir) / "regions")
        self.endpoints = Endpoints(self.gateway, version("clockwork-serve"), config.model_control)
        self.http = HttpServer(self.gateway, self.endpoints, self.door)
        self.metrics = HttpServer(self.gateway, self.endpoints, self.door, find_metrics_route)
        self.grpc: GatewayGrpc | None = None
        self.port_by_name: dict[str, int] = {}
        loop = asyncio.get_running_loop()
        works = (self.gateway.link.run(), self.door.keep_fresh(), keep_small())
        self._tasks = [loop.create_task(work) for work in works]

    async def start(self, settle: Callable[[], None] = lambda: None) -> None:
        """Listen on all ports, after ``settle()``. Raises :class:`ConfigError` if one is not to be had.

        HTTP comes last, when everything that takes long is done: nobody knows how long a request has waited
        that came before we could read it.
        """
        config = self.config
        if config.grpc_port is not None:
            from clockwork_serve.serve.grpc.service import GatewayGrpc

            self.grpc = GatewayGrpc(
                self.gateway, self.endpoints, self.door, self.http.codec, reuse_port=config.reuse_port
            )
        settle()
        if self.grpc is not None and config.grpc_port is not None:
            self.port_by_name["grpc_port"] = await self.grpc.listen(config.host, config.grpc_port)
        if config.metrics_port is not None:
            await self._listen(self.metrics, "metrics_port", config.metrics_port)
        share = None
        if config.gateways > 1:
            share = Share(Path(config.run_dir), "http", config.gateways, config.number)
        await self._listen(self.http, "http_port", config.http_port, share)

    async def close(self, patience_s: float | None = None) -> None:
        """Accept no more, let requests in flight end for a while, then end everything."""
        patience_s = self.config.drain_s if patience_s is None else patience_s
        closing = [self.http.close(patience_s), self.metrics.close(patience_s)]
        if self.grpc is not None:
            closing.append(self.grpc.close(patience_s))
        await asyncio.gather(*closing)
        for task in self._tasks:
            task.cancel()
        self.gateway.close()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _listen(self, server: HttpServer, name: str, port: int, share: Share | None = None) -> None:
        config = self.config
        try:
            self.port_by_name[name] = await server.listen(
                config.host, port, reuse_port=config.reuse_port, share=share
            )
        except OSError as error:
            taken = error.errno == errno.EADDRINUSE
            why = "taken by another program" if taken else f"not to be had ({error.strerror or error})"
            raise ConfigError(
                f"{name}: expected a free port; found {port} on {config.host} {why}; choose another"
            ) from None


async def serve(config: GatewayConfig, stop: asyncio.Event) -> int:
    """Run a gateway until ``stop``; its exit status."""
    try:
        servers = GatewayServers(config)
        await servers.start(settle_memory)
    except ConfigError as error:
        _log.critical("%s", error)
        return EXIT_CONFIG
    child.answer_beats()
    servers.http.codec.start_soon()
    _log.info("listening", extra={"host": config.host, **servers.port_by_name})
    status = 0
    if servers.far is None:
        await stop.wait()
    else:
        status = await _unless_refused(servers.far, stop)
    await servers.close()
    return status


async def _unless_refused(far: FarReach, stop: asyncio.Event) -> int:
    """Return at ``stop``, or once the server will not have this gateway; the exit status."""
    stopped = asyncio.ensure_future(stop.wait())
    await asyncio.wait((stopped, far.refused), return_when=asyncio.FIRST_COMPLETED)
    stopped.cancel()
    if far.refused.done() and (error := far.refused.exception()) is not None:
        _log.critical("%s", error)
        return EXIT_CONFIG
    return 0


def settle_memory() -> None:
    """What was imported lives as long as the process; requests make few cycles."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(50_000, 20, 100)


def main(argv: Sequence[str]) -> int:
    """Run the process whose configuration is the JSON in ``argv[1]``; returns its exit status."""
    config = msgspec.json.decode(argv[1], type=GatewayConfig)
    child.prepare(config.name, config.log_level, config.log_format)
    run_patiently()
    # gRPC's core logs each client's nonsense by itself, from its own threads, as often as clients like.
    os.environ.setdefault("GRPC_VERBOSITY", "NONE")
    _allow_connections(config.door.limits.connections)
    status = 0

    async def body(stop: asyncio.Event) -> None:
        nonlocal status
        status = await serve(config, stop)

    return child.run_until_stopped(body) or status


def _allow_connections(wanted: int) -> None:
    """As many open files as the system allows: a connection is one."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    if hard != resource.RLIM_INFINITY and hard < wanted:
        _log.warning("max_connections: %d wanted, but the system allows a process %d files", wanted, hard)


if __name__ == "__main__":
    sys.exit(main(sys.argv))

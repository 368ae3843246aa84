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

from clockwork_serve.errors import ConfigError
from clockwork_serve.serve import child
from clockwork_serve.serve.child import keep_small
from clockwork_serve.serve.gateway.access import AccessControl, Caps
from clockwork_serve.serve.gateway.client_shm import Regions
from clockwork_serve.serve.gateway.gateway import Gateway
from clockwork_serve.serve.gateway.settings import GatewayConfig
from clockwork_serve.serve.http.routes import Endpoints, find_metrics_route
from clockwork_serve.serve.http.server import BalancerConfig, HttpServer
from clockwork_serve.serve.os_scheduling import run_patiently
from clockwork_serve.serve.remote.gateway import FarReach

if TYPE_CHECKING:
    from clockwork_serve.serve.grpc.service import GatewayGrpc

EXIT_CONFIG: Final = 78
"""Exit status where a setting or the host does not allow to start (sysexits' EX_CONFIG)."""
DRAIN_S: Final = 2.0
"""For requests in flight to end after SIGTERM, where a keeper drained the whole server before."""

_log = logging.getLogger(__name__)


class GatewayServers:
    """A running gateway with its servers. ``port_by_name`` are the ports that it listens on."""

    def __init__(self, config: GatewayConfig) -> None:
        """Raises :class:`ConfigError` for a file of TLS or keys that will not do."""
        self.config = config
        settings = config.settings
        self.access = AccessControl(config)
        keys = self.access.keys
        self.far = FarReach(config.name, settings) if config.elsewhere else None
        self.gateway = Gateway(config, caps=None if keys is None else Caps(keys.tenants), reach=self.far)
        if settings.shared_memory is not None:
            self.gateway.regions = Regions(settings.shared_memory, Path(config.run_dir) / "regions")
        self.endpoints = Endpoints(self.gateway, version("clockwork-serve"), settings.model_control)
        self.http = HttpServer(self.gateway, self.endpoints, self.access)
        self.metrics = HttpServer(self.gateway, self.endpoints, self.access, find_metrics_route)
        self.grpc: GatewayGrpc | None = None
        self.port_by_name: dict[str, int] = {}
        loop = asyncio.get_running_loop()
        works = (self.gateway.link.run(), self.access.keep_fresh(), keep_small())
        self._tasks = [loop.create_task(work) for work in works]

    async def start(self, settle: Callable[[], None] = lambda: None) -> None:
        """Listen on all ports, after ``settle()``. Raises :class:`ConfigError` if one is not to be had.

        HTTP comes last, when everything that takes long is done: nobody knows how long a request has waited
        that came before we could read it.
        """
        config, settings = self.config, self.config.settings
        if settings.grpc_port is not None:
            from clockwork_serve.serve.grpc.service import GatewayGrpc

            self.grpc = GatewayGrpc(
                self.gateway, self.endpoints, self.access, self.http.codec, reuse_port=config.reuse_port
            )
        settle()
        if self.grpc is not None and settings.grpc_port is not None:
            self.port_by_name["grpc_port"] = await self.grpc.listen(settings.host, settings.grpc_port)
        if settings.metrics_port is not None:
            await self._listen(self.metrics, "metrics_port", settings.metrics_port)
        share = None
        if settings.gateways > 1:
            share = BalancerConfig(Path(config.run_dir), "http", settings.gateways, config.number)
        await self._listen(self.http, "http_port", settings.http_port, share)

    async def close(self, grace_s: float | None = None) -> None:
        """Accept no more, let requests in flight end for a while, then end everything."""
        if grace_s is None:
            # At home the keeper drains the whole server before it ends one.
            grace_s = self.config.settings.drain_s if self.config.elsewhere else DRAIN_S
        closing = [self.http.close(grace_s), self.metrics.close(grace_s)]
        if self.grpc is not None:
            closing.append(self.grpc.close(grace_s))
        await asyncio.gather(*closing)
        for task in self._tasks:
            task.cancel()
        self.gateway.close()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _listen(
        self, server: HttpServer, name: str, port: int, share: BalancerConfig | None = None
    ) -> None:
        host = self.config.settings.host
        try:
            self.port_by_name[name] = await server.listen(
                host, port, reuse_port=self.config.reuse_port, share=share
            )
        except OSError as error:
            taken = error.errno == errno.EADDRINUSE
            why = "taken by another program" if taken else f"not to be had ({error.strerror or error})"
            raise ConfigError(
                f"{name}: expected a free port; found {port} on {host} {why}; choose another"
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
    _log.info("listening", extra={"host": config.settings.host, **servers.port_by_name})
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
    child.prepare(config.name, config.settings)
    run_patiently()
    # gRPC's core logs each client's nonsense by itself, from its own threads, as often as clients like.
    os.environ.setdefault("GRPC_VERBOSITY", "NONE")
    _allow_connections(config.settings.max_connections)
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

"""A gateway process: HTTP, gRPC and metrics on one loop, and one link to the controller."""

from __future__ import annotations

import asyncio
import errno
import logging
import os
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import msgspec

from clockwork_serve import __version__
from clockwork_serve.config.values import split_address
from clockwork_serve.errors import ConfigError, TransportError
from clockwork_serve.serve import child
from clockwork_serve.serve.child import limit_arenas, trim_memory
from clockwork_serve.serve.driver import use_batch_policy
from clockwork_serve.serve.gateway.access import AccessControl, Caps
from clockwork_serve.serve.gateway.client_shm import Regions
from clockwork_serve.serve.gateway.gateway import Gateway
from clockwork_serve.serve.gateway.settings import GatewayConfig
from clockwork_serve.serve.http.routes import Endpoints, find_metrics_route
from clockwork_serve.serve.http.server import BalancerConfig, HttpServer
from clockwork_serve.serve.lease import STANDBY_NAME
from clockwork_serve.serve.remote.config import ClusterContext, cluster_files
from clockwork_serve.serve.remote.finding import FarConnector
from clockwork_serve.serve.remote.tensor_server import TensorServer
from clockwork_serve.telemetry import Journal, refusals_path

if TYPE_CHECKING:
    from clockwork_serve.serve.grpc.service import GatewayGrpc

DRAIN_S: Final = 2.0
"""How long requests in flight may take after SIGTERM, where the supervisor has drained the server before."""
REFUSALS_SHARE: Final = 8  # what a gateway ended by itself may take the journal's bytes divided by this
REFUSALS_FILES: Final = 2
REFUSALS_FLUSH_S: Final = 0.25
_THRESHOLDS: Final = (50_000, 20, 100)  # of garbage collection; requests create few reference cycles

_log = logging.getLogger(__name__)


class GatewayServers:
    """A running gateway with its servers. ``port_by_name`` are the ports that it listens on."""

    def __init__(self, config: GatewayConfig) -> None:
        """Raises :class:`ConfigError` if a file of TLS or of keys cannot be used."""
        limit_arenas()  # now: gRPC's check of itself starts eight threads before any task runs
        self.config = config
        settings = config.settings
        self.access = AccessControl(config)
        keys = self.access.keys
        self.far = FarConnector(config.name, settings, self._on_host) if config.elsewhere else None
        self.gateway = Gateway(config, caps=None if keys is None else Caps(keys.tenants), connector=self.far)
        self.tensors: TensorServer | None = None
        if config.elsewhere or settings.listen_machines:
            context = ClusterContext(cluster_files(settings), server=True)
            self.tensors = TensorServer(self.gateway.slots, context, settings.silence_s)
        if settings.shared_memory is not None:
            self.gateway.regions = Regions(settings.shared_memory, Path(config.run_dir) / "regions")
        if config.metrics_only:
            self.gateway.link.read_standby = partial(_read_standby, Path(config.run_dir) / STANDBY_NAME)
        path = None if config.elsewhere else settings.journal_path(config.run_dir)
        if path is not None:
            size = settings.journal_bytes // REFUSALS_SHARE // REFUSALS_FILES
            kept = refusals_path(path, config.name)
            self.gateway.refusals = Journal(kept, file_bytes=size, files=REFUSALS_FILES)
        self.endpoints = Endpoints(self.gateway, __version__)
        self.http = HttpServer(self.gateway, self.endpoints, self.access)
        self.metrics = HttpServer(self.gateway, self.endpoints, self.access, find_metrics_route)
        self.grpc: GatewayGrpc | None = None
        self.port_by_name: dict[str, int] = {}
        loop = asyncio.get_running_loop()
        works = (self.gateway.link.run(), self.access.keep_fresh(), trim_memory(), self._keep_refusals())
        self._tasks = [loop.create_task(work) for work in works]

    async def start(self, before_listening: Callable[[], None] = lambda: None) -> None:
        """Listen on all ports, after ``before_listening()``.

        HTTP is last, after everything that takes long: how long a request waited that arrived before it could
        be read is not known. Raises :class:`ConfigError` if a port cannot be had.
        """
        config, settings = self.config, self.config.settings
        if settings.listen_machines and not (config.elsewhere or config.metrics_only):
            # Workers elsewhere reach it at the address by which they reach the server.
            port = self._listen_for_workers(split_address(settings.listen_machines)[0])
            self.gateway.slots.server = f":{port}"
        if settings.grpc_port is not None:
            from clockwork_serve.serve.grpc.service import GatewayGrpc

            self.grpc = GatewayGrpc(
                self.gateway, self.endpoints, self.access, self.http.codec, reuse_port=config.reuse_port
            )
        before_listening()
        if self.grpc is not None and settings.grpc_port is not None:
            self.port_by_name["grpc_port"] = await self.grpc.listen(settings.host, settings.grpc_port)
        if settings.metrics_port is not None:
            await self._listen(self.metrics, "metrics_port", settings.metrics_port)
        if config.metrics_only:
            return
        share = None
        if settings.gateways > 1:
            share = BalancerConfig(Path(config.run_dir), "http", settings.gateways, config.number)
        await self._listen(self.http, "http_port", settings.http_port, share)

    async def close(self, grace_s: float | None = None) -> None:
        """Stop accepting, wait up to ``grace_s`` for requests in flight, then close everything."""
        if grace_s is None:
            # On the server's own machine the supervisor has drained the server before.
            grace_s = self.config.settings.drain_s if self.config.elsewhere else DRAIN_S
        closing = [self.http.close(grace_s), self.metrics.close(grace_s)]
        if self.grpc is not None:
            closing.append(self.grpc.close(grace_s))
        await asyncio.gather(*closing)
        for task in self._tasks:
            task.cancel()
        if self.tensors is not None:
            self.tensors.close()
        self.gateway.close()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        if self.gateway.refusals is not None:
            self.gateway.refusals.close()

    def _on_host(self, host: str) -> None:
        """Have workers get tensors at the address of this machine that is on the way to the server."""
        try:
            port = self._listen_for_workers(host)
        except ConfigError as error:
            raise TransportError(str(error)) from None
        self.gateway.slots.server = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"

    def _listen_for_workers(self, host: str) -> int:
        assert self.tensors is not None, "others may get tensors here"
        first = self.config.settings.tensor_port
        return self.tensors.listen_at(host, first and first + self.config.number)

    async def _keep_refusals(self) -> None:
        while self.gateway.refusals is not None:
            await asyncio.sleep(REFUSALS_FLUSH_S)
            self.gateway.refusals.flush()

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


def _read_standby(path: Path) -> str:
    """What the controller of this host wrote, if it stands by."""
    try:
        return path.read_text()
    except OSError:
        return ""


async def serve(config: GatewayConfig, stop: asyncio.Event) -> None:
    """Run a gateway until ``stop``.

    Raises :class:`ConfigError` if it cannot start, or its server on another machine refuses it.
    """
    servers = GatewayServers(config)
    await servers.start(partial(child.freeze_live_objects, *_THRESHOLDS))
    child.answer_beats()
    servers.http.codec.start_soon()
    _log.info("listening", extra={"host": config.settings.host, **servers.port_by_name})
    refused: set[asyncio.Future[Any]] = set() if servers.far is None else {servers.far.refused}
    stopped: asyncio.Future[Any] = asyncio.ensure_future(stop.wait())
    await asyncio.wait({stopped, *refused}, return_when=asyncio.FIRST_COMPLETED)
    stopped.cancel()
    await servers.close()
    for refusal in refused:
        if refusal.done():
            refusal.result()


def main(argv: Sequence[str]) -> int:
    """Run the process whose configuration is the JSON in ``argv[1]``; returns its exit status."""
    config = msgspec.json.decode(argv[1], type=GatewayConfig)
    child.prepare(config.name, config.settings)
    use_batch_policy()
    # gRPC's core logs each malformed request by itself, from its own threads: clients could flood the log.
    os.environ.setdefault("GRPC_VERBOSITY", "NONE")
    return child.run_until_stopped(lambda stop: serve(config, stop))


if __name__ == "__main__":
    sys.exit(main(sys.argv))

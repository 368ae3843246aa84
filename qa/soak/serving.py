"""The server of a soak, in processes of its own, so that each of them can be watched and killed.

``python -m qa.soak.serving CONFIG`` is its supervisor; the rest of this module is for the code that starts
it.
"""

from __future__ import annotations

import json
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, cast

import msgspec

from clockwork_serve.config import Settings
from clockwork_serve.devices import DeviceConfig
from clockwork_serve.serve.supervisor.server import RunningServer, Server, ServerConfig, run
from clockwork_serve.store import StoreConfig
from clockwork_serve.units import MIB
from harness.machine import children
from harness.server import name_of
from harness.serving import Serving

ROOT: Final = Path(__file__).parents[2]
START_S: Final = 180.0
STOP_S: Final = 60.0
KEEPER: Final = "keeper"
_KINDS: Final = ("controller", "worker", "gateway")


class Processes:
    """A server's addresses and processes, by name; it has what benchmarks ask a ``RunningServer``."""

    def __init__(self, keeper: subprocess.Popen[str], told: dict[str, Any]) -> None:
        self.keeper = keeper
        self.http_url: str = told["http"]
        self.grpc_url: str = told["grpc"]
        self.metrics_url: str = told["metrics"]
        self.http_port, self.grpc_port, self.metrics_port = (
            int(url.rstrip("/metrics").rpartition(":")[2])
            for url in (self.http_url, self.grpc_url, self.metrics_url)
        )
        self.names = sorted(self.pids())

    def pid(self, name: str) -> int | None:
        """The process of that name now."""
        return self.pids().get(name)

    def pids(self) -> dict[str, int]:
        """All processes but the keeper and those that only help for a while, by name."""
        named = {name_of(pid): pid for pid in children(self.keeper.pid)}
        return {name: pid for name, pid in named.items() if name.partition("-")[0] in _KINDS}

    def all(self) -> dict[str, int]:
        """The keeper too."""
        return {KEEPER: self.keeper.pid, **self.pids()}


class Log:
    """What the server's processes say, on disk and, the last of it, here."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.lines: list[str] = []

    def read(self, stream: Any) -> None:
        """Until it ends."""
        with self.path.open("w") as file:
            for line in stream:
                file.write(line)
                file.flush()
                self.lines.append(line.rstrip("\n"))
                del self.lines[:-20_000]


@dataclass(slots=True)
class Up:
    """One server that is up."""

    name: str
    serving: Serving
    server: Processes
    log: Log
    offset: int = 0
    """Requests that gateways received which were killed, below zero."""
    heard: int = 0
    """Good answers until the last quiet moment."""
    late: int = 0
    """Answers counted as late until then."""
    over: int = 0
    """Good answers that came after their clients had been told that their deadline was over."""


def processes(ups: list[Up]) -> dict[str, int]:
    """All processes of all servers: ``cpu/gateway-0``."""
    return {f"{up.name}/{name}": pid for up in ups for name, pid in up.server.all().items()}


def config_of(folder: Path, kind: str, gateways: int) -> ServerConfig:
    """A device that has memory for some of its models."""
    devices = (DeviceConfig(device=f"{kind}:0", kind=kind, memory_bytes=(4 if kind == "cpu" else 12) * MIB),)
    return ServerConfig(
        settings=Settings(
            repository=str(folder / "models"),
            http_port=0,
            grpc_port=0,
            metrics_port=0,
            gateways=gateways,
            gateway_memory=32 * MIB,
            max_body=8 * MIB,
            log_level="warning",
        ),
        store=StoreConfig(cache_dir=str(folder / "cache")),
        devices=devices,
    )


@contextmanager
def served(folder: Path, kind: str, gateways: int) -> Iterator[Up]:
    """A server of its own processes that is ready; it is stopped at the end of the block."""
    config = msgspec.json.encode(config_of(folder, kind, gateways)).decode()
    keeper = subprocess.Popen(
        [sys.executable, "-m", "qa.soak.serving", config], cwd=ROOT, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True,
    )  # fmt: skip
    log = Log(folder / "server.log")
    reader = threading.Thread(target=log.read, args=(keeper.stderr,), daemon=True)
    reader.start()
    try:
        assert keeper.stdout is not None
        told = keeper.stdout.readline()
        if not told:
            raise RuntimeError("the server did not start: " + "; ".join(log.lines[-5:]))
        server = Processes(keeper, json.loads(told))
        yield Up(kind, Serving(cast("RunningServer", server), "worker"), server, log)
    finally:
        keeper.terminate()
        try:
            keeper.wait(STOP_S)
        except subprocess.TimeoutExpired:
            keeper.kill()
            keeper.wait()
        reader.join(5)
        for stream in (keeper.stdout, keeper.stderr):
            assert stream is not None
            stream.close()


def main() -> int:
    """Be the keeper until told to stop."""

    def announce(server: Server) -> None:
        told = {"http": server.http_url, "grpc": server.grpc_url, "metrics": server.metrics_url}
        print(json.dumps(told), flush=True)

    return run(msgspec.json.decode(sys.argv[1], type=ServerConfig), on_ready=announce, timeout_s=START_S)


if __name__ == "__main__":
    sys.exit(main())

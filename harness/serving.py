"""Starts the server that a benchmark measures, as real processes, and asks it about itself."""

from __future__ import annotations

import json
import ssl
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from prometheus_client.parser import text_string_to_metric_families

from clockwork_serve.config import Settings
from clockwork_serve.config.table import IN_MEMORY
from clockwork_serve.controller import ControllerConfig
from clockwork_serve.devices import DeviceConfig
from clockwork_serve.serve.supervisor.server import RunningServer, ServerConfig, running_server
from clockwork_serve.store import StoreConfig
from clockwork_serve.units import MIB
from harness import machine

Metrics = dict[tuple[str, frozenset[tuple[str, str]]], float]


@dataclass(slots=True)
class Serving:
    """A server that is up, with its one worker."""

    server: RunningServer
    worker: str

    @property
    def http_url(self) -> str:
        """``http://host:port``."""
        return self.server.http_url

    @property
    def grpc_url(self) -> str:
        """``host:port``."""
        return self.server.grpc_url

    def get(self, path: str) -> Any:
        """The JSON of a GET."""
        with urllib.request.urlopen(f"{self.http_url}{path}", timeout=60) as response:  # noqa: S310 (a URL of ours)
            return json.load(response)

    def metrics(self, url: str = "") -> Metrics:
        """All samples by name and labels; ``url`` is for those of any gateway, not the first one's."""
        return read_metrics(url or self.server.metrics_url)

    def pids(self) -> list[int]:
        """All processes of the server but the one that this program runs in."""
        pids = [self.server.pid(name) for name in self.server.names]
        return [pid for pid in pids if pid is not None]

    def worker_pid(self) -> int:
        """The worker's process. RuntimeError while it is down."""
        pid = self.server.pid(self.worker)
        if pid is None:
            raise RuntimeError(f"{self.worker} is down")
        return pid

    def exec_thread(self) -> int:
        """The worker's thread that runs models: by name, else the one that used most CPU.

        An emulated device's actions are run by the process's only thread.
        """
        pid = self.worker_pid()
        found = machine.threads(pid)
        others = [thread for thread in found if thread.tid != pid]
        named = [thread for thread in others if "exec" in thread.name]
        return max(named or others or found, key=lambda thread: thread.cpu_s).tid


def read_metrics(url: str, timeout_s: float = 30.0, ca: Path | None = None) -> Metrics:
    """All samples of one page by name and labels; ``ca``: its authority. OSError if nobody answers."""
    trust = None if ca is None else ssl.create_default_context(cafile=ca)
    with urllib.request.urlopen(url, timeout=timeout_s, context=trust) as response:  # noqa: S310 (of ours)
        text = response.read().decode()
    return {
        (sample.name, frozenset(sample.labels.items())): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


def total(metrics: Metrics, name: str, **labels: str) -> float:
    """The sum of all samples of a name that have these labels."""
    wanted = set(labels.items())
    return sum(value for (found, pairs), value in metrics.items() if found == name and wanted <= pairs)


@contextmanager
def serve(
    repository: Path,
    *,
    device: str = "cpu",
    memory_bytes: int = 256 * MIB,
    io_bytes: int = 256 * MIB,
    journal: Path | str | None = IN_MEMORY,
    cache: Path | None = None,
    controller: ControllerConfig | None = None,
    on_line: Callable[[str], None] | None = None,
    **settings: Any,
) -> Iterator[Serving]:
    """Serve ``repository`` on one device with free ports until the end of the block.

    ``on_line`` gets what its processes log. ``settings`` are more settings of the server.
    """
    given: dict[str, Any] = {"http_port": 0, "grpc_port": 0, "metrics_port": 0, "log_level": "warning"}
    every = Settings(
        repository=str(repository), journal=None if journal is None else str(journal), **given | settings
    )
    config = ServerConfig(
        settings=every,
        store=StoreConfig(cache_dir=str(cache or repository.parent / "cache"), shared=every.store),
        devices=(
            DeviceConfig(
                device=f"{device}:0",
                kind=device,
                memory_bytes=memory_bytes,
                io_bytes=io_bytes,
                workspace_bytes=every.workspace,
            ),
        ),
        controller=controller or ControllerConfig(),
    )
    with running_server(config, on_line=on_line) as server:
        (worker,) = (name for name in server.names if name.startswith("worker"))
        yield Serving(server, worker)


def until(what: str, condition: Callable[[], Any], timeout_s: float = 60.0, every_s: float = 0.005) -> Any:
    """Wait for a condition; what it gave. TimeoutError names it when it does not come.

    Who asks takes a fifth of a core at most: what is waited for needs the others.
    """
    end = time.monotonic() + timeout_s
    began_s = time.thread_time()
    while not (found := condition()):
        if time.monotonic() > end:
            raise TimeoutError(f"waited {timeout_s:g} s in vain until {what}")
        now_s = time.thread_time()
        time.sleep(max(every_s, 4 * (now_s - began_s)))
        began_s = now_s
    return found

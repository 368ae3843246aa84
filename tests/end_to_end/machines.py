"""Workers as if on other machines: processes that join over TCP, with certificates of one authority."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import msgspec
import numpy as np
from benchmarks.machine import children
from benchmarks.serving import Serving, until

from benchmarks import repositories
from clockwork_serve.devices import DeviceConfig
from clockwork_serve.errors import TransportError
from clockwork_serve.serve.cluster_tls import ClusterFiles
from clockwork_serve.serve.machine_config import BridgeSettings, MachineConfig
from clockwork_serve.serve.worker_process import WorkerConfig
from tests.serve.certificates import Certificates

WIDE, LONG = 512, 256
"""Half a MiB of weights, which a server's own device of one page has no room for."""
MODELS = 3
PAGE = 256 * 1024
PATIENCE_S = 60.0


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port: int = found.getsockname()[1]
        return port


def settings(certificates: Certificates, port: int, silence_s: float = 2.0) -> BridgeSettings:
    files = ClusterFiles(certificate=certificates.certificate, key=certificates.key, ca=certificates.ca)
    return BridgeSettings(host="127.0.0.1", port=port, files=files, silence_s=silence_s)


def matrices(root: Path) -> Path:
    """A repository of models that only other machines can hold."""
    for index in range(MODELS):
        repositories.one_matrix(root, f"m{index}", repositories.matrix_of(index, WIDE, LONG))
    return root


def product(index: int, x: repositories.Floats) -> repositories.Floats:
    """What model ``index`` answers."""
    return np.asarray(x @ repositories.matrix_of(index, WIDE, LONG))


@dataclass
class FarWorker:
    """A ``clockwork worker`` and what it said."""

    process: subprocess.Popen[str]
    name: str
    said: list[str] = field(default_factory=list)

    @property
    def device(self) -> str:
        return f"{self.name}.cpu:0"

    @property
    def children(self) -> list[int]:
        """Its worker processes."""
        return children(self.process.pid)

    def heard(self, word: str) -> bool:
        return any(word in line for line in self.said)

    def listen(self) -> None:
        assert self.process.stderr is not None
        for line in self.process.stderr:
            self.said.append(line.rstrip("\n"))

    def signal_children(self, number: signal.Signals) -> None:
        for pid in self.children:
            os.kill(pid, number)


@contextmanager
def far_worker(
    port: int, certificates: Certificates, cache: Path, *options: str, name: str = "alpha",
    before: tuple[str, ...] = (), host: str = "127.0.0.1",
) -> Iterator[FarWorker]:  # fmt: skip
    """One on ``host`` and ``port``; ``before`` its command come other words."""
    command = [
        *before, sys.executable, "-m", "clockwork_serve", "worker", "--controller", f"{host}:{port}",
        "--machine-name", name, "--cache", str(cache), "--device-memory", "16MiB",
        "--cluster-certificate", certificates.client_certificate, "--cluster-key", certificates.client_key,
        "--cluster-ca", certificates.ca, *options,
    ]  # fmt: skip
    process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    worker = FarWorker(process, name)
    listening = threading.Thread(target=worker.listen, daemon=True)
    listening.start()
    try:
        yield worker
    finally:
        process.terminate()
        try:
            process.wait(15)
        except subprocess.TimeoutExpired:
            worker.signal_children(signal.SIGKILL)
            process.kill()
            process.wait()
        listening.join(5)
        assert process.stderr is not None
        process.stderr.close()


def devices(serving: Serving) -> dict[str, bool]:
    """Names of all devices that the controller knows, and whether each has prepared all."""
    try:
        found = serving.server.state()["controller"]["devices"]
    except TransportError:
        return {}
    return {device["device"]: not device["pending_codes"] for device in found}


def joined(serving: Serving, *workers: FarWorker, timeout_s: float = PATIENCE_S) -> None:
    """Wait until the controller has these, ready."""
    for worker in workers:
        until(
            f"{worker.device} is ready", lambda worker=worker: devices(serving).get(worker.device), timeout_s
        )


def worker_config(port: int, certificates: Certificates, folder: Path, name: str) -> str:
    """The configuration of a worker process by itself, as JSON."""
    run_dir = folder / "run"
    run_dir.mkdir()
    files = ClusterFiles(
        certificate=certificates.client_certificate, key=certificates.client_key, ca=certificates.ca
    )
    machine = MachineConfig(
        host="127.0.0.1", port=port, files=files, cache_dir=str(folder / "cache"), kinds=("cpu",)
    )
    config = WorkerConfig(
        run_dir=str(run_dir), name=name, devices=(DeviceConfig(device=name, memory_bytes=16 * PAGE),),
        machine=machine,
    )  # fmt: skip
    return msgspec.json.encode(config).decode()

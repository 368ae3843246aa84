"""Workers as if on other machines: processes that join over TCP, with certificates of one authority."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import msgspec
import numpy as np

from clockwork_serve.config import Settings
from clockwork_serve.devices import DeviceConfig
from clockwork_serve.errors import TransportError
from clockwork_serve.serve.remote.config import ClusterFiles
from clockwork_serve.serve.worker.host import WorkerConfig
from harness import repositories
from harness.machine import children
from harness.server import name_of
from harness.serving import Metrics, Serving, read_metrics, until
from tests.serve.certificates import Certificates

WIDE, LONG = 512, 256
"""Half a MiB of weights, which a server's own device of one page has no room for."""
MODELS = 3
PAGE = 256 * 1024
PATIENCE_S = 60.0

Far = TypeVar("Far", bound="FarProcess")


def settings(certificates: Certificates, port: int, silence_s: float = 2.0) -> dict[str, Any]:
    """Of a server that others may join; its store is beside the certificates."""
    files = ClusterFiles(certificate=certificates.certificate, key=certificates.key, ca=certificates.ca)
    return {
        "listen_machines": f"127.0.0.1:{port}",
        "silence_s": silence_s,
        "store": store_of(certificates),
        **files.named(),
    }


def store_of(certificates: Certificates) -> str:
    """The shared store of a server with these certificates."""
    folder = Path(certificates.ca).with_name("store")
    folder.mkdir(exist_ok=True)
    return str(folder)


def matrices(root: Path) -> Path:
    """A repository of models that only other machines can hold."""
    for index in range(MODELS):
        repositories.one_matrix(root, f"m{index}", repositories.matrix_of(index, WIDE, LONG))
    return root


def product(index: int, x: repositories.Floats) -> repositories.Floats:
    """What model ``index`` answers."""
    return np.asarray(x @ repositories.matrix_of(index, WIDE, LONG))


@dataclass
class FarProcess:
    """A ``clockwork worker`` or ``gateway`` and what it said."""

    process: subprocess.Popen[str]
    name: str
    said: list[str] = field(default_factory=list)
    at: dict[str, str] = field(default_factory=dict)
    """Addresses of a gateway."""

    @property
    def children(self) -> list[int]:
        """The processes that it keeps, without their guard."""
        return [pid for pid in children(self.process.pid) if name_of(pid)]

    def heard(self, word: str) -> bool:
        return any(word in line for line in self.said)

    def listen(self) -> None:
        assert self.process.stderr is not None
        for line in self.process.stderr:
            self.said.append(line.rstrip("\n"))

    def signal_children(self, number: signal.Signals) -> None:
        for pid in self.children:
            os.kill(pid, number)


class FarWorker(FarProcess):
    """A ``clockwork worker``."""

    @property
    def device(self) -> str:
        return f"{self.name}.cpu:0"


class FarGateway(FarProcess):
    """A ``clockwork gateway``."""

    @property
    def url(self) -> str:
        return self.at["http"]

    @property
    def gateway(self) -> str:
        """What the server calls its first process."""
        return f"{self.name}.gateway-0"

    def metrics(self) -> Metrics:
        return read_metrics(self.at["metrics"])

    @property
    def ready(self) -> bool:
        """Whether it would serve."""
        try:
            with urllib.request.urlopen(f"{self.url}/v2/health/ready", timeout=60) as response:
                return bool(response.status == 200)
        except OSError:
            return False


@contextmanager
def far_worker(
    port: int, certificates: Certificates, cache: Path, *options: str, name: str = "alpha",
    before: tuple[str, ...] = (), host: str = "127.0.0.1",
) -> Iterator[FarWorker]:  # fmt: skip
    """One on ``host`` and ``port``; ``before`` its command come other words."""
    command = [*joining("worker", f"{host}:{port}", certificates, name), "--log-level", "info"]
    place = ["--store", store_of(certificates), "--cache", str(cache)]
    process = spoken([*before, *command, *place, "--device-memory", "16MiB", *options])
    with kept(FarWorker(process, name)) as worker:
        yield worker


@contextmanager
def far_gateway(
    port: int, certificates: Certificates, *options: str, name: str = "alpha",
    before: tuple[str, ...] = (), host: str = "127.0.0.1",
) -> Iterator[FarGateway]:  # fmt: skip
    """One that listens, on ports that the system chose, unless it ended at once."""
    command = [*joining("gateway", f"{host}:{port}", certificates, name), "--json"]
    ports = [f"--{which}-port=0" for which in ("http", "grpc", "metrics")]
    process = spoken([*before, *command, *ports, *options], stdout=subprocess.PIPE)
    assert process.stdout is not None
    with kept(FarGateway(process, name)) as gateway, process.stdout as told:
        gateway.at.update(json.loads(told.readline() or "{}"))
        yield gateway


def joining(command: str, server: str, certificates: Certificates, name: str) -> list[str]:
    return [
        sys.executable, "-m", "clockwork_serve", command, "--controller", server, "--machine-name", name,
        "--cluster-certificate", certificates.client_certificate, "--cluster-key", certificates.client_key,
        "--cluster-ca", certificates.ca,
    ]  # fmt: skip


def spoken(command: list[str], stdout: int | None = None) -> subprocess.Popen[str]:
    return subprocess.Popen(
        command, stdin=subprocess.DEVNULL, stdout=stdout, stderr=subprocess.PIPE, text=True
    )


@contextmanager
def kept(far: Far) -> Iterator[Far]:
    """Listen to it until the end of the block, and end it then."""
    process = far.process
    listening = threading.Thread(target=far.listen, daemon=True)
    listening.start()
    try:
        yield far
    finally:
        process.terminate()
        try:
            process.wait(60)
        except subprocess.TimeoutExpired:
            far.signal_children(signal.SIGKILL)
            process.kill()
            process.wait()
        listening.join(60)
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
    """Wait until the controller has these, ready: themselves, and not others of their names before them."""
    for worker in workers:
        until(f"{worker.device} has joined", lambda worker=worker: worker.heard("joined with"), timeout_s)
        until(
            f"{worker.device} is ready", lambda worker=worker: devices(serving).get(worker.device), timeout_s
        )


def cluster_files(certificates: Certificates) -> ClusterFiles:
    """What a machine that joins shows."""
    return ClusterFiles(
        certificate=certificates.client_certificate, key=certificates.client_key, ca=certificates.ca
    )


def worker_config(port: int, certificates: Certificates, folder: Path, name: str) -> str:
    """The configuration of a worker process by itself, as JSON."""
    run_dir = folder / "run"
    run_dir.mkdir()
    settings = Settings(
        controller=f"127.0.0.1:{port}",
        cache=str(folder / "cache"),
        store=store_of(certificates),
        **cluster_files(certificates).named(),
    )
    config = WorkerConfig(
        run_dir=str(run_dir),
        name=name,
        devices=(DeviceConfig(device=name, memory_bytes=16 * PAGE),),
        settings=settings,
        elsewhere=True,
    )
    return msgspec.json.encode(config).decode()


ANOTHER_BUILD = """
import clockwork_serve

clockwork_serve.__version__ = "9.9"

from clockwork_serve.serve import transport

transport.PROTOCOL += {ahead}
"""


def another_build(folder: Path, ahead: int) -> tuple[str, ...]:
    """Words before a command that is to run as a build of another protocol, with all that it starts."""
    (folder / "sitecustomize.py").write_text(ANOTHER_BUILD.format(ahead=ahead))
    rest = os.environ.get("PYTHONPATH", "")  # it is of this build's code but for that
    return ("env", f"PYTHONPATH={folder}{os.pathsep if rest else ''}{rest}")


# Without --fork: it takes the place of unshare, and its children get the clock.
OTHER_CLOCK = ("unshare", "--user", "--map-root-user", "--time", "--monotonic", "1000000", "--")


def other_clocks() -> bool:
    return subprocess.run([*OTHER_CLOCK, "true"], capture_output=True, check=False).returncode == 0

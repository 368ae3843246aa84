"""Starts a real Triton server, which ``make triton`` installs, to compare ours with. It judges nothing.

Triton's Python backend runs each instance of a model in a process of its own, the stub.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import sysconfig
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from harness.ports import free_port

_PYTHON: Final = f"{sys.version_info.major}.{sys.version_info.minor}"
SHARED: Final = Path("/dev/shm")  # noqa: S108 - where stubs put their memory, by names that nobody guesses
START_S: Final = 180.0
STOP_S: Final = 15.0


@dataclass(frozen=True, slots=True)
class Wheel:
    """The wheel of PyTriton, installed into a Python of its own; it has the Python backend alone."""

    home: Path

    @property
    def packages(self) -> Path:
        """Where it is."""
        return self.home / "lib" / f"python{_PYTHON}" / "site-packages"

    @property
    def server(self) -> Path:
        """Triton's own folder."""
        return self.packages / "pytriton" / "tritonserver"

    @property
    def stub(self) -> Path:
        """The program that runs models in this very Python."""
        return self.server / "python_backend_stubs" / _PYTHON / "triton_python_backend_stub"

    @property
    def libraries(self) -> str:
        """Where the stub finds the library of this Python."""
        return f"{sysconfig.get_config_var('LIBDIR')}:{self.packages / 'nvidia_pytriton.libs'}"

    def backends(self) -> Path:
        """The folder with the Python backend, and with it the stub for this very Python."""
        stub = self.server / "backends" / "python" / self.stub.name
        if not stub.is_file() or stub.read_bytes() != self.stub.read_bytes():
            shutil.copyfile(self.stub, stub)
        stub.chmod(0o755)
        return stub.parents[1]


WHEEL: Final = Wheel(Path(__file__).parents[1] / "build" / "triton")


def serve_options(repository: Path, backends: Path, ports: Sequence[int]) -> list[str]:
    """Of a server on 127.0.0.1 whose clients may load and unload; ``ports``: HTTP, gRPC, metrics."""
    http, grpc, metrics = ports
    return [
        f"--model-repository={repository}", "--model-control-mode=explicit", "--load-model=*",
        f"--backend-directory={backends}",
        "--http-address=127.0.0.1", f"--http-port={http}",
        "--grpc-address=127.0.0.1", f"--grpc-port={grpc}",
        "--metrics-address=127.0.0.1", f"--metrics-port={metrics}",
        "--allow-gpu-metrics=false", "--exit-timeout-secs=5", "--log-info=false",
    ]  # fmt: skip


SOURCE: Final = '''"""Takes its time and gives back what it got; Triton and Clockwork Serve both read it."""

import time

PAIRS = {pairs!r}
SLEEP_S = {sleep_s}


class TritonPythonModel:
    def execute(self, requests):
        import triton_python_backend_utils as utils

        time.sleep(SLEEP_S)
        return [
            utils.InferenceResponse(
                [utils.Tensor(y, utils.get_input_tensor_by_name(one, x).as_numpy()) for x, y in PAIRS]
            )
            for one in requests
        ]


class Model:
    def load(self, path):
        pass

    def infer(self, inputs):
        time.sleep(SLEEP_S)
        return {{y: inputs[x] for x, y in PAIRS}}

    def unload(self):
        pass
'''


@dataclass(frozen=True, slots=True)
class PythonModel:
    """A model that Triton and we read from the same folder: ``config`` in pbtxt, ``source`` in Python."""

    name: str
    config: str
    source: str
    files: dict[str, str] = field(default_factory=dict)
    versions: tuple[int, ...] = (1,)

    def write(self, repository: Path) -> None:
        """Put it into a repository, each version with the same source."""
        for version in self.versions:
            folder = repository / self.name / str(version)
            folder.mkdir(parents=True)
            (folder / "model.py").write_text(self.source)
        files = {"config.pbtxt": f'backend: "python"\n{self.config}\n', **self.files}
        for name, text in files.items():
            (repository / self.name / name).write_text(text)


def identity(
    name: str = "identity",
    *,
    datatype: str = "FP32",
    dims: Sequence[int] = (-1,),
    max_batch_size: int = 8,
    sleep_s: float = 0.0,
    more: str = "dynamic_batching {}",
) -> PythonModel:
    """``Y = X``. ``more`` are further fields of its configuration."""
    kind = "STRING" if datatype == "BYTES" else datatype
    tensor = f"data_type: TYPE_{kind} dims: [{', '.join(map(str, dims))}]"
    config = (
        f"max_batch_size: {max_batch_size}\n"
        f'input [{{ name: "X" {tensor} }}]\noutput [{{ name: "Y" {tensor} }}]\n'
        f"instance_group [{{ kind: KIND_CPU count: 1 }}]\n{more}"
    )
    return PythonModel(name, config, SOURCE.format(pairs=[("X", "Y")], sleep_s=sleep_s))


@dataclass(frozen=True, slots=True)
class Triton:
    """A server that is up. ``log`` is the file with all that it says."""

    http_url: str
    """``http://host:port``."""
    grpc_url: str
    """``host:port``."""
    metrics_url: str
    pid: int
    repository: Path
    log: Path

    def stubs(self) -> list[int]:
        """The processes of its Python models."""
        return sorted(_stubs(self.repository))

    def pids(self) -> list[int]:
        """All its processes."""
        return [self.pid, *self.stubs()]


def why_not() -> str:
    """Why Triton cannot be started here; "" if it can."""
    if not (WHEEL.server / "bin" / "tritonserver").is_file():
        return "Triton is not here: make triton fetches it (73 MB, x86-64 with glibc 2.35 or later)"
    if not WHEEL.stub.is_file():
        return f"Triton here has no Python backend for Python {_PYTHON}"
    command = ["/usr/bin/env", "ldd", str(WHEEL.stub)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=_environment())
    absent = [line.split()[0] for line in done.stdout.splitlines() if "not found" in line]
    return f"Triton's Python backend does not find {', '.join(absent)}" if absent else ""


@contextmanager
def running_triton(
    repository: Path, *models: PythonModel, options: Sequence[str] = (), log: Path | None = None
) -> Iterator[Triton]:
    """Serve ``repository``, to which ``models`` are added, on free ports of 127.0.0.1 until the block ends.

    Clients may load and unload. RuntimeError with its last words if it does not start.
    """
    for model in models:
        model.write(repository)
    said = log or repository.parent / "triton.log"
    with said.open("wb") as file:
        triton, process = _start(repository, options, said, file.fileno())
        try:
            _await_ready(triton, process)
            yield triton
        finally:
            _stop(process, repository)


def _start(
    repository: Path, options: Sequence[str], said: Path, output: int
) -> tuple[Triton, subprocess.Popen[bytes]]:
    http, grpc, metrics = ports = [free_port() for _ in range(3)]  # it cannot choose its own
    command = [
        str(WHEEL.server / "bin" / "tritonserver"), *serve_options(repository, WHEEL.backends(), ports),
        "--backend-config=python,shm-default-byte-size=1048576", *options,
    ]  # fmt: skip
    process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, env=_environment())
    urls = (f"http://127.0.0.1:{http}", f"127.0.0.1:{grpc}", f"http://127.0.0.1:{metrics}/metrics")
    return Triton(*urls, process.pid, repository, said), process


def _environment() -> dict[str, str]:
    """Its whole environment, with the packages of its own folder."""
    return {
        "PATH": f"{WHEEL.home / 'bin'}:/usr/bin:/bin",
        "LD_LIBRARY_PATH": WHEEL.libraries,
        "PYTHONDONTWRITEBYTECODE": "1",
    }


def _await_ready(triton: Triton, process: subprocess.Popen[bytes]) -> None:
    end_s = time.monotonic() + START_S
    while process.poll() is None and time.monotonic() < end_s:
        try:
            with urllib.request.urlopen(f"{triton.http_url}/v2/health/ready", timeout=5):  # noqa: S310 (ours)
                return
        except (urllib.error.URLError, ConnectionError, TimeoutError):
            time.sleep(0.05)
    tail = "\n".join(triton.log.read_text(errors="replace").splitlines()[-30:])
    raise RuntimeError(f"Triton did not become ready (exit code {process.poll()}); it said:\n{tail}")


def _stop(process: subprocess.Popen[bytes], repository: Path) -> None:
    """End it, and what is left of its stubs, each by its own pid: they outlive a server that was killed."""
    stubs = _stubs(repository)
    process.send_signal(signal.SIGTERM)
    try:
        process.wait(STOP_S)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
    end_s = time.monotonic() + STOP_S
    while (left := stubs.keys() & _stubs(repository).keys()) and time.monotonic() < end_s:
        for pid in left:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        time.sleep(0.01)
    for region in stubs.values():
        (SHARED / region).unlink(missing_ok=True)


def _stubs(repository: Path) -> dict[int, str]:
    """Processes that run models of a repository, each with the name of its shared memory."""
    found = {}
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            words = path.read_bytes().split(b"\0")
        except OSError:
            continue  # it ended
        if len(words) > 2 and words[0].endswith(b"/triton_python_backend_stub"):
            model = Path(os.fsdecode(words[1]))
            if model.is_relative_to(repository):
                found[int(path.parent.name)] = os.fsdecode(words[2])
    return found

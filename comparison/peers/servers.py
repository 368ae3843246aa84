"""The servers of the comparison, each with the best configuration for deadlines that its docs give."""

from __future__ import annotations

import json
import os
import shutil
import sys
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar, Final

import numpy as np

from comparison.peers.peer import APPS, INSTALLED, MOST_PROCESSES, Answer, Floats, Kind, Peer, Request, Setup
from comparison.triton import Wheel, serve_options

# ------------------------------------------------------------
# Requests of the Open Inference Protocol and their answers, made and read by hand.


def http_request(
    x: Floats, *, headers: tuple[tuple[str, str], ...] = (), parameters: dict[str, Any] | None = None
) -> Request:
    """With binary tensors both ways."""
    data = x.tobytes()
    head = {
        "inputs": [{
            "name": "x", "shape": [1, *x.shape[1:]], "datatype": "FP32",
            "parameters": {"binary_data_size": len(data)},
        }],
        "parameters": {"binary_data_output": True, **(parameters or {})},
    }  # fmt: skip
    text = json.dumps(head).encode()
    own = (
        ("Content-Type", "application/octet-stream"), ("Inference-Header-Content-Length", str(len(text))),
    )  # fmt: skip
    return Request("/v2/models/{model}/infer", (*own, *headers), text + data)


def http_output(answer: Answer) -> Floats:
    """The first tensor of a binary response."""
    length = int(answer.headers["inference-header-content-length"])
    return np.frombuffer(answer.body[length:], np.float32)


# ------------------------------------------------------------
# The servers.


class Clockwork(Peer):
    """Ours, as the others are served. It is told no durations: what it has not measured it does not know."""

    name = "clockwork"
    package = "clockwork-serve"
    configured = "defaults; header `x-slo-ms` on every request"
    source = "docs/use/outcomes.md"
    loads_on_demand = True
    ready_path = "/v2/health/ready"
    start_s = 180.0  # the first time, it compiles
    model = APPS / "clockwork_model.py"
    page_bytes = 256 << 10

    def why_not(self, setup: Setup | None = None, *, isolated: bool = True) -> str:
        """It is here."""
        return ""

    def command(self, setup: Setup) -> Sequence[str]:
        """A repository of links is made of the models' files."""
        repository = setup.folder / "repository"
        for name, where in setup.models.items():
            version = repository / name / "1"
            version.mkdir(parents=True)
            settings = f'backend = "onnx"\nmax_batch_size = {setup.batch}\n'
            if isinstance(where, str):
                _link(Path(where), version / "model.onnx")
            else:
                shutil.copy(self.model, version / "model.py")
                tensor = f'dims = {json.dumps(setup.shape)}, datatype = "FP32"'
                settings = (
                    f'backend = "python"\nmax_batch_size = {setup.batch}\nmemory_bytes = 65536\n'
                    f'inputs = [{{name = "x", {tensor}}}]\noutputs = [{{name = "y", {tensor}}}]\n'
                )
            (repository / name / "clockwork.toml").write_text(settings)
        # Beside this interpreter; not resolved: a venv.
        program = os.path.join(os.path.dirname(sys.executable), "clockwork")  # noqa: PTH118, PTH120
        return [
            program, "serve", str(repository),
            "--http-port", str(setup.port), "--grpc-port", str(setup.port + 1),
            "--metrics-port", str(setup.port + 2), "--cache", str(setup.cache), "--log-level", "warning",
            "--device-memory", str(self._memory_bytes(setup)),
        ]  # fmt: skip

    def _memory_bytes(self, setup: Setup) -> int:
        """Room for so many models, each in whole pages."""
        if setup.emulated:
            return 64 << 20
        largest = max(Path(str(where)).stat().st_size for where in setup.models.values())
        each = -(-largest // self.page_bytes) * self.page_bytes
        return each * (setup.memory_models or len(setup.models) + 1)

    def environment(self, setup: Setup) -> dict[str, str]:
        """Its own source, where it is not installed."""
        found = super().environment(setup)
        sources = sorted(map(str, Path(__file__).parents[2].glob("packages/*/src")))
        return {**found, "PYTHONPATH": ":".join((*sources, found["PYTHONPATH"]))}

    def request(self, setup: Setup, x: Floats) -> Request:
        """Binary tensors over HTTP."""
        return http_request(x, headers=(("x-slo-ms", f"{setup.slo_ms:g}"),))

    def output(self, answer: Answer) -> Floats:
        """The binary part."""
        return http_output(answer)


def _link(file: Path, to: Path) -> None:
    """A second name of the file: symbolic links out of a repository are not followed."""
    try:
        to.hardlink_to(file)
    except OSError:
        shutil.copy(file, to)


class Triton(Peer):
    """Requests carry a timeout, of their time in the queue alone: so a full batch is taken off by hand.

    The wheel of PyTriton has no backend for ONNX, so its models run ONNX Runtime in processes of the Python
    backend. Where ``PEER_TRITON`` names the folder of a whole Triton (``/opt/tritonserver`` in its
    containers), networks run in its own backend.
    """

    name = "triton"
    package = "nvidia-pytriton"
    configured = (
        "dynamic batches of up to 8, queue policy REJECT with `timeout` = SLO less a full batch (by hand) on "
        "every request, rate limiter: one model at a time"
    )
    source = "https://github.com/triton-inference-server/server/blob/main/docs/user_guide/batcher.md"
    ready_path = "/v2/health/ready"
    loads_by_call = True
    whole = Path(os.environ["PEER_TRITON"]) if os.environ.get("PEER_TRITON") else None
    native = whole is not None and (whole / "backends" / "onnxruntime").is_dir()
    note = (
        "networks in its own backend for ONNX"
        if native
        else "networks in its Python backend, a process per model: the wheel has no other"
    )

    @property
    def wheel(self) -> Wheel:
        """What is installed."""
        return Wheel(self.home)

    def why_not(self, setup: Setup | None = None, *, isolated: bool = True) -> str:
        """Also: a process per model is not for a hundred."""
        stubs = setup is not None and (setup.emulated or not self.native)
        if setup is not None and stubs and len(setup.models) > MOST_PROCESSES:
            return f"its Python backend has a process per model: {len(setup.models)} models are too many"
        return super().why_not(setup, isolated=isolated)

    def command(self, setup: Setup) -> Sequence[str]:
        """Its options are its documentation's."""
        native = self.native and not setup.emulated
        repository = setup.folder / "repository"
        for name, where in setup.models.items():
            version = repository / name / "1"
            version.mkdir(parents=True)
            if native:
                (version / "model.onnx").symlink_to(str(where))
            else:
                shutil.copy(APPS / "triton_model.py", version / "model.py")
            config = _CONFIG.format(
                backend=_ONNX if native else 'backend: "python"', batch=setup.batch,
                dims=", ".join(map(str, setup.shape)), out=", ".join(map(str, setup.out)),
                slo_us=round(setup.slo_ms * 1e3),
            )  # fmt: skip
            (repository / name / "config.pbtxt").write_text(config)
        server = self.whole or self.wheel.server
        backends = self.wheel.backends() if self.whole is None else server / "backends"
        return [
            str(server / "bin" / "tritonserver"),
            *serve_options(repository, backends, (setup.port, setup.port + 1, setup.port + 2)),
            f"--backend-config=python,shm-region-prefix-name={self._region(setup)}",
            "--backend-config=python,shm-default-byte-size=8388608",
            "--rate-limit=execution_count", "--rate-limit-resource=device:1",
        ]  # fmt: skip

    def environment(self, setup: Setup) -> dict[str, str]:
        """With which the stub finds the library of this Python."""
        return {**super().environment(setup), "LD_LIBRARY_PATH": self.wheel.libraries}

    def _region(self, setup: Setup) -> str:
        return f"peers-{setup.port}-"

    def left_behind(self, setup: Setup) -> Iterable[Path]:
        """Shared memory of processes that were killed."""
        return Path("/dev/shm").glob(f"{self._region(setup)}*")  # noqa: S108 (names of ours)

    def request(self, setup: Setup, x: Floats) -> Request:
        """Binary tensors over HTTP."""
        queue_us = max(1, round((setup.slo_ms - setup.reserve_ms) * 1e3))
        return http_request(x, parameters={"timeout": queue_us})

    def understood(self, kind: Kind, words: str) -> Kind:
        """503 for both: its words tell which."""
        return "expired" if "timeout" in words else kind

    def output(self, answer: Answer) -> Floats:
        """The binary part."""
        return http_output(answer)


_ONNX: Final = """platform: "onnxruntime_onnx"
parameters { key: "intra_op_thread_count" value: { string_value: "1" } }
parameters { key: "inter_op_thread_count" value: { string_value: "1" } }"""
_CONFIG: Final = """{backend}
max_batch_size: {batch}
input [{{ name: "x" data_type: TYPE_FP32 dims: [{dims}] }}]
output [{{ name: "y" data_type: TYPE_FP32 dims: [{out}] }}]
dynamic_batching {{
  default_queue_policy {{
    timeout_action: REJECT
    default_timeout_microseconds: {slo_us}
    allow_timeout_override: true
  }}
}}
instance_group [{{
  kind: KIND_CPU count: 1
  rate_limiter {{ resources [{{ name: "device" count: 1 global: true }}] }}
}}]
"""


class RayServe(Peer):
    """A proxy and a replica that has all models, multiplexed.

    Its processes (13 with one model) share the core, which its makers would not do.
    """

    queued = 16
    name = "ray_serve"
    package = "ray"
    configured = (
        f"batches of 8, `request_timeout_s` = SLO, `max_queued_requests` {queued}, `@serve.multiplexed` "
        "with as many models as memory has room for"
    )
    source = "https://docs.ray.io/en/latest/serve/advanced-guides/performance.html"
    arguments = "-m comparison.peers.apps.ray_serve_app"
    variables: ClassVar = {"RAY_USAGE_STATS_ENABLED": "0", "RAY_SERVE_LOG_TO_STDERR": "0"}
    """Without what it would send."""
    more: ClassVar = {"queued": queued}
    note = "some 11 processes on the one core"
    binds_all = True
    loads_on_demand = True
    ready_path = "/-/healthz"
    start_s = 180.0
    stop_s = 20.0


class FastApi(Peer):
    """What people write first: FastAPI on uvicorn, a session in a thread pool.

    It knows no deadlines and no batches, so there is nothing to configure.
    """

    name = "fastapi_ort"
    package = "fastapi"
    configured = "no deadline, no batches, no limit: it has none"
    source = "https://fastapi.tiangolo.com/async/"
    arguments = (
        "-m uvicorn comparison.peers.apps.fastapi_ort_app:app --host 127.0.0.1 --port {port} --loop uvloop "
        "--http httptools --no-access-log --log-level warning"
    )


class FastApiBounded(FastApi):
    """What a careful engineer writes: one thread runs models, a bounded queue, the client's timeout."""

    name = "fastapi"
    configured = (
        "a session per model, one thread for all, off the event loop; 429 if more requests wait than are "
        "served in half of the SLO (by hand); 504 after the client's timeout, the SLO"
    )
    arguments = FastApi.arguments.replace("fastapi_ort_app", "fastapi_bounded_app")

    @property
    def home(self) -> Path:
        """The Python of the simple one."""
        return INSTALLED / FastApi.name

    def request(self, setup: Setup, x: Floats) -> Request:
        """With the time that the client waits."""
        asked = super().request(setup, x)
        return replace(asked, headers=(*asked.headers, ("x-timeout-ms", f"{setup.slo_ms:g}")))


CLOCKWORK: Final = Clockwork()
PEERS: Final[dict[str, Peer]] = {
    one.name: one
    for one in (
        CLOCKWORK, Triton(), RayServe(), FastApi(),
    )
}  # fmt: skip
"""By name."""

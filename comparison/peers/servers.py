"""The servers of the comparison, each with the best configuration for deadlines that its docs give."""

from __future__ import annotations

import base64
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar, Final

import numpy as np

from clockwork_serve.oip.protobuf import INFERENCE_SERVICE, ModelInferRequest, ModelInferResponse
from comparison.peers.peer import APPS, INSTALLED, MOST_PROCESSES, Answer, Floats, Kind, Peer, Request, Setup
from comparison.triton import Wheel, serve_options

# ------------------------------------------------------------
# Requests of the Open Inference Protocol and their answers, made and read by hand.

METHOD: Final = f"/{INFERENCE_SERVICE}/ModelInfer"


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


def grpc_request(names: Iterable[str], x: Floats, **parameters: int) -> Request:
    """With raw tensors; one message for each model, which names it."""
    messages = {}
    for name in names:
        message = ModelInferRequest(model_name=name, raw_input_contents=[x.tobytes()])
        message.inputs.add(name="x", datatype="FP32", shape=[1, *x.shape[1:]])
        for parameter, value in parameters.items():
            message.parameters[parameter].int64_param = value
        messages[name] = message.SerializeToString()
    return Request(METHOD, messages=messages)


def grpc_output(answer: Answer) -> Floats:
    """The first tensor of a raw response, or of a typed one."""
    message = ModelInferResponse.FromString(answer.body)
    if message.raw_output_contents:
        return np.frombuffer(message.raw_output_contents[0], np.float32)
    return np.asarray(message.outputs[0].contents.fp32_contents, np.float32)


class OverGrpc(Peer):
    """A server whose path for binary tensors over HTTP makes lists of them, or that has none."""

    protocol = "grpc"
    ready_path = "/v2/health/ready"

    def request(self, setup: Setup, x: Floats) -> Request:
        """Raw tensors."""
        return grpc_request(setup.names, x)

    def output(self, answer: Answer) -> Floats:
        """Raw, or not."""
        return grpc_output(answer)


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


class Mosec(Peer):
    """A front end in Rust, a worker process per model; its queue no longer than can be served in time."""

    capacity = 24
    """Requests in its queue beyond which it says 429: sized by hand for an SLO of some batches of eight."""
    name = "mosec"
    package = "mosec"
    configured = (
        f"batches of 8, timeout = SLO, `--capacity {capacity}` (by hand: what can be served within the SLO)"
    )
    source = "https://mosecorg.github.io/mosec/reference/arguments.html"
    arguments = (
        "-m comparison.peers.apps.mosec_app --address 127.0.0.1 --port {port} --timeout {slo_ms} "
        f"--capacity {capacity} --log-level warning"
    )
    more: ClassVar = {"wait_ms": 1, "workers": 1}
    """A full batch is waited for as long as the first of a batch takes alone."""
    per_model = True


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


class BentoMl(Peer):
    """A service with an API per model, which learns how long batches take.

    It takes JSON or forms from outside; its batches are of JSON.
    """

    name = "bentoml"
    package = "bentoml"
    configured = "adaptive batches of up to 8, `max_latency_ms` = SLO"
    source = "https://docs.bentoml.com/en/latest/get-started/adaptive-batching.html"
    arguments = "-m bentoml serve comparison.peers.apps.bentoml_app:Models --host 127.0.0.1 --port {port}"
    variables: ClassVar = {"BENTOML_HOME": "{folder}/bentoml", "BENTOML_DO_NOT_TRACK": "True"}
    """Without what it would write and send beside its work."""
    ready_path = "/readyz"

    def request(self, setup: Setup, x: Floats) -> Request:
        """Base64 in JSON."""
        body = json.dumps({"x": [base64.b64encode(x.tobytes()).decode()]}).encode()
        return Request("/{model}", (("Content-Type", "application/json"),), body)

    def output(self, answer: Answer) -> Floats:
        """Base64 in JSON."""
        return np.frombuffer(base64.b64decode(json.loads(answer.body)[0]), np.float32)


class LitServe(Peer):
    """FastAPI in front, a worker process per model behind queues.

    It takes JSON or forms; a form with a file is the cheaper.
    """

    name = "litserve"
    package = "litserve"
    configured = "batches of 8, timeout = SLO (seen when a worker takes a request from its queue)"
    source = "https://lightning.ai/docs/litserve/features/batching"
    arguments = "-m comparison.peers.apps.litserve_app"
    per_model = True
    ready_path = "/health"

    def request(self, setup: Setup, x: Floats) -> Request:
        """A form with one file."""
        content_type, body = form("x", x.tobytes())
        return Request("/{model}", (("Content-Type", content_type),), body)


_BOUNDARY: Final = "a-boundary-that-no-tensor-holds-7d1f0c9ab2"


def form(field: str, data: bytes) -> tuple[str, bytes]:
    """Content type and body of a multipart form with one file."""
    head = (
        f'--{_BOUNDARY}\r\nContent-Disposition: form-data; name="{field}"; filename="{field}"\r\n'
        "Content-Type: application/octet-stream\r\n\r\n"
    )
    body = b"".join((head.encode(), data, f"\r\n--{_BOUNDARY}--\r\n".encode()))
    return f"multipart/form-data; boundary={_BOUNDARY}", body


class KServe(OverGrpc):
    """Its Python server: no batches (a sidecar that is not in the package makes them), deadline or limit."""

    name = "kserve"
    package = "kserve"
    configured = "no deadline, no batches, no limit: the Python server has none"
    source = (
        "https://kserve.github.io/website/docs/model-serving/predictive-inference/frameworks/custom-predictor"
    )
    arguments = (
        "-m comparison.peers.apps.kserve_app --http_port {port} --grpc_port {grpc_port} --workers 1 "
        "--enable_docs_url False"
    )
    binds_all = True


class MlServer(OverGrpc):
    """With a runtime of ours: batches, but neither deadline nor limit. Its REST API accepts JSON only."""

    name = "mlserver"
    package = "mlserver"
    configured = (
        "batches of 8 (`max_batch_size`, `max_batch_time` 1 ms), one process; it has no deadline and no limit"
    )
    source = "https://docs.seldon.ai/mlserver/user-guide/adaptive-batching"
    loads_by_call = True

    def command(self, setup: Setup) -> Sequence[str]:
        """Settings in files, as it wants them."""
        settings = {
            "host": "127.0.0.1", "http_port": setup.port, "grpc_port": setup.port + 1,
            "metrics_port": setup.port + 2, "metrics_endpoint": None, "parallel_workers": 0, "debug": False,
            "grpc_max_message_length": 64 << 20, "use_structured_logging": False,
        }  # fmt: skip
        repository = setup.folder / "repository"
        repository.mkdir()
        (repository / "settings.json").write_text(json.dumps(settings))
        for name in setup.names:
            (repository / name).mkdir()
            model = {
                "name": name, "implementation": "comparison.peers.apps.mlserver_app.Model",
                "max_batch_size": setup.batch, "max_batch_time": 0.001,
                "inputs": [{"name": "x", "datatype": "FP32", "shape": [-1, *setup.shape]}],
                "outputs": [{"name": "y", "datatype": "FP32", "shape": [-1, *setup.out]}],
            }  # fmt: skip
            (repository / name / "model-settings.json").write_text(json.dumps(model))
        return [str(self.home / "bin" / "mlserver"), "start", str(repository)]


class TorchServe(Peer):
    """A front end in Java, a worker process per model.

    Requests whose time is up in the queue get no answer at all.
    """

    queue = 16
    """Requests of a model that may wait, by hand: two batches."""
    name = "torchserve"
    package = "torchserve"
    configured = f"batches of 8 (`maxBatchDelay` 1 ms), `jobQueueSize` {queue}, `clientTimeoutInMills` = SLO"
    source = "https://docs.pytorch.org/serve/batch_inference_with_ts.html"
    variables: ClassVar = {"LOG_LOCATION": "{folder}", "METRICS_LOCATION": "{folder}"}
    note = "archived by its makers in 2025"
    path = "/predictions/{model}"
    per_model = True
    ready_path = "/ping"
    start_s = 300.0
    stop_s = 20.0

    def why_not(self, setup: Setup | None = None, *, isolated: bool = True) -> str:
        """It needs Java."""
        if shutil.which("java") is None:
            return "it needs Java 11 or later, and there is no java here"
        return super().why_not(setup, isolated=isolated)

    def command(self, setup: Setup) -> Sequence[str]:
        """An archive per model, made by its own tool; it holds the handler, which finds its model by name."""
        store = setup.folder / "store"
        store.mkdir()
        settings = setup.folder / "model-config.yaml"
        settings.write_text(
            f"minWorkers: 1\nmaxWorkers: 1\nbatchSize: {setup.batch}\nmaxBatchDelay: 1\n"
            f"jobQueueSize: {self.queue}\n"
            f"clientTimeoutInMills: {setup.slo_ms:.0f}\nresponseTimeout: 120\nstartupTimeout: 120\n"
        )
        for name in setup.names:
            subprocess.run(
                [str(self.home / "bin" / "torch-model-archiver"), "--model-name", name, "--version", "1",
                 "--handler", str(APPS / "torchserve_model.py"), "--config-file", str(settings),
                 "--export-path", str(store), "--archive-format", "no-archive"],
                check=True, capture_output=True, env=self.environment(setup),
            )  # fmt: skip
        (setup.folder / "config.properties").write_text(
            f"inference_address=http://127.0.0.1:{setup.port}\n"
            f"management_address=http://127.0.0.1:{setup.port + 1}\n"
            f"metrics_address=http://127.0.0.1:{setup.port + 2}\ngrpc_inference_port={setup.port + 3}\n"
            f"grpc_management_port={setup.port + 4}\nnumber_of_netty_threads=1\nnetty_client_threads=1\n"
            "disable_token_authorization=true\nenable_envvars_config=false\nmetrics_mode=log\n"
            "disable_system_metrics=true\nmax_request_size=65535000\n"
        )
        (setup.folder / "log4j2.xml").write_text(_QUIET)
        return [
            str(self.home / "bin" / "torchserve"), "--foreground", "--model-store", str(store),
            "--models", *(f"{name}={name}" for name in setup.names),
            "--ts-config", str(setup.folder / "config.properties"), "--disable-token-auth",
            "--no-config-snapshots",
            "--log-config", str(setup.folder / "log4j2.xml"),
        ]  # fmt: skip


_QUIET: Final = """<?xml version="1.0" encoding="UTF-8"?>
<Configuration><Appenders><Console name="c"><PatternLayout pattern="%d %p %c - %m%n"/></Console></Appenders>
<Loggers><Root level="warn"><AppenderRef ref="c"/></Root></Loggers></Configuration>
"""
"""By itself it writes ten lines per request."""


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
        CLOCKWORK, Triton(), Mosec(), RayServe(), BentoMl(), LitServe(), KServe(), MlServer(), TorchServe(),
        FastApi(),
    )
}  # fmt: skip
"""By name."""

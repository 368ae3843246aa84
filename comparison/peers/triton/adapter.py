"""NVIDIA Triton: from the wheel of PyTriton, with the Python backend; a whole one where there is one.

The wheel has no backend for ONNX, so its models run ONNX Runtime in processes of the Python backend. Where
``PEER_TRITON`` names the folder of a whole Triton (``/opt/tritonserver`` in its containers), networks run in
its own backend.
"""

from __future__ import annotations

import os
import shutil
import sysconfig
from collections.abc import Iterable, Sequence
from pathlib import Path

from comparison.peers import v2
from comparison.peers.peer import Answer, Floats, Kind, Peer, Request, Setup

_CONFIG = """
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


class Triton(Peer):
    """Requests carry a timeout, of their time in the queue alone: so a full batch is taken off by hand."""

    name = "triton"
    package = "nvidia-pytriton"
    configured = (
        "dynamic batches of up to 8, queue policy REJECT with `timeout` = SLO less a full batch (by hand) on "
        "every request, rate limiter: one model at a time"
    )
    source = "https://github.com/triton-inference-server/server/blob/main/docs/user_guide/batcher.md"
    ready_path = "/v2/health/ready"
    loads_by_call = True

    @property
    def whole(self) -> Path | None:
        """A Triton with all of its backends, if there is one."""
        found = os.environ.get("PEER_TRITON")
        return Path(found) if found else None

    @property
    def _packages(self) -> Path:
        return self.home / "lib" / f"python{sysconfig.get_python_version()}" / "site-packages"

    @property
    def native(self) -> bool:
        """Whether networks run in Triton's own backend for ONNX."""
        return self.whole is not None and (self.whole / "backends" / "onnxruntime").is_dir()

    @property
    def note(self) -> str:
        """Which of its backends runs networks."""
        if self.native:
            return "networks in its own backend for ONNX"
        return "networks in its Python backend, a process per model: the wheel has no other"

    def why_not(self, setup: Setup | None = None, *, isolated: bool = True) -> str:
        """Also: a process per model is not for a hundred."""
        from comparison.peers.peer import MOST_PROCESSES

        if (
            setup is not None
            and len(setup.models) > MOST_PROCESSES
            and not (self.native and not setup.emulated)
        ):
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
                shutil.copy(self.folder / "model.py", version)
            backend = 'platform: "onnxruntime_onnx"\n' + _ONE_THREAD if native else 'backend: "python"\n'
            config = _CONFIG.format(
                batch=setup.batch, dims=", ".join(map(str, setup.shape)),
                out=", ".join(map(str, setup.out)), slo_us=round(setup.slo_ms * 1e3),
            )  # fmt: skip
            (repository / name / "config.pbtxt").write_text(backend + config)
        server = self.whole or self._packages / "pytriton" / "tritonserver"
        return [
            str(server / "bin" / "tritonserver"), f"--model-repository={repository}",
            "--model-control-mode=explicit", "--load-model=*",
            f"--backend-directory={self._backends(server)}",
            f"--backend-config=python,shm-region-prefix-name={self._region(setup)}",
            "--backend-config=python,shm-default-byte-size=8388608",
            "--rate-limit=execution_count", "--rate-limit-resource=device:1",
            "--http-address=127.0.0.1", f"--http-port={setup.port}",
            "--grpc-address=127.0.0.1", f"--grpc-port={setup.port + 1}",
            "--metrics-address=127.0.0.1", f"--metrics-port={setup.port + 2}",
            "--allow-gpu-metrics=false", "--exit-timeout-secs=5", "--log-info=false",
        ]  # fmt: skip

    def _backends(self, server: Path) -> Path:
        """The Python backend's own process must be for the Python that has the packages."""
        if self.whole is None:
            version = sysconfig.get_python_version()
            stub = server / "python_backend_stubs" / version / "triton_python_backend_stub"
            to = server / "backends" / "python" / stub.name
            if not to.is_file() or to.read_bytes() != stub.read_bytes():
                shutil.copyfile(stub, to)
            to.chmod(0o755)
        return server / "backends"

    def environment(self, setup: Setup) -> dict[str, str]:
        """With which the stub finds the library of this Python."""
        libraries = f"{sysconfig.get_config_var('LIBDIR')}:{self._packages / 'nvidia_pytriton.libs'}"
        return {**super().environment(setup), "LD_LIBRARY_PATH": libraries}

    def _region(self, setup: Setup) -> str:
        return f"peers-{setup.port}-"

    def left_behind(self, setup: Setup) -> Iterable[Path]:
        """Shared memory of processes that were killed."""
        return Path("/dev/shm").glob(f"{self._region(setup)}*")  # noqa: S108 (names of ours)

    def request(self, setup: Setup, x: Floats) -> Request:
        """Binary tensors over HTTP."""
        queue_us = max(1, round((setup.slo_ms - setup.reserve_ms) * 1e3))
        return v2.http_request(x, parameters={"timeout": queue_us})

    def understood(self, kind: Kind, words: str) -> Kind:
        """503 for both: its words tell which."""
        return "expired" if "timeout" in words else kind

    def output(self, answer: Answer) -> Floats:
        """The binary part."""
        return v2.http_output(answer)


_ONE_THREAD = (
    'parameters { key: "intra_op_thread_count" value: { string_value: "1" } }\n'
    'parameters { key: "inter_op_thread_count" value: { string_value: "1" } }\n'
)

PEER = Triton()

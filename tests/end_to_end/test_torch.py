"""A server with devices of two kinds: torch models beside ONNX models, each on the device that runs it."""

from __future__ import annotations

import importlib.util
import os
import shutil
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest

from clockwork_serve.config import Settings
from clockwork_serve.devices import DeviceConfig
from clockwork_serve.errors import RepositoryError
from clockwork_serve.serve.supervisor.server import ServerConfig, running_server
from clockwork_serve.store import StoreConfig
from clockwork_serve.units import MIB
from harness import repositories
from harness.http_load import closed_loop, infer_message, run
from harness.serving import Serving, total, until
from tests.end_to_end.asking import ask
from tests.end_to_end.conftest import LONG, PATIENT_SLO_MS, WIDE, call, product, x_json

torch = pytest.importorskip("torch", reason="torch is not installed (make test installs it where it can)")

pytestmark = [
    pytest.mark.slow,  # models are compiled
    pytest.mark.timeout(600),
    pytest.mark.skipif(shutil.which("g++") is None, reason="there is no C++ compiler (g++)"),
    pytest.mark.skipif(
        importlib.util.find_spec("clockwork_serve.store.torch.compiler") is None,
        reason="the store does not compile torch models",
    ),
]
COPIES = 6
CPU = DeviceConfig(device="cpu:0", memory_bytes=8 * MIB)
TORCH = DeviceConfig(device="torch-cpu:0", kind="torch-cpu", memory_bytes=MIB, page_bytes=64 * 1024)
"""Room for four of the six copies."""
WORKER = "worker-torch-cpu:0"


class Net(torch.nn.Module):
    """Two layers with weights of their own."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.first, self.last = torch.nn.Linear(64, 512), torch.nn.Linear(512, 16)

    def forward(self, x):
        return self.last(torch.tanh(self.first(x)))


def put_copies(root: Path) -> None:
    """Copies, each a model.pt2 whose first axis is the batch; exported once, for that takes its time."""
    batch = torch.export.Dim("batch", min=1, max=64)
    program = torch.export.export(Net(0).eval(), (torch.zeros(2, 64),), dynamic_shapes=({0: batch},))
    for seed in range(COPIES):
        for name, tensor in Net(seed).state_dict().items():
            program.state_dict[name].data.copy_(tensor)
        folder = root / f"t{seed}"
        (folder / "1").mkdir(parents=True)
        torch.export.save(program, folder / "1" / "model.pt2")
        (folder / "clockwork.toml").write_text("max_batch_size = 2\n")


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Copies of one torch architecture, and one ONNX model."""
    made = tmp_path_factory.mktemp("torch") / "models"
    put_copies(made)
    repositories.one_matrix(made, "m0", repositories.matrix_of(0, WIDE, LONG))
    return made


@pytest.fixture(scope="module")
def serving(cache: Path) -> Callable[..., Iterator[Serving]]:
    """Starts servers whose compiled models are kept."""

    @contextmanager
    def start(root: Path, *devices: DeviceConfig) -> Iterator[Serving]:
        config = ServerConfig(
            settings=Settings(
                repository=str(root),
                http_port=0,
                grpc_port=0,
                metrics_port=0,
                log_level="warning",
                slo_ms=PATIENT_SLO_MS,
            ),
            store=StoreConfig(cache_dir=str(cache), max_batch_size=2),
            devices=devices,
        )
        with running_server(config, timeout_s=300) as server:
            yield Serving(server, WORKER)

    return start


@pytest.fixture(scope="module")
def mixed(root: Path, serving) -> Iterator[Serving]:
    """A server on a CPU device and a torch device."""
    with serving(root, CPU, TORCH) as server:
        yield server


def given(rows: int, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((rows, 64)).astype(np.float32)


def works(server: Serving, model: str) -> bool:
    """Whether a request is answered now."""
    body = x_json([0.0] * 64, parameters={"slo_ms": 2000})
    return call(server.http_url, f"/v2/models/{model}/infer", body).status == 200


@pytest.mark.parametrize("protocol", ["http", "grpc"])
def test_answers_equal_eager_whichever_copy_is_asked(mixed: Serving, protocol: str) -> None:
    for turn in range(4 * COPIES):
        seed, rows = turn * 5 % COPIES, 1 + turn % 2
        x = given(rows, turn)
        (answer,) = ask(mixed, protocol, f"t{seed}", {"x": x}).values()
        with torch.no_grad():
            wanted = Net(seed)(torch.from_numpy(x)).numpy()
        assert np.abs(answer - wanted).max() < 1e-5 * np.abs(wanted).max()


def test_each_model_runs_on_the_device_that_runs_it(mixed: Serving) -> None:
    x = given(1, 3)
    (answer,) = ask(mixed, "http", "m0", {"x": x}).values()
    assert np.allclose(answer, product(0, x), atol=1e-5)
    ask(mixed, "http", "t0", {"x": x})
    infers = {
        device: total(mixed.metrics(), "clockwork_actions_total", device=device, action="infer", status="ok")
        for device in ("cpu:0", "torch-cpu:0")
    }
    assert min(infers.values()) >= 1
    states = {one["device"]: one for one in mixed.server.state()["controller"]["devices"]}
    assert all(one["warm"] for one in states.values())
    assert "runs torch codes" in str(states["torch-cpu:0"]["failed_codes"])


def test_a_killed_torch_worker_costs_no_client_its_one_response(mixed: Serving) -> None:
    url = mixed.http_url
    message = infer_message(url, "t1", [("x", "FP32", (1, 64), bytes(4 * 64))], slo_ms=3000)
    until("the server works", lambda: works(mixed, "t1"), 60)
    victim = mixed.worker_pid()

    def messages(index: int) -> bytes:
        if index == 300:
            os.kill(victim, signal.SIGKILL)
        return message

    report = run(closed_loop(url, messages, requests=1000, connections=10))
    assert (len(report.samples), report.unanswered) == (1000, 0)
    assert report.ends()["200"] >= 200
    assert works(mixed, "m0"), "the other device serves on"
    until("the worker is back", lambda: works(mixed, "t1"), 60)
    assert mixed.worker_pid() != victim


def test_where_no_device_runs_torch_models_the_rest_is_served_and_they_have_a_reason(
    root: Path, serving
) -> None:
    with serving(root, CPU) as server:
        assert works(server, "m0")
        index = call(server.http_url, "/v2/repository/index", b"{}").json
        reasons = {one["name"]: one.get("reason", "") for one in index if one["state"] == "UNAVAILABLE"}
        assert reasons.keys() == {f"t{seed}" for seed in range(COPIES)}
        assert all("give --device torch-cpu or cuda:0" in reason for reason in reasons.values())
        assert call(server.http_url, "/v2/models/t0/ready").status != 200


def test_a_torch_device_alone_serves_no_onnx_models(tmp_path: Path, serving) -> None:
    repositories.one_matrix(tmp_path / "models", "m0", repositories.matrix_of(0, WIDE, LONG))
    reason = r"m0.*one that devices of kind torch-cpu run.*--device cpu"
    with pytest.raises(RepositoryError, match=reason), serving(tmp_path / "models", TORCH):
        pass

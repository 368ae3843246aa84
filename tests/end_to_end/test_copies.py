"""How often a large tensor is copied between the socket and the model, by the server's own count."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path

import numpy as np
import pytest
import tritonclient.http

from clockwork_serve.units import MIB
from harness import repositories
from harness.serving import Serving, total

pytestmark = pytest.mark.system

WIDTH, REQUESTS = 150_000, 12


def test_a_large_tensor_is_received_where_the_worker_reads_it(
    tmp_path: Path, start: Callable[..., AbstractContextManager[Serving]]
) -> None:
    """One copy, the kernel's to us; the device binds that memory, or gathers a batch from it: at most two."""
    root = tmp_path / "models"
    repositories.python_model(root, "echo", repositories.echoing(), max_batch_size=4)
    config = root / "echo" / "clockwork.toml"
    config.write_text(config.read_text().replace("dims = [4]", f"dims = [{WIDTH}]"))
    sent = np.arange(WIDTH, dtype=np.float32)[None]
    with start(root, memory_bytes=64 * MIB, slo_ms=20_000) as serving:
        with tritonclient.http.InferenceServerClient(serving.http_url.removeprefix("http://")) as client:
            tensor = tritonclient.http.InferInput("x", list(sent.shape), "FP32")
            for turn in range(REQUESTS):
                tensor.set_data_from_numpy(sent + turn)
                found = client.infer("echo", [tensor])
                np.testing.assert_array_equal(found.as_numpy("y"), sent + turn)
        metrics = serving.metrics()
        name = "clockwork_gateway_input_bytes_total"
        assert total(metrics, name, how="in_place") == REQUESTS * sent.nbytes
        assert total(metrics, name, how="copied") == 0

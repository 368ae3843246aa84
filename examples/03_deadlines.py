"""Gives requests ever less time, until the server says no at once. First: clockwork serve examples/models."""

from __future__ import annotations

import sys
import time

import numpy as np
from tritonclient import http
from tritonclient.utils import InferenceServerException

URL = sys.argv[1] if len(sys.argv) > 1 else "127.0.0.1:8000"

client = http.InferenceServerClient(URL)
tensor = http.InferInput("bits", [1, 2], "FP32")
tensor.set_data_from_numpy(np.array([[0.0, 1.0]], np.float32))

for slo_ms in (100.0, 10.0, 1.0, 0.01):
    started = time.perf_counter()
    try:
        answer = client.infer("mlp", [tensor], parameters={"slo_ms": slo_ms})
        said = f"equal, different = {answer.as_numpy('probability')[0].round(3)}"
    except InferenceServerException as error:
        said = f"{error.status()}: {error.message()}"
    print(f"SLO {slo_ms:6.2f} ms, answered after {1000 * (time.perf_counter() - started):5.2f} ms: {said}")

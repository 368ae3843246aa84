"""Asks a tiny model over HTTP. First, in another terminal: clockwork serve examples/models."""

from __future__ import annotations

import sys

import numpy as np
from tritonclient import http

URL = sys.argv[1] if len(sys.argv) > 1 else "127.0.0.1:8000"

client = http.InferenceServerClient(URL)

numbers = np.arange(16, dtype=np.int32)[None]
inputs = [http.InferInput("INPUT0", [1, 16], "INT32"), http.InferInput("INPUT1", [1, 16], "INT32")]
for tensor in inputs:
    tensor.set_data_from_numpy(numbers)

answer = client.infer("add_sub", inputs)
print("sum:       ", answer.as_numpy("OUTPUT0")[0])
print("difference:", answer.as_numpy("OUTPUT1")[0])

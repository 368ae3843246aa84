"""Sends a hundred requests at once, which share batches. First: clockwork serve examples/models."""

from __future__ import annotations

import asyncio
import sys

import numpy as np
from tritonclient.http import InferInput
from tritonclient.http.aio import InferenceServerClient

URL = sys.argv[1] if len(sys.argv) > 1 else "127.0.0.1:8000"


async def ask(client: InferenceServerClient, a: int, b: int) -> int:
    """Whether the bits a and b differ, by the model."""
    tensor = InferInput("bits", [1, 2], "FP32")
    tensor.set_data_from_numpy(np.array([[a, b]], np.float32))
    answer = await client.infer("mlp", [tensor], parameters={"slo_ms": 1000})
    return int(answer.as_numpy("probability")[0].argmax())


async def main() -> None:
    """Ask for all pairs of bits, 25 times."""
    client = InferenceServerClient(URL)
    pairs = [(a, b) for a in (0, 1) for b in (0, 1)] * 25
    found = await asyncio.gather(*(ask(client, a, b) for a, b in pairs))
    statistics = (await client.get_inference_statistics("mlp"))["model_stats"][0]
    await client.close()
    right = sum(a ^ b == answer for (a, b), answer in zip(pairs, found, strict=True))
    print(f"{right} of {len(pairs)} right, in {statistics['execution_count']} batches so far")


asyncio.run(main())

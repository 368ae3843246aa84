"""Sends texts over gRPC, at once, each with a deadline. First: clockwork serve examples/models."""

from __future__ import annotations

import asyncio
import sys

import numpy as np
from tritonclient.grpc import InferInput
from tritonclient.grpc.aio import InferenceServerClient
from tritonclient.utils import InferenceServerException

URL = sys.argv[1] if len(sys.argv) > 1 else "127.0.0.1:8001"
TEXTS = ("never odd or even", "no lemon no melon", "a nut for a jar of tuna")


async def turned(client: InferenceServerClient, text: str, timeout_s: float) -> str:
    """The text backwards, or why not. gRPC's own deadline is the server's too."""
    tensor = InferInput("text", [1, 1], "BYTES")
    tensor.set_data_from_numpy(np.array([[text]], object))
    try:
        answer = await client.infer("words", [tensor], client_timeout=timeout_s)
    except InferenceServerException as error:
        return f"{error.status()}: {error.message()}"
    return str(answer.as_numpy("reversed")[0, 0].decode())


async def main() -> None:
    """Turn all texts round at once, then one with no time left."""
    async with InferenceServerClient(URL) as client:
        for text, found in zip(
            TEXTS, await asyncio.gather(*(turned(client, t, 10.0) for t in TEXTS)), strict=True
        ):
            print(f"{text!r} backwards: {found!r}")
        print("in no time:", await turned(client, TEXTS[0], 0.0005))


asyncio.run(main())

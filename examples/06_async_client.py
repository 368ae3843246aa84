"""Our own client with await: a thousand at once, one cancelled. First: clockwork serve examples/models."""

from __future__ import annotations

import asyncio
import sys

import numpy as np

from clockwork_serve import AsyncClient, ServingError

URL = sys.argv[1] if len(sys.argv) > 1 else "127.0.0.1:8000"


async def differ(client: AsyncClient, a: int, b: int) -> int | None:
    """Whether the bits a and b differ, by the model; None if it did not say so in time."""
    try:
        result = await client.infer("mlp", {"bits": np.array([[a, b]], np.float32)}, slo_ms=10_000)
    except ServingError:
        return None
    return int(result["probability"][0].argmax())


async def main() -> None:
    """Ask for all pairs of bits, 250 times, over at most 50 connections."""
    async with AsyncClient(URL, connections=50) as client:
        pairs = [(a, b) for a in (0, 1) for b in (0, 1)] * 250
        found = await asyncio.gather(*(differ(client, a, b) for a, b in pairs))
        right = sum(a ^ b == answer for (a, b), answer in zip(pairs, found, strict=True))
        print(f"{right} of {len(pairs)} right, {found.count(None)} not in time")

        (statistics,) = await client.statistics("mlp")
        print(f"{statistics.inference_count} rows in {statistics.execution_count} batches so far")

        call = asyncio.create_task(differ(client, 0, 1))
        await asyncio.sleep(0)
        call.cancel()  # closes its connection: the server frees its place
        await asyncio.wait([call])
        print("cancelled:", call.cancelled())


asyncio.run(main())

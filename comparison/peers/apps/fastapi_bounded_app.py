"""The application as a careful engineer writes it: one thread runs models, a bounded queue, a timeout.

Bytes in, bytes out, a session per model. A request says in ``x-timeout-ms`` how long its client waits.
"""

from __future__ import annotations

import asyncio
from concurrent.futures import ThreadPoolExecutor
from typing import Final

from fastapi import FastAPI, Request, Response

from comparison.peers import served

MODELS: Final = {name: served.load(name) for name in served.names()}
ROOM: Final = asyncio.Semaphore(served.plan()["waiting"])
"""As many requests may wait as can be served in time."""
RUNNER: Final = ThreadPoolExecutor(max_workers=1)
"""Sessions have one thread, and there is one core: more at once would only make all of them late."""
app = FastAPI()


def _full() -> Response:
    return Response("the queue is full", 429)


@app.get("/")
def ready() -> str:
    """It is up once its models are loaded."""
    return "ready"


@app.post("/{name}")
async def infer(name: str, request: Request) -> Response:
    """One inference off the event loop: 429 if the queue is full, 504 once the client has stopped waiting."""
    if ROOM.locked():
        return _full()  # before its body is read, which takes the core from inferences
    try:
        async with asyncio.timeout(float(request.headers["x-timeout-ms"]) / 1e3):
            batch = served.array(await request.body())
            if ROOM.locked():
                return _full()
            async with ROOM:
                # What times out while it waits for the thread is cancelled, and never runs.
                found = await asyncio.get_running_loop().run_in_executor(RUNNER, MODELS[name], batch)
    except TimeoutError:
        return Response("too late", 504)
    return Response(found.tobytes(), media_type="application/octet-stream")

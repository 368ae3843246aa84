"""The application: bytes in, bytes out, a session per model."""

from __future__ import annotations

from fastapi import FastAPI, Request, Response
from fastapi.concurrency import run_in_threadpool

from comparison.peers import served

MODELS = {name: served.load(name) for name in served.names()}
app = FastAPI()


@app.get("/")
def ready() -> str:
    """It is up once its models are loaded."""
    return "ready"


@app.post("/{name}")
async def infer(name: str, request: Request) -> Response:
    """One inference, in a thread, so that others are listened to meanwhile."""
    batch = served.array(await request.body())
    found = await run_in_threadpool(MODELS[name], batch)
    return Response(found.tobytes(), media_type="application/octet-stream")

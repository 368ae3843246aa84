"""A gRPC server of grpcio that does what a script says with each inference, and counts what it did.

A script gets the number of the inference, from 0, and says "ok", ("ok", seconds), "never" (until the client
gives up), ("large", bytes), or (status name, message, trailing metadata).
"""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import grpc

from clockwork_serve.oip.protobuf import INFERENCE_SERVICE, ModelInferRequest, ModelInferResponse, message

Script = Callable[[int], Any]
METADATA = message("inference.ModelMetadataResponse")


@dataclass
class PlayedGrpc:
    """What it did; ``left_s``: what was left of each call's deadline, ``sizes`` of its tensors' bytes."""

    url: str = ""
    server: Any = None
    done: Counter[Any] = field(default_factory=Counter)
    requests: list[Any] = field(default_factory=list)
    left_s: list[float | None] = field(default_factory=list)
    metadata: list[dict[str, str]] = field(default_factory=list)
    most_at_once: int = 0


class _Service(grpc.GenericRpcHandler):
    def __init__(self, script: Script, shape: tuple[int, ...], played: PlayedGrpc) -> None:
        self._script, self._shape, self._played = script, shape, played
        self._lock = threading.Lock()
        self._at_once = 0

    def service(self, details: Any) -> Any:
        rpcs = {"ModelInfer": self._infer, "ModelMetadata": self._tell}
        name = details.method.removeprefix(f"/{INFERENCE_SERVICE}/")
        return grpc.unary_unary_rpc_method_handler(rpcs[name]) if name in rpcs else None

    def _tell(self, request: bytes, context: Any) -> bytes:
        asked = message("inference.ModelMetadataRequest").FromString(request)
        if asked.name != "m":
            context.abort(grpc.StatusCode.NOT_FOUND, "no such model")
        found = METADATA(name="m")
        found.inputs.add(name="x", datatype="FP32", shape=self._shape)
        content: bytes = found.SerializeToString()
        return content

    def _infer(self, request: bytes, context: Any) -> bytes:
        played = self._played
        with self._lock:
            number = len(played.requests)
            played.requests.append(ModelInferRequest.FromString(request))
            left = context.time_remaining()
            played.left_s.append(left)
            played.metadata.append(dict(context.invocation_metadata()))
            self._at_once += 1
            played.most_at_once = max(played.most_at_once, self._at_once)
            action = self._script(number)
            played.done[action] += 1
        try:
            return self._act(action, context)
        finally:
            with self._lock:
                self._at_once -= 1

    def _act(self, action: Any, context: Any) -> bytes:
        match action:
            case ("ok", seconds):
                time.sleep(seconds)
            case "never":
                while context.is_active():
                    time.sleep(0.01)
            case ("large", nbytes):
                content: bytes = ModelInferResponse(raw_output_contents=[bytes(nbytes)]).SerializeToString()
                return content
            case (status, text, trailers):
                context.set_trailing_metadata(trailers)
                context.abort(getattr(grpc.StatusCode, status), text)
        empty: bytes = ModelInferResponse(model_name="m").SerializeToString()
        return empty


@contextmanager
def scripted_grpc(
    script: Script = lambda number: "ok", *, shape: tuple[int, ...] = (-1, 4), options: Any = ()
) -> Iterator[PlayedGrpc]:
    """A server while the block lasts."""
    played = PlayedGrpc()
    played.server = server = grpc.server(
        ThreadPoolExecutor(64), options=[("grpc.max_receive_message_length", -1), *options]
    )
    server.add_generic_rpc_handlers((_Service(script, shape, played),))
    played.url = f"127.0.0.1:{server.add_insecure_port('127.0.0.1:0')}"
    server.start()
    try:
        yield played
    finally:
        server.stop(0).wait(60)

"""Clients that ask at a steady pace, over HTTP and gRPC, and keep how each request ended."""

from __future__ import annotations

import json
import struct
import threading
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from http.client import HTTPConnection, HTTPException

import grpc

from clockwork_serve.oip.protobuf import INFERENCE_SERVICE, message

WIDE = 64
_ModelInferRequest, _ModelInferResponse = (
    message("inference.ModelInferRequest"), message("inference.ModelInferResponse"),
)  # fmt: skip


@dataclass(frozen=True)
class End:
    """One request: when it was sent and ended, and how: ``200``, ``503``, ``OK``, ``UNAVAILABLE``, ..."""

    protocol: str
    model: str
    sent_s: float
    ended_s: float
    how: str
    why: str = ""
    retry_after: str = ""

    @property
    def good(self) -> bool:
        return self.how in ("200", "OK")

    @property
    def took_ms(self) -> float:
        return (self.ended_s - self.sent_s) * 1e3


class Steady:
    """Threads that ask the ``models`` in turn, each every ``pause_s``."""

    def __init__(
        self, http_port: int, grpc_port: int, models: Sequence[str], slo_ms: int, pause_s: float, each: int
    ) -> None:
        self.ends: list[End] = []
        self._models = models
        self._slo_ms = slo_ms
        self._pause_s = pause_s
        self._stop = threading.Event()
        kinds = [(self._http, http_port), (self._grpc, grpc_port)] * each
        self._threads = [
            threading.Thread(target=ask, args=(port, at), daemon=True) for at, (ask, port) in enumerate(kinds)
        ]
        for thread in self._threads:
            thread.start()

    def stop(self) -> list[End]:
        """No more; all ends, in order."""
        self._stop.set()
        for thread in self._threads:
            thread.join(60)
            assert not thread.is_alive(), "a request was never answered"
        return sorted(self.ends, key=lambda end: end.sent_s)

    def _turns(self, at: int) -> Iterator[str]:
        while not self._stop.is_set():
            yield self._models[at % len(self._models)]
            at += 1
            time.sleep(self._pause_s)

    def _http(self, port: int, at: int) -> None:
        entry = {"name": "x", "datatype": "FP32", "shape": [1, WIDE], "data": [0.5] * WIDE}
        body = json.dumps({"inputs": [entry], "parameters": {"slo_ms": self._slo_ms}})
        connection = HTTPConnection("127.0.0.1", port, timeout=60)
        for model in self._turns(at):
            sent_s = time.monotonic()
            try:
                connection.request("POST", f"/v2/models/{model}/infer", body)
                reply = connection.getresponse()
                said = json.loads(reply.read())
                how, why = str(reply.status), said.get("error", "")
                after = reply.headers.get("Retry-After", "")
            except (OSError, HTTPException) as error:
                how, why, after = type(error).__name__, str(error), ""
                connection.close()
            self.ends.append(End("http", model, sent_s, time.monotonic(), how, why, after))
        connection.close()

    def _grpc(self, port: int, at: int) -> None:
        options = [("grpc.use_local_subchannel_pool", 1), ("grpc.initial_reconnect_backoff_ms", 20)]
        with grpc.insecure_channel(f"127.0.0.1:{port}", options=options) as channel:
            ask = channel.unary_unary(
                f"/{INFERENCE_SERVICE}/ModelInfer",
                request_serializer=_ModelInferRequest.SerializeToString,
                response_deserializer=_ModelInferResponse.FromString,
            )
            for model in self._turns(at):
                asked = _ModelInferRequest(model_name=model)
                tensor = asked.inputs.add(name="x", datatype="FP32", shape=[1, WIDE])
                tensor.contents.fp32_contents.extend([0.5] * WIDE)
                asked.parameters["slo_ms"].int64_param = self._slo_ms
                sent_s, how, why, after = time.monotonic(), "OK", "", ""
                try:
                    (output,) = ask(asked, timeout=60).raw_output_contents
                    assert len(output) == struct.calcsize(f"{WIDE}f")
                except grpc.RpcError as error:
                    how, why = error.code().name, error.details()
                    trailers = dict(error.trailing_metadata() or ())
                    after = str(trailers.get("clockwork-retry-after-ms", ""))
                self.ends.append(End("grpc", model, sent_s, time.monotonic(), how, why, after))


@contextmanager
def steady(
    http_port: int, grpc_port: int | None, models: Sequence[str], *, slo_ms: int = 10_000,
    pause_s: float = 0.01, each: int = 2,
) -> Iterator[Steady]:  # fmt: skip
    """Load while the block lasts."""
    assert grpc_port is not None
    load = Steady(http_port, grpc_port, models, slo_ms, pause_s, each)
    try:
        yield load
    finally:
        load.stop()


def how(ends: Sequence[End]) -> Counter[tuple[str, str, str]]:
    """How often each end came that was not good."""
    return Counter((end.protocol, end.how, end.why[:100]) for end in ends if not end.good)

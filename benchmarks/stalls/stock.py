"""Stock clients with their own clocks: grpcio's streams, the standard library's HTTP client, also by TLS.

``python -m benchmarks.stalls.stock PLAN``, as :mod:`benchmarks.stalls.clients`. These clients wait in
threads, and cannot see when the kernel had their answers. So a thread that should run every 2 ms measures
how late this process is: the greatest lateness while a request was open is subtracted from what it took.
"""

from __future__ import annotations

import gc
import http.client
import json
import queue
import random
import ssl
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Final

import grpc
import msgspec
import numpy as np

from benchmarks.stalls.clients import LAST_S, Plan, Seen
from clockwork_serve.oip.protobuf import INFERENCE_SERVICE, ModelInferRequest, ModelStreamInferResponse
from clockwork_serve.units import NS_PER_MS

TICK_NS: Final = 2 * NS_PER_MS
_KEPT: Final = 15_000  # half a minute of ticks
_REASONS: Final = (("rejected", "429"), ("would_miss_deadline", "429"), ("queue_full", "429"))


class Lateness:
    """How late this process was, by a thread that wants to run every 2 ms."""

    def __init__(self) -> None:
        self._ticks: deque[tuple[int, int]] = deque(maxlen=_KEPT)
        threading.Thread(target=self._run, daemon=True).start()

    def _run(self) -> None:
        while True:
            before_ns = time.monotonic_ns()
            time.sleep(TICK_NS / 1e9)
            now_ns = time.monotonic_ns()
            self._ticks.append((now_ns, now_ns - before_ns - TICK_NS))

    def within_ns(self, begun_ns: int, ended_ns: int) -> int:
        """The greatest lateness in that time."""
        late = [
            late_ns
            for at_ns, late_ns in list(self._ticks)
            if at_ns >= begun_ns and at_ns - late_ns <= ended_ns
        ]
        return max(late, default=0)


class Stock:
    """Requests at random times over one connection; subclasses send them and take the answers."""

    def __init__(self, plan: Plan) -> None:
        self.seen: list[Seen] = []
        self.plan = plan
        self.data = np.zeros(plan.floats, np.float32)
        self.late = Lateness()
        self._dice = random.Random(plan.seed)

    def due(self) -> Iterator[tuple[str, int]]:
        """Models and SLOs in ms, each at its time, until the plan is over."""
        begin, at_s = time.monotonic(), 0.0
        while (at_s := at_s + self._dice.expovariate(self.plan.per_s)) < self.plan.seconds:
            time.sleep(max(0.0, begin + at_s - time.monotonic()))
            yield f"m{self._dice.randrange(self.plan.models)}", self._dice.choice(self.plan.slos_ms)

    def end(self, seen: Seen, status: str) -> None:
        """The answer is there."""
        seen.ended_ns, seen.status = time.monotonic_ns(), status

    def judge(self) -> None:
        """Subtract this process's own lateness."""
        for seen in self.seen:
            if seen.ended_ns:
                seen.own_ns = self.late.within_ns(seen.begun_ns, seen.ended_ns)


class Streams(Stock):
    """``ModelStreamInfer`` by grpcio: one stream, whose answers come in the order of its requests."""

    def run(self) -> None:
        """Until all answers came, or the stream broke."""
        plan = self.plan
        channel = (
            grpc.secure_channel(plan.address, grpc.ssl_channel_credentials(Path(plan.authority).read_bytes()))
            if plan.authority
            else grpc.insecure_channel(plan.address)
        )
        grpc.channel_ready_future(channel).result(LAST_S)
        call = channel.stream_stream(f"/{INFERENCE_SERVICE}/ModelStreamInfer")
        try:
            for number, answer in enumerate(call(self._requests(), timeout=plan.seconds + LAST_S)):
                self.end(self.seen[number], _status(answer))
        except grpc.RpcError as error:
            for seen in self.seen:
                if not seen.ended_ns:
                    self.end(seen, error.code().name)
        channel.close()

    def _requests(self) -> Iterator[bytes]:
        for model, slo_ms in self.due():
            request: Any = ModelInferRequest(model_name=model)
            request.inputs.add(name="x", datatype="FP32", shape=[1, len(self.data)])
            request.parameters["slo_ms"].double_param = slo_ms
            request.raw_input_contents.append(self.data.tobytes())
            message = request.SerializeToString()
            self.seen.append(Seen(slo_ms, time.monotonic_ns()))
            yield message


def _status(answer: bytes) -> str:
    parsed: Any = ModelStreamInferResponse.FromString(answer)
    text = parsed.error_message
    if not text:
        return "200"
    return next(
        (status for word, status in _REASONS if word in text), "504" if "deadline" in text else text[:40]
    )


class Https(Stock):
    """``http.client`` in threads, a connection each."""

    def run(self) -> None:
        """Until all answers came."""
        work: queue.Queue[tuple[str, int] | None] = queue.Queue()
        threads = [threading.Thread(target=self._ask_all, args=(work,)) for _ in range(64)]
        for thread in threads:
            thread.start()
        for one in self.due():
            work.put(one)
        for _ in threads:
            work.put(None)
        for thread in threads:
            thread.join(LAST_S)

    def _ask_all(self, work: queue.Queue[tuple[str, int] | None]) -> None:
        connection = self._connection()
        while (one := work.get()) is not None:
            model, slo_ms = one
            tensor = {
                "name": "x",
                "datatype": "FP32",
                "shape": [1, len(self.data)],
                "data": self.data.tolist(),
            }
            body = json.dumps({"inputs": [tensor]})
            if connection.sock is None and not _connect(connection):
                continue  # no gateway is there, and nothing was asked
            seen = Seen(slo_ms, time.monotonic_ns())
            self.seen.append(seen)
            try:
                connection.request("POST", f"/v2/models/{model}/infer", body, {"x-slo-ms": str(slo_ms)})
                response = connection.getresponse()
                response.read()
            except (OSError, http.client.HTTPException):
                self.end(seen, "reset")
                connection.close()
            else:
                self.end(seen, str(response.status))
        connection.close()

    def _connection(self) -> http.client.HTTPConnection:
        plan = self.plan
        if not plan.authority:
            return http.client.HTTPConnection(plan.address, timeout=LAST_S)
        context = ssl.create_default_context(cafile=plan.authority)
        return http.client.HTTPSConnection(plan.address, timeout=LAST_S, context=context)


def _connect(connection: http.client.HTTPConnection) -> bool:
    """Connect before a request's time begins; false if nobody accepts it."""
    try:
        connection.connect()
    except OSError:
        connection.close()
        return False
    return True


def main() -> int:
    """Play the plan in ``argv[1]``; what was seen goes to standard output."""
    plan = msgspec.json.decode(sys.argv[1], type=Plan)
    kinds: dict[str, Callable[[Plan], Streams | Https]] = {"http": Https, "stream": Streams}
    clients = kinds[plan.protocol](plan)
    gc.collect()
    gc.freeze()
    gc.disable()
    clients.run()
    clients.judge()
    sys.stdout.write(json.dumps([msgspec.to_builtins(one) for one in clients.seen]))
    return 0


if __name__ == "__main__":
    sys.exit(main())

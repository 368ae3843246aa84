"""Closed-loop clients of a real server, over HTTP."""

from __future__ import annotations

import http.client
import json
import threading
import time
from collections.abc import Callable, Sequence
from urllib.parse import urlsplit

import numpy as np
from msgspec import Struct

from clockwork_lab.reproduce.real_model import INPUT_SHAPE

TIMEOUT_S = 30.0
ZIPF = 0.9
"""Exponent of the models' popularity."""
TELL_S = 0.5


class RequestCounts(Struct, frozen=True):
    """How many requests were sent, and how many of them were good."""

    asked: int
    good: int


class Asking(Struct, frozen=True, kw_only=True):
    """The load: ``clients`` concurrently, each waiting ``think_s`` on average between two requests."""

    models: Sequence[str]
    clients: int
    think_s: float
    seconds: float
    slo_ms: float
    seed: int


def ask(url: str, asking: Asking, report: Callable[[float], None]) -> RequestCounts:
    """Send requests until the time is over; ``report`` is called with the share of it that has passed."""
    counts: list[RequestCounts] = []
    end_s = time.monotonic() + asking.seconds

    def client(number: int) -> None:
        counts.append(_client(url, asking, number, end_s))

    threads = [threading.Thread(target=client, args=(number,)) for number in range(asking.clients)]
    for thread in threads:
        thread.start()
    while (left_s := end_s - time.monotonic()) > 0:
        report(1 - left_s / asking.seconds)
        time.sleep(min(TELL_S, left_s))
    for thread in threads:
        thread.join()
    return RequestCounts(sum(each.asked for each in counts), sum(each.good for each in counts))


def _client(url: str, asking: Asking, number: int, end_s: float) -> RequestCounts:
    rng = np.random.default_rng([asking.seed, number])
    popularity = np.arange(1, len(asking.models) + 1) ** -ZIPF
    popularity /= popularity.sum()
    body, headers = _request(rng, asking.slo_ms)
    connection = http.client.HTTPConnection(urlsplit(url).netloc, timeout=TIMEOUT_S)
    asked = good = 0
    try:
        while time.monotonic() < end_s:
            model = asking.models[int(rng.choice(len(asking.models), p=popularity))]
            connection.request("POST", f"/v2/models/{model}/infer", body, headers)
            response = connection.getresponse()
            response.read()
            asked += 1
            good += response.status == http.HTTPStatus.OK
            time.sleep(rng.exponential(asking.think_s))
    finally:
        connection.close()
    return RequestCounts(asked, good)


def _request(rng: np.random.Generator, slo_ms: float) -> tuple[bytes, dict[str, str]]:
    """One inference request with its tensor in binary."""
    picture = rng.standard_normal((1, *INPUT_SHAPE), dtype=np.float32).tobytes()
    head = json.dumps(
        {
            "inputs": [
                {
                    "name": "x", "shape": [1, *INPUT_SHAPE], "datatype": "FP32",
                    "parameters": {"binary_data_size": len(picture)},
                }
            ],
            "parameters": {"binary_data_output": True},
        }
    ).encode()  # fmt: skip
    headers = {
        "Inference-Header-Content-Length": str(len(head)),
        "Content-Type": "application/octet-stream",
        "x-slo-ms": f"{slo_ms:g}",
    }
    return head + picture, headers

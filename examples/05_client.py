"""Our own client: answers, and every way not to get one. First: clockwork serve examples/models."""

from __future__ import annotations

import sys
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np

from clockwork_serve import Client, Invalid, Rejected, ServingError

URL = sys.argv[1] if len(sys.argv) > 1 else "127.0.0.1:8000"
BITS = {"bits": np.array([[0.0, 1.0]], np.float32)}


def show(client: Client, what: str, **request: Any) -> None:
    """Ask, and say what became of it."""
    try:
        result = client.infer(**{"model": "mlp", "inputs": BITS, "slo_ms": 1000, **request})
    except Rejected as error:
        again = error.retry_after_s
        advice = "coming back would not help" if again is None else f"come back in {again:.4f} s"
        print(f"{what}: rejected, {error.reason}; {advice}")
    except Invalid as error:
        print(f"{what}: {error.field} is wrong: {error}")
    except ServingError as error:
        print(f"{what}: {type(error).__name__}: {error}")
    else:
        different = result["probability"][0, 1]
        print(f"{what}: {different:.0%} sure that they differ, after {result.queue_ms} + {result.exec_ms} ms")


def end_of(client: Client, retries: int) -> str:
    """How a request ends that has 5 ms, and may come back so often when the server says so."""
    try:
        client.infer("mlp", BITS, slo_ms=5, retries=retries, timeout_s=5)
    except ServingError as error:
        return error.reason or type(error).__name__
    return "answered"


with Client(URL) as client:
    show(client, "plenty of time")
    show(client, "no time at all", slo_ms=0.2)
    show(client, "three bits", inputs={"bits": np.zeros((1, 3), np.float32)})
    show(client, "a list of bits", inputs={"bits": [0, 1]})
    show(client, "no such model", model="nope")
    with ThreadPoolExecutor(32) as threads:
        for retries, how in ((0, ""), (10, ", with retries")):
            ends = Counter(threads.map(end_of, [client] * 200, [retries] * 200))
            said = ", ".join(f"{count} {end}" for end, count in ends.most_common())
            print(f"200 in 5 ms each{how}: {said}")

"""Clients of a soak that know each right result, and the client that changes models under them."""

from __future__ import annotations

import http.client
import json
import random
import shutil
import threading
import time
import urllib.error
import urllib.request
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, Final
from urllib.parse import urlsplit

import numpy as np
import tritonclient.grpc
from tritonclient.utils import InferenceServerException

from harness import repositories
from harness.server import Server
from qa.soak.servers import LONG, QUICK, REPLACED, UNLOADED, WIDE

SLO_MS: Final = 1000
SLACK_MS: Final = 1.0
"""What a server says of its own durations may be off by so much."""
CHANGED_S: Final = 2.0
"""So long after a replacement was confirmed, answers of the weights before it are right: they were on their
way."""
MAY_REFUSE: Final = {429, 503, 504, 500}
TIMEOUT_S: Final = 15.0
CLOSE_S: Final = 120.0


def _names(of: str, count: int) -> list[str]:
    return [f"{of}{index}" for index in range(count)]


class Truth:
    """Which weights may answer, by model."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._seeds = {
            model: [(index, float("inf"))]
            for name, count in (("m", QUICK), ("r", REPLACED), ("x", UNLOADED))
            for index, model in enumerate(_names(name, count))
        }
        """The weights that may still answer, and until when."""

    def replacing(self, model: str, seed: int) -> None:
        """From now on it may be either."""
        with self._lock:
            self._seeds[model].append((seed, float("inf")))

    def replaced(self, model: str) -> None:
        """The server says that it serves the newest."""
        until = time.monotonic() + CHANGED_S
        with self._lock:
            *old, newest = self._seeds[model]
            self._seeds[model] = [(seed, min(end, until)) for seed, end in old] + [newest]

    def right(self, model: str, x: Any, found: Any, sent_s: float) -> bool:
        """Whether an answer to what was sent then is one of the model's."""
        with self._lock:
            self._seeds[model] = [(seed, end) for seed, end in self._seeds[model] if end > sent_s - 60]
            seeds = [seed for seed, end in self._seeds[model] if end >= sent_s]
        return any(
            np.allclose(found, x @ repositories.matrix_of(seed, WIDE, LONG), rtol=1e-4, atol=1e-4)
            for seed in seeds
        )


class Paused:
    """Does pieces of work, of each kind one after another in a thread of its own, while it is on.

    A piece returns how many seconds pass until the next.
    """

    def __init__(self, *pieces: Callable[[], float]) -> None:
        self._on, self._over = threading.Event(), threading.Event()
        self._busy = [threading.Lock() for _ in pieces]
        self._threads = [
            threading.Thread(target=self._work, args=each, daemon=True)
            for each in zip(pieces, self._busy, strict=True)
        ]

    def start(self) -> None:
        """Begin; nothing is done until :meth:`go_on`."""
        for thread in self._threads:
            thread.start()

    def go_on(self) -> None:
        """Do it."""
        self._on.set()

    def pause(self) -> None:
        """Return once no piece is under way."""
        self._on.clear()
        for busy in self._busy:
            with busy:
                pass

    def close(self) -> None:
        """End."""
        self._over.set()
        self._on.set()
        for thread in self._threads:
            thread.join(CLOSE_S)

    def _work(self, piece: Callable[[], float], busy: threading.Lock) -> None:
        while not self._over.is_set():
            self._on.wait()
            with busy:
                if not self._on.is_set() or self._over.is_set():
                    continue
                wait_s = piece()
            self._over.wait(wait_s)


class Honest(Paused):
    """Asks at a steady pace over both protocols."""

    def __init__(self, server: Server, truth: Truth, rate: float, seed: int) -> None:
        super().__init__(*(
            partial(self._ask, ask, random.Random(seed + at), np.random.default_rng(seed + at))
            for at, ask in enumerate((self._http, self._grpc))
        ))  # fmt: skip
        self.ends: Counter[str] = Counter()
        self.violations: list[str] = []
        self.answered = 0
        self.gateway_died_s = 0.0
        """When one was last killed: connections to it end."""
        self._server, self._truth, self._rate = server, truth, rate
        changing = [*_names("r", REPLACED), *_names("x", UNLOADED)]
        self._models = [*_names("m", QUICK), *changing * 3]
        self._connection: http.client.HTTPConnection | None = None
        self._client: tritonclient.grpc.InferenceServerClient | None = None

    def pause(self) -> None:
        """Return once nothing is out and no connection is open."""
        super().pause()
        for each in (self._connection, self._client):
            if each is not None:
                each.close()
        self._connection = self._client = None

    def _ask(self, ask: Any, dice: random.Random, numbers: np.random.Generator) -> float:
        model, x = dice.choice(self._models), numbers.standard_normal((1, WIDE), dtype=np.float32)
        sent_s = time.monotonic()
        try:
            self._judge(model, x, sent_s, *ask(model, x))
        except (OSError, http.client.HTTPException) as error:
            self._connection = None
            self._lost(model, sent_s, error)
        return dice.expovariate(self._rate / 2)

    def _lost(self, model: str, sent_s: float, error: Exception) -> None:
        self.ends["connection ended"] += 1
        if self.gateway_died_s < sent_s - TIMEOUT_S:
            self.violations.append(f"lost: {model} was not answered: {error!r}")

    def _judge(self, model: str, x: Any, sent_s: float, status: int, said: Any, took_ms: float) -> None:
        if status != 200:
            self.ends[f"{status} {said}"] += 1
            gone = model[0] == "x" and status in {400, 404}
            dead = status == 0 and self.gateway_died_s >= sent_s - TIMEOUT_S
            if status not in MAY_REFUSE and not gone and not dead:
                self.violations.append(f"refused: {model}: {status} {said}")
            return
        self.ends["answered"] += 1
        self.answered += 1
        if not self._truth.right(model, x, said, sent_s):
            self.violations.append(
                f"wrong answer of {model}, {time.monotonic() - sent_s:.3f} s after it was asked"
            )
        if took_ms > SLO_MS + SLACK_MS:
            self.violations.append(f"late counted good: {model} took {took_ms:.1f} of {SLO_MS} ms")

    def _http(self, model: str, x: Any) -> tuple[int, Any, float]:
        parts = urlsplit(self._server.http_url)
        if self._connection is None:
            self._connection = http.client.HTTPConnection(str(parts.hostname), parts.port, timeout=TIMEOUT_S)
        tensor = {"name": "x", "shape": [1, WIDE], "datatype": "FP32", "data": x.reshape(-1).tolist()}
        body = json.dumps({"inputs": [tensor], "parameters": {"slo_ms": SLO_MS}})
        self._connection.request("POST", f"/v2/models/{model}/infer", body)
        response = self._connection.getresponse()
        content = json.loads(response.read())
        if response.will_close:
            self._connection.close()
            self._connection = None
        if response.status != 200:
            return response.status, content.get("reason", ""), 0.0
        found = np.array(content["outputs"][0]["data"], np.float32).reshape(1, LONG)
        told = content.get("parameters", {})
        return 200, found, told.get("queue_ms", 0.0) + told.get("exec_ms", 0.0)

    def _grpc(self, model: str, x: Any) -> tuple[int, Any, float]:
        if self._client is None:
            self._client = tritonclient.grpc.InferenceServerClient(self._server.facts["grpc"])
        tensor = tritonclient.grpc.InferInput("x", [1, WIDE], "FP32")
        tensor.set_data_from_numpy(x)
        try:
            result = self._client.infer(
                model, [tensor], parameters={"slo_ms": SLO_MS}, client_timeout=TIMEOUT_S
            )
        except InferenceServerException as error:
            words = f"{error.status()} {error.message()}"[:80]
            cut = any(part in words for part in _CUT)
            return 0 if cut else _GRPC.get(str(error.status()), -1), words, 0.0
        told = result.get_response().parameters
        took_ms = sum(told[name].double_param for name in ("queue_ms", "exec_ms") if name in told)
        return 200, result.as_numpy("y"), took_ms


_CUT: Final = ("ocket closed", "onnect", "reset")
"""Words of gRPC's own about a connection that ended."""
_GRPC: Final = {
    "StatusCode.RESOURCE_EXHAUSTED": 429, "StatusCode.DEADLINE_EXCEEDED": 504, "StatusCode.INTERNAL": 500,
    "StatusCode.NOT_FOUND": 404, "StatusCode.INVALID_ARGUMENT": 400, "StatusCode.UNAVAILABLE": 503,
    "StatusCode.CANCELLED": 0, "StatusCode.UNKNOWN": 0,
}  # fmt: skip


class Churn(Paused):
    """Unloads, loads and replaces models, one after another."""

    def __init__(self, server: Server, root: Path, truth: Truth, every_s: float, seed: int) -> None:
        super().__init__(self._change)
        self.done: Counter[str] = Counter()
        self.failed: list[str] = []
        self._server, self._root, self._truth, self._every_s = server, root, truth, every_s
        self._dice = random.Random(seed)
        self._seed = 1000
        self._loaded = dict.fromkeys(_names("x", UNLOADED), True)

    def _change(self) -> float:
        if self._dice.random() < 0.5:
            self._replace(self._dice.choice(_names("r", REPLACED)))
        else:
            model = self._dice.choice(_names("x", UNLOADED))
            if self._post(model, "unload" if self._loaded[model] else "load"):
                self._loaded[model] = not self._loaded[model]
        return self._every_s

    def _replace(self, model: str) -> None:
        """Other weights under the same name, as an operator would put them there."""
        self._seed += 1
        scratch = self._root.parent / "scratch"
        shutil.rmtree(scratch, ignore_errors=True)
        repositories.one_matrix(scratch, model, repositories.matrix_of(self._seed, WIDE, LONG))
        self._truth.replacing(model, self._seed)
        (scratch / model / "1" / "model.onnx").replace(self._root / model / "1" / "model.onnx")
        if self._post(model, "load"):
            self._truth.replaced(model)

    def _post(self, model: str, what: str) -> bool:
        url = f"{self._server.http_url}/v2/repository/models/{model}/{what}"
        request = urllib.request.Request(url, data=b"{}", method="POST")  # noqa: S310 (a URL of ours)
        try:
            with urllib.request.urlopen(request, timeout=60):  # noqa: S310 (as above)
                self.done["replace" if model[0] == "r" else what] += 1
                return True
        except urllib.error.HTTPError as error:
            self.failed.append(f"{what} {model}: {error.code} {error.read()[:200].decode(errors='replace')}")
        except OSError as error:
            self.failed.append(f"{what} {model}: {error!r}")
        return False

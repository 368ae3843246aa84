"""The graphs in real servers, asked alone and in company, and compared with plain ONNX Runtime."""

from __future__ import annotations

import contextlib
import http.client
import json
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import numpy as np

from benchmarks.unseen_graphs.cases import Feeds
from benchmarks.unseen_graphs.draft import Array
from harness.serving import Serving, serve

TYPES = {"float32": "FP32", "float16": "FP16", "int64": "INT64", "uint8": "UINT8", "int32": "INT32"}
ARRAYS = {name: np.dtype(kind) for kind, name in TYPES.items()}
HEAD = "Inference-Header-Content-Length"
CLIENTS = 16
START_S = 600.0
SETTLED = ("READY", "UNAVAILABLE")


@dataclass(slots=True)
class Answers:
    """What servers answered."""

    models: int = 0
    served: int = 0
    batched: list[str] = field(default_factory=list)
    asked: int = 0
    answered: int = 0
    in_company: int = 0
    wrong: Counter[str] = field(default_factory=Counter)
    """How many answers differ, by model."""
    uncertain: int = 0
    """Answers that plain ONNX Runtime itself rounds differently, optimised and not."""
    refusals: list[str] = field(default_factory=list)

    def figures(self) -> dict[str, Any]:
        """For the record."""
        return {
            "models": self.models, "served": self.served, "batched": len(self.batched),
            "asked": self.asked, "answered": self.answered, "in_company": self.in_company,
            "uncertain": self.uncertain, "wrong": dict(self.wrong.most_common(20)),
            "refusals": self.refusals[:20],
        }  # fmt: skip


@dataclass(slots=True)
class Reply:
    """One answer: its tensors by name, or the error."""

    outputs: dict[str, Array]
    batch_size: int = 0
    error: str = ""


class Clients:
    """Connections that can all send before any of them reads."""

    def __init__(self, serving: Serving, count: int = CLIENTS) -> None:
        place = urlsplit(serving.http_url)
        assert place.hostname is not None
        self.connections = [
            http.client.HTTPConnection(place.hostname, place.port, timeout=60) for _ in range(count)
        ]

    def ask(self, name: str, rows: Sequence[Feeds]) -> list[Reply]:
        """All at once; more than there are connections wait for their turn."""
        found: list[Reply] = []
        for first in range(0, len(rows), len(self.connections)):
            some = list(zip(self.connections, rows[first : first + len(self.connections)], strict=False))
            for connection, row in some:
                body, head = encoded(row)
                headers = {HEAD: str(head), "Content-Type": "application/octet-stream"}
                connection.request("POST", f"/v2/models/{name}/infer", body, headers)
            for connection, _ in some:
                response = connection.getresponse()
                found.append(decoded(response.status, response.read(), response.getheader(HEAD)))
        return found

    def close(self) -> None:
        """Close all."""
        for connection in self.connections:
            connection.close()


def encoded(row: Feeds) -> tuple[bytes, int]:
    """A request with binary tensors, and the length of its JSON."""
    parts = {name: np.ascontiguousarray(array).tobytes() for name, array in row.items()}
    head = json.dumps({
        "inputs": [
            {
                "name": name, "shape": list(array.shape), "datatype": TYPES[array.dtype.name],
                "parameters": {"binary_data_size": len(parts[name])},
            }
            for name, array in row.items()
        ],
        "parameters": {"slo_ms": 30_000, "binary_data_output": True},
    }).encode()  # fmt: skip
    return head + b"".join(parts.values()), len(head)


def decoded(status: int, body: bytes, head: str | None) -> Reply:
    """What a response says."""
    length = int(head) if head else len(body)
    said = json.loads(body[:length] or b"{}")
    if status != 200:
        return Reply({}, error=f"{status}: {said.get('error', '')}"[:300])
    outputs, at = {}, length
    for tensor in said["outputs"]:
        size, kind = tensor.get("parameters", {}).get("binary_data_size"), ARRAYS[tensor["datatype"]]
        if size is None:
            flat = np.array(tensor["data"], kind)
        else:
            flat, at = np.frombuffer(body[at : at + size], kind), at + size
        outputs[tensor["name"]] = flat.reshape(tensor["shape"])
    return Reply(outputs, int(said.get("parameters", {}).get("batch_size", 0)))


@contextlib.contextmanager
def served(
    models: Mapping[str, bytes], *, declared: int | None = None
) -> Iterator[tuple[Serving, dict[str, int]]]:
    """A server of these, all compiled; by name, the ``max_batch_size`` that it shows of what it serves."""
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder) / "models"
        for name, model in models.items():
            (root / name / "1").mkdir(parents=True)
            (root / name / "1" / "model.onnx").write_bytes(model)
            if declared is not None:
                (root / name / "clockwork.toml").write_text(f"max_batch_size = {declared}\n")
        with serve(root, log_level="critical") as serving:
            yield serving, settled(serving, len(models))


def settled(serving: Serving, count: int) -> dict[str, int]:
    """Wait until every model is served or has a problem. RuntimeError if that takes too long."""
    end = time.monotonic() + START_S
    clients = Clients(serving, 1)
    try:
        while True:
            connection = clients.connections[0]
            connection.request("POST", "/v2/repository/index", b"{}")
            index = json.loads(connection.getresponse().read())
            states = {one["name"]: (one["state"], one.get("reason", "")) for one in index}
            if len(states) >= count and all(state in SETTLED for state, _ in states.values()):
                break
            if time.monotonic() > end:
                raise RuntimeError(f"not all of {count} models are served: {list(states.items())[:5]}")
            time.sleep(0.2)
    finally:
        clients.close()
    ready = [name for name, (state, _) in states.items() if state == "READY"]
    return {name: serving.get(f"/v2/models/{name}/config").get("max_batch_size", 0) for name in ready}

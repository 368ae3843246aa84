"""Whole servers in the test's process tree, and requests to them."""

from __future__ import annotations

import json
import urllib.error
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from clockwork_serve.config import Settings
from clockwork_serve.devices import DeviceConfig
from clockwork_serve.serve.supervisor.server import RunningServer, ServerConfig
from clockwork_serve.store import StoreConfig
from clockwork_serve.units import MIB
from harness import serving


def config(root: Path, **fields: Any) -> ServerConfig:
    settings: dict[str, Any] = {
        "repository": str(root / "repository"),
        "http_port": 0,
        "grpc_port": 0,
        "metrics_port": 0,
        "gateway_memory": 16 * MIB,
        "max_body": 4 * MIB,
        "slo_ms": 20_000.0,
        "drain_s": 5.0,
    }
    own: dict[str, Any] = {
        "store": StoreConfig(cache_dir=str(root / "cache"), max_batch_size=4, largest_batch=4),
        "devices": (DeviceConfig(device="cpu:0", memory_bytes=8 * MIB),),
        "run_dir": str(root),
    }
    own |= {name: fields.pop(name) for name in list(fields) if name in ServerConfig.__struct_fields__}
    return ServerConfig(settings=Settings(**settings | fields), **own)


def call(server: RunningServer, path: str, body: object = None) -> Any:
    data = None if body is None else json.dumps(body).encode()
    asked = urllib.request.Request(f"{server.http_url}/v2/{path}", data=data)
    with urllib.request.urlopen(asked, timeout=60) as reply:
        found = reply.read()
    return json.loads(found) if found else None


def infer(server: RunningServer, model: str, x: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    entry = {"name": "x", "datatype": "FP32", "shape": list(x.shape), "data": x.ravel().tolist()}
    reply = call(server, f"models/{model}/infer", {"inputs": [entry]})
    return np.array(reply["outputs"][0]["data"], np.float32).reshape(reply["outputs"][0]["shape"])


def until(condition: Callable[[], object], seconds: float = 60.0) -> None:
    serving.until("it happened", condition, seconds)


def refusal(server: RunningServer, path: str, body: object) -> tuple[int, str]:
    """Status and error of a request that is expected to be refused."""
    with pytest.raises(urllib.error.HTTPError) as refused:
        call(server, path, body)
    with refused.value:
        return refused.value.code, json.loads(refused.value.read())["error"]

"""HTTP requests written by hand, and their responses."""

from __future__ import annotations

import gzip
import json
from typing import Any

import numpy as np
import tritonclient.http

from clockwork_serve.units import MIB
from tests.serve.gateway.running import RunningGateway


def tensor(name: str, data: Any, datatype: str, *, binary: bool = True) -> Any:
    found = tritonclient.http.InferInput(name, list(data.shape), datatype)
    found.set_data_from_numpy(data, binary_data=binary)
    return found


X = np.array([[1.5, -2]], np.float32)
INFER = "/v2/models/ident/infer"
BOMB = gzip.compress(bytes(9 * MIB))
IDENT_JSON = b'{"inputs":[{"name":"X","shape":[1,2],"datatype":"FP32","data":[1.5,-2]}]}'


def post(path: str, body: bytes = b"", *headers: str, close: bool = True) -> bytes:
    lines = [f"POST {path} HTTP/1.1", "Host: here", f"Content-Length: {len(body)}", *headers]
    if close:
        lines.append("Connection: close")
    return "\r\n".join([*lines, "", ""]).encode() + body


def get(path: str, *headers: str, method: str = "GET") -> bytes:
    return "\r\n".join(
        [f"{method} {path} HTTP/1.1", "Host: here", "Connection: close", *headers, "", ""]
    ).encode()


class Found:
    """One response, parsed."""

    def __init__(self, raw: bytes) -> None:
        head, _, self.body = raw.partition(b"\r\n\r\n")
        lines = head.decode().split("\r\n")
        self.status = int(lines[0].split()[1])
        self.headers = {
            name.lower(): value for name, _, value in (line.partition(": ") for line in lines[1:])
        }

    @property
    def json(self) -> Any:
        return json.loads(self.body)


def ask(gateway: RunningGateway, sent: bytes) -> Found:
    return Found(gateway.exchange(sent))

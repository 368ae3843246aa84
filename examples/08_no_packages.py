"""Asks in JSON with nothing but Python's own library. First: clockwork serve examples/models."""

from __future__ import annotations

import json
import sys
from http.client import HTTPConnection

URL = sys.argv[1] if len(sys.argv) > 1 else "127.0.0.1:8000"

connection = HTTPConnection(URL, timeout=10)
for values, slo_ms in (([0, 1], 1000), ([1, 1], 1000), ([1, 1], 0.2), ([1, 1, 1], 1000)):
    tensor = {"name": "bits", "datatype": "FP32", "shape": [1, len(values)], "data": values}
    body = json.dumps({"inputs": [tensor]})
    connection.request("POST", "/v2/models/mlp/infer", body, {"x-slo-ms": str(slo_ms)})
    response = connection.getresponse()
    answer = json.load(response)
    if response.status == 200:
        print(f"{values}: equal, different = {answer['outputs'][0]['data']}")
    else:
        print(f"{values} in {slo_ms} ms: {response.status} {answer['outcome']}: {answer['error']}")
connection.close()

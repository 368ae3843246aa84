"""A service with a batchable API per model."""

import base64
from typing import Any

import bentoml
import numpy as np

from comparison.peers import served

PLAN = served.plan()


def _api(name: str) -> Any:
    run = served.load(name)

    def infer(self: Any, x: list[str]) -> list[str]:
        rows = [served.array(base64.b64decode(row)) for row in x]
        found = run(np.concatenate(rows) if len(rows) > 1 else rows[0])
        return [base64.b64encode(row.tobytes()).decode() for row in found]

    infer.__name__ = name.replace("-", "_")
    return bentoml.api(
        route=f"/{name}", batchable=True, max_batch_size=PLAN["batch"], max_latency_ms=int(PLAN["slo_ms"])
    )(infer)


Models = bentoml.service(
    workers=1, traffic={"timeout": 60}, logging={"access": {"enabled": False}}, metrics={"enabled": False}
)(type("Models", (), {name.replace("-", "_"): _api(name) for name in served.names()}))

"""A server whose port for other machines is flooded by others: machines join all the same."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import uvloop

from harness.ports import free_port
from harness.serving import Serving
from tests.end_to_end import machines
from tests.end_to_end.conftest import call, x_json
from tests.end_to_end.machines import PAGE, WIDE, far_worker, joined, product
from tests.serve.certificates import Certificates, certificates
from tests.serve.flood import HELLO, flooded
from tests.serve.links import Side
from tests.serve.remote.machine_links import connect, theirs
from tests.timing import Timing

Start = Callable[..., AbstractContextManager[Serving]]
JOIN_S = 2.0


@pytest.mark.parametrize(("addresses", "connections"), [(10, 80), (60, 600)])
def test_machines_join_during_a_flood(
    tmp_path: Path, start: Start, timing: Timing, addresses: int, connections: int
) -> None:
    files, port = certificates(tmp_path), free_port()
    repository = machines.matrices(tmp_path / "models")
    settings: dict[str, Any] = machines.settings(files, port)
    with (
        start(repository, memory_bytes=PAGE, **settings) as serving,
        flooded(port, addresses=addresses, connections=connections, words=HELLO),
    ):
        time.sleep(1.0)
        took_s = uvloop.run(connected(files, port))
        with timing.judged():
            assert took_s < JOIN_S
        with far_worker(port, files, tmp_path / "far", name="alpha") as worker:
            joined(serving, worker)
            x = np.ones((1, WIDE), np.float32)
            answer = call(serving.http_url, "/v2/models/m0/infer", x_json(x[0].tolist(), [1, WIDE]))
            found = np.array(answer.json["outputs"][0]["data"], np.float32)
            np.testing.assert_allclose(found, product(0, x)[0], rtol=1e-4, atol=1e-4)


async def connected(files: Certificates, port: int) -> float:
    """How long a link takes that has a certificate, to the bridge's first word."""
    began_s = time.monotonic()
    link = await connect(Side(), port, theirs(files), silence_s=20.0)
    took_s = time.monotonic() - began_s
    link.close()
    await asyncio.sleep(0.1)
    return took_s

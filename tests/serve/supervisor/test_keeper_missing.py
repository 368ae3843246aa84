"""Workers that never connect are ended; connected workers and other processes are not."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest
import uvloop

from clockwork_serve.errors import TransportError
from clockwork_serve.serve.supervisor.keeper import CHECKS_MISSED, end_unconnected_workers
from clockwork_serve.serve.supervisor.processes import Launch, Supervisor

CHECK_INTERVAL_S = 0.02


def test_only_a_worker_that_does_not_connect_is_restarted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "waits.py").write_text("import time\ntime.sleep(60)\n")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))

    async def main() -> None:
        supervisor = Supervisor(lambda line: None)
        for name in ("worker-here", "worker-missing", "gateway-0"):
            supervisor.start(Launch(name=name, module="waits", config=""))
        before = {name: supervisor.pid(name) for name in supervisor.names}
        asked = 0

        async def state() -> dict[str, Any]:
            nonlocal asked
            asked += 1
            if asked % 3 == 0:
                raise TransportError("no controller")
            return {"workers": ["worker-here"]}

        task = asyncio.get_running_loop().create_task(
            end_unconnected_workers(supervisor, state, CHECK_INTERVAL_S)
        )
        while asked < CHECKS_MISSED:
            await asyncio.sleep(CHECK_INTERVAL_S)
            assert {name: supervisor.pid(name) for name in supervisor.names} == before
        async with asyncio.timeout(20):
            while supervisor.pid("worker-missing") in {None, before["worker-missing"]}:
                await asyncio.sleep(CHECK_INTERVAL_S)
        assert supervisor.pid("worker-here") == before["worker-here"]
        assert supervisor.pid("gateway-0") == before["gateway-0"]
        task.cancel()
        await supervisor.kill()

    uvloop.run(main())

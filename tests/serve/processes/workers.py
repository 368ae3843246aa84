"""The worker's process, started as the supervisor starts it."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import msgspec

from clockwork_serve.devices import DeviceConfig
from clockwork_serve.serve.processes.worker import WorkerConfig

DEVICE = DeviceConfig(device="gpu:0", kind="emulated", memory_bytes=1000, page_bytes=100)


def spawn(config: WorkerConfig) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        [
            sys.executable,
            "-m",
            "clockwork_serve.serve.processes.worker",
            msgspec.json.encode(config).decode(),
        ],
        stderr=subprocess.PIPE,
    )


@asynccontextmanager
async def worker(run_dir: Path, **settings: Any) -> AsyncIterator[subprocess.Popen[bytes]]:
    given: dict[str, Any] = {"devices": (DEVICE,), **settings}
    process = spawn(WorkerConfig(run_dir=str(run_dir), name="w0", **given))
    try:
        yield process
    finally:
        process.kill()
        process.communicate()

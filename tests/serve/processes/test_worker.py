"""A worker as a process of its own, on an emulated device: start, service, loss of its controller, end."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
from msgspec import structs

from clockwork_serve.config import Settings
from clockwork_serve.devices import DeviceConfig
from clockwork_serve.integrity import hash_of
from clockwork_serve.messages import (
    CodeAdded,
    CodeFile,
    CodeReady,
    Result,
    RetainWeights,
    Status,
    Tensors,
    WorkerJoined,
)
from clockwork_serve.serve.child import EXIT_CONFIG
from clockwork_serve.serve.shm import Region, memory_of
from clockwork_serve.serve.worker.host import WorkerConfig
from tests.serve.processes.workers import DEVICE, spawn, worker
from tests.serve.slots import answer, slot
from tests.serve.worker.lane_bench import over, timely
from tests.serve.worker.ordering import PATIENCE_S, Orders, orders
from tests.worker.actions import CODE, GPU, infer, load

X = np.ones((1, 4), np.float32)


async def ended(process: subprocess.Popen[bytes]) -> tuple[int, str]:
    """The exit status of a worker, and its log."""
    _, said = await asyncio.to_thread(process.communicate, timeout=PATIENCE_S)
    return process.returncode, said.decode()


async def ready(at: Orders, run_dir: Path, *, infer_ms: float = 1) -> None:
    """The worker joined and prepared an emulated code."""
    await at.linked()
    await at.hear(WorkerJoined)
    profile = json.dumps({"infer_ns": {"1": round(infer_ms * 1e6)}, "load_ns": 1000}).encode()
    (run_dir / "profile.json").write_bytes(profile)
    files = (CodeFile("profile.json", hash_of(profile)),)
    told = await at.ask(CodeAdded(code=structs.replace(CODE, path=str(run_dir), files=files)), CodeReady)
    assert told.ok, told.message


async def test_it_serves_survives_its_controller_and_ends_on_sigterm(tmp_path: Path) -> None:
    region = Region.create(4096)
    async with worker(tmp_path) as process:
        async with orders(tmp_path) as at:
            await ready(at, tmp_path)
            assert (await at.ask(timely(load(1, "a", 0)), Result)).status is Status.OK
            result = await at.ask(over(infer(2, "a", 0), slot(region, {"x": X})), Result)
            assert result.status is Status.OK, result
            np.testing.assert_array_equal(answer(region, result.outputs[0])["x"], np.zeros_like(X))
            assert result.lane_ns >= 1_000_000
        async with orders(tmp_path) as again:
            await ready(again, tmp_path)
            again.send(RetainWeights(device=GPU))
            assert (await again.ask(timely(infer(1, "a", 0)), Result)).status is Status.WEIGHTS_MISSING
            process.send_signal(signal.SIGINT)
            process.send_signal(signal.SIGTERM)
            status, said = await ended(process)
    assert status == 0, said
    assert "lost the controller" in said
    region.close()


async def test_running_actions_finish_after_sigterm(tmp_path: Path) -> None:
    region = Region.create(4096)
    async with worker(tmp_path) as process, orders(tmp_path) as at:
        await ready(at, tmp_path, infer_ms=3000)
        await at.ask(timely(load(1, "a", 0)), Result)
        at.send(
            over(infer(2, "a", 0), slot(region, {"x": X})), over(infer(3, "a", 0), slot(region, {"x": X}))
        )
        await asyncio.sleep(1)  # it runs
        process.send_signal(signal.SIGTERM)
        refused, finished = await at.hear(Result), await at.hear(Result)
        assert (refused.action_id, refused.status) == (3, Status.SHUTTING_DOWN)
        assert (finished.action_id, finished.status) == (2, Status.OK)
        assert (await ended(process))[0] == 0
    region.close()


async def test_outputs_in_its_memory_are_there_until_they_were_read(tmp_path: Path) -> None:
    region = Region.create(4096)
    async with worker(tmp_path) as process, orders(tmp_path) as at:
        await ready(at, tmp_path, infer_ms=3000)
        await at.ask(timely(load(1, "a", 0)), Result)
        made = slot(region, {"x": X}, room=1)
        at.send(over(infer(2, "a", 0), made))
        await asyncio.sleep(1)  # it runs
        process.send_signal(signal.SIGTERM)
        told = msgspec.msgpack.decode((await at.hear(Result)).outputs[0], type=Tensors)
        await asyncio.sleep(0.2)
        (ref,) = told.refs
        assert bytes(memory_of(told, region)[ref.offset : ref.offset + ref.nbytes]) == bytes(X.nbytes)
        made.take_back()
        assert (await ended(process))[0] == 0
    region.close()


COMPUTES = DeviceConfig(device="cpu:0", kind="cpu", memory_bytes=1 << 24, page_bytes=1 << 20)
devices_and_threads = pytest.mark.parametrize(
    ("devices", "threads"), [((DEVICE,), 1), ((COMPUTES,), 3), ((DEVICE, COMPUTES), 5)]
)
"""Only what takes time and computes nothing needs no thread for each lane."""


async def joins(at: Orders) -> None:
    await at.linked()
    await at.hear(WorkerJoined)


@devices_and_threads
async def test_real_time_is_granted_or_refused_with_what_it_needs(
    tmp_path: Path, devices: tuple[DeviceConfig, ...], threads: int
) -> None:
    settings = Settings(isolate="realtime")
    async with worker(tmp_path, settings=settings, devices=devices) as process, orders(tmp_path) as at:
        joined = asyncio.create_task(joins(at))
        refused = asyncio.create_task(asyncio.to_thread(process.wait))
        await asyncio.wait((joined, refused), return_when=asyncio.FIRST_COMPLETED)
        if joined.done():
            assert policies(process.pid) == [os.SCHED_FIFO] * threads
            process.kill()
            await refused
            return
        joined.cancel()
        assert process.returncode == EXIT_CONFIG
        assert "CAP_SYS_NICE, or an rtprio limit of 11 or more" in (await ended(process))[1]


def policies(pid: int) -> list[int]:
    """Of each of its threads."""
    return [os.sched_getscheduler(int(entry.name)) for entry in Path(f"/proc/{pid}/task").iterdir()]


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"devices": (structs.replace(DEVICE, kind="quantum"),)}, "kind: expected one of cpu, torch-cpu"),
        ({"devices": (structs.replace(DEVICE, kind="cpu", page_bytes=1),)}, "page_size: expected"),
    ],
)
async def test_a_setting_that_can_not_be_met_ends_it_with_a_reason(
    tmp_path: Path, settings: dict[str, Any], expected: str
) -> None:
    config = WorkerConfig(run_dir=str(tmp_path), name="w0", devices=(DEVICE,))
    process = spawn(structs.replace(config, **settings))
    try:
        status, said = await ended(process)
    finally:
        process.kill()
        process.wait()
    assert status == EXIT_CONFIG
    assert expected in said
    assert "Traceback" not in said

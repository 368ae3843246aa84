"""The controller's links and different devices: which codes a worker is sent, and devices' counters."""

from __future__ import annotations

from pathlib import Path

import msgspec

from clockwork_serve.messages import CodeRemoved, DeviceNumbers, Role, WorkerJoined
from clockwork_serve.telemetry.metrics import render
from tests.serve.controller.exchanges import World, code, joined, play
from tests.serve.links import until


def test_a_worker_is_sent_only_codes_that_one_of_its_devices_runs(tmp_path: Path) -> None:
    def on(worker: str, *backends: str) -> WorkerJoined:
        spec = msgspec.structs.replace(joined(worker, worker).devices[0], backends=backends)
        return WorkerJoined(worker=worker, devices=(spec,))

    async def story(world: World) -> None:
        supervisor = await world.supervisor(code("c1"))
        able, unable = await world.peer(Role.WORKER, "able"), await world.peer(Role.WORKER, "unable")
        able.send(on("able", "python", "onnx"))
        unable.send(on("unable", "torch"))
        await until(lambda: len(world.brain.seen) == 3)
        supervisor.send(code("c2"), CodeRemoved(code_id="c2"))
        await until(lambda: unable.frames and len(able.frames) == 3)
        assert able.frames == [code("c1"), code("c2"), CodeRemoved(code_id="c2")]
        assert unable.frames == [CodeRemoved(code_id="c2")]

    play(tmp_path, story)


def test_counters_of_devices_are_kept_for_metrics(tmp_path: Path) -> None:
    async def story(world: World) -> None:
        await world.supervisor()
        worker = await world.worker("w", "d")
        await until(lambda: world.brain.seen)
        worker.send(DeviceNumbers(device="d", numbers={"swaps": 3}))
        await until(lambda: world.recorder.counters.devices["d"].numbers)
        assert b'clockwork_device_number{device="d",number="swaps"} 3' in render(world.recorder.counters)
        worker.send(DeviceNumbers(device="other's", numbers={}))
        await until(lambda: worker.is_lost)

    play(tmp_path, story)

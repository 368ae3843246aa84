"""A worker's link to the controller, and the check of weights beside it."""

from __future__ import annotations

import asyncio
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from clockwork_serve.errors import DamageError, DeviceError, TransportError
from clockwork_serve.integrity import damage
from clockwork_serve.messages import (
    Beat,
    CodeAdded,
    CodeReady,
    DeviceNumbers,
    Drain,
    Infer,
    Result,
    RetainWeights,
    Role,
    Status,
    Weights,
    WorkerJoined,
)
from clockwork_serve.serve.shm import Region
from clockwork_serve.serve.worker import host as worker_host
from clockwork_serve.serve.worker.host import Verifier, WorkerConfig, WorkerHost
from tests.serve.slots import answer, slot
from tests.serve.worker.lane_bench import Toy, over, timely
from tests.serve.worker.ordering import PATIENCE_S, Orders, orders
from tests.worker.actions import CODE, GPU, SPEC, infer, load

# A worker's link: it joins a controller as soon as there is one, and the next one after a failover.


X = np.ones((1, 4), np.float32)
ROOT = Path(__file__).parents[3]


class Running:
    """A worker in this process's own loop."""

    def __init__(self, run_dir: Path, toy: Toy) -> None:
        self.stop = asyncio.Event()
        self.host = WorkerHost(WorkerConfig(run_dir=str(run_dir), name="w0", devices=()), {GPU: toy})
        self.task = asyncio.get_running_loop().create_task(self.host.run(self.stop))

    async def end(self) -> None:
        self.stop.set()
        await self.task


async def joined(at: Orders) -> None:
    await at.linked()
    assert await at.hear(WorkerJoined) == WorkerJoined(worker="w0", devices=(SPEC,))


async def prepared(at: Orders) -> None:
    assert await at.ask(CodeAdded(code=CODE), CodeReady) == CodeReady(device=GPU, code_id="net")


async def test_it_joins_prepares_loads_and_answers(tmp_path: Path) -> None:
    region = Region.create(4096)
    async with orders(tmp_path) as at:
        worker = Running(tmp_path, Toy())
        await joined(at)
        await prepared(at)
        assert (await at.ask(timely(load(1, "a", 0)), Result)).status is Status.OK
        result = await at.ask(over(infer(2, "a", 0), slot(region, {"x": X})), Result)
        assert result.status is Status.OK
        np.testing.assert_array_equal(answer(region, result.outputs[0])["y"], X * 2)
        await worker.end()
        await asyncio.wait_for(at.lost.wait(), PATIENCE_S)
    region.close()


class AtOnce:
    """Brings inputs in no time; what it is given it posts, and passes results on when told to."""

    idle = True

    def __init__(self, host: WorkerHost) -> None:
        self.host = host
        self.held: list[Result] = []
        self.renewed = 0

    def bring(self, action: Infer) -> bool:
        self.host.post(action)
        return True

    def answer(self, result: Result) -> Result | None:
        if result.action_id != 2:
            return result
        self.held.append(result)
        return None

    def renew(self) -> None:
        self.renewed += 1

    def close(self) -> None:
        self.held.clear()


async def test_tensors_from_elsewhere_are_brought_in_order_and_results_wait_for_them(tmp_path: Path) -> None:
    async def _until(condition: Callable[[], object]) -> None:
        while not condition():
            await asyncio.sleep(0.01)

    region = Region.create(4096)
    async with orders(tmp_path) as at:
        worker = Running(tmp_path, Toy())
        tensors = worker.host.tensors = AtOnce(worker.host)
        await joined(at)
        await prepared(at)
        infers = [over(infer(number, "a", 0), slot(region, {"x": X})) for number in (2, 3)]
        at.send(timely(load(1, "a", 0)), *infers)
        found = [await at.hear(Result) for _ in (1, 3)]
        assert {(one.action_id, one.status) for one in found} == {(1, Status.OK), (3, Status.OK)}
        (held,) = tensors.held
        worker.host.send(held)
        assert (await at.hear(Result)).status is Status.OK, "it was posted after the LOAD"
        at.close()
        await asyncio.wait_for(_until(lambda: tensors.renewed), PATIENCE_S)
        await worker.end()
    region.close()


async def test_counters_of_a_device_are_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(worker_host, "REPORT_INTERVAL_S", 0.02)

    class Counting(Toy):
        def counters(self) -> dict[str, int]:
            return {"swaps": len(self.log)}

    async with orders(tmp_path) as at:
        worker = Running(tmp_path, Counting())
        await joined(at)
        for _ in range(2):
            assert await at.hear(DeviceNumbers) == DeviceNumbers(device=GPU, numbers={"swaps": 0})
        await worker.end()


async def test_memory_of_a_dead_gateway_is_unmapped_without_another_request(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(worker_host, "PRUNE_INTERVAL_S", 0.02)
    region = Region.create(4096)
    async with orders(tmp_path) as at:
        worker = Running(tmp_path, Toy())
        await joined(at)
        await prepared(at)
        assert (await at.ask(timely(load(1, "a", 0)), Result)).status is Status.OK
        result = await at.ask(over(infer(2, "a", 0), slot(region, {"x": X})), Result)
        assert result.status is Status.OK
        await asyncio.sleep(0.1)
        assert len(worker.host.executors.regions) == 1
        region.close()
        while len(worker.host.executors.regions):  # `run` ends in time if this does not
            await asyncio.sleep(0.01)
        await worker.end()


async def test_it_joins_no_controller_that_was_deposed(tmp_path: Path) -> None:
    worker, at = Running(tmp_path, Toy()), Orders(tmp_path)
    for epoch in (2, 1, 3):
        at.epoch = epoch
        await at.open()
        if epoch == 1:
            await asyncio.sleep(0.1)
            assert at.heard.empty()
        else:
            assert (await at.hear(WorkerJoined)).worker == "w0"
        at.close()
    await worker.end()


async def test_it_waits_until_a_controller_is_up(tmp_path: Path) -> None:
    worker = Running(tmp_path, Toy())
    await asyncio.sleep(0.12)
    async with orders(tmp_path) as at:
        await joined(at)
        await worker.end()


async def test_it_can_be_stopped_while_it_waits(tmp_path: Path) -> None:
    worker = Running(tmp_path, Toy())
    await asyncio.sleep(0.01)
    await worker.end()


async def test_the_next_controller_finds_weights_and_codes_and_may_drop_weights(tmp_path: Path) -> None:
    toy = Toy()
    at = Orders(tmp_path)
    await at.open()
    worker = Running(tmp_path, toy)
    await joined(at)
    await prepared(at)
    await at.ask(timely(load(1, "a", 0, version=1)), Result)
    await at.ask(timely(load(2, "b", 2, version=2)), Result)
    at.close()
    again = Orders(tmp_path)
    await again.open()
    await again.linked()
    (state,) = (await again.hear(WorkerJoined)).states
    assert state.codes == ("net",)
    assert [(one.model, one.ready) for one in state.weights] == [("a", True), ("b", True)]
    again.send(RetainWeights(device=GPU, versions=(2,)))
    await prepared(again)
    assert (await again.ask(timely(infer(11, "a", 0)), Result)).status is Status.WEIGHTS_MISSING
    assert (await again.ask(timely(infer(12, "b", 2, version=2)), Result)).status is not (
        Status.WEIGHTS_MISSING
    )
    assert (await again.ask(timely(load(13, "c", 0, version=13)), Result)).status is Status.OK
    assert toy.log[:4] == ["prepare net", "load a", "load b", "unload a"]
    await worker.end()
    again.close()


async def test_a_running_action_of_a_dead_controller_is_adopted_by_the_next(tmp_path: Path) -> None:
    toy, running, release = Toy(), threading.Event(), threading.Event()
    at = Orders(tmp_path)
    await at.open()
    worker = Running(tmp_path, toy)
    await joined(at)
    await prepared(at)

    def until_released(what: str) -> None:
        running.set()
        assert release.wait(PATIENCE_S)

    toy.act = until_released
    at.send(timely(load(1, "a", 0)), timely(load(2, "b", 2)))
    assert await asyncio.to_thread(running.wait, PATIENCE_S)
    at.close()
    again = Orders(tmp_path)
    await again.open()
    await again.linked()
    (state,) = (await again.hear(WorkerJoined)).states
    assert [one.action_id for one in state.running] == [1]
    assert [(one.model, one.ready) for one in state.weights] == [("a", False)]
    toy.act = lambda what: None
    release.set()
    result = await again.hear(Result)
    assert (result.action_id, result.status) == (1, Status.OK)
    await prepared(again)
    assert (await again.ask(timely(load(11, "c", 4)), Result)).status is Status.OK
    assert again.heard.empty()
    await worker.end()
    again.close()


async def test_stop_refuses_queued_actions(tmp_path: Path) -> None:
    async with orders(tmp_path) as at:
        worker = Running(tmp_path, Toy())
        await joined(at)
        await prepared(at)
        at.send(timely(load(1, "a", 0), after_ms=9000))
        await at.ask(timely(load(2, "b", 2)), Result)
        await worker.end()
        result = await at.hear(Result)
        assert (result.action_id, result.status) == (1, Status.SHUTTING_DOWN)


async def test_it_returns_beats_at_once(tmp_path: Path) -> None:
    async with orders(tmp_path) as at:
        worker = Running(tmp_path, Toy())
        await joined(at)
        assert await at.ask(Beat(), Beat) == Beat()
        await worker.end()


async def test_an_unexpected_frame_is_logged_and_ignored(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async with orders(tmp_path) as at:
        worker = Running(tmp_path, Toy())
        await joined(at)
        at.send(Drain())
        await prepared(at)
        await worker.end()
    assert "the controller sent a Drain, which no worker expects" in caplog.text


async def test_another_process_where_the_controller_should_be_is_an_error(tmp_path: Path) -> None:
    at = Orders(tmp_path, Role.GATEWAY)
    await at.open()
    worker = Running(tmp_path, Toy())
    with pytest.raises(TransportError, match="expected a controller there, found gateway"):
        await worker.task
    worker.host.executors.close()
    at.close()


# Weights are verified in the background, each once, and damage is reported.


class VerifyingDevice:
    """A device that can verify: it finds ``bad`` weights damaged, and cannot read ``odd`` ones."""

    def __init__(self) -> None:
        self.seen: list[str] = []

    def verify(self, weights: Weights) -> None:
        self.seen.append(weights.weights_id)
        if weights.weights_id == "bad":
            raise damage("weights", "bad", weights.path, "other content")
        if weights.weights_id == "odd":
            raise DeviceError("it cannot be read")


def blob(name: str) -> Weights:
    return Weights(weights_id=name, path=f"/cache/{name}.bin", size=1)


def test_all_are_verified_and_damage_is_reported() -> None:
    device, found = VerifyingDevice(), list[DamageError]()
    verifier = Verifier([device], found.append)  # type: ignore[list-item]
    for name in ("good", "odd", "bad", "last"):
        verifier.add(blob(name))
    verifier.join()
    assert sorted(device.seen) == ["bad", "good", "last", "odd"]
    assert [(error.what, error.name) for error in found] == [("weights", "bad")]


IDLE = """
import os, threading
from clockwork_serve.serve.worker.host import Verifier
from tests.serve.worker.test_host import VerifyingDevice, blob
device = VerifyingDevice()
verifier = Verifier([device], print)
verifier.add(blob("w"))
verifier.join()
print(device.seen)
"""


def test_who_may_not_choose_a_scheduling_policy_verifies_under_the_one_there_is() -> None:
    # In a name space where nobody may leave the idle policy.
    command = ["unshare", "--map-root-user", "chrt", "--idle", "0", sys.executable, "-c"]
    if shutil.which("unshare") is None or subprocess.run([*command, ""], check=False).returncode:
        pytest.skip("needs name spaces")
    done = subprocess.run([*command, IDLE], capture_output=True, text=True, timeout=60, check=False, cwd=ROOT)
    assert (done.stdout, done.stderr) == ("['w']\n", "")


@pytest.mark.parametrize("path", ["/a/folder", ""])
def test_weights_that_are_no_file_of_their_own_are_not_verified(path: str) -> None:
    device = VerifyingDevice()
    verifier = Verifier([device], lambda error: None)  # type: ignore[list-item]
    verifier.add(Weights(weights_id="w", path=path, size=1))
    verifier.join()
    assert device.seen == []


def test_after_close_nothing_is_verified() -> None:
    device = VerifyingDevice()
    verifier = Verifier([device], lambda error: None)  # type: ignore[list-item]
    verifier.close()
    verifier.add(blob("late"))
    verifier.join()
    assert device.seen == []

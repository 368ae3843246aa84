"""A device that its process has lost: the process logs why and ends."""

from __future__ import annotations

import gc
import subprocess
import sys
import weakref

import pytest

from clockwork_serve.errors import DeviceGone
from clockwork_serve.messages import CodeAdded, CodeReady, Status
from clockwork_serve.serve.child import EXIT_BROKEN
from clockwork_serve.serve.shm import Region
from clockwork_serve.serve.worker.lanes import LaneExecutors
from clockwork_serve.worker import Worker
from tests.serve.slots import slot
from tests.serve.worker.lane_bench import Bench, Toy, X, bench, over, timely
from tests.worker.actions import CODE, GPU, SPEC, infer, load


@pytest.mark.parametrize("what", ["prepare", "load"])
def test_whichever_call_a_device_is_lost_in_ends_the_process(what: str) -> None:
    toy = Toy()
    gone: list[DeviceGone] = []

    def act(said: str) -> None:
        if said.startswith(what):
            raise DeviceGone("gpu:0 is lost after model a: CUDA error: unspecified launch failure")

    toy.act = act
    at = Bench(toy)
    at.executors.on_device_gone = gone.append
    at.executors.start()
    at.post(CodeAdded(code=CODE))
    ready = at.next()
    assert isinstance(ready, CodeReady)
    if what == "load":
        assert at.ask(timely(load(1, "a", 0))).status is Status.DEVICE_FAULT
    assert [str(error) for error in gone] == [
        "gpu:0 is lost after model a: CUDA error: unspecified launch failure"
    ]
    assert at.executors.close(30)


def test_the_process_ends_with_a_line_that_says_why_and_what_comes() -> None:
    source = (
        "from clockwork_serve.errors import DeviceGone; "
        "from clockwork_serve.serve.worker.lanes import end_process_without_device; "
        "end_process_without_device(DeviceGone('cuda:0 is lost after model a/1: CUDA error'))"
    )
    ended = subprocess.run(
        [sys.executable, "-c", source], capture_output=True, text=True, timeout=60, check=False
    )
    assert ended.returncode == EXIT_BROKEN
    said = "cuda:0 is lost after model a/1: CUDA error; this worker ends, to be started again"
    assert said in ended.stderr


def test_by_default_it_ends_the_process() -> None:
    executors = LaneExecutors(Worker((SPEC,)), {GPU: Toy()}, lambda: None)
    assert executors.on_device_gone.__name__ == "end_process_without_device"


def test_the_memory_of_a_gateway_that_died_is_let_go_without_the_collector() -> None:
    region = Region.create(65536)
    with bench(Toy()) as at:
        at.loaded()
        made = slot(region, {"x": X})
        view = weakref.ref(at.executors.regions.view(made.tensors.region))
        gc.disable()
        try:
            assert at.ask(over(infer(2, "a", 0), made)).status is Status.OK
            assert view() is not None
            region.close()
            assert at.ask(over(infer(3, "a", 0), made)).status is Status.INPUT_GONE
            assert view() is None
        finally:
            gc.enable()

"""A thread per lane: what it executes and how it ends."""

from __future__ import annotations

import asyncio
import gc
import logging
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager

import msgspec
import numpy as np
import pytest
from msgspec import structs

from clockwork_serve.errors import DeviceError, DeviceGone, ModelError
from clockwork_serve.messages import CodeAdded, CodeReady, CodeRemoved, Lane, Status, Tensors, Window
from clockwork_serve.serve.child import EXIT_BROKEN
from clockwork_serve.serve.shm import Region, memory_of
from clockwork_serve.serve.worker.lanes import LaneExecutors
from clockwork_serve.units import ms
from clockwork_serve.worker import ControllerLost, Stop, Worker
from tests.serve.slots import Slot, answer, slot
from tests.serve.worker.lane_bench import TIMEOUT_S, Bench, TimedToy, Toy, X, bench, over, timely
from tests.worker.actions import CODE, GPU, SPEC, infer, load, start, unload

# Lanes: threads that execute what the brain starts, report results, and survive any failure of a device.


@pytest.fixture
def toy() -> Toy:
    return Toy()


@pytest.fixture
def region() -> Iterator[Region]:
    made = Region.create(65536)
    yield made
    made.close()


def test_a_request_is_computed(toy: Toy, region: Region) -> None:
    with bench(toy) as at:
        at.loaded()
        result = at.ask(over(infer(2, "a", 0), slot(region, {"x": X})))
    assert result.status is Status.OK
    (encoded,) = result.outputs
    np.testing.assert_array_equal(answer(region, encoded)["y"], X * 2)
    assert (result.input_ns, result.run_ns, result.output_ns) == (1, 2, 3)
    assert result.started_ns <= toy.started_ns[2] <= result.ended_ns
    assert toy.log == ["prepare net", "load a", "infer a 1"]


def test_a_lane_records_its_action_until_it_is_done(toy: Toy, region: Region) -> None:
    noted: list[tuple[int, ...]] = []
    with bench(toy) as at:
        words = [lane._record._words for lane in at.executors._all()]
        toy.act = lambda what: noted.append(tuple([word for note in words for word in note[:3]]))
        at.loaded()
        at.ask(over(infer(2, "a", 0), slot(region, {"x": X})))
        toy.act = lambda what: None
        assert [tuple(note[:3]) for note in words] == [(0, 900, 0), (0, 2, 0)]
    assert noted == [(900, 0, 0, 0, 0, 0), (0, 900, 0, 2, 0, 0)]


def test_each_call_of_a_batch_gets_its_own_answer(toy: Toy, region: Region) -> None:
    other = Region.create(4096)
    with bench(toy) as at:
        at.loaded()
        result = at.ask(over(infer(2, "a", 0), slot(region, {"x": X}), slot(other, {"x": X + 1})))
    first, second = result.outputs
    np.testing.assert_array_equal(answer(region, first)["y"], X * 2)
    np.testing.assert_array_equal(answer(other, second)["y"], (X + 1) * 2)
    other.close()


def test_each_lane_is_a_thread(toy: Toy, region: Region) -> None:
    with bench(toy) as at:
        at.loaded()
        at.ask(over(infer(2, "a", 0), slot(region, {"x": X})))
        at.ask(timely(unload(3, "a", 0)))
    assert toy.threads == dict.fromkeys(("prepare", "load", "unload"), f"{GPU} load") | {
        "infer": f"{GPU} exec"
    }


def test_lanes_run_concurrently(toy: Toy, region: Region) -> None:
    copying = threading.Event()
    with bench(toy) as at:
        at.loaded()
        toy.act = lambda what: (
            copying.set() if what == "load b" else None if what != "infer a 1" else _wait(copying)
        )
        at.post(over(infer(2, "a", 0), slot(region, {"x": X})), timely(load(3, "b", 2)))
        assert {at.result().action_id, at.result().action_id} == {2, 3}


def test_nothing_starts_before_its_window(toy: Toy) -> None:
    with bench(toy) as at:
        soon = timely(load(1, "a", 0), after_ms=30)
        result = at.ask(soon)
    assert result.status is Status.OK
    assert toy.started_ns[1] >= soon.window.earliest_ns


def test_an_earlier_action_wakes_a_sleeping_lane(toy: Toy) -> None:
    with bench(toy) as at:
        at.post(timely(load(1, "a", 0), after_ms=9000))
        assert at.ask(timely(load(2, "b", 2), after_ms=20)).action_id == 2
        at.post(Stop())
        assert at.result().status is Status.SHUTTING_DOWN


def test_a_lane_starts_its_next_action_by_itself(toy: Toy, region: Region) -> None:
    with bench(toy) as at:
        at.loaded()
        for action_id in range(10, 30):
            at.executors.post(over(infer(action_id, "a", 0), slot(region, {"x": X})))
        assert [at.result().action_id for _ in range(20)] == list(range(10, 30))


def test_a_notification_is_repeated_only_after_answers_were_taken(toy: Toy) -> None:
    with bench(toy) as at:
        for action_id in range(5):
            at.executors.post(timely(load(action_id, "a", 2 * action_id)))
        while len(at.executors._answers) < 5:
            time.sleep(0.001)
        told = 0
        while at.notified.acquire(timeout=0.05):
            told += 1
        assert told == 1
        assert len(at.executors.take_answers()) == 5


def test_a_window_that_closes_while_the_thread_wakes_is_too_late(toy: Toy) -> None:
    with bench(toy) as at:
        work = structs.replace(load(1, "a", 0), window=Window(0, 1))
        done = at.executors._lanes[GPU][Lane.LOAD]._start(start(work))
    assert done is not None
    assert done.status is Status.TOO_LATE
    assert "after its window closed" in done.message
    assert "load a" not in toy.log


@pytest.mark.parametrize(
    ("error", "status", "message"),
    [
        (ModelError("row 3 is not finite"), Status.MODEL_RAISED, "row 3 is not finite"),
        (DeviceError("bus error"), Status.DEVICE_FAULT, "bus error"),
        (ZeroDivisionError("by zero"), Status.DEVICE_FAULT, "ZeroDivisionError: by zero"),
        (ValueError("no \ud800\nluck"), Status.DEVICE_FAULT, r"ValueError: no \ud800 luck"),
        (ModelError("op \ud800"), Status.MODEL_RAISED, r"op \ud800"),
        (ModelError("x" * 5000), Status.MODEL_RAISED, "x" * 997 + "..."),
        (KeyboardInterrupt(), Status.DEVICE_FAULT, "KeyboardInterrupt"),
        (SystemExit(3), Status.DEVICE_FAULT, "SystemExit: 3"),
    ],
)
def test_an_error_fails_its_action_and_nothing_else(
    toy: Toy,
    region: Region,
    caplog: pytest.LogCaptureFixture,
    error: BaseException,
    status: Status,
    message: str,
) -> None:
    with bench(toy) as at, caplog.at_level(logging.ERROR):
        at.loaded()
        toy.act = _raiser(error)
        failed = at.ask(over(infer(2, "a", 0), slot(region, {"x": X})))
        toy.act = lambda what: None
        assert at.ask(over(infer(3, "a", 0), slot(region, {"x": X}))).status is Status.OK
    assert (failed.status, failed.message, failed.outputs) == (status, message, ())
    logged = [record for record in caplog.records if record.levelno >= logging.ERROR]
    assert len(logged) == (status is Status.DEVICE_FAULT)
    if isinstance(error, ZeroDivisionError):
        assert logged[0].exc_info is not None
        assert logged[0].request_ids == "r0"  # type: ignore[attr-defined]


def test_a_load_that_fails_leaves_its_pages_empty(toy: Toy, region: Region) -> None:
    with bench(toy) as at:
        toy.act = _raiser(DeviceError("the blob is gone"))
        assert at.ask(timely(load(1, "a", 0))).status is Status.DEVICE_FAULT
        toy.act = lambda what: None
        assert at.ask(over(infer(2, "a", 0), slot(region, {"x": X}))).status is Status.WEIGHTS_MISSING
        at.loaded("b")


def test_a_code_that_can_not_be_prepared_says_why_and_the_others_go_on(toy: Toy) -> None:
    with bench(toy) as at:
        toy.act = _raiser(DeviceError("no such file"))
        at.post(CodeAdded(code=structs.replace(CODE, code_id="bad")))
        assert at.next() == CodeReady(device=GPU, code_id="bad", ok=False, message="no such file")
        toy.act = lambda what: None
        at.loaded()


def test_a_code_that_raises_system_exit_ends_no_lane(toy: Toy) -> None:
    with bench(toy) as at:
        toy.act = _raiser(KeyboardInterrupt("\ud800"))
        at.post(CodeAdded(code=structs.replace(CODE, code_id="bad")))
        expected = CodeReady(device=GPU, code_id="bad", ok=False, message=r"KeyboardInterrupt: \ud800")
        assert at.next() == expected
        toy.act = lambda what: None
        at.loaded()


def test_code_changes_are_reported_once_all_codes_are_prepared(toy: Toy) -> None:
    called = threading.Event()
    with bench(toy, on_codes_changed=called.set) as at:
        assert called.wait(TIMEOUT_S)
        called.clear()
        at.loaded()
        assert not called.is_set()
        at.post(CodeAdded(code=structs.replace(CODE, code_id="more")))
        at.next()
        assert called.wait(TIMEOUT_S)


def test_a_code_that_is_added_between_loads_is_prepared(toy: Toy) -> None:
    toy.act = lambda what: time.sleep(0.02 * what.startswith("load"))  # so long that the lane rests for 2 ms
    with bench(toy) as at:
        for count in range(5):
            assert at.ask(timely(load(1000 + count, f"m{count}", 0))).status is Status.OK
            at.post(CodeAdded(code=structs.replace(CODE, code_id=f"c{count}")))
            assert at.next() == CodeReady(device=GPU, code_id=f"c{count}")
            assert at.ask(timely(unload(2000 + count, f"m{count}", 0))).status is Status.OK


def test_a_broken_brain_ends_the_process() -> None:
    source = (
        "from clockwork_serve.serve.worker.lanes import end_broken_process; "
        "end_broken_process(AssertionError('two at once'))"
    )
    ended = subprocess.run(
        [sys.executable, "-c", source], capture_output=True, text=True, timeout=TIMEOUT_S, check=False
    )
    assert ended.returncode == EXIT_BROKEN
    assert "two at once" in ended.stderr


def test_a_removed_code_is_retired(toy: Toy) -> None:
    with bench(toy) as at:
        at.post(CodeRemoved(code_id="net"))
        end_s = time.monotonic() + TIMEOUT_S
        while toy.log[-1] != "retire net" and time.monotonic() < end_s:
            time.sleep(0.001)  # in one turn with what follows nothing would change
        at.post(CodeAdded(code=CODE))
        assert at.next() == CodeReady(device=GPU, code_id="net")
    assert toy.log == ["prepare net", "retire net", "prepare net"]


def test_inputs_withdrawn_before_the_run_are_gone(toy: Toy, region: Region) -> None:
    with bench(toy) as at:
        at.loaded()
        made = slot(region, {"x": X})
        action = over(infer(2, "a", 0), made)
        made.take_back()
        assert at.ask(action).status is Status.INPUT_GONE
    assert "infer a 1" not in toy.log


def test_inputs_withdrawn_while_the_action_waits_are_gone(toy: Toy, region: Region) -> None:
    with bench(toy) as at:
        at.loaded()
        made = slot(region, {"x": X})
        at.post(
            structs.replace(over(infer(2, "a", 0), made), window=timely(infer(2, "a", 0), after_ms=50).window)
        )
        made.take_back()
        assert at.result().status is Status.INPUT_GONE
    assert "infer a 1" not in toy.log


def test_outputs_into_a_slot_that_was_reused_are_dropped(toy: Toy, region: Region) -> None:
    with bench(toy) as at:
        at.loaded()
        made = slot(region, {"x": X})
        toy.act = lambda what: made.take_back()
        result = at.ask(over(infer(2, "a", 0), made))
    assert (result.status, result.outputs) == (Status.INPUT_GONE, ())


LARGE = np.arange(1024, dtype=np.float32).reshape(1, 1024)


def test_outputs_that_outgrow_their_room_are_in_memory_of_the_worker_until_the_slot_is_free(
    region: Region,
) -> None:
    with bench(Toy(structs.replace(SPEC, io_bytes=2 * LARGE.nbytes))) as at:
        at.loaded()
        first, second, third = (slot(region, {"x": LARGE}, room=64) for _ in range(3))
        before = bytes(region.buffer)
        result = at.ask(over(infer(2, "a", 0), first, second))
        assert result.status is Status.OK, result.message
        for made, encoded in zip((first, second), result.outputs, strict=True):
            told = msgspec.msgpack.decode(encoded, type=Tensors)
            (ref,) = told.refs
            found = bytes(memory_of(told, region)[ref.offset : ref.offset + ref.nbytes])
            assert found == (LARGE * 2).tobytes()
            end = made.tensors.output_offset
            assert bytes(region.buffer[end : end + 64]) == before[end : end + 64]

        refused = at.ask(over(infer(3, "a", 0), third))
        assert refused.status is Status.MODEL_RAISED
        assert "expected at most 0 bytes, as are left of 8192; found 4096" in refused.message
        first.take_back()
        assert at.ask(over(infer(4, "a", 0), third)).status is Status.OK


def test_references_outside_the_region_never_reach_the_device(toy: Toy, region: Region) -> None:
    with bench(toy) as at:
        at.loaded()
        made = slot(region, {"x": X})
        wild = structs.replace(made.tensors, output_bytes=1 << 40)
        result = at.ask(over(infer(2, "a", 0), Slot(region, wild)))
    assert result.status is Status.BAD_ACTION
    assert "output: 1099511627776 bytes" in result.message
    assert "infer a 1" not in toy.log


def test_nothing_is_kept_of_an_infer_that_ended(toy: Toy, region: Region) -> None:
    with bench(toy) as at:
        at.loaded()
        at.ask(over(infer(2, "a", 0), slot(region, {"x": X})))
        at.ask(over(infer(3, "nobody", 4), slot(region, {"x": X})))
        at.post(timely(infer(4, "a", 0), after_ms=9000))
        assert list(at.executors._opened) == [4]
        at.post(ControllerLost())
        assert at.result().status is Status.SHUTTING_DOWN
        assert not at.executors._opened


def test_stop_finishes_what_runs(toy: Toy, region: Region) -> None:
    release, running = threading.Event(), threading.Event()
    with bench(toy) as at:
        at.loaded()

        def until_released(what: str) -> None:
            running.set()
            _wait(release)

        toy.act = until_released
        at.post(
            over(infer(2, "a", 0), slot(region, {"x": X})), over(infer(3, "a", 0), slot(region, {"x": X}))
        )
        _wait(running)
        assert at.ask(Stop()).action_id == 3
        assert not at.executors.idle
        release.set()
        assert at.result().status is Status.OK
        assert at.executors.idle


def test_every_device_has_lanes_of_its_own(region: Region) -> None:
    first, second = Toy(), Toy(structs.replace(SPEC, device="gpu:1"))
    both = threading.Barrier(2)
    with bench(first, second) as at:
        at.loaded()
        at.loaded("a", device="gpu:1")
        first.act = second.act = lambda what: _meet(both)
        at.post(
            over(infer(2, "a", 0), slot(region, {"x": X})),
            over(infer(3, "a", 0, device="gpu:1"), slot(region, {"x": X})),
        )
        assert {at.result().device, at.result().device} == {GPU, "gpu:1"}


def test_an_error_of_the_brain_is_reported(toy: Toy) -> None:
    made = Bench(toy)
    made.executors.start()
    made.executors.worker._devices[GPU].lanes.clear()
    deadline = time.monotonic() + TIMEOUT_S
    while not made.broken and time.monotonic() < deadline:
        with made.executors.lock:
            made.executors._lanes[GPU][Lane.LOAD].wake()
        time.sleep(0.001)
    assert isinstance(made.broken[0], (KeyError, AssertionError))
    made.executors.close(0.1)


def _raiser(error: BaseException) -> Callable[[str], None]:
    def act(what: str) -> None:
        raise error

    return act


def _wait(event: threading.Event) -> None:
    assert event.wait(TIMEOUT_S)


def _meet(barrier: threading.Barrier) -> None:
    barrier.wait(TIMEOUT_S)


# A device that its process has lost: the process logs why and ends.


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


# Lanes of devices that only take time: the loop's thread begins actions, and its timer ends them.


@asynccontextmanager
async def on_loop(*devices: Toy, changed: Callable[[], None] = lambda: None) -> AsyncIterator[Bench]:
    """Beside the lanes, on their loop."""
    at = Bench(*devices, on_codes_changed=changed)
    at.executors.start()
    at.post(CodeAdded(code=CODE))
    async with asyncio.timeout(TIMEOUT_S):
        assert [type(await at.later()) for _ in devices] == [CodeReady] * len(devices)
        yield at
    assert at.executors.close(TIMEOUT_S)


async def test_devices_that_only_take_time_have_no_threads(region: Region) -> None:
    before = threading.active_count()
    async with on_loop(TimedToy()) as at:
        assert at.executors.on_loop
        assert threading.active_count() == before
        at.post(timely(load(1, "a", 0)))
        loaded = await at.result_later()
        at.post(over(infer(2, "a", 0), slot(region, {"x": X})))
        ran = await at.result_later()
        for result, takes_ns in ((loaded, ms(1)), (ran, ms(2))):
            assert result.status is Status.OK
            assert result.ended_ns - result.started_ns >= takes_ns
        np.testing.assert_array_equal(answer(region, ran.outputs[0])["y"], X[:1, :1] * 0)
        assert (ran.input_ns, ran.run_ns + ran.output_ns) == (0, ran.ended_ns - ran.started_ns)


def test_one_device_that_computes_gives_threads_to_all(region: Region) -> None:
    timed = TimedToy(structs.replace(SPEC, device="gpu:1"))
    with bench(Toy(), timed) as at:
        assert not at.executors.on_loop
        at.loaded(device="gpu:1")


async def test_timed_lanes_are_under_way_at_once_and_each_keeps_its_order(region: Region) -> None:
    async with on_loop(TimedToy(), TimedToy(structs.replace(SPEC, device="gpu:1"))) as at:
        for device in (GPU, "gpu:1"):
            at.post(timely(load(1 + (device != GPU), "a", 0, device=device)))
        assert {(await at.result_later()).action_id for _ in range(2)} == {1, 2}
        asked = [
            over(infer(3 + at_, "a", 0, device=(GPU, "gpu:1")[at_ % 2]), slot(region, {"x": X}))
            for at_ in range(4)
        ]
        at.post(*asked)
        found = {each.action_id: each for each in [await at.result_later() for _ in asked]}
        assert max(found[3].started_ns, found[4].started_ns) < min(found[3].ended_ns, found[4].ended_ns)
        assert found[3].ended_ns <= found[5].started_ns
        assert found[4].ended_ns <= found[6].started_ns


async def test_a_timed_lane_starts_nothing_before_its_window_and_an_earlier_action_goes_first() -> None:
    async with on_loop(TimedToy()) as at:
        later = timely(load(1, "a", 0), after_ms=60)
        at.post(later)
        sooner = timely(load(2, "b", 2), after_ms=20)
        at.post(sooner)
        first, second = await at.result_later(), await at.result_later()
        assert (first.action_id, second.action_id) == (2, 1)
        assert first.started_ns >= sooner.window.earliest_ns
        assert second.started_ns >= later.window.earliest_ns


async def test_whatever_a_timed_device_raises_is_the_result_of_that_action(region: Region) -> None:
    toy = TimedToy()
    async with on_loop(toy) as at:
        at.post(timely(load(1, "a", 0)))
        assert (await at.result_later()).status is Status.OK
        toy.act = _raiser(DeviceError("bus error"))
        at.post(*[over(infer(number, "a", 0), slot(region, {"x": X})) for number in (2, 3)])
        assert [(await at.result_later()).status for _ in range(2)] == [Status.DEVICE_FAULT] * 2
        toy.act = lambda what: None
        at.post(over(infer(4, "a", 0), slot(region, {"x": X})))
        assert (await at.result_later()).status is Status.OK


async def test_a_slot_that_is_reused_while_a_timed_device_is_at_it_gets_no_outputs(region: Region) -> None:
    async with on_loop(TimedToy()) as at:
        at.post(timely(load(1, "a", 0)))
        await at.result_later()
        mine = slot(region, {"x": X})
        at.post(over(infer(2, "a", 0), mine))
        mine.take_back()
        assert (await at.result_later()).status is Status.INPUT_GONE


async def test_timed_lanes_report_code_changes_once_all_are_at_rest() -> None:
    changes: list[int] = []
    toys = [TimedToy(), TimedToy(structs.replace(SPEC, device="gpu:1"))]
    async with on_loop(*toys, changed=lambda: changes.append(sum(len(toy.log) for toy in toys))):
        while not changes:
            await asyncio.sleep(0.001)
    assert changes == [2]


async def test_a_stop_lets_timed_actions_end() -> None:
    async with on_loop(TimedToy()) as at:
        at.post(timely(load(1, "a", 0)), timely(load(2, "b", 2)))
        at.post(Stop())
        found = [await at.result_later() for _ in range(2)]
        assert {each.action_id: each.status for each in found} == {1: Status.OK, 2: Status.SHUTTING_DOWN}
        assert at.executors.idle

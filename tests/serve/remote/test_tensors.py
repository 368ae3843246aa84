"""Tensors between a gateway and a worker on another machine: they arrive as they left, and nowhere else."""

from __future__ import annotations

import asyncio
import tempfile
import time
from pathlib import Path
from random import Random
from typing import Any

import pytest
import uvloop
from hypothesis import given, settings
from hypothesis import strategies as st
from msgspec import structs

from clockwork_serve.messages import Result, Status, TensorRef
from clockwork_serve.serve.remote.link import PIECE_BYTES
from clockwork_serve.serve.remote.tensor_link import stretches
from clockwork_serve.serve.remote.tensors import LaneTiming, Transfer
from clockwork_serve.units import MIB, align, ms
from tests.serve.links import until
from tests.serve.proxy import proxy
from tests.serve.remote.tensor_ends import LASTED_NS, REGION, Gateway, Worker, answered, ends, over, seen
from tests.worker.actions import GPU

LARGE = 20 * MIB
SIZES = st.sampled_from([0, 1, 63, 64, 65, 1000, PIECE_BYTES, PIECE_BYTES + 1, 300_000])
CALLS = st.lists(
    st.tuples(st.lists(SIZES, max_size=3), st.lists(SIZES, min_size=1, max_size=3)), min_size=1, max_size=3
)


async def there_and_back(calls: list[tuple[list[int], list[int]]], dice: Random, folder: Path) -> None:
    async with ends(folder) as (gateway, worker):
        other = Gateway(folder, elsewhere=True)
        for action_id in (1, 2):  # the second by connections that are there
            inputs = [[dice.randbytes(size) for size in sizes] for sizes, _ in calls]
            outputs = [[dice.randbytes(size) for size in sizes] for _, sizes in calls]
            slots = []
            for blobs, found in zip(inputs, outputs, strict=True):
                room = sum(align(len(blob)) for blob in found) * dice.randint(0, 2) // 2
                slots.append(dice.choice([gateway, other]).ask(*blobs, room=room))
            action = await worker.post(over(action_id, *slots))
            opened = worker.open(action)
            assert seen(opened) == inputs
            worker.end(action, opened, outputs)
            del opened
            result = await worker.result()
            assert result.status is Status.OK, result
            assert [answered(slot, told) for slot, told in zip(slots, result.outputs, strict=True)] == outputs
            assert worker.tensors.idle
            assert worker.tensors.used_bytes == 0
            assert not worker.spill.free_unused()
            for slot in slots:
                (gateway if slot.region is gateway.slots.region else other).slots.free(slot)
            assert gateway.slots.used_bytes == other.slots.used_bytes == 0
        other.close()


@settings(max_examples=25, deadline=None)
@given(CALLS, st.integers(0, 2**32))
def test_tensors_arrive_as_they_left_there_and_back(
    calls: list[tuple[list[int], list[int]]], seed: int
) -> None:
    with tempfile.TemporaryDirectory() as folder:
        uvloop.run(there_and_back(calls, Random(seed), Path(folder)))


async def test_a_worker_of_the_server_s_host_brings_only_what_it_cannot_map(tmp_path: Path) -> None:
    async with ends(tmp_path, server="") as (gateway, worker):
        far = Gateway(tmp_path, elsewhere=True)
        near = gateway.ask(b"near", room=64)
        assert not worker.tensors.bring(over(1, near)), "its lane maps it"
        away = far.ask(b"away", room=64)
        action = await worker.post(over(2, near, away))
        assert action.calls[0].tensors == near.encoded
        opened = worker.open(action)
        assert seen(opened) == [[b"near"], [b"away"]]
        worker.end(action, opened, [[b"y" * 64], [b"z" * 64]])
        result = await worker.result()
        assert [answered(slot, told) for slot, told in zip((near, away), result.outputs, strict=True)] == [
            [b"y" * 64],
            [b"z" * 64],
        ]
        far.close()


async def test_the_way_of_tensors_is_told_beside_the_time_on_the_lane(tmp_path: Path) -> None:
    async with ends(tmp_path, server="") as (_, worker):
        far = Gateway(tmp_path, elsewhere=True)
        with proxy(far.port) as between:
            far.slots.server = f"127.0.0.1:{between.port}"
            between.delay(0.05)
            for action_id in (1, 2):
                sent_ns = time.monotonic_ns()
                action = await worker.post(over(action_id, far.ask(bytes(1000), room=64)))
                arrived_ns = time.monotonic_ns()
                worker.end(action, worker.open(action), [[b"y"]])
                result = await worker.result()
            assert ms(50) <= result.transfer_in_ns <= arrived_ns - sent_ns
            assert result.transfer_out_ns >= ms(50)
            assert result.lane_ns >= ms(50), "no more inputs come in that time than this"
            assert result.ended_ns + result.transfer_out_ns <= time.monotonic_ns()
            assert (result.input_ns, result.run_ns) == (result.lane_ns - LASTED_NS, LASTED_NS)
        far.close()


# How long an INFER counts on its lane, whose inputs come over a network.

KIND = ("code", 1, 1000)


def ran(started_ms: float, ended_ms: float) -> Result:
    started_ns, ended_ns = ms(started_ms), ms(ended_ms)
    return Result(
        action_id=1, device=GPU, status=Status.OK, started_ns=started_ns, ended_ns=ended_ns,
        run_ns=ended_ns - started_ns,
    )  # fmt: skip


def test_inputs_that_come_while_another_runs_take_no_time_of_the_lane() -> None:
    timing = LaneTiming()
    timing.inputs_arrived(KIND, asked_ns=ms(100), now_ns=ms(103))
    found = timing.ended(ran(104, 108), KIND, ms(3), ms(110))
    assert (found.started_ns, found.ended_ns, found.input_ns) == (ms(104), ms(108), 0)
    assert (found.transfer_in_ns, found.transfer_out_ns) == (ms(3), ms(2))


def test_inputs_that_take_longer_than_the_execution_bound_the_rate() -> None:
    timing = LaneTiming()
    for asked_ms in (0, 100):
        timing.inputs_arrived(KIND, asked_ns=ms(asked_ms), now_ns=ms(asked_ms + 6))
    found = timing.ended(ran(106, 108), KIND, ms(6), ms(110))
    assert (found.started_ns, found.ended_ns) == (ms(102), ms(108))
    assert (found.input_ns, found.run_ns, found.output_ns) == (ms(4), ms(2), 0)
    other = timing.ended(ran(106, 108), ("code", 2, 1000), ms(6), ms(110))
    assert other.lane_ns == ms(2), "nothing is known of another kind"


def test_inputs_that_were_stopped_once_on_their_way_change_nothing() -> None:
    timing = LaneTiming()
    for at, took_ms in enumerate((3, 3, 5000, 3, 3)):
        timing.inputs_arrived(KIND, asked_ns=ms(10_000 * at), now_ns=ms(10_000 * at + took_ms))
        ended = timing.ended(ran(60_000, 60_001), KIND, ms(took_ms), ms(60_001))
        assert ended.lane_ns == (ms(3) if at else ms(1)), "of the first of a kind nothing is known"


def test_no_infer_counts_as_begun_before_its_own_inputs_began_to_come() -> None:
    timing = LaneTiming()
    for asked_ms in (0, 1000, 2000):
        timing.inputs_arrived(KIND, asked_ns=ms(asked_ms), now_ns=ms(asked_ms + 380))
    took_ns = timing.inputs_arrived(KIND, asked_ns=ms(3000), now_ns=ms(3005))
    assert timing.ended(ran(3005, 3006), KIND, took_ns, ms(3006)).started_ns == ms(3001)


def test_inputs_take_no_time_while_those_before_them_come() -> None:
    timing = LaneTiming()
    timing.inputs_arrived(KIND, asked_ns=ms(100), now_ns=ms(106))
    for at in range(1, 100):
        timing.inputs_arrived(KIND, asked_ns=ms(100), now_ns=ms(106 + 2 * at))
    assert timing.ended(ran(300, 301), KIND, ms(2), ms(301)).lane_ns == pytest.approx(ms(2), rel=0.001)


async def test_a_small_tensor_does_not_wait_behind_large_ones(tmp_path: Path) -> None:
    async with ends(tmp_path) as (gateway, worker):
        with proxy(gateway.port) as between:
            gateway.slots.server = f"127.0.0.1:{between.port}"
            await worker.post(over(1, gateway.ask(b"first")))
            between.delay(0.002)  # so that not all is sent at once
            large = gateway.ask(bytes(LARGE))
            small = gateway.ask(b"small")
            assert worker.tensors.bring(over(2, large))
            assert worker.tensors.bring(over(3, small))
            await until(lambda: len(worker.posted) == 2)
            assert [action.action_id for action in worker.posted] == [3, 2]


async def test_what_is_too_large_is_refused_at_once_and_what_has_no_room_now_when_its_window_closes(
    tmp_path: Path,
) -> None:
    async with ends(tmp_path) as (gateway, worker):
        assert worker.tensors.bring(over(1, gateway.ask(room=33 * MIB)))
        slot = gateway.ask(b"x", room=64)
        slot.tensors = structs.replace(slot.tensors, output_bytes=REGION)
        assert worker.tensors.bring(over(2, slot))
        refused = worker.results.pop()
        assert (refused.action_id, refused.status) == (2, Status.MODEL_RAISED)
        assert f"expected at most {REGION} bytes" in refused.message
        slot.tensors = structs.replace(slot.tensors, output_bytes=33 * MIB)
        crowded = over(3, slot, for_ms=100)
        assert worker.tensors.bring(crowded)
        assert not worker.results
        refused = await worker.result()
        assert (refused.action_id, refused.status) == (3, Status.TOO_LATE)
        assert refused.started_ns > crowded.window.latest_ns
        assert [action.action_id for action in worker.posted] == [1]


async def test_outputs_that_find_no_room_in_their_gateway_fail_their_infer(tmp_path: Path) -> None:
    async with ends(tmp_path) as (gateway, worker):
        first, second = gateway.ask(b"x", room=64), gateway.ask(room=63 * MIB)
        action = await worker.post(over(1, first))
        worker.end(action, worker.open(action), [[bytes(2 * MIB)]])
        result = await worker.result()
        assert (result.status, result.outputs) == (Status.MODEL_RAISED, ())
        assert "gateway_memory" in result.message
        assert (worker.tensors.used_bytes, second.tensors.output_bytes) == (0, 63 * MIB)


async def test_inputs_of_a_slot_that_is_freed_on_the_way_come_no_further(tmp_path: Path) -> None:
    async with ends(tmp_path) as (gateway, worker):
        with proxy(gateway.port) as between:
            gateway.slots.server = f"127.0.0.1:{between.port}"
            between.delay(0.002)
            slot = gateway.ask(b"x" * LARGE)
            assert worker.tensors.bring(over(1, slot))
            await until(lambda: any(one.upto for one in transfers(worker)))
            gateway.slots.free(slot)
            result = await worker.result()
            assert (result.status, worker.posted) == (Status.INPUT_GONE, [])
            assert worker.tensors.used_bytes == 0


async def test_outputs_for_a_slot_that_is_freed_on_the_way_are_written_nowhere(tmp_path: Path) -> None:
    async with ends(tmp_path) as (gateway, worker):
        with proxy(gateway.port) as between:
            gateway.slots.server = f"127.0.0.1:{between.port}"
            between.delay(0.002)
            slot = gateway.ask(room=LARGE)
            action = await worker.post(over(1, slot))
            worker.end(action, worker.open(action), [[b"y" * LARGE]])
            await until(lambda: any(one.upto for one in writings(gateway)))
            gateway.slots.free(slot)
            after = gateway.ask(bytes(LARGE))  # where that was
            assert (await worker.result()).status is Status.INPUT_GONE
            memory, (x,) = gateway.slots.region.buffer, after.tensors.refs
            assert not any(memory[x.offset : x.offset + x.nbytes]), "it is another's"


def transfers(worker: Worker) -> list[Transfer]:
    return [one for source in worker.tensors._sources.values() for one in source._transfers.values()]


def writings(gateway: Gateway) -> list[Any]:
    return [one for each in gateway.server._workers.values() for one in each.writing.values()]


async def test_all_is_forgotten_with_the_link_and_nothing_is_written_to_what_is_free(tmp_path: Path) -> None:
    async with ends(tmp_path) as (gateway, worker):
        with proxy(gateway.port) as between:
            gateway.slots.server = f"127.0.0.1:{between.port}"
            await worker.post(over(1, gateway.ask(b"first")))
            between.cut(there=False)
            assert worker.tensors.bring(over(2, gateway.ask(b"x" * 1000)))
            await asyncio.sleep(0.1)
            worker.tensors.renew()
            assert worker.tensors.idle
            between.heal()
            action = await worker.post(over(3, gateway.ask(b"third")))
            assert action.action_id == 3
            assert seen(worker.open(action)) == [[b"third"]]


async def test_an_infer_whose_window_closed_is_posted_and_its_memory_is_not_touched_any_more(
    tmp_path: Path,
) -> None:
    async with ends(tmp_path) as (gateway, worker):
        with proxy(gateway.port) as between:
            gateway.slots.server = f"127.0.0.1:{between.port}"
            await worker.post(over(1, gateway.ask(b"first")))
            between.cut(there=False)
            late = over(2, gateway.ask(b"x" * 1000), for_ms=50)
            action = await worker.post(late)
            assert time.monotonic_ns() > action.window.latest_ns
            (call,) = worker.open(action)
            between.heal()
            await asyncio.sleep(0.1)
            assert not call.inputs["x0"].any()


async def test_malformed_tensors_are_for_the_lane_to_refuse(tmp_path: Path) -> None:
    async with ends(tmp_path) as (gateway, worker):
        slot = gateway.ask(b"x")
        for server in ("", "10.0.0.1", "nowhere:x", "a b:7"):
            slot.tensors = structs.replace(slot.tensors, server=server)
            assert not worker.tensors.bring(over(1, slot)), server
        call = structs.replace(over(1, slot).calls[0], tensors=b"\xc1")
        assert not worker.tensors.bring(structs.replace(over(1, slot), calls=(call,)))


async def test_a_gateway_that_cannot_be_reached_is_tried_until_the_window_closes(tmp_path: Path) -> None:
    async with ends(tmp_path) as (gateway, worker):
        slot = gateway.ask(b"x")
        gateway.server.close()
        action = await worker.post(over(1, slot, for_ms=200))
        assert time.monotonic_ns() > action.window.latest_ns
        await until(lambda: not worker.tensors._sources)
        again = Gateway(tmp_path)
        assert seen(worker.open(await worker.post(over(2, again.ask(b"again"))))) == [[b"again"]]
        again.close()


async def test_results_of_others_and_refusals_pass(tmp_path: Path) -> None:
    async with ends(tmp_path) as (gateway, worker):
        other = Result(action_id=99, device=GPU, status=Status.OK, started_ns=1, ended_ns=2)
        assert worker.tensors.answer(other) == other
        action = await worker.post(over(1, gateway.ask(b"x")))
        refused = structs.replace(other, action_id=action.action_id, status=Status.WEIGHTS_MISSING)
        assert worker.tensors.answer(refused) == refused
        assert (worker.tensors.idle, worker.tensors.used_bytes) == (True, 0)


def ref(offset: int, nbytes: int) -> TensorRef:
    return TensorRef(name="x", datatype="UINT8", shape=(nbytes,), offset=offset, nbytes=nbytes)


@pytest.mark.parametrize(
    ("refs", "targets", "found"),
    [
        ([(64, 70), (192, 5)], [(0, 70), (128, 5)], [(64, 0, 133)]),
        ([(64, 70), (1024, 5)], [(0, 70), (128, 5)], [(64, 0, 70), (1024, 128, 5)]),
        ([(192, 5), (64, 70)], [(0, 5), (64, 70)], [(192, 0, 5), (64, 64, 70)]),
        ([(64, 0), (64, 5)], [(0, 0), (0, 5)], [(64, 0, 5)]),
        ([(0, 500), (500, 100), (100, 7)], [(0, 500), (500, 100), (100, 7)], [(0, 0, 600), (100, 100, 7)]),
    ],
)
def test_tensors_side_by_side_are_one_stretch(
    refs: list[tuple[int, int]], targets: list[tuple[int, int]], found: list[tuple[int, int, int]]
) -> None:
    assert stretches([ref(*each) for each in refs], [ref(*each) for each in targets]) == found

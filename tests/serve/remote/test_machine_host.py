"""A far worker as a process: what it does with actions that come late, and when nobody speaks to it."""

from __future__ import annotations

import asyncio
import time
from pathlib import Path
from typing import Any

import msgspec

from clockwork_serve.messages import (
    CodeAdded,
    CodeReady,
    MachineHello,
    Result,
    Status,
    WorkerJoined,
)
from tests.serve.links import until
from tests.serve.remote.far_orders import X, far_orders, timely
from tests.worker.actions import CODE, load


def statuses(found: dict[int, Result]) -> dict[int, Status]:
    return {action_id: result.status for action_id, result in found.items()}


async def test_an_infer_waits_for_its_inputs_within_its_window(tmp_path: Path) -> None:
    async with far_orders(tmp_path, silence_s=10) as at:
        at.gateways.cut()
        at.send(at.asking(2, 10_000))
        await asyncio.sleep(0.1)
        assert at.heard.empty()
        at.gateways.heal()
        result = await at.hear(Result)
        assert result.status is Status.OK, result
        assert at.outputs(result) == [bytes(X.nbytes)], "they are there before the result"

        at.send(at.asking(5, 10_000, room=1))
        result = await at.hear(Result)
        assert (result.status, at.outputs(result)) == (Status.OK, [bytes(X.nbytes)])
        assert at.asked[5].tensors.output_bytes == X.nbytes, "it needed more room"

        at.gateways.cut()
        at.send(at.asking(3, 100))
        result = await at.hear(Result)
        assert (result.action_id, result.status) == (3, Status.TOO_LATE), "they never came"
        at.gateways.heal()
        at.send(at.asking(4, 10_000))
        assert statuses(await at.results(1)) == {4: Status.OK}, "what comes after the end harms nobody"


async def test_a_slot_that_is_another_request_s_is_neither_read_nor_written(tmp_path: Path) -> None:
    async with far_orders(tmp_path, silence_s=10, infer_ms=2000) as at:
        action = at.asking(2, 10_000)
        at.slots.free(at.asked[2])
        at.send(action)
        found = await at.hear(Result)
        assert (found.status, found.lane_ns) == (Status.INPUT_GONE, 0)
        assert "its tensors were withdrawn" in found.message

        at.send(at.asking(3, 10_000))
        await asyncio.sleep(0.1)  # it runs
        at.slots.free(at.asked[3])
        before = bytes(at.slots.region.buffer)
        assert statuses(await at.results(1)) == {3: Status.INPUT_GONE}
        assert bytes(at.slots.region.buffer) == before


async def test_tensors_whose_connection_breaks_come_by_the_next_one(tmp_path: Path) -> None:
    async with far_orders(tmp_path, silence_s=10, infer_ms=200) as at:
        at.gateways.cut()
        at.send(at.asking(2, 10_000))
        await asyncio.sleep(0.1)
        at.gateways.reset()
        at.gateways.heal()
        await asyncio.sleep(0.3)
        at.gateways.reset()
        result = await at.hear(Result)
        assert (result.status, at.outputs(result)) == (Status.OK, [bytes(X.nbytes)])
        assert not at.lost, "the link to the server is another"


async def test_a_gateway_that_says_nothing_is_given_up_and_its_request_ends(tmp_path: Path) -> None:
    async with far_orders(tmp_path, silence_s=2, infer_ms=2000) as at:
        at.send(at.asking(2, 10_000))
        await asyncio.sleep(0.1)
        at.gateways.cut(there=False)
        result = await at.hear(Result)
        assert result.status is Status.INPUT_GONE
        assert "its gateway took no outputs" in result.message


async def test_actions_that_the_network_held_back_are_stale_and_not_executed(tmp_path: Path) -> None:
    async with far_orders(tmp_path, silence_s=20) as at:
        at.proxy.cut(there=False, back=True)
        at.send(at.asking(2, 200), at.asking(3, 200), timely(load(4, "b", 4), 200))
        await asyncio.sleep(0.6)
        at.proxy.heal()
        at.send(at.asking(5, 10_000))
        found = await at.results(4)
        late = Status.TOO_LATE
        assert statuses(found) == {2: late, 3: late, 4: late, 5: Status.OK}
        assert all(found[each].lane_ns == 0 for each in (2, 3, 4)), "none of them had its lane"
        assert not at.lost, "the link itself lived"


async def test_a_worker_that_nobody_speaks_to_stops_at_the_end_of_its_windows(tmp_path: Path) -> None:
    """The link is cut and nobody is told: what waits may start in its window, and not after it."""
    async with far_orders(tmp_path, silence_s=20, infer_ms=300) as at:
        at.send(at.asking(2, 10_000), at.asking(3, 100), at.asking(4, 10_000))
        await asyncio.sleep(0.05)
        at.proxy.cut()
        await asyncio.sleep(1.0)
        at.proxy.heal()
        found = await at.results(3)
        assert statuses(found) == {2: Status.OK, 3: Status.TOO_LATE, 4: Status.OK}
        assert found[4].started_ns >= found[2].ended_ns


async def test_after_a_lost_link_it_joins_again_with_empty_memory_and_answers_nothing_old(
    tmp_path: Path,
) -> None:
    """Though the first INFER still runs then: a result that the server does not expect would end the link."""
    async with far_orders(tmp_path, silence_s=2, infer_ms=5000) as at:
        at.send(at.asking(2, 10_000), at.asking(3, 10_000))
        await asyncio.sleep(0.05)
        at.proxy.cut()
        await until(lambda: at.lost)
        await asyncio.sleep(0.2)
        at.proxy.heal()
        began_s = time.monotonic()
        frame: Any = None
        while not isinstance(frame, MachineHello):
            frame = await asyncio.wait_for(at.heard.get(), 60)
            assert not isinstance(frame, Result), "it was asked on a link that is gone"
        await at.hear(WorkerJoined)
        assert time.monotonic() - began_s < 10
        at.send(CodeAdded(code=CODE))
        assert (await at.hear(CodeReady)).ok, "it kept the code, and has it in its cache"
        at.send(at.asking(4, 10_000))
        assert statuses(await at.results(1)) == {4: Status.WEIGHTS_MISSING}
        at.send(timely(load(5, "a", 0), 10_000))
        assert statuses(await at.results(1)) == {5: Status.OK}
        at.send(at.asking(6, 10_000))
        assert statuses(await at.results(1)) == {6: Status.OK}


async def test_a_code_that_is_not_in_the_store_is_refused_with_its_reason(tmp_path: Path) -> None:
    async with far_orders(tmp_path, silence_s=10) as at:
        other = msgspec.structs.replace(CODE, code_id="other")
        at.send(CodeAdded(code=other))
        told = await at.hear(CodeReady)
        assert not told.ok
        assert f"store: expected it in {tmp_path}/store" in told.message

"""Devices whose tensors come over a network are used as well as those that have them beside them."""

from __future__ import annotations

from random import Random

import pytest
from msgspec import structs

from clockwork_serve.controller import ControllerConfig
from clockwork_serve.messages import Infer, Load, Outcome, Result, Status, Unload
from clockwork_serve.serve.remote.tensors import LaneTiming
from clockwork_serve.units import ms
from harness import records
from tests.controller.honest import World, device


class FarWorld(World):
    """Inputs and outputs have a network in each direction, and take as long as one by the name of dice says.

    Those of one INFER follow those of the one before it; a worker reports as a real one does.
    """

    def __init__(self, in_ms: float, out_ms: float, dice: Random) -> None:
        super().__init__(ControllerConfig())
        self._transfer_ms, self.dice = {"in": in_ms, "out": out_ms}, dice
        self._free_ns: dict[tuple[str, str], int] = {}
        self._timing: dict[str, LaneTiming] = {}

    def stop(self, device: str, seconds: float) -> None:
        """Nothing comes to a device for a while."""
        self._free_ns[device, "in"] = self.now_ns + ms(1000 * seconds)

    def _transferred_ns(self, device: str, way: str, from_ns: int) -> int:
        mean_ms = self._transfer_ms[way]
        begin_ns = max(from_ns, self._free_ns.get((device, way), 0))
        end_ns = begin_ns + ms(mean_ms / 2 + self.dice.expovariate(2 / mean_ms))
        self._free_ns[device, way] = end_ns
        return end_ns

    def _execute(self, action: Load | Unload | Infer) -> None:
        if not isinstance(action, Infer):
            super()._execute(action)
            return
        kind, asked_ns = (action.code_id, action.batch, 1000), self.now_ns + self.network_ns
        arrived_ns = self._transferred_ns(action.device, "in", asked_ns)
        lane = self.lanes[action.device, "exec"]
        start_ns = max(arrived_ns, lane.free_ns)
        if start_ns > action.window.latest_ns:
            self.reply(action, Status.TOO_LATE, start_ns, start_ns)
            return
        end_ns = lane.free_ns = start_ns + self.durations[action.code_id].infer_ns[action.batch]
        self.reply(action, Status.OK, start_ns, end_ns)
        _, action_id, result = self._inbox.pop()
        assert isinstance(result, Result)
        there_ns = self._transferred_ns(action.device, "out", end_ns)
        timing = self._timing.setdefault(action.device, LaneTiming())
        took_ns = timing.inputs_arrived(kind, asked_ns, arrived_ns)
        result = timing.ended(structs.replace(result, run_ns=end_ns - start_ns), kind, took_ns, there_ns)
        self._inbox.append((there_ns + self.network_ns, action_id, result))


def far_world(infer_ms: float, in_ms: float, out_ms: float) -> FarWorld:
    """Two far devices that serve one model."""
    world = FarWorld(in_ms, out_ms, Random(7))
    world.serve(
        records.model("m", sizes=(1,)), code=records.code(sizes=(1,)),
        times=records.profile("c", {1: ms(infer_ms)}, load_ns=ms(8)),
    )  # fmt: skip
    world.join(device("d0"), device("d1"))
    world.ask("m", 1000, until_ms=200)
    return world


def share_in_time(world: FarWorld, rate: int, seconds: int) -> float:
    """Of requests that come by chance for so long, with an SLO of 100 ms."""
    asked = []
    for _ in range(seconds * rate):
        world.run(world.dice.expovariate(rate) * 1000)
        asked.append((world.request("m", slo_ms=100), world.now_ns + ms(100)))
    world.run()
    in_time = [
        world.answers[request_id].outcome is Outcome.OK and world.answered_ns[request_id] <= deadline_ns
        for request_id, deadline_ns in asked
    ]
    return sum(in_time) / len(in_time)


@pytest.mark.parametrize(
    ("rate", "infer_ms", "in_ms", "out_ms"),
    [(400, 4, 3, 2), (200, 8, 3, 2), (200, 8, 6, 5), (100, 4, 8, 2)],
    ids=["shorter than an execution", "much shorter", "there and back longer", "longer, at less load"],
)
def test_at_four_fifths_of_the_load_nearly_all_are_in_time(
    rate: int, infer_ms: float, in_ms: float, out_ms: float
) -> None:
    """Two devices; without any way at least 99 % are in time. The last asks for less."""
    world = far_world(infer_ms, in_ms, out_ms)
    assert share_in_time(world, rate, 2) >= 0.98


def test_a_network_that_stood_still_is_used_again() -> None:
    world = far_world(4, 3, 2)
    share_in_time(world, 400, 1)
    world.stop("d0", 3)
    share_in_time(world, 400, 6)
    assert share_in_time(world, 400, 2) >= 0.98

"""Requests are feasible where a plain search over all devices says so, now and as time passes."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from clockwork_serve.controller.admission import Admission
from clockwork_serve.controller.belief import Belief
from clockwork_serve.controller.cluster import Queue
from clockwork_serve.controller.feasibility import LOADERS_MAX, Feasibility
from clockwork_serve.controller.lanes import Watch
from clockwork_serve.controller.promises import Promises
from clockwork_serve.controller.quarantine import Quarantine
from clockwork_serve.controller.timers import NEVER_NS
from clockwork_serve.messages import Answer, Infer, Load
from clockwork_serve.units import ms
from tests.controller.clusters import ask, belief, place, serve
from tests.controller.honest import serving

INFER_NS, LOAD_NS = ms(10), ms(8)
times_ms = st.sampled_from([0, 1, 7.5, 8, 10, 20, 33])
lane = st.tuples(times_ms, times_ms, st.booleans())
lanes = st.sampled_from([1, 2, 3, 4, 9, 9]).flatmap(
    lambda count: st.lists(lane, min_size=count, max_size=count)
)


def soonest_ns(made: Belief, queue: Queue, now_ns: int) -> int:
    """When the first of all devices could end a request, and how long that takes on it from a free lane."""
    ends = []
    for one in made.devices.values():
        begin_ns = one.exec.available_ns(now_ns)
        if one.name not in queue.model.residencies:
            begin_ns = max(begin_ns, one.load.available_ns(now_ns) + LOAD_NS)
        ends.append(begin_ns + INFER_NS)
    return min(ends)


def pass_time(made: Belief, layer: Feasibility, now_ns: int) -> None:
    """As ``decide`` does, without a policy."""
    while made.timers.next_ns() <= now_ns:
        timer = made.timers.due(now_ns)
        if isinstance(timer, Watch):
            layer.check_watch(timer, now_ns)
    Admission(made, layer, Quarantine(made), Promises(made)).recheck(now_ns)


@settings(max_examples=300)
@given(lanes, st.floats(5, 70), st.lists(st.floats(0, 15), min_size=3, max_size=6))
def test_a_request_is_refused_when_and_only_when_no_device_can_end_it_in_time(
    work: list[tuple[float, float, bool]], slo_ms: float, pauses_ms: list[float]
) -> None:
    made = belief(*[f"d{at}" for at in range(len(work))])
    layer, served = Feasibility(made), serve(made, "a")
    for one, (exec_ms, load_ms, has) in zip(made.devices.values(), work, strict=True):
        layer.device_joined(one)
        if has and len(work) <= LOADERS_MAX:
            place(made, served, one.name)
        for lane, lasts_ms in ((one.exec, exec_ms), (one.load, load_ms)):
            if lasts_ms and (lane is one.load or len(work) <= LOADERS_MAX):
                lane.send(made.next_id(), ms(lasts_ms), ms(10))
    made.effects.clear()
    now_ns, queue = ms(10), ask(made, served, slo_ms)
    (due_ns,) = queue.dues
    for pause_ms in (0, *pauses_ms):
        now_ns += ms(pause_ms)
        end_ns = soonest_ns(made, queue, now_ns)
        pass_time(made, layer, now_ns)
        assert bool(made.effects) == (end_ns > due_ns)
        layer.check()
        if made.effects:
            (answer,) = made.effects
            assert isinstance(answer, Answer)
            assert answer.retry_after_ns in (0, end_ns - due_ns)
            return
        assert now_ns < made.timers.next_ns() < NEVER_NS, "it is looked at again before hope ends"


def test_every_change_of_a_load_lane_is_counted() -> None:
    made = belief("d0")
    layer, served = Feasibility(made), serve(made, "a")
    layer.device_joined(made.devices["d0"])
    before = made.load_moves
    residency = place(made, served, "d0")
    layer.load_ended(made.devices["d0"], ms(10))
    made.send_unload(residency, ms(10))
    assert made.load_moves == before + 3


def test_the_layer_hears_that_a_load_ended() -> None:
    world = serving("a")
    world.request("a", slo_ms=500)
    before = world.controller._belief.load_moves
    world.run(until_ms=9)
    assert [type(one) for one in world.actions] == [Load, Infer]
    assert world.controller._belief.load_moves == before + 1

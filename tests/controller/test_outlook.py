"""What an explanation is told of each device: when a request could end there, and what goes before it."""

from __future__ import annotations

from clockwork_serve.controller.outlook import Ahead
from clockwork_serve.messages import Request
from clockwork_serve.units import ms
from tests.controller.honest import World, model, profile, serving


def world() -> World:
    """Model ``a`` is loaded on d0; ``b`` is on no device, ``huge`` fits none."""
    made = serving(
        "a", "b", model("huge", mib=100), times=profile(b1_ms=10, load_ms=8), policy="paper", max_batch=1
    )
    made.ask("a", slo_ms=5000)
    return made


def asking(made: World, name: str, slo_ms: float = 100) -> Request:
    return Request(
        request_id="asking", gateway="g", model=f"{name}/1", arrival_ns=made.now_ns,
        deadline_ns=made.now_ns + ms(slo_ms),
    )  # fmt: skip


def test_an_idle_device_with_the_weights_could_begin_at_once() -> None:
    made = world()

    (found,) = made.controller.outlooks(asking(made, "a"), made.now_ns)

    assert (found.device, found.weights, found.sent, found.waiting) == ("d0", "ready", (), ())
    assert found.ready_ns == made.now_ns
    assert found.end_ns == found.free_ns + found.infer_ns
    assert ms(10) <= found.end_ns - made.now_ns <= ms(11)


def test_what_was_sent_and_what_waits_go_before() -> None:
    made = world()
    for _ in range(4):
        made.request("a", slo_ms=5000)

    (found,) = made.controller.outlooks(asking(made, "a", slo_ms=6000), made.now_ns)
    (before,) = made.controller.outlooks(asking(made, "a", slo_ms=50), made.now_ns)

    sent = sum(one.requests for one in found.sent)
    assert sent >= 1
    assert found.waiting == (Ahead("a/1", 4 - sent),)
    assert found.before_ns >= (4 - sent) * ms(9)
    assert found.end_ns == found.free_ns + found.before_ns + found.infer_ns
    assert before.waiting == ()  # they are due later


def test_absent_weights_have_to_be_loaded_and_some_fit_nowhere() -> None:
    made = world()

    (absent,) = made.controller.outlooks(asking(made, "b"), made.now_ns)
    (huge,) = made.controller.outlooks(asking(made, "huge"), made.now_ns)

    assert absent.weights == "absent"
    assert absent.load_ns == ms(8)
    assert absent.end_ns == absent.ready_ns + absent.infer_ns
    assert huge.weights == "its weights are larger than the device's memory"
    assert huge.end_ns == 0
    assert made.controller.outlooks(asking(made, "unknown"), made.now_ns) == []


def test_workers_are_told_as_they_are_believed() -> None:
    made = world()

    (worker,) = made.controller.workers()

    (state,) = worker.states
    assert [one.model for one in worker.states[0].weights] == ["a/1"]
    assert state.codes == tuple(made.controller.codes)
    assert made.controller.in_flight() == []
    assert made.controller.model("a/1") is not None
    assert made.controller.seed_ns("c", worker.devices[0].kind, 1) == ms(10)


def test_pages_that_are_added_are_used() -> None:
    made = world()
    before = made.controller.snapshot()["devices"][0]["pages"]

    made.controller.add_pages(4)

    made.controller.check()
    assert made.controller.snapshot()["devices"][0]["pages"] == before + 4

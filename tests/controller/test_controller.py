"""The controller by example: one thing happens, one thing is decided."""

from __future__ import annotations

import msgspec
import pytest

from clockwork_serve.messages import (
    Cancel,
    Drain,
    GatewayLost,
    Infer,
    Load,
    ModelRemoved,
    Outcome,
    Readiness,
    Reason,
    Result,
    Status,
    Unload,
)
from clockwork_serve.units import ms
from tests.controller.honest import World, device, model, profile, serving


def served(world: World, *ids: str) -> list[Outcome]:
    return [world.answers[request_id].outcome for request_id in ids]


def test_a_cold_request_is_loaded_run_and_answered() -> None:
    world = serving("a")
    request_id = world.ask("a", slo_ms=100)
    assert served(world, request_id) == [Outcome.OK]
    assert [type(action) for action in world.actions] == [Load, Infer]
    assert world.answers[request_id].cold


def test_a_warm_request_needs_no_load() -> None:
    world = serving("a")
    world.ask("a", slo_ms=100)
    request_id = world.ask("a", slo_ms=15)
    assert served(world, request_id) == [Outcome.OK]
    assert not world.answers[request_id].cold


def test_a_hopeless_request_is_refused_at_once_with_the_reason() -> None:
    world = serving("a")
    request_id = world.request("a", slo_ms=9)
    answer = world.answers[request_id]
    assert (answer.outcome, answer.reason) == (Outcome.REJECTED, Reason.WOULD_MISS_DEADLINE)
    assert answer.retry_after_ns == 0, "no wait can make a 10 ms model answer in 9 ms"


def test_without_the_rejecting_layer_a_hopeless_request_hears_at_its_deadline() -> None:
    world = serving("a", reject_infeasible=False)
    request_id = world.request("a", slo_ms=9)
    arrived_ns = world.now_ns
    world.run()
    assert served(world, request_id) == [Outcome.EXPIRED]
    assert world.answered_ns[request_id] == arrived_ns + ms(9)


def test_a_request_is_refused_when_the_device_is_given_away() -> None:
    world = serving("a", "b", times=profile(b1_ms=100))
    world.request("a", slo_ms=500)
    world.request("b", slo_ms=500)
    world.run()
    first, second = world.request("a", slo_ms=120), world.request("b", slo_ms=121)
    assert world.answers[second].reason is Reason.WOULD_MISS_DEADLINE
    assert world.answers[second].retry_after_ns > ms(60)
    world.run()
    assert served(world, first, second) == [Outcome.OK, Outcome.REJECTED]


def test_requests_that_wait_are_run_as_one_batch() -> None:
    world = serving("a")
    ids = [world.request("a", slo_ms=200) for _ in range(9)]
    world.run()
    assert served(world, *ids) == [Outcome.OK] * 9
    assert sorted(action.batch for action in world.actions if isinstance(action, Infer)) == [1, 8]


def test_a_batch_never_makes_a_member_late() -> None:
    world = serving("a")
    world.ask("a", slo_ms=200)
    tight, *relaxed = [world.request("a", slo_ms=slo) for slo in (13, 200, 200, 200)]
    world.run()
    assert served(world, tight, *relaxed) == [Outcome.OK] * 4


def test_the_earliest_deadline_runs_first_whatever_the_order_of_arrival() -> None:
    world = serving("a", max_batch=1)
    world.ask("a", slo_ms=200)
    ids = [world.request("a", slo_ms=slo) for slo in (300, 300, 40, 30)]
    world.run()
    assert served(world, *ids) == [Outcome.OK] * 4
    assert world.answered_ns[ids[3]] < world.answered_ns[ids[2]] < world.answered_ns[ids[1]]


def test_least_recently_used_weights_make_room() -> None:
    world = serving("a", "b", "c", pages=8)
    for name in ("a", "b", "a", "c"):
        world.ask(name, slo_ms=100)
    unloads = [action.model for action in world.actions if isinstance(action, Unload)]
    assert unloads == ["b/1"]


def test_lanes_are_topped_up_only_to_the_look_ahead() -> None:
    world = serving("a", max_batch=1)
    world.ask("a", slo_ms=100)
    before = len(world.actions)
    for _ in range(5):
        world.request("a", slo_ms=1000)
    assert len(world.actions) == before + 1, "10 ms of work is more than the 5 ms look-ahead"


def test_an_infer_that_missed_its_window_is_planned_again() -> None:
    world = serving("a")
    world.ask("a", slo_ms=100)
    world.lanes["d0", "exec"].free_ns = world.now_ns + ms(60)
    request_id = world.ask("a", slo_ms=70)
    assert world.answers[request_id].outcome is Outcome.REJECTED
    assert world.answers[request_id].reason is Reason.WOULD_MISS_DEADLINE


def test_a_running_request_hears_at_its_deadline_and_its_tensors_are_released_later() -> None:
    world = serving("a")
    world.ask("a", slo_ms=100)
    world.slower = 5.0
    request_id = world.ask("a", slo_ms=20)
    assert served(world, request_id) == [Outcome.EXPIRED]
    assert not world.answers[request_id].release
    assert world.releases == [request_id]


def test_a_cancelled_request_leaves_its_queue() -> None:
    world = serving("a", max_batch=1)
    world.ask("a", slo_ms=500)
    ids = [world.request("a", slo_ms=500) for _ in range(3)]
    world.tell(Cancel(request_id=ids[2]))
    world.run()
    assert served(world, *ids) == [Outcome.OK, Outcome.OK, Outcome.CANCELLED]


def test_requests_of_a_lost_gateway_are_cancelled() -> None:
    world = serving("a")
    request_id = world.request("a", slo_ms=500)
    world.tell(GatewayLost(gateway="g0"))
    world.run()
    assert served(world, request_id) == [Outcome.CANCELLED]


def test_a_lost_workers_requests_are_planned_elsewhere_once() -> None:
    world = serving("a")
    world.join(device("d1"), worker="w1")
    request_id = world.ask("a", slo_ms=500, until_ms=9)
    load = world.actions[0]
    world.kill("w0" if load.device == "d0" else "w1", load.device)
    world.run()
    assert served(world, request_id) == [Outcome.OK]


def test_a_request_that_costs_two_workers_fails() -> None:
    world = World()
    world.serve(model("a"))
    for attempt in range(2):
        world.join(device("d0"), worker="w0")
        if not attempt:
            world.ask("a", slo_ms=5000)
            request_id = world.request("a", slo_ms=5000)
        else:
            world.run(until_ms=12)
        world.join(device("d1"), worker="w1")
        world.kill("w0", "d0")
        if attempt == 0:
            world.run(until_ms=11)
            world.kill("w1", "d1")
    assert world.answers[request_id].reason in (Reason.WORKER_LOST, Reason.NOT_SERVING)


def test_without_any_worker_requests_are_refused_at_once() -> None:
    world = World()
    world.serve(model("a"))
    request_id = world.request("a", slo_ms=500)
    assert world.answers[request_id].reason is Reason.NOT_SERVING
    assert "no worker" in world.answers[request_id].message


def test_weights_that_fit_no_device_are_refused_by_name() -> None:
    world = serving(model("a", mib=17))
    request_id = world.request("a", slo_ms=500)
    assert world.answers[request_id].reason is Reason.UNSERVABLE
    assert world.answers[request_id].message == (
        "no device can run it: its weights have 17825792 bytes; d0 has 16777216: "
        "set device_memory to at least 17MiB"
    )


def test_a_model_that_raises_fails_only_the_request_that_raised() -> None:
    world = serving("a")
    world.ask("a", slo_ms=500)
    blocker = world.request("a", slo_ms=500)
    ids = [world.request("a", slo_ms=500) for _ in range(4)]
    honest = world.reply

    def raising(action, status, start_ns, end_ns):  # type: ignore[no-untyped-def]
        poisoned = isinstance(action, Infer) and any(call.request_id == ids[2] for call in action.calls)
        honest(action, Status.MODEL_RAISED if poisoned else status, start_ns, end_ns)

    world.reply = raising  # type: ignore[method-assign]
    world.run()
    assert served(world, blocker, *ids) == [Outcome.OK] * 3 + [Outcome.FAILED] + [Outcome.OK]


def test_a_load_that_fails_fails_its_requests_with_its_message() -> None:
    world = serving("a")
    honest = world.reply

    def failing(action, status, start_ns, end_ns):  # type: ignore[no-untyped-def]
        honest(action, Status.DEVICE_FAULT if isinstance(action, Load) else status, start_ns, end_ns)

    world.reply = failing  # type: ignore[method-assign]
    request_id = world.ask("a", slo_ms=500)
    assert world.answers[request_id].reason is Reason.DEVICE_FAULT
    assert "could not be loaded" in world.answers[request_id].message


def test_a_load_without_valid_weights_is_tried_again_before_its_requests_fail() -> None:
    world = serving("a")
    honest, statuses = world.reply, [Status.DAMAGED, Status.DAMAGED]

    def failing(action, status, start_ns, end_ns):  # type: ignore[no-untyped-def]
        damaged = isinstance(action, Load) and statuses
        honest(action, statuses.pop() if damaged else status, start_ns, end_ns)

    world.reply = failing  # type: ignore[method-assign]
    assert served(world, world.ask("a", slo_ms=500)) == [Outcome.OK]


def test_a_full_queue_refuses() -> None:
    world = serving(model("a", queue_limit=2), max_batch=1)
    ids = [world.request("a", slo_ms=5000) for _ in range(4)]
    world.run()
    assert [world.answers[one].reason for one in ids] == [Reason.NONE, Reason.NONE, *[Reason.QUEUE_FULL] * 2]


def test_draining_refuses_new_requests_and_finishes_old_ones() -> None:
    world = serving("a")
    old = world.request("a", slo_ms=500)
    world.tell(Drain())
    new = world.ask("a", slo_ms=500)
    assert served(world, old, new) == [Outcome.OK, Outcome.REJECTED]
    assert world.answers[new].reason is Reason.DRAINING


def test_a_server_that_drains_is_not_ready() -> None:
    world = World()
    world.join(device())
    world.controller.observe(Drain(), world.now_ns)
    assert world.controller.decide(world.now_ns) == [Readiness(ready=False, why="draining")]


def test_a_removed_model_leaves_the_device_and_is_unknown() -> None:
    world = serving("a")
    world.ask("a", slo_ms=500)
    world.tell(ModelRemoved(model="a/1"))
    request_id = world.request("a", slo_ms=500)
    assert isinstance(world.actions[-1], Unload)
    assert world.answers[request_id].reason is Reason.UNKNOWN_MODEL


def test_a_model_removed_before_a_refused_action_can_be_planned_again_is_not_served() -> None:
    world = serving("a")
    request_id = world.ask("a", slo_ms=500, until_ms=9)
    infer = world.actions[-1]
    assert isinstance(infer, Infer)
    world.tell(ModelRemoved(model="a/1"))
    refused = Result(
        action_id=infer.action_id, device="d0", status=Status.TOO_LATE, started_ns=world.now_ns,
        ended_ns=world.now_ns,
    )  # fmt: skip
    world.tell(refused)
    assert served(world, request_id) == [Outcome.REJECTED]
    assert world.answers[request_id].reason is Reason.NOT_SERVING


def test_who_waits_for_a_model_that_is_removed_hears_so() -> None:
    world = serving("a")
    request_id = world.request("a", slo_ms=500)
    world.tell(ModelRemoved(model="a/1"))
    answer = world.answers[request_id]
    assert (answer.reason, answer.message) == (Reason.NOT_SERVING, "the model was unloaded")


def test_a_request_of_many_rows_runs_alone_at_the_next_size() -> None:
    world = serving("a")
    request_id = world.ask("a", slo_ms=500, rows=3)
    infer = world.actions[-1]
    assert served(world, request_id) == [Outcome.OK]
    assert isinstance(infer, Infer)
    assert (infer.batch, len(infer.calls)) == (4, 1)


def test_a_request_of_too_many_rows_is_invalid() -> None:
    world = serving("a")
    request_id = world.request("a", slo_ms=500, rows=9)
    assert world.answers[request_id].outcome is Outcome.INVALID


def test_different_signatures_never_share_a_batch() -> None:
    world = serving("a")
    ids = [world.request("a", slo_ms=500, signature=f"x:{at % 2}") for at in range(6)]
    world.run()
    assert served(world, *ids) == [Outcome.OK] * 6
    for infer in [action for action in world.actions if isinstance(action, Infer)]:
        assert len({int(call.request_id[1:]) % 2 for call in infer.calls}) == 1


def test_a_request_without_a_signature_never_joins_those_with_one() -> None:
    world = serving("a")
    ids = [world.request("a", slo_ms=500, signature=signature) for signature in ("x:1", "", "x:1", "")]
    world.run()
    calls = [[call.request_id for call in one.calls] for one in world.actions if isinstance(one, Infer)]
    assert sorted(calls) == [[ids[0], ids[2]], [ids[1], ids[3]]]


def test_one_outlier_does_not_lock_a_model_out() -> None:
    world = serving("a")
    world.ask("a", slo_ms=500)
    world.slower = 8.0
    world.ask("a", slo_ms=500, until_ms=500)
    world.slower = 1.0
    first = world.ask("a", slo_ms=50, until_ms=100)
    second = world.ask("a", slo_ms=50)
    assert served(world, first, second) == [Outcome.REJECTED, Outcome.OK]


def test_a_guess_never_locks_a_model_out_and_the_first_execution_replaces_it() -> None:
    world = World()
    guess = msgspec.structs.replace(profile(b1_ms=50), guessed=True)
    world.serve(model("a"), times=guess)
    world.durations["c"] = profile(b1_ms=2)
    world.join(device())
    ids = []
    for _ in range(2):
        ids.append(world.request("a", slo_ms=20))
        world.run()
    assert served(world, *ids) == [Outcome.OK, Outcome.OK]
    assert world.answers[ids[1]].expected_ns == ms(2)


def test_a_shape_that_never_ran_is_tried_however_long_others_take() -> None:
    world = serving("a", times=profile(b1_ms=5000))
    world.durations["c"] = profile(b1_ms=2)
    ids = []
    for signature in ("x:2", "x:2", "x:3"):
        ids.append(world.request("a", slo_ms=100, signature=signature))
        world.run(until_ms=200)
    assert served(world, *ids) == [Outcome.OK] * 3
    assert [world.answers[one].expected_ns for one in ids[:2]] == [ms(1), ms(2)]


def test_a_shape_that_ran_and_took_too_long_is_refused() -> None:
    world = serving("a", times=profile(b1_ms=5000))
    ids = []
    for _ in range(3):
        ids.append(world.request("a", slo_ms=100, signature="x:2"))
        world.run(until_ms=6000)
    assert served(world, *ids) == [Outcome.EXPIRED, Outcome.REJECTED, Outcome.REJECTED]


def test_a_batch_that_was_extrapolated_is_tried() -> None:
    times = msgspec.structs.replace(profile(b1_ms=5000, step_ms=5000), extrapolated=(8,))
    world = serving("a", times=times)
    world.durations["c"] = profile(b1_ms=2)
    ids = [world.request("a", slo_ms=100, rows=rows) for rows in (4, 8)]
    world.run()
    assert served(world, *ids) == [Outcome.REJECTED, Outcome.OK]


@pytest.mark.parametrize("limit", ["workspace_bytes", "io_bytes"])
def test_a_model_whose_least_batch_has_no_room_is_refused_with_what_to_set(limit: str) -> None:
    world = World()
    world.serve(model("a"), times=msgspec.structs.replace(profile(), **{limit: {1: 4 << 40}}))
    world.join(device())
    answer = world.answers[world.ask("a", slo_ms=500)]
    mib = {"workspace_bytes": 5 << 20, "io_bytes": 20 << 20}[limit]
    assert (answer.outcome, answer.reason) == (Outcome.FAILED, Reason.UNSERVABLE)
    assert answer.message.startswith("no device can run it: batch 1 needs ")
    assert answer.message.endswith(f"has {1 << 30} and {1 << 30}: set scratch_memory to at least {mib}MiB")
    assert not world.actions


def test_rows_that_have_no_room_on_any_device_are_refused_and_fewer_are_not() -> None:
    world = World()
    world.serve(model("a"), times=msgspec.structs.replace(profile(), workspace_bytes={8: 4 << 40}))
    world.join(device())
    few, many = (world.ask("a", slo_ms=500, rows=rows) for rows in (4, 5))
    assert served(world, few, many) == [Outcome.OK, Outcome.FAILED]
    assert world.answers[many].reason is Reason.UNSERVABLE
    assert "batch 8 needs" in world.answers[many].message
    world.join(device("d1"), worker="w1")
    assert served(world, world.ask("a", slo_ms=500, rows=5)) == [Outcome.FAILED]


def test_a_hot_model_is_replicated_and_a_lukewarm_one_is_not() -> None:
    world = serving("hot", "lukewarm", max_batch=1)
    world.join(device("d1"), worker="w1")
    world.ask("lukewarm", slo_ms=100)
    ids = []
    for _ in range(40):
        ids += [world.request("hot", slo_ms=100) for _ in range(2)]
        world.run(until_ms=12)
    world.run()
    loads = [action.model for action in world.actions if isinstance(action, Load)]
    assert sorted(loads) == ["hot/1", "hot/1", "lukewarm/1"]
    assert served(world, *ids).count(Outcome.OK) >= 76, "one device alone could serve 49 in that time"


def test_a_result_that_comes_twice_or_after_its_worker_was_lost_changes_nothing() -> None:
    world = serving("a")
    request_id = world.request("a", slo_ms=500)
    told: list[Result] = []
    tell = world.tell

    def listen(*events):  # type: ignore[no-untyped-def]
        told.extend(event for event in events if isinstance(event, Result))
        tell(*events)

    world.tell = listen  # type: ignore[method-assign]
    world.run()
    world.tell(*told)
    world.kill("w0", "d0")
    world.tell(*told)
    assert served(world, request_id) == [Outcome.OK]
    assert world.releases == []


def test_a_snapshot_names_all_that_a_screen_shows() -> None:
    world = serving("a", "b")
    world.ask("a", slo_ms=500)
    for name in ("a", "a", "b"):
        world.request(name, slo_ms=500)
    assert world.controller.snapshot() == {
        "in_flight": 3, "waiting": {"a/1": 1, "b/1": 1}, "models": 2,
        "devices": [{
            "device": "d0", "kind": "emulated", "worker": "w0", "warm": True, "pages": 16,
            "page_bytes": 1 << 20, "pages_used": 8, "resident": ["a/1"], "codes": 1, "failed_codes": {},
            "failed_weights": {}, "pending_codes": 0, "exec_outstanding": 1, "load_outstanding": 1,
        }],
        "tenants": {}, "quarantined": {}, "unservable": {}, "hung": {},
    }  # fmt: skip

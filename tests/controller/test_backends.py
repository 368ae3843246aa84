"""A server whose devices run different backends: each model goes where it can run, and only there."""

from __future__ import annotations

import pytest
from msgspec import structs

from clockwork_serve.controller import ControllerConfig
from clockwork_serve.controller.cluster import DeviceBelief
from clockwork_serve.controller.placement import Candidates
from clockwork_serve.messages import (
    CodeAdded,
    CodeReady,
    DeviceSpec,
    DeviceState,
    ModelAdded,
    ModelRemoved,
    Outcome,
    Reason,
    Unservable,
    WorkerJoined,
)
from tests.controller.clusters import ask, belief, place, serve
from tests.controller.honest import CODE, Lane, World, device, model, profile

TORCH = structs.replace(CODE, code_id="t", backend="torch")
ONNX = structs.replace(CODE, code_id="o", backend="onnx")
CPU = structs.replace(device("cpu:0"), backends=("onnx", "python"))
GPU = structs.replace(device("cuda:0"), backends=("torch",))


def join(world: World, spec: DeviceSpec) -> None:
    """A worker that prepares what its device can run, and says nothing of the rest."""
    for lane in ("exec", "load"):
        world.lanes[spec.device, lane] = Lane()
    able = [code for code in (TORCH, ONNX) if spec.runs(code.backend)]
    ready = [CodeReady(device=spec.device, code_id=code.code_id) for code in able]
    world.tell(WorkerJoined(worker=f"worker-{spec.device}", devices=(spec,)), *ready)


def mixed(*devices: DeviceSpec, policy: str = "default") -> World:
    """Models of two backends on these devices."""
    world = World(ControllerConfig(policy=policy, expected_devices=len(devices)))
    for code, name in ((TORCH, "torch"), (ONNX, "onnx")):
        times = profile(code.code_id)
        world.durations[code.code_id] = times
        world.tell(CodeAdded(code=code, profiles=(times,)), ModelAdded(model=model(name, code.code_id)))
    for spec in devices:
        join(world, spec)
    return world


@pytest.mark.parametrize("policy", ["default", "paper"])
def test_every_model_runs_on_the_device_that_can_run_it(policy: str) -> None:
    world = mixed(CPU, GPU, policy=policy)
    asked = {world.request(name, slo_ms=200): name for name in ("torch", "onnx") * 5}
    world.run()
    assert {world.answers[request_id].outcome for request_id in asked} == {Outcome.OK}
    assert {(action.device, action.model) for action in world.actions} == {
        ("cuda:0", "torch/1"), ("cpu:0", "onnx/1"),
    }  # fmt: skip


def test_a_server_is_ready_although_no_device_prepares_all_codes() -> None:
    world = mixed(CPU, GPU)
    devices = world.controller.snapshot()["devices"]
    assert isinstance(devices, list)
    assert [(one["device"], one["warm"], one["pending_codes"]) for one in devices] == [
        ("cpu:0", True, 0), ("cuda:0", True, 0),
    ]  # fmt: skip
    assert devices[0]["failed_codes"] == {"t": "cpu:0 runs onnx and python codes; found one of backend torch"}


def test_a_code_that_comes_later_is_awaited_only_where_it_can_run() -> None:
    world = mixed(CPU, GPU)
    late = structs.replace(TORCH, code_id="late")
    world.tell(CodeAdded(code=late, profiles=(profile("late"),)))
    pending = {one.name: one.pending_codes for one in world.controller._belief.devices.values()}
    assert pending == {"cpu:0": set(), "cuda:0": {"late"}}


def test_a_model_that_no_device_runs_is_refused_with_that_reason() -> None:
    world = mixed(CPU)
    request_id = world.request("torch", slo_ms=200)
    answer = world.answers[request_id]
    assert (answer.outcome, answer.reason) == (Outcome.FAILED, Reason.UNSERVABLE)
    assert "cpu:0 runs onnx and python codes; found one of backend torch" in answer.message


def test_a_model_that_no_device_could_run_is_served_once_one_joins_that_can() -> None:
    world = mixed(CPU)
    why = "no device can run it: cpu:0 runs onnx and python codes; found one of backend torch"
    assert world.unservable == [Unservable(model="torch/1", why=why)]
    join(world, GPU)
    assert world.unservable[1:] == [Unservable(model="torch/1")]
    assert world.answers[world.ask("torch", slo_ms=200)].outcome is Outcome.OK


def test_a_device_that_could_run_a_model_and_is_lost_may_come_back() -> None:
    world = mixed(CPU, GPU)
    world.kill("worker-cuda:0", "cuda:0")
    answer = world.answers[world.request("torch", slo_ms=200)]
    assert (answer.outcome, answer.reason) == (Outcome.REJECTED, Reason.NOT_SERVING)
    assert world.unservable == []


def test_no_model_is_unservable_before_all_devices_of_the_server_have_joined() -> None:
    world = World(ControllerConfig(policy="default", expected_devices=2))
    world.serve(model("torch", "t"), code=TORCH)
    join(world, CPU)
    assert world.unservable == []
    join(world, structs.replace(CPU, device="cpu:1"))
    assert [one.model for one in world.unservable] == ["torch/1"]
    world.tell(ModelRemoved(model="torch/1"))
    assert world.unservable[1:] == [Unservable(model="torch/1")]


def test_after_a_failover_no_model_is_unservable_before_all_devices_have_come_back() -> None:
    world = World(ControllerConfig(policy="default", expected_devices=2))
    world.serve(model("torch", "t"), code=TORCH)
    world.tell(WorkerJoined(worker="w0", devices=(CPU,), states=(DeviceState(device=CPU.device),)))
    assert world.unservable == []


def test_a_device_of_a_kind_without_a_profile_cannot_run_a_model() -> None:
    world = mixed(structs.replace(CPU, kind="other"))
    answer = world.answers[world.request("onnx", slo_ms=200)]
    assert answer.reason is Reason.UNSERVABLE
    assert "there is no profile for devices of kind other" in answer.message


def test_what_failed_where_it_could_run_is_the_reason_told() -> None:
    world = mixed(CPU, GPU)
    world.tell(
        CodeAdded(code=structs.replace(TORCH, code_id="bad"), profiles=(profile("bad"),)),
        ModelAdded(model=model("bad", "bad")),
        CodeReady(device="cuda:0", code_id="bad", ok=False, message="compile the model again"),
    )
    answer = world.answers[world.request("bad", slo_ms=200)]
    assert answer.message == "device cuda:0 could not prepare the model: compile the model again"


def test_weights_larger_than_the_devices_that_run_them_are_told_how_large_those_are() -> None:
    small = structs.replace(GPU, pages=2)
    world = mixed(CPU, small)
    answer = world.answers[world.request("torch", slo_ms=200)]
    assert answer.message.endswith(f"; cuda:0 has {2 << 20}: set device_memory to at least 4MiB")


def test_a_device_that_cannot_run_a_model_makes_it_no_candidate_for_a_load() -> None:
    made = belief("d0")
    other = DeviceBelief(structs.replace(GPU, device="d1"), "d1", made.next_id(), made.config)
    made.devices["d1"] = other
    served = serve(made, "a")
    place(made, served, "d0")
    ask(made, served, count=50)
    assert not Candidates(made).rank(served), "it is everywhere it can be"
    made.devices["d2"] = DeviceBelief(device("d2"), "d2", made.next_id(), made.config)
    made.reset_bases()
    assert Candidates(made).rank(served)

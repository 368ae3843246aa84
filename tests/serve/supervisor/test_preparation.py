"""A repository is prepared in a child process, within its limits."""

from __future__ import annotations

import asyncio
import os
import resource
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import onnx
import pytest
import uvloop
from onnx import TensorProto as T
from onnx import helper as h
from onnx import numpy_helper

from clockwork_serve.config import Settings
from clockwork_serve.devices import DeviceConfig
from clockwork_serve.errors import ConfigError, RepositoryError
from clockwork_serve.serve.supervisor.preparation import (
    Preparation,
    PreparedRepository,
    StartProgress,
    Steering,
    prepare,
    runnable,
)
from clockwork_serve.store import Entry, Problem, StoreConfig, publish
from clockwork_serve.store.cache import shared_store
from clockwork_serve.units import MIB
from harness import repositories
from tests.serve.onnx_models import affine, put

# A child process prepares a repository, and reports its progress and its errors to the supervisor.


EMULATED = DeviceConfig(device="emulated:0", kind="emulated", profile="v100")


@pytest.fixture
def preparation(tmp_path: Path) -> Preparation:
    """Two good models and a bad one, for an emulated device."""
    root = tmp_path / "repository"
    put(root, "a", affine(1))
    put(root, "b", affine(2))
    put(root, "c", b"this is no model")
    return Preparation(
        settings=Settings(repository=str(root)),
        store=StoreConfig(cache_dir=str(tmp_path / "cache"), largest_batch=2, max_batch_size=2),
        devices=(EMULATED,),
        result=str(tmp_path / "result"),
    )


def run(preparation: Preparation) -> tuple[PreparedRepository, list[StartProgress], list[str]]:
    told: list[StartProgress] = []
    lines: list[str] = []
    return uvloop.run(prepare(preparation, told.append, lines.append)), told, lines


def test_all_models_are_prepared_and_progress_is_reported(preparation: Preparation) -> None:
    prepared, told, _ = run(preparation)
    assert prepared.names == ("a", "b", "c")
    assert [each.model.key for each in prepared.served] == ["a/1", "b/1"]
    assert [problem.model for problem in prepared.problems] == ["c"]
    assert [profile.device_kind for profile in prepared.profiles] == ["emulated:v100"]
    for stage in ("compile", "profile"):
        steps = [(each.done, each.total) for each in told if each.stage == stage]
        assert steps[-1] == (3, 3) and steps == sorted(steps)
    assert not Path(preparation.result).exists()


def slow(seconds: float) -> str:
    """A class whose import takes a while."""
    return repositories.echoing(f"import time\n\ntime.sleep({seconds})")


def test_what_is_ready_does_not_wait_for_what_takes_long(preparation: Preparation) -> None:
    repositories.python_model(Path(preparation.settings.repository), "a0", slow(4))
    parts: list[PreparedRepository] = []
    cpu = DeviceConfig(device="cpu:0", memory_bytes=MIB)
    whole = msgspec.structs.replace(preparation, devices=(cpu,), parts=True)
    rest = uvloop.run(prepare(whole, lambda progress: None, print, parts.append))
    found = [each.model.key for part in [*parts, rest] for each in part.served]
    assert sorted(found) == ["a/1", "a0/1", "b/1"]
    early = next(part for part in [*parts, rest] if "b" in part.names)
    assert "a0" not in early.names
    assert [profile.code_id for profile in early.profiles] == [early.served[0].code.code_id]
    assert [problem.model for part in [*parts, rest] for problem in part.problems] == ["c"]
    assert sorted(name for part in [*parts, rest] for name in part.names) == ["a", "a0", "b", "c"]
    assert not list(Path(preparation.result).parent.glob("result*"))


def test_what_is_urgent_is_prepared_first(preparation: Preparation) -> None:
    for number in range(8):
        source = slow(0.3) + f"NUMBER = {number}\n"
        repositories.python_model(Path(preparation.settings.repository), f"slow{number}", source)
    cpu = DeviceConfig(device="cpu:0", memory_bytes=MIB)
    steering = Steering()
    order: list[str] = []

    def note(part: PreparedRepository) -> None:
        order.extend(part.names)
        steering.set_urgent(["slow7"])
        steering.give_way()

    whole = msgspec.structs.replace(preparation, devices=(cpu,), parts=True)
    note(uvloop.run(prepare(whole, lambda progress: None, print, note, steering)))
    assert sorted(order) == ["a", "b", "c", *[f"slow{number}" for number in range(8)]]
    assert order.index("slow7") < order.index("slow6")


def test_only_the_named_models_are_prepared(preparation: Preparation) -> None:
    prepared, _, _ = run(msgspec.structs.replace(preparation, names=("b",), nice=5))
    assert prepared.names == ("b",)
    assert [each.model.key for each in prepared.served] == ["b/1"]


def test_what_one_machine_prepared_another_takes_from_the_store(
    preparation: Preparation, tmp_path: Path
) -> None:
    store = tmp_path / "store"
    store.mkdir()

    def prepared_on(machine: str) -> PreparedRepository:
        config = msgspec.structs.replace(
            preparation.store, cache_dir=str(tmp_path / machine), shared=str(store)
        )
        cpu = DeviceConfig(device="cpu:0", memory_bytes=MIB)
        return run(msgspec.structs.replace(preparation, devices=(cpu,), store=config))[0]

    first, second = prepared_on("one"), prepared_on("two")
    assert first.measured == {each.code.code_id for each in first.served} != set()
    assert second.measured == frozenset()
    assert second.profiles == first.profiles
    assert [each.model.key for each in second.served] == ["a/1", "b/1"]
    assert all(str(tmp_path / "two") in each.model.weights.path for each in second.served)


def test_without_a_repository_the_catalogue_of_the_store_is_prepared(
    preparation: Preparation, tmp_path: Path
) -> None:
    (tmp_path / "store").mkdir()
    config = msgspec.structs.replace(preparation.store, shared=str(tmp_path / "store"))
    cpu = DeviceConfig(device="cpu:0", memory_bytes=MIB)
    there = run(msgspec.structs.replace(preparation, devices=(cpu,), store=config))[0]
    publish(shared_store(config.shared), there.served, ())

    here = msgspec.structs.replace(config, cache_dir=str(tmp_path / "elsewhere"))
    alone = msgspec.structs.replace(preparation, settings=Settings(), devices=(cpu,), store=here)
    found = run(alone)[0]
    assert [each.model.key for each in found.served] == ["a/1", "b/1"]
    assert found.problems == ()
    assert found.measured == frozenset()
    assert found.profiles == there.profiles
    assert run(msgspec.structs.replace(alone, names=("b",)))[0].names == ("b",)


def test_a_model_that_is_not_there_is_named(preparation: Preparation) -> None:
    with pytest.raises(RepositoryError, match=r"model 'nobody'.*none of that name"):
        run(msgspec.structs.replace(preparation, names=("nobody",)))


def test_a_repository_that_is_not_there_is_named(preparation: Preparation, tmp_path: Path) -> None:
    with pytest.raises(
        RepositoryError, match=r"model repository: expected a readable folder, found .*nowhere"
    ):
        run(msgspec.structs.replace(preparation, settings=Settings(repository=str(tmp_path / "nowhere"))))


def test_a_wrong_setting_is_distinguished_from_a_wrong_repository(preparation: Preparation) -> None:
    unknown = msgspec.structs.replace(EMULATED, profile="no_such_device")
    with pytest.raises(ConfigError, match=r"profile: expected .* found 'no_such_device'"):
        run(msgspec.structs.replace(preparation, devices=(unknown,)))


def test_a_child_that_ends_without_a_result_is_an_error_with_its_last_lines(preparation: Preparation) -> None:
    beyond = msgspec.structs.replace(preparation, settings=Settings(log_level="no such level"))
    with pytest.raises(RepositoryError, match=r"exit status 1; it said:[^$]*log_level"):
        run(beyond)


async def test_cancelling_stops_the_child(preparation: Preparation) -> None:
    started = asyncio.Event()
    work = asyncio.ensure_future(prepare(preparation, lambda progress: started.set(), lambda line: None))
    await asyncio.wait_for(started.wait(), 60)
    work.cancel()
    with pytest.raises(asyncio.CancelledError):
        await work


KILLS = """
import os, signal
from clockwork_serve.store.compiler import Compiler

honest = Compiler.compile

def compile(self, entry, *rest):
    if entry.name in ("b", "z"):
        os.kill(os.getpid(), signal.SIGSEGV)
    return honest(self, entry, *rest)

Compiler.compile = compile
"""
"""Runs in each child as it starts; stands for a runtime that crashes on some graphs."""


@pytest.mark.slow
def test_models_that_crash_the_compiler_are_named_and_all_others_are_served(
    preparation: Preparation, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("x", "y", "z"):
        put(Path(preparation.settings.repository), name, affine(3))
    (tmp_path / "sitecustomize.py").write_text(KILLS)
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}:{os.environ.get('PYTHONPATH', '')}")
    prepared, _, _ = run(preparation)
    assert prepared.names == ("a", "b", "c", "x", "y", "z")
    assert [each.model.name for each in prepared.served] == ["a", "x", "y"]
    crashed = [problem for problem in prepared.problems if "SIGSEGV" in problem.found]
    assert [(problem.model, problem.version) for problem in crashed] == [("b", "1"), ("z", "1")]
    assert [problem.model for problem in prepared.problems if problem not in crashed] == ["c"]
    assert str(crashed[0]).startswith(
        "model 'b' version 1: model: expected a model that can be compiled, found a crash of the compiler "
    )


def test_a_child_that_is_killed_before_it_compiles_is_no_model_s_fault(
    preparation: Preparation, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "sitecustomize.py").write_text("import os; os.kill(os.getpid(), 9)")
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}:{os.environ.get('PYTHONPATH', '')}")
    with pytest.raises(RepositoryError, match="compiling ended unexpectedly: killed by SIGKILL"):
        run(preparation)


def test_models_that_no_device_runs_are_problems_and_never_compiled() -> None:
    entries = [
        Entry(name=name, path="", root="", backend=backend)
        for name, backend in (("o", "onnx"), ("t", "torch"), ("p", "python"))
    ]
    broken = Entry(name="b", path="", root="", problems=(fitting_problem(),))
    torch = DeviceConfig(device="torch-cpu:0", kind="torch-cpu")
    able, unfit = runnable([*entries, broken], (torch,))
    assert [entry.name for entry in able] == ["t", "b"]
    assert [str(found) for found in unfit] == [
        f"model '{name}': backend: expected one that devices of kind torch-cpu run, found a {backend} model;"
        " give --device cpu as well"
        for name, backend in (("o", "onnx"), ("p", "python"))
    ]
    able, unfit = runnable(entries, (DeviceConfig(device="cpu:0"),))
    assert [entry.name for entry in able] == ["o", "p"]
    assert unfit[0].advice == "give --device torch-cpu or cuda:0 as well"
    able, unfit = runnable(entries, (EMULATED,))
    assert [entry.name for entry in able] == ["o", "t"]
    assert str(unfit[0]).endswith("found a python model; give --device cpu as well"), "it would answer zeros"


def fitting_problem() -> Problem:
    return Problem(model="b", field="f", expected="e", found="g", advice="a")


# A model that needs too much memory or time to compile is reported, and the others are prepared.


GIB = 1 << 30
system = pytest.mark.system


def model(nodes: list[onnx.NodeProto], weights: dict[str, np.ndarray]) -> onnx.ModelProto:
    sides = [h.make_tensor_value_info(name, T.FLOAT, ["N", 4]) for name in ("x", "y")]
    kept = [numpy_helper.from_array(array, name) for name, array in weights.items()]
    made = h.make_model(
        h.make_graph(nodes, "g", sides[:1], sides[1:], kept), opset_imports=[h.make_opsetid("", 17)]
    )
    made.ir_version = 9
    return made


def endless() -> onnx.ModelProto:
    """A loop of 2**62 rounds."""
    counted = [h.make_tensor_value_info("i", T.INT64, []), h.make_tensor_value_info("go", T.BOOL, [])]
    body = h.make_graph(
        [h.make_node("Identity", ["go"], ["on"]), h.make_node("Add", ["state", "state"], ["next"])],
        "body",
        [*counted, h.make_tensor_value_info("state", T.FLOAT, None)],
        [h.make_tensor_value_info("on", T.BOOL, []), h.make_tensor_value_info("next", T.FLOAT, None)],
    )
    loop = h.make_node("Loop", ["rounds", "", "x"], ["y"], body=body)
    return model([loop], {"rounds": np.array(2**62, np.int64)})


def greedy() -> onnx.ModelProto:
    """Two bytes of shape become 16 GiB."""
    nodes = [
        h.make_node("ConstantOfShape", ["shape"], ["zeros"]),
        h.make_node("ReduceSum", ["zeros"], ["sum"], keepdims=0),
        h.make_node("Add", ["x", "sum"], ["y"]),
    ]
    return model(nodes, {"shape": np.array([1 << 16, 1 << 16], np.int64)})


def prepared(root: Path, bad: onnx.ModelProto, **more: Any) -> PreparedRepository:
    put(root / "repository", "good", affine(1))
    put(root / "repository", "bad", bad.SerializeToString())
    preparation = Preparation(
        settings=Settings(repository=str(root / "repository"), **more),
        store=StoreConfig(cache_dir=str(root / "cache"), largest_batch=2, max_batch_size=2),
        devices=(DeviceConfig(device="cpu:0"),),
        result=str(root / "result"),
    )
    return uvloop.run(prepare(preparation, lambda told: None, lambda line: None))


@system
@pytest.mark.slow
@pytest.mark.timeout(300)
def test_a_model_that_never_ends_is_left_out(tmp_path: Path) -> None:
    """It is found stuck twice, with others and alone; the limit is long enough for a busy machine."""
    found = prepared(tmp_path, endless(), compile_s=15.0)

    assert [each.model.name for each in found.served] == ["good"]
    assert [(each.model, each.found) for each in found.problems] == [
        ("bad", "one that takes longer, or for ever")
    ]
    assert "serve a smaller model" in str(found.problems[0])


@system
def test_a_model_that_needs_too_much_memory_is_left_out(tmp_path: Path) -> None:
    """It is not probed then, and its weights are not lifted out of its code."""
    found = prepared(tmp_path, greedy(), compile_memory=2 * GIB)

    assert resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024 < 3 * GIB
    by_name = {each.model.name: each.model for each in found.served}
    assert "good" in by_name
    told = [*map(str, found.problems), *(by_name["bad"].warnings if "bad" in by_name else ())]
    assert any("lloc" in words for words in told), told


@system
def test_output_of_a_model_at_exit_does_not_hide_its_profile(tmp_path: Path) -> None:
    folder = tmp_path / "repository" / "chatty"
    (folder / "1").mkdir(parents=True)
    (folder / "1" / "model.py").write_text(
        repositories.echoing("import atexit\n\natexit.register(print, 'bye')")
    )
    tensors = '[{name = "%s", dims = [4], datatype = "FP32"}]'
    (folder / "clockwork.toml").write_text(f"inputs = {tensors % 'x'}\noutputs = {tensors % 'y'}\n")
    found = prepared(tmp_path, model([h.make_node("Relu", ["x"], ["y"])], {}))

    assert [each.model.name for each in found.served] == ["bad", "chatty", "good"]
    assert not found.problems, "what a model prints is no part of its profile"

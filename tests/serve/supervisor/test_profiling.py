"""Profiles of a repository: measured in a process each, kept, and guessed with a warning where that fails."""

from __future__ import annotations

import os
import signal
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path
from typing import NamedTuple

import msgspec
import pytest

from clockwork_serve.devices import DeviceConfig
from clockwork_serve.messages import Profile
from clockwork_serve.serve.supervisor.processes import read_thread_state
from clockwork_serve.serve.supervisor.profile_process import REFUSED_NS
from clockwork_serve.serve.supervisor.profiling import ProfileProcesses, Profiler
from clockwork_serve.store import Cache, Problem, Repository, ServedVersion, StoreConfig, compile_all
from clockwork_serve.units import MIB
from harness import records
from harness.machine import children
from harness.repositories import echoing, layers
from harness.serving import until
from tests.serve.onnx_models import affine, put


class Shelf:
    """A cache of profiles in memory."""

    def __init__(self) -> None:
        self.profiles: dict[tuple[str, str], Profile] = {}
        self.shared = None

    def profile(self, code_id: str, device_kind: str) -> Profile | None:
        return self.profiles.get((code_id, device_kind))

    def save_profile(self, profile: Profile) -> None:
        self.profiles[profile.code_id, profile.device_kind] = profile


class Found(NamedTuple):
    """What came of profiling some models."""

    profiles: tuple[Profile, ...]
    warnings: tuple[str, ...]
    problems: tuple[Problem, ...]


def profile_all(
    served: Sequence[ServedVersion], devices: Sequence[DeviceConfig], shelf: Shelf, limit_s: float = 60.0
) -> Found:
    with closing(Profiler(devices, shelf, limit_s=limit_s)) as profiler:
        problems = [found for each in served for found in profiler.profile(each)]
        return Found(tuple(profiler.profiles.values()), tuple(profiler.warnings), tuple(problems))


CPU = DeviceConfig(device="cpu:0", memory_bytes=MIB)


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> list[ServedVersion]:
    """Two models of one architecture."""
    root = tmp_path_factory.mktemp("repository")
    config = StoreConfig(cache_dir=str(tmp_path_factory.mktemp("cache")), largest_batch=2, max_batch_size=2)
    put(root, "a", affine(1))
    put(root, "b", affine(2))
    cache = Cache(config.cache_dir)
    found, problems = compile_all(Repository(root, config), cache)
    cache.close()
    assert problems == []
    return found


def broken(path: Path) -> ServedVersion:
    code = records.code("broken", (1, 2), backend="onnx", path=str(path))
    model = records.model("bad", "broken", size=4, sizes=(1, 2), path=str(path))
    return ServedVersion(model=model, code=code)


def test_one_code_is_measured_once_and_kept(served: list[ServedVersion]) -> None:
    shelf = Shelf()
    first = profile_all(served, [CPU], shelf)
    assert first.warnings == ()
    (measured,) = first.profiles
    assert measured.device_kind == "cpu"
    assert measured.infer_ns.keys() == {1, 2}
    assert all(duration > 0 for duration in measured.infer_ns.values())
    marked = msgspec.structs.replace(measured, load_base_ns=12345)
    shelf.save_profile(marked)
    assert profile_all(served, [CPU, CPU], shelf).profiles == (marked,), (
        "from the cache, once for equal devices"
    )


def test_neither_weights_nor_inputs_of_larger_batches_are_scratch_memory_of_a_batch(
    tmp_path: Path,
) -> None:
    layers(tmp_path / "models", "wide", width=1024, depth=8)
    config = StoreConfig(cache_dir=str(tmp_path / "cache"), largest_batch=4096, max_batch_size=4096)
    with Cache(config.cache_dir) as cache:
        found, problems = compile_all(Repository(tmp_path / "models", config), cache)
        assert (problems, found[0].model.weights.size) == ([], 32 * MIB)
        (measured,) = profile_all(found, [CPU], cache).profiles
    assert measured.io_bytes[4096] == 32 * MIB
    assert measured.workspace_bytes[1] < 16 * MIB, "not 64 MiB and more"


def test_a_code_that_cannot_be_measured_is_guessed_with_a_warning(tmp_path: Path) -> None:
    shelf = Shelf()
    found = profile_all([broken(tmp_path)], [CPU], shelf)
    assert found.profiles[0].infer_ns == {1: REFUSED_NS, 2: 2 * REFUSED_NS}
    assert "bad/1: profiling failed" in found.warnings[0]
    assert shelf.profiles == {}, "a guess is not kept"


def test_an_emulated_device_knows_its_profile(served: list[ServedVersion]) -> None:
    shelf = Shelf()
    emulated = DeviceConfig(device="emulated:0", kind="emulated", profile="v100")
    (found,) = profile_all(served, [emulated], shelf).profiles
    assert found.device_kind == "emulated:v100"
    assert shelf.profiles == {}


CRASHES = """
import ctypes


class Model:
    def load(self, path):
        ctypes.string_at(0)

    def infer(self, inputs):
        return inputs

    def unload(self):
        pass
"""
SETTINGS = """
backend = "python"
max_batch_size = 2
[[inputs]]
name = "x"
datatype = "FP32"
dims = [4]
[[outputs]]
name = "y"
datatype = "FP32"
dims = [4]
"""


def python_model(tmp_path: Path, name: str, source: str) -> list[ServedVersion]:
    folder = tmp_path / "models" / name / "1"
    folder.mkdir(parents=True)
    (folder / "model.py").write_text(source)
    (folder.parent / "clockwork.toml").write_text(SETTINGS)
    config = StoreConfig(cache_dir=str(tmp_path / "cache"))
    with Cache(config.cache_dir) as cache:
        models, problems = compile_all(Repository(tmp_path / "models", config), cache)
    assert problems == []
    return models


def test_a_model_that_crashes_the_measuring_process_is_a_problem(tmp_path: Path) -> None:
    models, shelf = python_model(tmp_path, "crash", CRASHES), Shelf()
    found = profile_all(models, [CPU], shelf)
    (problem,) = found.problems
    assert str(problem) == (
        "model 'crash' version 1: model: expected a model that runs on cpu:0, found a crash (killed by "
        "SIGSEGV); it would take the device down for all others; run it by itself to see why"
    )
    assert (found.profiles, shelf.profiles) == ((), {})


@pytest.mark.parametrize(
    ("first", "found"),
    [
        ("raise ValueError('unknown \\ud800')", r"ValueError: unknown \ud800"),
        ("import sys; sys.exit(0)", "SystemExit: 0"),
        ("raise KeyboardInterrupt", "KeyboardInterrupt"),
        ("import nothing_of_that_name", "ModuleNotFoundError"),
    ],
)
def test_a_class_that_cannot_be_imported_is_a_problem(tmp_path: Path, first: str, found: str) -> None:
    models, shelf = python_model(tmp_path, "bad", echoing(first)), Shelf()
    profiled = profile_all(models, [CPU], shelf)
    (problem,) = profiled.problems
    assert found in str(problem)
    assert str(problem).startswith("model 'bad' version 1: model: expected a class that can be imported")
    assert (profiled.profiles, shelf.profiles) == ((), {})


def test_a_class_whose_load_raises_is_a_problem(tmp_path: Path) -> None:
    raising = echoing().replace("        pass", "        raise OSError('no weights')", 1)
    profiled = profile_all(python_model(tmp_path, "bad", raising), [CPU], Shelf())
    (problem,) = profiled.problems
    assert "that can be imported and loaded, found model bad/1: load: OSError: no weights" in str(problem)


def test_an_endless_import_is_a_problem_however_much_it_writes(tmp_path: Path) -> None:
    endless = "import os\nwhile True: os.write(2, b'x' * 65536)\n"
    profiled = profile_all(python_model(tmp_path, "bad", echoing(endless)), [CPU], Shelf(), limit_s=2.0)
    (problem,) = profiled.problems
    assert "found an import that takes longer than 2 s, or for ever" in str(problem)


def test_a_class_that_ends_its_process_with_nothing_to_read_is_named(tmp_path: Path) -> None:
    source = echoing().replace("        pass", "        import os; os.write(2, b'\\x1c'); os._exit(1)", 1)
    profiled = profile_all(python_model(tmp_path, "bad", source), [CPU], Shelf())
    assert "bad/1: profiling failed (exit status 1)" in profiled.warnings[0]


def test_output_of_a_class_is_not_mistaken_for_its_profile(tmp_path: Path) -> None:
    noisy = (
        "import atexit, sys\nprint('\\n{}')\natexit.register(sys.exit, 3)\nsys.stderr = 1\nsys.stdout = 2\n"
    )
    profiled = profile_all(python_model(tmp_path, "noisy", echoing(noisy)), [CPU], Shelf())
    assert (profiled.problems, profiled.warnings) == ((), ())
    assert len(profiled.profiles) == 1


def test_if_two_models_of_one_code_crash_the_others_are_not_tried(tmp_path: Path) -> None:
    tried = tmp_path / "tried"
    source = CRASHES.replace("import ctypes", f"import ctypes\nopen({str(tried)!r}, 'a').write('.')", 1)
    (one,) = python_model(tmp_path, "crash", source)
    models = [
        msgspec.structs.replace(one, model=msgspec.structs.replace(one.model, key=f"m{at}/1", name=f"m{at}"))
        for at in range(4)
    ]
    found = profile_all(models, [CPU], Shelf())
    assert tried.read_text() == ".."
    assert [problem.model for problem in found.problems] == ["m0", "m1", "m2", "m3"]


def test_models_come_one_by_one_and_share_the_measurement_of_their_code(served: list[ServedVersion]) -> None:
    shelf = Shelf()
    with closing(Profiler([CPU], shelf)) as profiler:
        first, second = served
        assert not profiler.is_known(first.code)
        assert profiler.profile(first) == []
        assert profiler.is_known(second.code)
        before = dict(profiler.profiles)
        assert profiler.profile(second) == []
        assert (profiler.profiles, profiler.measured) == (before, {first.code.code_id})
    with closing(Profiler([CPU], shelf)) as profiler:
        assert profiler.profile(second) == []
        assert (profiler.profiles, profiler.measured) == (before, set()), "from the cache"
    with closing(Profiler([CPU], shelf, again=True)) as profiler:
        assert not profiler.is_known(first.code)
        assert profiler.profile(first) == []
        assert profiler.profiles != before


def test_a_code_is_measured_although_the_process_that_forks_was_killed(served: list[ServedVersion]) -> None:
    processes = ProfileProcesses()
    before = set(children(os.getpid()))
    try:
        for _ in range(2):
            assert processes.measure(served[0].code, served[0].model, CPU).warnings == ()
        (parent,) = set(children(os.getpid())) - before
        os.kill(parent, signal.SIGKILL)
        until("it is gone", lambda: "Z" in str(read_thread_state(parent)))
        assert processes.measure(served[0].code, served[0].model, CPU).warnings == ()
    finally:
        processes.close()
    assert set(children(os.getpid())) == before


def test_codes_are_measured_only_on_devices_that_run_them(served: list[ServedVersion]) -> None:
    torch = DeviceConfig(device="torch-cpu:0", kind="torch-cpu")
    found = profile_all(served, [torch, CPU], Shelf())
    assert [profile.device_kind for profile in found.profiles] == ["cpu"]
    assert found.warnings == ()


# A server without devices: profiles are those that others measured.


def test_without_devices_all_profiles_that_there_are_are_taken(tmp_path: Path) -> None:
    (tmp_path / "store").mkdir()
    code, model = records.code("c1"), records.model("a", "c1")
    served = ServedVersion(model=model, code=code)
    profiles = [records.profile("c1", {1: 10**6}, device_kind=kind) for kind in ("cpu", "cuda:sm_90")]
    with Cache(tmp_path / "builder", store=str(tmp_path / "store")) as builder:
        builder.save_profile(profiles[0])
        builder.save_profile(records.profile("c10", {1: 1}, device_kind="cpu"))
    with Cache(tmp_path / "here", store=str(tmp_path / "store")) as cache:
        cache.save_profile(profiles[1])
        with closing(Profiler((), cache)) as profiler:
            assert profiler.is_known(code)
            assert profiler.profile(served) == []
            assert profiler.profiles == {("c1", one.device_kind): one for one in profiles}
            assert not profiler.measured
            other = ServedVersion(model=records.model("b", "c2"), code=records.code("c2"))
            (problem,) = profiler.profile(other)
            assert "store: expected a profile of its code, found none" in str(problem)
            assert "--device KIND" in str(problem)


def test_durations_of_an_emulated_device_are_in_the_shared_store_for_servers_without_one(
    tmp_path: Path,
) -> None:
    (tmp_path / "store").mkdir()
    served = ServedVersion(model=records.model("a", "c1"), code=records.code("c1", backend="onnx"))
    device = DeviceConfig(device="emulated:0", kind="emulated", profile="v100")
    for at in ("first", "second"):
        with (
            Cache(tmp_path / at, store=str(tmp_path / "store")) as cache,
            closing(Profiler((device,), cache)) as profiler,
        ):
            assert profiler.profile(served) == []
    with Cache(tmp_path / "other", store=str(tmp_path / "store")) as other:
        assert [one.device_kind for one in other.profiles("c1")] == ["emulated:v100"]

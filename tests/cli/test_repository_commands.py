"""``validate``, ``profile`` and ``profile --no-measure``: their screens, their JSON, their exit codes."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from clockwork_serve.cli.repository import _durations
from clockwork_serve.messages import Profile
from tests.cli.commands import Cli

COMPILE = "profile --no-measure"
COMMANDS = ("validate", COMPILE, "profile")
WITHOUT_TORCH = """
import importlib.util, sys
found = importlib.util.find_spec
importlib.util.find_spec = lambda name, *more: None if name == "torch" else found(name, *more)
from clockwork_serve.cli.entry import run
sys.exit(run(sys.argv[1:]))
"""


@pytest.mark.parametrize("command", COMMANDS)
def test_a_good_repository_is_a_table_and_exit_0(command: str, repository: Path, cli: Cli) -> None:
    devices = ["--device", "emulated:v100"] if command == "profile" else []

    shown = cli(*command.split(), repository, *devices)
    assert "slow/1" in shown.out
    assert "compiling 1/1: slow/1" in shown.err
    assert "problem:" not in shown.err


@pytest.mark.parametrize("command", COMMANDS)
def test_a_broken_model_is_named_and_exit_1(command: str, broken: Path, cli: Cli) -> None:
    devices = ["--device", "emulated:v100"] if command == "profile" else []

    shown = cli(*command.split(), broken, *devices, code=1)
    assert "slow/1" in shown.out
    assert "problem: model 'broken'" in shown.err


@pytest.mark.parametrize("command", COMMANDS)
def test_a_folder_that_is_not_there_is_one_line(command: str, repository: Path, cli: Cli) -> None:
    wrote = cli(*command.split(), repository / "none", code=1)
    assert wrote.err.startswith("error: model repository: expected a readable folder")


@pytest.mark.parametrize("command", COMMANDS)
def test_an_empty_folder_is_a_problem_and_exit_1(
    command: str, repository: Path, tmp_path: Path, cli: Cli
) -> None:
    empty = tmp_path / "empty"
    empty.mkdir()

    said = cli(*command.split(), empty, code=1).err
    assert "problem: repository: models: expected each model at MODEL/1/model.onnx (or model.pt2" in said
    assert f"found no model in {empty}" in said


def test_a_model_file_in_the_root_is_a_problem_beside_what_is_served(repository: Path, cli: Cli) -> None:
    (repository / "model.onnx").write_bytes(b"")

    shown = cli("validate", repository, code=1)
    assert "slow/1" in shown.out
    assert "1 model version can be served, 1 problem" in shown.out
    assert "found model.onnx in the repository's own folder; move it to MODEL/1/model.onnx" in shown.err


def test_a_models_own_folder_is_told_as_that_and_its_settings_are_not_the_servers(
    repository: Path, cli: Cli
) -> None:
    (repository / "slow" / "1").mkdir()
    (repository / "slow" / "1" / "model.onnx").write_bytes(b"")

    said = cli("validate", repository / "slow", code=1).err
    assert f"1 is a version: give the folder above that of the model, {repository}" in said


def test_one_file_is_validated_by_itself(repository: Path, tmp_path: Path, cli: Cli) -> None:
    file = tmp_path / "net.onnx"
    file.write_bytes(b"not a graph")
    assert "problem: model 'net' version 1" in cli("validate", file, code=1).err
    wrote = cli("validate", tmp_path / "none.onnx", code=1)
    assert wrote.err.startswith("error: model file: expected a readable file")


@pytest.mark.parametrize("command", ["validate", COMPILE])
def test_a_torch_program_for_a_gpu_that_is_not_here_is_a_problem_and_the_rest_is_served(
    command: str, repository: Path, cli: Cli
) -> None:
    (repository / "program" / "1").mkdir(parents=True)
    (repository / "program" / "1" / "model.pt2").write_bytes(b"no program")

    shown = cli(*command.split(), repository, "--torch-target", "cuda", code=1)
    assert "slow/1" in shown.out
    assert "problem: model 'program' version 1" in shown.err


@pytest.mark.parametrize("command", ["validate", COMPILE])
def test_a_torch_target_that_there_is_not_is_named(command: str, repository: Path, cli: Cli) -> None:
    assert "'cpu', 'cuda'" in cli(*command.split(), repository, "--torch-target", "gpu", code=2).err


def test_validate_says_how_much_is_reserved_for_outputs(repository: Path, cli: Cli) -> None:
    told = (repository / "slow" / "clockwork.toml").read_text()
    for name, output in (
        ("open", "dims = [-1], datatype = 'FP32'"),
        ("texts", "dims = [1], datatype = 'BYTES'"),
    ):
        (repository / name).mkdir()
        (repository / name / "clockwork.toml").write_text(
            told.replace('"y", dims = [4], datatype = "FP32"', f'"y", {output}')
        )
    (repository / "asked").mkdir()
    (repository / "asked" / "clockwork.toml").write_text(
        "output_bytes = 3145728\n" + (repository / "open" / "clockwork.toml").read_text()
    )

    lines = cli("validate", repository).out.splitlines()
    rooms = {line.split()[0]: line for line in lines if "/1 " in line}
    for key, room in (
        ("slow/1", " 64 B "), ("open/1", "open, first 64.0 KiB"), ("texts/1", "open, first 64.0 KiB"),
        ("asked/1", "open, first 3.0 MiB"),
    ):  # fmt: skip
        assert room in rooms[key]


def test_validate_for_machines(broken: Path, cli: Cli) -> None:
    shown = cli("validate", broken, "--json", code=1)
    found = json.loads(shown.out)
    assert shown.err == ""
    assert found["ok"] is False
    assert found["models"] == [
        {"name": "slow", "version": "1", "output_bytes": 64, "outputs_open": False, "warnings": []}
    ]
    assert [problem["model"] for problem in found["problems"]] == ["broken"]


def test_compile_for_machines(repository: Path, cli: Cli) -> None:
    [model] = cli(*COMPILE.split(), repository, "--json").json["models"]
    assert (model["name"], model["backend"], model["weights_bytes"]) == ("slow", "emulated", 2 << 20)


def test_profile_for_machines(repository: Path, cli: Cli) -> None:
    found = cli("profile", repository, "--device", "emulated:v100", "--json").json
    [profile] = found["profiles"]
    assert profile["device_kind"] == "emulated:v100"
    assert profile["infer_ns"] == {"1": 5_000_000, "8": 20_000_000}
    assert found["models"] == {profile["code_id"]: ["slow/1"]}


def test_a_profile_is_a_table_for_simulate(repository: Path, tmp_path: Path, cli: Cli) -> None:
    shutil.copytree(repository / "slow", repository / "many")
    (repository / "many" / "clockwork.toml").write_text(
        (repository / "slow" / "clockwork.toml").read_text() + 'version_policy = "all"\n'
    )
    for version in ("1", "2"):
        (repository / "many" / version).mkdir()
    table = cli("profile", repository, "--device", "emulated:v100", "--json").out
    zoo, scenario = tmp_path / "mine.json", tmp_path / "mine.toml"
    zoo.write_text(table)
    scenario.write_text(
        'name = "mine"\nseconds = 5\n[[models]]\nname = "slow"\nkind = "slow"\n'
        '[[loads]]\nname = "all"\nmodels = ["slow"]\narrivals = "poisson"\nslo_ms = 100\nrate_rps = 50\n'
    )

    found = cli("simulate", scenario, "--zoo", zoo, "--json", "-").json
    assert (found["setup"]["zoo"], found["loads"][0]["satisfaction"]) == (str(zoo), 1)
    rows = json.loads(zoo.read_text())["tables"]["emulated:v100"]
    assert sorted(row["model"] for row in rows) == ["many", "many.1", "slow"]
    assert {(row["weights_mb"], row["infer_b8_ms"]) for row in rows} == {(2.097152, 20.0)}


def test_profile_shows_powers_of_two_and_the_largest() -> None:
    profile = Profile(
        code_id="c", device_kind="cpu", infer_ns={size: size * 1_500_000 for size in range(1, 7)},
        load_base_ns=0, load_ns_per_mib=0,
    )  # fmt: skip
    assert _durations(profile) == "1: 1.50  2: 3.00  4: 6.00  6: 9.00"


def test_a_setting_reaches_the_work(repository: Path, tmp_path: Path, cli: Cli) -> None:
    cache = tmp_path / "elsewhere"

    cli(*COMPILE.split(), repository, "--cache", cache)
    assert list(cache.iterdir()) != []


def test_a_cache_that_cannot_be_written_is_one_line(repository: Path, tmp_path: Path, cli: Cli) -> None:
    blocked = tmp_path / "file"
    blocked.write_text("")

    wrote = cli(*COMPILE.split(), repository, "--cache", blocked, code=1)
    assert wrote.err.startswith("error: cache_dir: expected a folder that can be written")


@pytest.mark.parametrize("command", [COMPILE, "profile"])
def test_the_store_gets_what_the_cache_holds(
    command: str, repository: Path, tmp_path: Path, cli: Cli
) -> None:
    devices = ["--device", "emulated:v100"] if command == "profile" else []
    cli(*command.split(), repository, *devices)
    store = tmp_path / "store"
    store.mkdir()

    assert f"store: {store}" in cli(*command.split(), repository, "--store", store, *devices).out
    assert len(list(store.glob("*/codes/*/code.json"))) == 1
    assert len(list(store.glob("objects/*/*"))) == 1


def test_a_store_that_is_not_there_is_a_problem_and_what_was_made_is_kept_here(
    repository: Path, tmp_path: Path, cli: Cli
) -> None:
    missing = tmp_path / "missing"

    shown = cli(*COMPILE.split(), repository, "--store", missing, code=1)
    assert "slow/1" in shown.out
    assert f"store: expected a store that can be reached, found {missing}: NotADirectoryError" in shown.err
    assert not missing.exists()
    assert list((tmp_path / "cache").glob("*/codes/*"))


def test_the_self_test_is_a_screen_and_exit_0(cli: Cli) -> None:
    shown = cli("validate", "--self-test", "--device", "cpu").out
    assert "cpu:0 passed the self-test" in shown
    assert "onnxruntime: " in shown
    lines = [line.split()[:2] for line in shown.splitlines()]
    steps = ("device", "compile", "load", "run", "compare", "batch", "timings")
    assert [line for line in lines if line[1:] == ["ok"]] == [[step, "ok"] for step in steps]


def test_the_self_test_of_a_gpu_that_is_not_there_names_it_and_exits_with_1(cli: Cli) -> None:
    shown = cli("validate", "--self-test", "--device", "cuda:77", code=1)
    assert shown.err.startswith("problem: device: device cuda:77: expected ")
    assert "cuda:77 did not pass the self-test" in shown.out


def test_the_self_test_for_machines(cli: Cli) -> None:
    shown = cli("validate", "--self-test", "--device", "cuda:77", "--json", code=1)
    assert shown.err == ""
    assert (shown.json["ok"], shown.json["device"], shown.json["infer_ms"]) == (False, "cuda:77", {})
    assert [step["result"] for step in shown.json["steps"]] == ["failed"] + ["not run"] * 6


@pytest.mark.parametrize("kind", ["torch-cpu", "cuda:0"])
def test_the_self_test_without_torch_says_what_to_install(kind: str) -> None:
    ended = subprocess.run(
        [sys.executable, "-c", WITHOUT_TORCH, "validate", "--self-test", "--device", kind],
        capture_output=True, text=True, check=False, timeout=60,
    )  # fmt: skip

    assert ended.returncode == 1
    assert "expected torch to be installed; found none; " in ended.stderr
    assert "pip install './packages/clockwork-serve[torch]'" in ended.stderr


def test_the_self_test_takes_one_device_and_no_repository(repository: Path, cli: Cli) -> None:
    said = cli.refused("validate", repository, "--self-test", "--max-batch", "4")
    assert "expected only --device, --config and --json with it, found REPO, --max-batch" in said
    assert "REPO" in cli.refused("validate", "--self-test", "--store", repository, repository)
    assert "expected one with --self-test" in cli.refused(
        "validate", "--self-test", "--device", "cpu", "--device", "torch-cpu"
    )


def test_validate_needs_a_repository_or_the_self_test(repository: Path, cli: Cli) -> None:
    said = cli.refused("validate")
    assert "REPO: expected the folder of a model repository, or --self-test" in said
    assert "--device: expected --self-test" in cli.refused("validate", repository, "--device", "cpu")


@pytest.mark.parametrize("command", [COMPILE, "profile"])
def test_the_summary_says_what_is_not_in_the_store(
    command: str, repository: Path, tmp_path: Path, cli: Cli
) -> None:
    given = [repository, "--store", tmp_path / "store"]
    if command == "profile":
        given += ["--device", "emulated:v100"]
    shown = cli(*command.split(), *given, code=1)
    assert f"not all in store: {tmp_path}/store" in shown.out
    (tmp_path / "store").mkdir()
    assert f", store: {tmp_path}/store" in cli(*command.split(), *given).out

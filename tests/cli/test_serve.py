"""``clockwork serve`` as its user sees it: what it prints, how it ends. Real processes."""

from __future__ import annotations

import json
import shutil
import signal
import socket
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from onnx import TensorProto, helper

from tests.cli.commands import Cli
from tests.end_to_end.commands import SMALL

pytestmark = pytest.mark.system
EMULATED = ("--device", "emulated:v100", "--http-port", "0", "--grpc-port", "0", "--metrics-port", "0")


@contextmanager
def serving(repository: Path | str, *options: str) -> Iterator[subprocess.Popen[str]]:
    """A ``clockwork serve`` process, ended at the latest with the block."""
    command = [sys.executable, "-m", "clockwork_serve", "serve", str(repository), *options]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as child:
        try:
            yield child
        finally:
            child.kill()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_it_says_where_it_listens_and_ends_in_good_order(repository: Path, number: signal.Signals) -> None:
    with serving(repository, *EMULATED, "--json") as child:
        assert child.stdout is not None
        ready = json.loads(child.stdout.readline())
        with urllib.request.urlopen(f"{ready['http']}/v2/health/ready", timeout=60) as answer:
            assert answer.status == 200
        with urllib.request.urlopen(ready["metrics"], timeout=60) as answer:
            assert b"clockwork_ready 1" in answer.read()
        child.send_signal(number)
        _, said = child.communicate(timeout=60)

    assert ready["ready"] is True
    assert ready["models"] == 1
    assert child.returncode == 0, said
    assert "Traceback" not in said


def test_for_people_it_is_a_short_list(repository: Path) -> None:
    with serving(repository, *EMULATED, "--grpc-port", "off") as child:
        assert child.stdout is not None
        lines = [child.stdout.readline().split() for _ in range(5)]
        child.send_signal(signal.SIGTERM)
        child.communicate(timeout=60)

    assert lines[0] == ["ready:", "1", "model"]
    assert [line[0] for line in lines[1:]] == ["http", "grpc", "metrics", "page"]
    assert lines[3] == ["metrics", f"{lines[4][1]}metrics"]
    assert lines[2] == ["grpc", "off"]


def test_a_port_in_use_is_one_line(repository: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        with serving(repository, *EMULATED, "--http-port", port) as child:
            shown, said = child.communicate(timeout=60)

    assert shown == ""
    errors = [line for line in said.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1
    assert "http_port" in errors[0]
    assert port in errors[0]
    assert "Traceback" not in said
    assert child.returncode != 0


def test_a_repository_that_is_not_there_is_told_before_a_port_in_use(repository: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        with serving(repository / "none", *EMULATED, "--http-port", port) as child:
            _, said = child.communicate(timeout=60)

    assert child.returncode == 1
    assert said.startswith("error: model repository: expected a readable folder")
    assert "port" not in said


def test_an_empty_repository_is_one_line(repository: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with serving(tmp_path / "empty", *EMULATED) as child:
        _, said = child.communicate(timeout=60)

    assert child.returncode == 1
    assert said.splitlines()[-1].startswith(
        "error: no model can be served: repository: models: expected each"
    )


def test_a_repository_without_a_model_that_can_be_served_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CLOCKWORK_CACHE", str(tmp_path / "cache"))
    (tmp_path / "models" / "broken" / "1").mkdir(parents=True)
    (tmp_path / "models" / "broken" / "1" / "model.onnx").write_bytes(b"not a graph")

    with serving(tmp_path / "models", *EMULATED) as child:
        _, said = child.communicate(timeout=60)

    assert child.returncode == 1
    assert said.splitlines()[-1].startswith("error: ")
    assert "broken" in said
    assert "Traceback" not in said


@pytest.mark.parametrize(("name", "shape"), [("double", (4,)), ("double-image", (3, 32, 32))])
def test_one_file_is_served_and_the_command_that_is_shown_asks_it(
    repository: Path, tmp_path: Path, name: str, shape: tuple[int, ...]
) -> None:
    if shutil.which("curl") is None:
        pytest.skip("curl is not there")
    file = tmp_path / f"{name}.onnx"
    file.write_bytes(doubling(shape))
    quiet = ("--http-port", "0", "--grpc-port", "off", "--metrics-port", "off", "--slo-ms", "20000", *SMALL)
    with serving(file, *quiet) as child:
        assert child.stdout is not None
        lines = [child.stdout.readline().strip() for _ in range(5)]
        assert lines[0] == "ready: 1 model"
        command = lines[4].removeprefix("ask").strip()
        assert f"/v2/models/{name}/infer" in command
        asked = subprocess.run(command, shell=True, capture_output=True, timeout=60, check=True)
        (output,) = json.loads(asked.stdout)["outputs"]
        assert (output["shape"], set(output["data"])) == ([1, *shape], {0.0})
        url = lines[1].split()[1]
        for action in ("unload", "load"):
            wish = urllib.request.Request(f"{url}/v2/repository/models/{name}/{action}", b"{}")
            with urllib.request.urlopen(wish, timeout=60) as answer:
                assert answer.status == 200
        child.send_signal(signal.SIGTERM)
        child.communicate(timeout=60)
    assert file.read_bytes() == doubling(shape)


def test_without_a_repository_the_catalogue_of_a_store_is_served(
    repository: Path, tmp_path: Path, cli: Cli
) -> None:
    store = tmp_path / "store"
    store.mkdir()
    with serving(f"--store={store}", *EMULATED) as child:
        _, said = child.communicate(timeout=60)
    assert child.returncode == 1
    assert said.splitlines()[-1].startswith("error: repository: store: expected a catalogue for this version")

    cli("profile", repository, "--device", "emulated:v100", "--store", store)
    shutil.rmtree(repository)
    elsewhere = ("--cache", str(tmp_path / "elsewhere"))
    with serving(f"--store={store}", *elsewhere, *EMULATED, "--json") as child:
        assert child.stdout is not None
        ready = json.loads(child.stdout.readline())
        assert ready["models"] == 1
        for action in ("unload", "load"):
            wish = urllib.request.Request(f"{ready['http']}/v2/repository/models/slow/{action}", b"{}")
            with urllib.request.urlopen(wish, timeout=60) as answer:
                assert answer.status == 200
        with urllib.request.urlopen(f"{ready['http']}/v2/models/slow/ready", timeout=60) as answer:
            assert answer.status == 200
        child.send_signal(signal.SIGTERM)
        child.communicate(timeout=60)
    assert child.returncode == 0


def doubling(shape: tuple[int, ...]) -> bytes:
    """A model ``y = x + x`` of such rows."""
    rows = ["N", *shape]
    tensors = [helper.make_tensor_value_info(name, TensorProto.FLOAT, rows) for name in "xy"]
    graph = helper.make_graph(
        [helper.make_node("Add", ["x", "x"], ["y"])], "double", tensors[:1], tensors[1:]
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)
    return bytes(model.SerializeToString())

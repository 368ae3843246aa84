"""Each server is asked for the same inputs in its own words, and its answers are understood."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest

from comparison.peers import measure, record, served
from comparison.peers.install import requirements
from comparison.peers.loads import EMULATED, Load
from comparison.peers.peer import Answer, Floats, Setup, differs
from comparison.peers.servers import PEERS, http_output

X: Floats = np.arange(4, dtype=np.float32).reshape(1, 4)


def setup(folder: Path, **more: object) -> Setup:
    models = {f"m-{row:04d}": float(row) for row in range(2)}
    return Setup(
        **{
            "kind": served.DEVICE, "models": models, "shape": (4,), "slo_ms": 200.0, "folder": folder,
            "port": 9000, "out": (4,), **more,
        }
    )  # type: ignore[arg-type]  # fmt: skip


@pytest.mark.parametrize("name", PEERS)
def test_it_is_told_the_inputs_as_they_are(name: str, tmp_path: Path) -> None:
    asked = PEERS[name]
    request = asked.request(setup(tmp_path), X)

    assert request.path.count("{model}") == 1
    assert X.tobytes() in request.body


@pytest.mark.parametrize("name", PEERS)
def test_it_says_how_it_is_configured_and_who_advises_that(name: str) -> None:
    asked = PEERS[name]

    assert asked.name == name
    assert asked.configured
    assert asked.source
    if name != "clockwork":
        pinned = requirements(name)
        assert all("==" in line for line in pinned)
        assert any(line.lower().startswith(f"{asked.package}==") for line in pinned)
        assert "onnxruntime==1.32.0" in pinned


@pytest.mark.parametrize("name", sorted({*PEERS} - {"triton"}))
def test_its_command_needs_nothing_that_is_installed(name: str, tmp_path: Path) -> None:
    command = PEERS[name].command(setup(tmp_path))

    assert command
    assert all(isinstance(word, str) for word in command)


def test_what_is_not_installed_says_how_to_install_it(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr("comparison.peers.peer.INSTALLED", tmp_path)

    assert "install ray_serve" in PEERS["ray_serve"].why_not()


def test_who_listens_everywhere_is_refused_without_a_network_of_its_own(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr("comparison.peers.peer.INSTALLED", tmp_path)
    (tmp_path / "ray_serve").mkdir()
    (tmp_path / "ray_serve" / ".set-up").touch()

    assert PEERS["ray_serve"].why_not(isolated=True) == ""
    assert "all interfaces" in PEERS["ray_serve"].why_not(isolated=False)


def test_clockwork_is_told_the_deadline_and_no_durations(tmp_path: Path) -> None:
    asked = PEERS["clockwork"]
    request = asked.request(setup(tmp_path), X)
    asked.command(setup(tmp_path))

    assert ("x-slo-ms", "200") in request.headers
    settings = (tmp_path / "repository" / "m-0000" / "clockwork.toml").read_text()
    assert 'backend = "python"' in settings
    assert "infer_ms" not in settings
    assert not list((tmp_path / "repository").rglob("*profile*"))


def test_clockwork_gets_memory_for_as_many_models_as_are_said(tmp_path: Path) -> None:
    file = tmp_path / "one.onnx"
    file.write_bytes(bytes(300 << 10))
    models = {f"m-{row}": str(file) for row in range(3)}
    given = setup(tmp_path, kind="mobilenet_v3_small", models=models, memory_models=2)
    command = list(PEERS["clockwork"].command(given))

    assert command[command.index("--device-memory") + 1] == str(2 * (512 << 10))


def test_triton_is_told_what_is_left_of_the_deadline_after_a_full_batch(tmp_path: Path) -> None:
    request = PEERS["triton"].request(setup(tmp_path), X)
    length = int(dict(request.headers)["Inference-Header-Content-Length"])

    assert json.loads(request.body[:length])["parameters"]["timeout"] == (200 - 48 - 4) * 1000


def test_triton_says_503_when_time_is_up_and_when_there_is_too_much() -> None:
    triton = PEERS["triton"]

    assert triton.understood("rejected", "503 Request timeout expired") == "expired"
    assert triton.understood("rejected", "503 Exceeds maximum queue size") == "rejected"
    assert triton.understood("failed", "500 failed") == "failed"


def test_an_answer_of_the_binary_extension_is_read() -> None:
    head = b'{"outputs":[]}'
    answer = Answer(200, {"inference-header-content-length": str(len(head))}, head + X.tobytes())

    assert http_output(answer).tolist() == [0, 1, 2, 3]


def test_an_answer_differs_by_its_worst_number_and_by_its_size() -> None:
    assert differs(np.array([1, 2.2], np.float32), np.array([1, 2], np.float32)) == pytest.approx(0.1)
    assert differs(np.zeros(3, np.float32), np.zeros(4, np.float32)) == float("inf")


class _Echo(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_POST(self) -> None:
        content = self.rfile.read(int(self.headers["Content-Length"]))
        found = (np.frombuffer(content, np.float32) + (1 if self.path == "/m-0001" else 0)).tobytes()
        status = 503 if self.path in self.server.refused else 200  # type: ignore[attr-defined]
        self.send_response(status)
        self.send_header("Content-Length", str(len(found)))
        self.end_headers()
        self.wfile.write(found)

    def log_message(self, *said: object) -> None:
        pass


@pytest.fixture
def echo(monkeypatch: pytest.MonkeyPatch) -> Iterator[ThreadingHTTPServer]:
    """Serves two models right, but for those whose paths are refused."""
    monkeypatch.setattr(measure, "PATIENCE_S", 0.1)
    server = ThreadingHTTPServer(("127.0.0.1", 0), _Echo)
    server.refused = set()  # type: ignore[attr-defined]
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


RIGHT: Floats = np.stack([X[0], X[0] + 1])


def test_right_answers_of_all_models_are_right(echo: ThreadingHTTPServer, tmp_path: Path) -> None:
    given = setup(tmp_path, port=echo.server_port)

    assert measure.check(PEERS["fastapi_ort"], given, X, RIGHT) == measure.Checked(0.0, ())


def test_the_answer_of_another_model_is_wrong(echo: ThreadingHTTPServer, tmp_path: Path) -> None:
    given = setup(tmp_path, port=echo.server_port)

    with pytest.raises(measure.WrongAnswer, match="m-0001 differs"):
        measure.check(PEERS["fastapi_ort"], given, X, np.stack([X[0], X[0]]))


def test_one_that_refuses_is_named_and_if_all_do_nothing_can_be_measured(
    echo: ThreadingHTTPServer, tmp_path: Path
) -> None:
    given = setup(tmp_path, port=echo.server_port)
    echo.refused.add("/m-0000")  # type: ignore[attr-defined]
    assert measure.check(PEERS["fastapi_ort"], given, X, RIGHT).silent == ("m-0000",)

    echo.refused.add("/m-0001")  # type: ignore[attr-defined]
    with pytest.raises(measure.WrongAnswer, match="no model answered; the last said 503"):
        measure.check(PEERS["fastapi_ort"], given, X, RIGHT)


@pytest.mark.system
@pytest.mark.skipif(find_spec("clockwork_lab.bench") is None, reason="clockwork bench is not here")
def test_a_load_is_played_and_its_record_says_what_became_of_it(
    echo: ThreadingHTTPServer, tmp_path: Path
) -> None:
    requests = {"name": "r", "models": ["m"], "arrivals": "fixed", "rate_rps": 40, "slo_ms": 1000}
    scenario = tmp_path / "short.toml"
    scenario.write_text(Load("short", "short", [("m", EMULATED, 2)], [requests], 2, 0.5).text)
    echo.refused.add("/m-0001")  # type: ignore[attr-defined]
    asked, given = PEERS["fastapi_ort"], setup(tmp_path, port=echo.server_port)
    played = record.play(asked, given, scenario, X, seed=1, core=0)
    found = record.figures(played)

    assert found["asked"] == 60
    assert found["rejected"] == 30
    assert found["in_time"] + found["late"] == 30
    assert played.about["generator"]["connections"] >= 1
    assert sum(count for *_, count in record.reasons(played)) == 80


def test_no_more_requests_may_wait_than_are_served_in_half_of_the_slo(tmp_path: Path) -> None:
    network = {"kind": "mobilenet_v2", "image_ms": 10.0}

    assert setup(tmp_path, **network).waiting == 10
    assert setup(tmp_path, **network, slo_ms=1.0).waiting == 1

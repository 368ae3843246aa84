"""Gateways on other machines, as processes that join over TCP: answers, refusals, what dies, what is cut."""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from clockwork_serve import __version__
from clockwork_serve.config import Settings
from clockwork_serve.serve.transport import PROTOCOL
from harness import repositories
from harness.http_load import Report, closed_loop, infer_message, run
from harness.ports import free_port
from harness.serving import Serving, total, until
from tests.end_to_end import cables, machines
from tests.end_to_end.cables import Cable
from tests.end_to_end.conftest import call, x_json
from tests.end_to_end.machines import (
    LONG,
    MODELS,
    OTHER_CLOCK,
    WIDE,
    FarGateway,
    far_gateway,
    far_worker,
    joined,
    other_clocks,
    product,
)
from tests.serve.certificates import Certificates, certificate_of, certificates
from tests.serve.proxy import Proxy, proxy
from tests.timing import Timing

Start = Callable[..., AbstractContextManager[Serving]]
SILENCE_S = Settings().silence_s
BACK_S = 10.0
"""Far above what is measured: these machines are shared."""

HOPELESS = {(429, "would_miss_deadline"), (504, "")}
"""How a request ends that is due sooner than it can be told to the server: refused, or expired by then."""

SLEEPY = '''"""Echoes, and sleeps first if the first number says so."""

import time


class Model:
    def load(self, path):
        pass

    def infer(self, inputs):
        if float(inputs["x"].reshape(-1)[0]) == 7.0:
            time.sleep(0.7)
        return {"y": inputs["x"]}

    def unload(self):
        pass
'''


@dataclass
class Place:
    """A server that others may join, and what it said."""

    serving: Serving
    port: int
    certificates: Certificates
    said: list[str] = field(default_factory=list)

    def gateway(self, *options: str, **more: Any) -> AbstractContextManager[FarGateway]:
        port = more.pop("port", self.port)
        return far_gateway(port, self.certificates, *options, **more)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory, start: Start) -> Iterator[Place]:
    root = tmp_path_factory.mktemp("place")
    files, port = certificates(root), free_port()
    settings = machines.settings(files, port, SILENCE_S)
    said: list[str] = []
    repository = machines.matrices(root / "models")
    repositories.python_model(repository, "sleepy", SLEEPY)
    with start(repository, **settings, log_level="info", on_line=said.append) as serving:
        yield Place(serving, port, files, said)


@pytest.fixture(scope="module")
def gateway(place: Place) -> Iterator[FarGateway]:
    """One that most tests ask."""
    with place.gateway("--log-level", "info") as found:
        serves(found)
        yield found


def serves(gateway: FarGateway) -> None:
    until(f"{gateway.name} serves", lambda: gateway.ready, machines.PATIENCE_S)


def listens(gateway: FarGateway) -> bool:
    try:
        return call(gateway.url, "/v2/health/live").status in {200, 503}
    except OSError:
        return False


def ask(gateway: FarGateway, index: int = 0, rows: int = 1, slo_ms: float = 5000) -> Any:
    x = np.random.default_rng(index + rows).standard_normal((rows, WIDE), dtype=np.float32)
    body = x_json(x.ravel().tolist(), [rows, WIDE], parameters={"slo_ms": slo_ms})
    return call(gateway.url, f"/v2/models/m{index}/infer", body), x


def check_answer(gateway: FarGateway, index: int = 0, rows: int = 1) -> Any:
    response, x = ask(gateway, index, rows)
    assert response.status == 200, response.json
    (y,) = response.json["outputs"]
    found = np.asarray(y["data"], np.float32).reshape(rows, LONG)
    np.testing.assert_allclose(found, product(index, x), rtol=1e-3, atol=1e-3)
    return response.json["parameters"]


def settled(place: Place, gateway: FarGateway) -> None:
    """Nothing is open, and no memory is taken."""
    until("nothing is open", lambda: total(gateway.metrics(), "clockwork_requests_open") == 0)
    until(
        "its memory is free",
        lambda: total(gateway.metrics(), "clockwork_gateway_region_bytes", state="taken") == 0,
    )
    assert total(place.serving.metrics(), "clockwork_answers_unmatched_total") == 0


def books(gateway: FarGateway) -> tuple[float, float]:
    """What its clients asked, and what ended, by itself or by the controller; nobody asks another."""
    until("nothing is open", lambda: total(gateway.metrics(), "clockwork_requests_open") == 0)
    metrics = gateway.metrics()
    ended = [total(metrics, f"clockwork_{whose}requests_total") for whose in ("", "gateway_")]
    return total(metrics, "clockwork_gateway_received_total"), sum(ended)


def test_clients_are_served_there_as_at_home(place: Place, gateway: FarGateway) -> None:
    import tritonclient.grpc as triton

    assert gateway.gateway in place.serving.server.state()["gateways"]
    for index in range(MODELS):
        for rows in (1, 3, 16):
            check_answer(gateway, index, rows)
    received, ended = books(gateway)
    client = triton.InferenceServerClient(gateway.at["grpc"])
    x = np.ones((2, WIDE), np.float32)
    given = triton.InferInput("x", list(x.shape), "FP32")
    given.set_data_from_numpy(x)
    found = client.infer("m1", [given]).as_numpy("y")
    client.close()
    np.testing.assert_allclose(found, product(1, x), rtol=1e-3, atol=1e-3)
    statistics = call(gateway.url, "/v2/models/m1/stats").json["model_stats"][0]
    assert statistics["inference_count"] >= 20
    assert books(gateway) == (received + 1, ended + 1)
    settled(place, gateway)


def test_refusals_are_those_of_home(place: Place, gateway: FarGateway) -> None:
    received, ended = books(gateway)
    unknown = call(gateway.url, "/v2/models/none/infer", x_json([1.0]))
    assert unknown.status == 404
    wrong = call(gateway.url, "/v2/models/m0/infer", x_json([1.0, 2.0]))
    assert wrong.status == 400
    hopeless, _ = ask(gateway, slo_ms=0.01)
    assert (hopeless.status, hopeless.json["reason"]) in HOPELESS, hopeless.json
    headers = {"x-slo-ms": "0.01"}
    early = call(gateway.url, "/v2/models/m0/infer", x_json([1.0] * 16 * WIDE, [16, WIDE]), headers)
    assert (early.status, early.json["reason"]) in HOPELESS, early.json
    now_received, now_ended = books(gateway)
    assert now_received - received == now_ended - ended
    settled(place, gateway)


def test_clients_that_leave_take_their_requests_with_them(place: Place, gateway: FarGateway) -> None:
    import http.client

    received, ended = books(gateway)
    body = x_json([1.0] * 16 * WIDE, [16, WIDE], parameters={"slo_ms": 3000})
    for _ in range(30):
        client = http.client.HTTPConnection(gateway.url.removeprefix("http://"))
        client.request("POST", "/v2/models/m0/infer", body)
        client.close()
    until("all have come", lambda: books(gateway)[0] == received + 30)
    assert books(gateway)[1] == ended + 30
    settled(place, gateway)


@pytest.mark.skipif(not other_clocks(), reason="this system lets no process have a clock of its own")
def test_a_gateway_with_another_clock_keeps_deadlines(place: Place) -> None:
    """Its monotonic clock is eleven days ahead, in a time namespace of its own."""
    with place.gateway(name="later", before=OTHER_CLOCK) as found:
        serves(found)
        for index in range(MODELS):
            told = check_answer(found, index)
            assert 0 <= told["queue_ms"] < 5000
        hopeless, _ = ask(found, slo_ms=0.01)
        assert (hopeless.status, hopeless.json["reason"]) in HOPELESS, hopeless.json


def test_it_ends_when_told_and_the_server_forgets_it(place: Place) -> None:
    with place.gateway("--gateways", "2", name="brief") as found:
        serves(found)
        names = {"brief.gateway-0", "brief.gateway-1"}
        until("both joined", lambda: names <= set(place.serving.server.state()["gateways"]))
        # Each is ready once a worker reached it; the kernel chooses which one answers.
        until("both serve", lambda: all(found.ready for _ in range(16)))
        check_answer(found)
        found.process.send_signal(signal.SIGTERM)
        assert found.process.wait(60) == 0, found.said
        until("both are gone", lambda: not names & set(place.serving.server.state()["gateways"]))


def test_another_gateway_of_the_same_name_waits(place: Place) -> None:
    with place.gateway(name="twin") as first:
        serves(first)
        with place.gateway(name="twin") as second:
            until("it is told", lambda: second.heard("another gateway of this server is called twin"))
            until("its port listens", lambda: listens(second))  # last, and on a busy machine after that
            assert call(second.url, "/v2/models/m0/infer", x_json([1.0] * WIDE)).status == 503
            time.sleep(1.0)
            assert sum("another gateway" in line for line in second.said) < 3, "it says so once"
            check_answer(first)
            first.process.send_signal(signal.SIGTERM)
            first.process.wait(60)
            serves(second)
            check_answer(second)


def test_a_build_of_the_next_protocol_serves(place: Place, tmp_path: Path) -> None:
    with place.gateway(name="next", before=machines.another_build(tmp_path, 1)) as found:
        serves(found)
        check_answer(found)


def test_a_build_of_no_neighbouring_protocol_is_told_both_versions_and_comes_again(
    place: Place, tmp_path: Path
) -> None:
    with place.gateway(name="odd", before=machines.another_build(tmp_path, 2)) as found:
        told = f"is of clockwork-serve {__version__!r} and speaks protocol {PROTOCOL}, expected"
        until("it is told", lambda: found.heard(told) and found.heard("as '9.9' here"))
        told_here = f"is of clockwork-serve '9.9' and speaks protocol {PROTOCOL + 2}, expected"
        until("the server says so", lambda: any(told_here in line for line in place.said))
        assert found.process.poll() is None


def test_a_gateway_whose_certificate_does_not_name_the_cluster_ends_and_says_what_to_do(
    place: Place, tmp_path: Path
) -> None:
    named = certificate_of(place.certificates, tmp_path, "127.0.0.1")
    with far_gateway(place.port, named, name="misnamed") as found:
        assert found.process.wait(60) == 2
    assert found.heard("cluster_certificate: expected one that names cluster.clockwork")
    assert found.heard("subjectAltName=DNS:cluster.clockwork")


@pytest.mark.parametrize(
    ("victim", "number"),
    [
        ("bridge", signal.SIGKILL),
        ("controller", signal.SIGKILL),
        ("bridge", signal.SIGSTOP),
        pytest.param("controller", signal.SIGSTOP, marks=pytest.mark.slow),
    ],
)
def test_after_a_death_at_the_server_it_serves_again(
    place: Place, gateway: FarGateway, victim: str, number: signal.Signals
) -> None:
    serves(gateway)
    dead = place.serving.server.pid(victim)
    assert dead is not None
    os.kill(dead, number)
    if number == signal.SIGSTOP:
        until("it says so", lambda: not gateway.ready, BACK_S)
    until("another", lambda: place.serving.server.pid(victim) not in (None, dead))
    until("it serves again", lambda: ask(gateway)[0].status == 200, BACK_S)
    settled(place, gateway)


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP])
def test_a_gateway_that_dies_is_started_again(place: Place, number: signal.Signals) -> None:
    with place.gateway(name="mortal") as found:
        serves(found)
        (victim,) = found.children
        found.signal_children(number)
        until("another process", lambda: found.children not in ([], [victim]))
        serves(found)
        settled(place, found)


# Its network


def load(gateway: FarGateway, cut: Callable[[], None], heal: Callable[[], None], for_s: float) -> Report:
    """A load during which the network is cut and heals."""
    timer = threading.Timer(for_s, heal)

    def messages(index: int) -> bytes:
        if index == 100:
            cut()
            timer.start()
        x = np.ones((1, WIDE), np.float32).tobytes()
        return infer_message(gateway.url, f"m{index % MODELS}", [("x", "FP32", (1, WIDE), x)], slo_ms=1000)

    report = run(closed_loop(gateway.url, messages, requests=1000, connections=8, pause_s=0.02))
    timer.join()
    return report


@pytest.fixture(scope="module")
def between(place: Place) -> Iterator[tuple[FarGateway, Proxy]]:
    with proxy(place.port) as found, place.gateway(name="beyond", port=found.port) as gateway:
        serves(gateway)
        yield gateway, found


def test_what_still_runs_when_the_link_is_lost_is_asked_again_and_answered_once(
    place: Place, between: tuple[FarGateway, Proxy]
) -> None:
    """Of the same controller, which still knows the first one: its worker reads its inputs."""
    gateway, network = between
    serves(gateway)
    controller, connections = place.serving.server.pid("controller"), network.connections
    answers: list[Any] = []
    body = x_json([7.0, 1.0, 2.0, 3.0], parameters={"slo_ms": 9000})
    client = threading.Thread(
        target=lambda: answers.append(call(gateway.url, "/v2/models/sleepy/infer", body))
    )
    client.start()
    until("it runs", lambda: open_and_waiting(place) == (1, 0))
    network.reset()
    until("a new link", lambda: network.connections > connections)
    client.join()
    assert answers[0].status == 200, answers[0].json
    assert answers[0].json["outputs"][0]["data"] == [7.0, 1.0, 2.0, 3.0]
    assert place.serving.server.pid("controller") == controller, "it lives"
    settled(place, gateway)


def open_and_waiting(place: Place) -> tuple[float, float]:
    """Requests without an answer, and those of them that are in no INFER."""
    metrics = place.serving.metrics()
    return total(metrics, "clockwork_requests_open"), total(metrics, "clockwork_requests_queued")


@pytest.mark.parametrize(
    ("there", "back"), [(True, True), (True, False), (False, True)], ids=["both", "from it", "to it"]
)
def test_a_cut_costs_no_request_its_one_answer(
    place: Place,
    between: tuple[FarGateway, Proxy],
    capsys: pytest.CaptureFixture[str],
    timing: Timing,
    there: bool,
    back: bool,
) -> None:
    gateway, network = between
    serves(gateway)
    received, _ = books(gateway)
    report = load(gateway, lambda: network.cut(there=there, back=back), network.heal, for_s=2.5)
    healed_s = time.monotonic()
    until("it serves again", lambda: ask(gateway)[0].status == 200, BACK_S)
    with capsys.disabled():
        sys.stdout.write(f"\nafter the load, {time.monotonic() - healed_s:.2f} s; {dict(report.ends())}")
    assert (len(report.samples), report.unanswered, report.unexpected_bytes) == (1000, 0, 0)
    with timing.judged():
        ends = report.ends()
        assert ends["200"] >= 90, ends
        assert all(sample.latency_ns < 3e9 for sample in report.samples), "all hear it in time"
    assert books(gateway)[0] >= received + 1000
    settled(place, gateway)


def test_a_pulled_cable_and_a_gateway_in_a_network_of_its_own(
    cable: Cable, tmp_path: Path, start: Start, capsys: pytest.CaptureFixture[str]
) -> None:
    """The kernel's own silence: no proxy, no reset, no end. A worker is beside it."""
    files, port = certificates(tmp_path), free_port()
    bridge = machines.settings(files, port, SILENCE_S) | {"listen_machines": f"{cables.HERE}:{port}"}
    far: dict[str, Any] = {"host": cables.HERE, "before": cable.there}
    with (
        start(machines.matrices(tmp_path / "models"), memory_bytes=machines.PAGE, **bridge) as serving,
        far_worker(port, files, tmp_path / "far", **far) as worker,
        far_gateway(port, files, "--host", cables.THERE, **far) as gateway,
    ):
        serves(gateway)
        joined(serving, worker)
        until("it serves", lambda: ask(gateway)[0].status == 200)
        cable.pull()
        until("the server forgot it", lambda: gateway.gateway not in serving.server.state()["gateways"], 60)
        cable.put_back()
        healed_s = time.monotonic()
        until("it serves again", lambda: gateway.ready and ask(gateway)[0].status == 200, 2 * BACK_S)
        with capsys.disabled():
            sys.stdout.write(
                f"\nserved again {time.monotonic() - healed_s:.2f} s after the cable was put back"
            )

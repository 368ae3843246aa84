"""What happens when the network between a server and its workers is cut, is slow, and heals."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from clockwork_serve.config import Settings
from harness.http_load import Report, closed_loop, infer_message, run
from harness.ports import free_port
from harness.serving import Serving, total, until
from tests.end_to_end import cables, machines
from tests.end_to_end.cables import Cable
from tests.end_to_end.conftest import call, x_json
from tests.end_to_end.machines import MODELS, PAGE, WIDE, FarWorker, far_worker, joined
from tests.serve.certificates import certificates
from tests.serve.proxy import Proxy, proxy
from tests.timing import Timing

Start = Callable[..., AbstractContextManager[Serving]]
SILENCE_S = Settings().silence_s
BACK_S = 10.0
"""Far above what is measured (0.5 to 1.5 s): these machines are shared."""
PAUSE_S = 0.02


@dataclass
class Network:
    """A server, a worker, and the network between them."""

    serving: Serving
    worker: FarWorker
    proxy: Proxy


@pytest.fixture(scope="module")
def network(tmp_path_factory: pytest.TempPathFactory, start: Start) -> Iterator[Network]:
    root = tmp_path_factory.mktemp("network")
    files, port = certificates(root), free_port()
    settings = machines.settings(files, port, SILENCE_S)
    with (
        start(machines.matrices(root / "models"), memory_bytes=PAGE, **settings) as serving,
        proxy(port) as between,
        far_worker(between.port, files, root / "far") as worker,
    ):
        joined(serving, worker)
        yield Network(serving, worker, between)


@pytest.fixture(autouse=True)
def whole(network: Network) -> Iterator[None]:
    """Each test finds and leaves a network that works."""
    joined(network.serving, network.worker)
    yield
    network.proxy.delay(0.0)
    network.proxy.heal()


def message(serving: Serving, index: int, slo_ms: float) -> bytes:
    x = np.ones((1, WIDE), np.float32).tobytes()
    return infer_message(serving.http_url, f"m{index % MODELS}", [("x", "FP32", (1, WIDE), x)], slo_ms=slo_ms)


def ask(serving: Serving, index: int = 0, slo_ms: float = 3000) -> Any:
    body = x_json([1.0] * WIDE, [1, WIDE], parameters={"slo_ms": slo_ms})
    return call(serving.http_url, f"/v2/models/m{index}/infer", body)


def books_balance(serving: Serving) -> None:
    until("nothing is open", lambda: total(serving.metrics(), "clockwork_requests_open") == 0)
    metrics = serving.metrics()
    assert total(metrics, "clockwork_requests_received_total") == total(metrics, "clockwork_requests_total")
    assert total(metrics, "clockwork_answers_unmatched_total") == 0
    # A slot of each gateway is free again.
    assert total(metrics, "clockwork_gateway_region_bytes", state="taken") == 0


@contextmanager
def later(seconds: float, work: Callable[[], None]) -> Iterator[None]:
    timer = threading.Timer(seconds, work)
    timer.start()
    try:
        yield
    finally:
        timer.join()


def load_through(
    network: Network, cut: Callable[[], None], for_s: float, requests: int
) -> tuple[Report, float]:
    """A load during which the network is cut and heals; and how soon after that there was a good answer."""
    serving, healed_ns = network.serving, [0]

    def heal() -> None:
        healed_ns[0] = time.monotonic_ns()
        network.proxy.heal()

    timer = threading.Timer(for_s, heal)

    def messages(index: int) -> bytes:
        if index == requests // 10:
            cut()
            timer.start()
        return message(serving, index, 1000)

    work = closed_loop(serving.http_url, messages, requests=requests, connections=8, pause_s=PAUSE_S)
    report = run(work)
    timer.join()
    good = [s.done_ns for s in report.samples if s.status == 200 and s.sent_ns > healed_ns[0]]
    if not good:  # the load was over before
        until("it serves again", lambda: ask(serving).status == 200, BACK_S)
        good = [time.monotonic_ns()]
    return report, (min(good) - healed_ns[0]) / 1e9


@pytest.mark.parametrize(
    ("there", "back"), [(True, True), (True, False), (False, True)], ids=["both", "from it", "to it"]
)
def test_a_cut_costs_no_request_its_one_answer_and_service_comes_back(
    network: Network, capsys: pytest.CaptureFixture[str], timing: Timing, there: bool, back: bool
) -> None:
    until("the server works", lambda: ask(network.serving).status == 200)
    report, back_s = load_through(
        network, lambda: network.proxy.cut(there=there, back=back), for_s=2.5, requests=1500
    )

    with capsys.disabled():
        sys.stdout.write(f"\nserved again {back_s:.2f} s after the network healed; {dict(report.ends())}")
    assert len(report.samples) == 1500
    assert report.unanswered == 0
    assert report.unexpected_bytes == 0
    with timing.judged():
        ends = report.ends()
        assert ends["200"] >= 150, ends
        assert all(sample.latency_ns < 3e9 for sample in report.samples), "all hear it in time"
        assert back_s < BACK_S
    joined(network.serving, network.worker)
    books_balance(network.serving)


def test_a_short_cut_loses_not_even_the_link(network: Network, timing: Timing) -> None:
    until("the server works", lambda: ask(network.serving).status == 200)
    lost = total(network.serving.metrics(), "clockwork_workers_lost_total")
    network.proxy.cut()
    with timing.judged():
        with later(0.3, network.proxy.heal):
            assert ask(network.serving, slo_ms=5000).status == 200
        assert total(network.serving.metrics(), "clockwork_workers_lost_total") == lost
    books_balance(network.serving)


def test_a_reset_connection_is_made_again(network: Network) -> None:
    before = network.proxy.connections
    network.proxy.reset()
    until("a new connection", lambda: network.proxy.connections > before)
    joined(network.serving, network.worker)
    until("it serves again", lambda: ask(network.serving).status == 200, BACK_S)
    books_balance(network.serving)


def test_the_way_to_a_far_worker_is_planned(network: Network, timing: Timing) -> None:
    way_s = 0.03
    until("the server works", lambda: ask(network.serving).status == 200)
    network.proxy.delay(way_s)
    answers = [ask(network.serving, index % MODELS) for index in range(12)]
    good = [answer.json["parameters"] for answer in answers if answer.status == 200]
    assert good, answers
    assert min(each["exec_ms"] for each in good) < 1000 * way_s, "it is no time of the device"

    started_s = time.monotonic()
    hopeless = ask(network.serving, slo_ms=2000 * way_s * 0.9)
    took_s = time.monotonic() - started_s
    with timing.judged():
        assert (hopeless.status, hopeless.json["reason"]) == (429, "would_miss_deadline"), hopeless.json
        assert took_s < way_s, "said at once, not after the way there and back"
    books_balance(network.serving)


def test_a_pulled_cable_and_a_worker_in_a_network_of_its_own(
    cable: Cable, tmp_path: Path, start: Start, capsys: pytest.CaptureFixture[str]
) -> None:
    """The kernel's own silence: no proxy, no reset, no end."""
    files, port = certificates(tmp_path), free_port()
    bridge = machines.settings(files, port, SILENCE_S) | {"listen_machines": f"{cables.HERE}:{port}"}
    with (
        start(machines.matrices(tmp_path / "models"), memory_bytes=PAGE, **bridge) as serving,
        far_worker(
            port, files, tmp_path / "far",
            host=cables.HERE, before=cable.there,
        ) as worker,
    ):  # fmt: skip
        joined(serving, worker)
        until("it serves", lambda: ask(serving).status == 200)
        cable.pull()
        until("the server has noticed", lambda: worker.device not in machines.devices(serving), 60)
        assert ask(serving, slo_ms=300).status in (429, 503, 504)
        cable.put_back()
        healed_s = time.monotonic()
        joined(serving, worker)
        until("it serves again", lambda: ask(serving).status == 200, BACK_S)
        with capsys.disabled():
            sys.stdout.write(
                f"\nserved again {time.monotonic() - healed_s:.2f} s after the cable was put back"
            )
        books_balance(serving)

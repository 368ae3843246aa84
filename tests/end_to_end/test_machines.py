"""Workers on other machines, as processes that join over TCP: answers, artefacts, who is let in."""

from __future__ import annotations

import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from harness import repositories
from harness.ports import free_port
from harness.serving import Serving, total, until
from tests.end_to_end import machines
from tests.end_to_end.conftest import MOODY, call, x_json
from tests.end_to_end.machines import (
    LONG,
    MODELS,
    OTHER_CLOCK,
    PAGE,
    WIDE,
    far_gateway,
    far_worker,
    joined,
    other_clocks,
    product,
)
from tests.serve.certificates import Certificates, certificates, renewed_certificates
from tests.serve.proxy import proxy

Start = Callable[..., AbstractContextManager[Serving]]


@dataclass
class Cluster:
    """A server that others may join; ``cache`` is theirs."""

    serving: Serving
    port: int
    certificates: Certificates
    cache: Path
    said: list[str] = field(default_factory=list)


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory, start: Start) -> Iterator[Cluster]:
    root = tmp_path_factory.mktemp("cluster")
    repository = machines.matrices(root / "models")
    repositories.python_model(repository, "moody", MOODY)
    files, port = certificates(root), free_port()
    said: list[str] = []
    settings = machines.settings(files, port)
    with start(repository, memory_bytes=PAGE, **settings, log_level="info", on_line=said.append) as serving:
        yield Cluster(serving, port, files, root / "far", said)


def asked(serving: Serving, index: int, rows: int = 1, slo_ms: float = 5000, url: str = "") -> Any:
    x = np.random.default_rng(index + rows).standard_normal((rows, WIDE), dtype=np.float32)
    body = x_json(x.ravel().tolist(), [rows, WIDE], parameters={"slo_ms": slo_ms})
    response = call(url or serving.http_url, f"/v2/models/m{index}/infer", body)
    return response, x


def check_answer(serving: Serving, index: int, rows: int = 1, url: str = "") -> Any:
    response, x = asked(serving, index, rows, url=url)
    assert response.status == 200, response.json
    (y,) = response.json["outputs"]
    found = np.asarray(y["data"], np.float32).reshape(rows, LONG)
    np.testing.assert_allclose(found, product(index, x), rtol=1e-3, atol=1e-3)
    return response.json["parameters"]


def served_again(serving: Serving, index: int) -> Any:
    """What the first answer says. Refusals are passed over: a state may be of before the death."""

    def answered() -> Any:
        response, _ = asked(serving, index)
        return response.json["parameters"] if response.status == 200 else None

    first = until("it is served", answered)
    check_answer(serving, index)
    return first


def test_models_that_only_another_machine_can_hold_are_answered_there(
    cluster: Cluster, tmp_path: Path
) -> None:
    cache = tmp_path / "cache"
    refused, _ = asked(cluster.serving, 0, slo_ms=100)
    assert refused.status != 200, "the server's own device has no room for it"
    with far_worker(cluster.port, cluster.certificates, cache) as worker:
        joined(cluster.serving, worker)
        for index in range(MODELS):
            for rows in (1, 3):
                check_answer(cluster.serving, index, rows)
        told = check_answer(cluster.serving, 0)
        assert told["exec_ms"] > 0
        metrics = cluster.serving.metrics()
        assert total(metrics, "clockwork_answers_unmatched_total") == 0
        until("nothing is open", lambda: total(cluster.serving.metrics(), "clockwork_requests_open") == 0)
        for child in worker.children:
            assert Path(f"/proc/{child}").exists()
    assert worker.process.returncode == 0, worker.said
    until("the device is gone", lambda: worker.device not in machines.devices(cluster.serving))
    # What was fetched is kept: the next time nothing has to come.
    blobs = list(cache.glob("*/weights/*/*.bin"))
    assert len(blobs) == MODELS
    before = [blob.stat().st_mtime_ns for blob in blobs]
    with far_worker(cluster.port, cluster.certificates, cache) as again:
        joined(cluster.serving, again)
        check_answer(cluster.serving, 1)
    assert [blob.stat().st_mtime_ns for blob in blobs] == before


def test_a_python_model_is_not_sent_to_other_machines_and_is_served_at_home(cluster: Cluster) -> None:
    with far_worker(cluster.port, cluster.certificates, cluster.cache) as worker:
        joined(cluster.serving, worker)
        found = cluster.serving.server.state()["controller"]["devices"]
        (device,) = (each for each in found if each["device"] == worker.device)
        assert [
            why for why in device["failed_codes"].values() if "Python models run on the server's own" in why
        ]
        body = x_json([1.0, 2.0, 3.0, 4.0], parameters={"slo_ms": 5000})
        assert call(cluster.serving.http_url, "/v2/models/moody/infer", body).status == 200


def test_a_large_tensor_goes_there_and_back(cluster: Cluster) -> None:
    with far_worker(cluster.port, cluster.certificates, cluster.cache) as worker:
        joined(cluster.serving, worker)
        check_answer(cluster.serving, 0)
        check_answer(cluster.serving, 2, rows=16)


def test_tensors_go_straight_from_a_gateway_elsewhere_to_a_worker_elsewhere(cluster: Cluster) -> None:
    files, requests, rows = cluster.certificates, 20, 16
    with (
        proxy(cluster.port) as between,
        far_worker(between.port, files, cluster.cache) as worker,
        far_gateway(between.port, files) as gateway,
    ):
        joined(cluster.serving, worker)
        until("it serves", lambda: gateway.ready, machines.PATIENCE_S)
        check_answer(cluster.serving, 0, rows, gateway.url)
        before = between.there.bytes + between.back.bytes
        for _ in range(requests):
            check_answer(cluster.serving, 0, rows, gateway.url)
        passed = between.there.bytes + between.back.bytes - before
        assert passed < requests * rows * WIDE, "a quarter of the inputs"
        until(
            "its memory is free",
            lambda: total(gateway.metrics(), "clockwork_gateway_region_bytes", state="taken") == 0,
        )


def test_two_machines_share_the_work(cluster: Cluster) -> None:
    one = far_worker(cluster.port, cluster.certificates, cluster.cache, name="one")
    two = far_worker(cluster.port, cluster.certificates, cluster.cache, name="two")
    with one as first, two as second:
        joined(cluster.serving, first, second)
        check_answer(cluster.serving, 0)
        first.process.send_signal(signal.SIGTERM)
        until("one is gone", lambda: first.device not in machines.devices(cluster.serving))
        for index in range(MODELS):
            check_answer(cluster.serving, index)


def test_a_worker_that_dies_is_started_again_and_joins_with_empty_memory(cluster: Cluster) -> None:
    with far_worker(cluster.port, cluster.certificates, cluster.cache) as worker:
        joined(cluster.serving, worker)
        check_answer(cluster.serving, 0)
        (victim,) = worker.children
        worker.signal_children(signal.SIGKILL)
        until("another process", lambda: worker.children not in ([], [victim]))
        assert served_again(cluster.serving, 0)["cold_start"] is True


def test_a_dead_bridge_is_replaced_and_workers_come_back(cluster: Cluster) -> None:
    with far_worker(cluster.port, cluster.certificates, cluster.cache) as worker:
        joined(cluster.serving, worker)
        victim = cluster.serving.server.pid("bridge")
        assert victim is not None
        machines.os.kill(victim, signal.SIGKILL)
        until("another bridge", lambda: cluster.serving.server.pid("bridge") not in (None, victim))
        until("the device is gone", lambda: worker.heard("lost the controller"))
        served_again(cluster.serving, 0)


def test_a_killed_controller_is_replaced_and_workers_join_the_new_one(cluster: Cluster) -> None:
    with far_worker(cluster.port, cluster.certificates, cluster.cache) as worker:
        joined(cluster.serving, worker)
        victim = cluster.serving.server.pid("controller")
        assert victim is not None
        machines.os.kill(victim, signal.SIGKILL)
        until("another controller", lambda: cluster.serving.server.pid("controller") not in (None, victim))
        cluster.serving.server.wait_ready()
        joined(cluster.serving, worker)
        check_answer(cluster.serving, 0)


def test_who_shows_no_certificate_of_the_authority_is_turned_away_and_told_so_once(
    cluster: Cluster, tmp_path: Path
) -> None:
    others = renewed_certificates(tmp_path)
    trusting = replace(others, ca=cluster.certificates.ca)
    with far_worker(cluster.port, trusting, tmp_path / "cache", name="stranger") as worker:
        until("it hears no", lambda: worker.heard("no controller yet"))
        until("the server says so", lambda: any("turned a machine away" in line for line in cluster.said))
        time.sleep(1.5)
        assert worker.process.poll() is None
        assert sum("no controller yet" in line for line in worker.said) == 1, worker.said
        assert sum("turned a machine away" in line for line in cluster.said) == 1
    assert not any("stranger" in name for name in machines.devices(cluster.serving))


def test_another_cpu_or_runtime_is_refused_with_what_differs(cluster: Cluster, tmp_path: Path) -> None:
    program = tmp_path / "other_cpu.py"
    program.write_text(
        "import sys\n"
        "from clockwork_serve.serve.processes import worker\n"
        "from clockwork_serve.serve.remote import worker as remote\n"
        "honest = remote.runtime\n"
        "remote.runtime = lambda: {**honest(), 'onnxruntime': '0.1'}\n"
        "sys.exit(worker.main(sys.argv))\n"
    )
    config = machines.worker_config(cluster.port, cluster.certificates, tmp_path, "odd.cpu:0")
    ended = subprocess.run(
        [sys.executable, str(program), config], capture_output=True, text=True, check=False, timeout=60
    )
    assert ended.returncode == 78, ended
    assert "onnxruntime: expected what the server's models were compiled for" in ended.stderr
    assert "0.1 there" in ended.stderr
    until("the server says so", lambda: any("odd.cpu:0" in line and "0.1" in line for line in cluster.said))


def test_a_kind_of_device_that_the_server_never_measured_is_refused(cluster: Cluster) -> None:
    worker = far_worker(
        cluster.port, cluster.certificates, cluster.cache, "--device", "emulated:v100", name="fake"
    )
    with worker as found:
        assert found.process.wait(60) == 1
        found.process.wait()
    assert found.heard("device: expected one of kind cpu, for which the server has measured its models")


def test_a_second_worker_of_the_same_name_waits_until_the_first_is_gone(cluster: Cluster) -> None:
    with far_worker(cluster.port, cluster.certificates, cluster.cache) as first:
        joined(cluster.serving, first)
        refused = sum("may not join: another worker" in line for line in cluster.said)
        with far_worker(cluster.port, cluster.certificates, cluster.cache) as second:
            until("it is told", lambda: second.heard("another worker of this server is called alpha.cpu:0"))
            time.sleep(1.0)
            assert sum("another worker" in line for line in second.said) == 1, "it says so once"
            assert not second.heard("joined with"), "it has not"
            assert sum("may not join: another worker" in line for line in cluster.said) == refused + 1
            check_answer(cluster.serving, 0)
            first.process.send_signal(signal.SIGTERM)
            first.process.wait(60)
            joined(cluster.serving, second)
            check_answer(cluster.serving, 0)


def test_a_model_that_is_loaded_later_is_fetched_then(cluster: Cluster) -> None:
    with far_worker(cluster.port, cluster.certificates, cluster.cache) as worker:
        joined(cluster.serving, worker)
        root = Path(cluster.serving.server.server.settings.repository)
        repositories.one_matrix(root, "late", repositories.matrix_of(99, WIDE, LONG))
        answer = call(cluster.serving.http_url, "/v2/repository/models/late/load", b"{}")
        assert answer.status == 200, answer.json
        x = np.ones((1, WIDE), np.float32)
        body = x_json(x.ravel().tolist(), [1, WIDE], parameters={"slo_ms": 5000})
        response = call(cluster.serving.http_url, "/v2/models/late/infer", body)
        assert response.status == 200, response.json
        expected = x @ repositories.matrix_of(99, WIDE, LONG)
        found = np.asarray(response.json["outputs"][0]["data"], np.float32).reshape(1, LONG)
        np.testing.assert_allclose(found, expected, rtol=1e-3, atol=1e-3)
        assert call(cluster.serving.http_url, "/v2/repository/models/late/unload", b"{}").status == 200
        shutil.rmtree(root / "late")


@pytest.mark.skipif(not other_clocks(), reason="this system lets no process have a clock of its own")
def test_a_machine_with_another_clock_serves_within_its_windows(cluster: Cluster) -> None:
    """Its monotonic clock is eleven days ahead, in a time namespace of its own."""
    worker = far_worker(cluster.port, cluster.certificates, cluster.cache, before=OTHER_CLOCK)
    with worker as found:
        joined(cluster.serving, found)
        for _ in range(5):
            for index in range(MODELS):
                told = check_answer(cluster.serving, index)
                assert 0 <= told["queue_ms"] < 5000
                assert 0 < told["exec_ms"] < 5000
        found.process.send_signal(signal.SIGTERM)
        until("it is gone", lambda: found.device not in machines.devices(cluster.serving))

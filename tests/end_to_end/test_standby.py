"""A second controller stands by: the leading one dies or hangs, and no request that can wait notices."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from clockwork_serve.errors import TransportError
from clockwork_serve.serve.supervisor.server import RunningServer, running_server
from clockwork_serve.telemetry import Counters
from tests.end_to_end.steady import how, steady
from tests.serve.onnx_models import affine, put
from tests.serve.supervisor.servers import config, infer, until
from tests.timing import Timing

pytestmark = [pytest.mark.system, pytest.mark.slow]

MODELS = ("m0", "m1", "m2", "m3")
BOTH = {"controller", "controller-1"}
BACK_MS = 500
REFUSED = {"503", "UNAVAILABLE"}


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningServer]:
    place = tmp_path_factory.mktemp("place")
    for at, name in enumerate(MODELS):
        put(place / "repository", name, affine(at))
    with running_server(config(place, gateways=2, controllers=2, stuck_s=1.0)) as running:
        yield running


@pytest.fixture(autouse=True)
def _well(server: RunningServer) -> None:
    """Each test finds a server that is whole, has all weights and has forgotten earlier deaths."""
    server.server.supervisor.reset_backoff("")
    whole(server)
    for name in MODELS:
        infer(server, name, np.zeros((1, 64), np.float32))


def whole(server: RunningServer) -> Counters:
    """The counters of a leader beside which another one stands by."""
    server.wait_ready(60)
    until(lambda: counters(server).standbys == 1)
    return counters(server)


def counters(server: RunningServer) -> Counters:
    try:
        return server.counters()
    except TransportError:
        return Counters()


def kill_leader(server: RunningServer, number: int = signal.SIGKILL) -> str:
    leader = server.leader
    pid = server.pid(leader)
    assert pid is not None
    os.kill(pid, number)
    return leader


def test_the_leader_dies_again_and_again_and_every_request_is_answered(
    server: RunningServer, timing: Timing
) -> None:
    worker, epoch = server.pid("worker-cpu:0"), counters(server).epoch
    killed_s: list[float] = []
    with steady(server.http_port, server.grpc_port, MODELS) as load:
        for turn in range(3):
            time.sleep(0.5)
            killed_s.append(time.monotonic())
            dead = kill_leader(server)
            until(lambda dead=dead: server.leader in BOTH - {dead})
            found = whole(server)
            with timing.judged():
                assert found.epoch == epoch + turn + 1
            assert sum(model.loads for model in found.models.values()) == 0, "loaded again"
            server.server.supervisor.reset_backoff("controller")
        time.sleep(0.3)
        ends = load.stop()
    assert {end.how for end in ends if not end.good} <= REFUSED, how(ends)
    with timing.judged():
        assert not how(ends), "what could wait waited"
        assert len(ends) > 200
        for at_s in killed_s:
            first_s = min(end.ended_s for end in ends if end.sent_s > at_s)
            assert (first_s - at_s) * 1e3 < BACK_MS
    assert server.pid("worker-cpu:0") == worker
    assert counters(server).unmatched == 0
    until(lambda: counters(server).open == 0)


def test_a_leader_that_hands_over_loses_no_request(server: RunningServer, timing: Timing) -> None:
    with steady(server.http_port, server.grpc_port, MODELS) as load:
        for _ in range(3):
            time.sleep(0.5)
            left = kill_leader(server, signal.SIGUSR1)
            until(lambda left=left: server.leader in BOTH - {left})
            found = whole(server)
            assert sum(model.loads for model in found.models.values()) == 0, "loaded again"
            server.server.supervisor.reset_backoff("controller")
        time.sleep(0.3)
        ends = load.stop()
    assert {end.how for end in ends if not end.good} <= REFUSED, how(ends)
    with timing.judged():
        assert not how(ends)
        assert max(end.took_ms for end in ends) < BACK_MS


def test_a_leader_that_hangs_is_ended_and_the_other_one_leads(server: RunningServer, timing: Timing) -> None:
    with steady(server.http_port, server.grpc_port, MODELS) as load:
        time.sleep(0.3)
        dead = kill_leader(server, signal.SIGSTOP)
        until(lambda: server.leader in BOTH - {dead})
        whole(server)
        time.sleep(0.3)
        ends = load.stop()
    assert {end.how for end in ends if not end.good} <= REFUSED, how(ends)
    assert ends[-1].good
    with timing.judged():  # the other one answered in time
        assert server.server.supervisor.unresponsive[dead] == 1


def test_nothing_happens_when_the_one_that_stands_by_dies(server: RunningServer, timing: Timing) -> None:
    leader, before = server.leader, counters(server)
    (other,) = BOTH - {leader}
    pid = server.pid(other)
    assert pid is not None
    with steady(server.http_port, server.grpc_port, MODELS) as load:
        os.kill(pid, signal.SIGKILL)
        until(lambda: server.pid(other) not in (None, pid))
        found = whole(server)
        ends = load.stop()
    with timing.judged():  # nor to the one that leads, if it answers in time
        assert not how(ends)
        assert (server.leader, found.epoch) == (leader, before.epoch)
        assert found.received > before.received


def test_both_die_at_once_and_one_of_those_that_are_started_leads(server: RunningServer) -> None:
    epoch, pids = counters(server).epoch, {name: server.pid(name) for name in BOTH}
    for pid in pids.values():
        assert pid is not None
        os.kill(pid, signal.SIGKILL)
    until(lambda: server.leader in BOTH and server.pid(server.leader) not in {None, pids[server.leader]})
    # Two, if the one that stood by took over within the microseconds that it had.
    assert whole(server).epoch in {epoch + 1, epoch + 2}
    infer(server, "m0", np.zeros((1, 64), np.float32))


def test_with_one_controller_there_is_no_other_and_a_restart_has_the_next_epoch(tmp_path: Path) -> None:
    put(tmp_path / "repository", "m0", affine(0))
    with running_server(config(tmp_path)) as alone:
        assert [name for name in alone.names if name.startswith("controller")] == ["controller"]
        assert (alone.leader, alone.counters().epoch, alone.counters().standbys) == ("controller", 1, 0)
        kill_leader(alone)
        until(lambda: counters(alone).epoch == 2)
        alone.wait_ready(60)

"""Half a minute of hostile traffic on a server: nothing ends, nothing grows, honest clients are answered.

How much slower they are is for ``qa.hostile`` to say, on a quiet machine.
"""

from __future__ import annotations

import random
from collections.abc import Iterator

import pytest

from harness.serving import Serving
from qa.hostile import __main__ as hostile
from qa.hostile import frames as hostile_frames
from qa.hostile.__main__ import Findings, Load
from qa.hostile.traffic import attack

SECONDS = 30.0
WINDOW_S = 10.0


@pytest.fixture(scope="module")
def log() -> list[str]:
    return []


@pytest.fixture(scope="module")
def attacked(log: list[str]) -> Iterator[Serving]:
    with hostile.served(on_line=log.append, gateways=2) as serving:
        yield serving


@pytest.fixture(scope="module")
def found(attacked: Serving, log: list[str]) -> Findings:
    return hostile.measure(
        attacked, Load(seconds=SECONDS, window_s=WINDOW_S, http_rate=40, grpc_rate=10, insists=True), log
    )


@pytest.mark.slow
@pytest.mark.timeout(240)
def test_no_process_ends_and_nothing_is_logged_with_a_traceback(found: Findings) -> None:
    assert sum(one.attacker["attacks"] for one in found.windows if one.hostile) > 100
    assert found.ended == []
    assert found.tracebacks == []


@pytest.mark.slow
@pytest.mark.timeout(240)
def test_every_honest_request_is_answered_right(found: Findings) -> None:
    assert found.wrong == {}


@pytest.mark.slow
@pytest.mark.timeout(240)
def test_nothing_grows(found: Findings) -> None:
    for name, (rss_bytes, files, threads) in hostile.growth(found.windows).items():
        assert rss_bytes <= hostile.GROWTH_BYTES, name
        assert files <= 2, name
        assert threads <= 2, name


@pytest.mark.slow
@pytest.mark.timeout(240)
def test_the_books_are_equal_and_no_room_is_held(found: Findings) -> None:
    assert not any(found.left.values()), found.left


def test_a_call_whose_path_is_no_text_ends_no_gateway() -> None:
    with hostile.served() as serving:
        before = serving.server.pid("gateway-0")
        assert serving.server.grpc_port is not None
        attack(serving.server.grpc_port, hostile_frames.grpc_paths_that_are_no_text(random.Random(1)))
        client = hostile.Honest(serving, seed=1)
        assert not client.ask(1, 20, 5)[2]
        assert serving.server.pid("gateway-0") == before

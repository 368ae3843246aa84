"""``clockwork bench`` against a real server: what it reports is what the server counted."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path

import pytest
from benchmarks.serving import Serving, total

from benchmarks import repositories
from clockwork_serve.bench.report import Report
from tests.bench.loads import ran

Start = Callable[..., AbstractContextManager[Serving]]
SCENARIO = """
name = "both"
seconds = 3

[[models]]
name = "m"
kind = "any"
copies = 3

[[loads]]
name = "urgent"
models = ["m"]
arrivals = "poisson"
rate_rps = {rate}
slo_ms = 120

[[loads]]
name = "clients"
models = ["m"]
arrivals = "closed"
concurrency = 2
retry = "retry_after"
slo_ms = 400
"""


@pytest.fixture(scope="module")
def serving(tmp_path_factory: pytest.TempPathFactory, start: Start) -> Iterator[Serving]:
    """Three models that take 10 ms, on one device that takes that time, behind two gateways."""
    root = tmp_path_factory.mktemp("bench") / "models"
    for number in range(3):
        repositories.emulated(root, f"net{number}", {1: 10.0, 8: 24.0})
    with start(root, device="emulated", gateways=2) as serving:
        yield serving


def counted(serving: Serving, **labels: str) -> float:
    """Requests that all gateways counted."""
    return total(serving.metrics(), "clockwork_requests_total", **labels)


def load(serving: Serving, folder: Path, protocol: str, rate: int, **options: object) -> Report:
    url = serving.grpc_url if protocol == "grpc" else serving.http_url
    given = {"renamed": {"m": "net{i}"}, "protocol": protocol, **options}
    return ran(folder, url, SCENARIO.format(rate=rate), **given).report


@pytest.mark.parametrize("protocol", ["http", "grpc"])
def test_what_is_reported_is_what_the_server_counted(serving: Serving, tmp_path: Path, protocol: str) -> None:
    before = [counted(serving, outcome=name) for name in ("ok", "rejected", "expired")]
    # With a deadline of gRPC's own, its core drops what the server answers a moment before it.
    report = load(serving, tmp_path, protocol, rate=900, processes=2, deadline="header")
    after = [counted(serving, outcome=name) for name in ("ok", "rejected", "expired")]

    ok, rejected, expired = (int(now - then) for then, now in zip(before, after, strict=True))
    asked = report.total
    assert asked.rejected > 100
    assert asked.good > 100
    assert asked.good + asked.late == ok
    assert (asked.rejected, asked.expired) == (rejected, expired)
    assert asked.failed == asked.reset == asked.broken == asked.unanswered == asked.unsent == 0
    assert asked.offered == ok + rejected + expired
    assert any(reason.reason.endswith(" would_miss_deadline") for reason in report.reasons)
    assert sum(group.offered for group in report.loads) == asked.offered
    assert {group.name for group in report.models} == {f"m-000{n} (net{n})" for n in range(3)}
    assert {group.name for group in report.slos} == {"120 ms", "400 ms"}


@pytest.mark.parametrize(
    ("protocol", "deadline"), [("http", "timeout"), ("http", "none"), ("grpc", "grpc"), ("grpc", "timeout")]
)
def test_the_server_hears_of_deadlines(
    serving: Serving, tmp_path: Path, protocol: str, deadline: str
) -> None:
    report = load(serving, tmp_path, protocol, rate=600, deadline=deadline)
    # Without a word, its own default stands: 100 ms.
    assert report.total.rejected > 20
    assert report.total.failed == report.total.reset == report.total.unanswered == 0


def test_a_load_that_fits_is_answered(serving: Serving, tmp_path: Path) -> None:
    total_of_all = load(serving, tmp_path, "grpc", rate=20).total
    assert total_of_all.satisfaction > 0.8
    assert total_of_all.failed == total_of_all.reset == 0

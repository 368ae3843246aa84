"""``clockwork bench`` against a real server: what it reports is what the server counted."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path

import pytest

from clockwork_lab.bench.report import BenchReport
from clockwork_serve.cli.entry import run
from harness import repositories
from harness.serving import Serving, total, until
from tests.lab.bench.loads import ran, written
from tests.serve.certificates import Certificates, certificates
from tests.timing import Timing

Start = Callable[..., AbstractContextManager[Serving]]
GATEWAYS = 2
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
    with start(root, device="emulated", gateways=GATEWAYS, slo_ms=None) as serving:
        yield serving


@pytest.fixture(scope="module")
def secure(tmp_path_factory: pytest.TempPathFactory, start: Start) -> Iterator[tuple[Serving, Certificates]]:
    """The same over TLS; ``wide`` takes a megabyte."""
    folder = tmp_path_factory.mktemp("secure")
    for number in range(3):
        repositories.emulated(folder / "models", f"net{number}", {1: 10.0, 8: 24.0})
    repositories.emulated(folder / "models", "wide", {1: 10.0, 8: 24.0}, width=1 << 18)
    files = certificates(folder)
    with start(folder / "models", device="emulated", **files.tls_settings()) as serving:
        yield serving, files


@pytest.fixture(scope="module")
def mutual(tmp_path_factory: pytest.TempPathFactory, start: Start) -> Iterator[tuple[Serving, Certificates]]:
    """A server that asks its clients for certificates."""
    folder = tmp_path_factory.mktemp("mutual")
    repositories.emulated(folder / "models", "net0", {1: 10.0})
    files = certificates(folder)
    with start(folder / "models", device="emulated", **files.tls_settings(mutual=True)) as serving:
        yield serving, files


def secure_url(serving: Serving, protocol: str) -> str:
    return f"grpcs://{serving.grpc_url}" if protocol == "grpc" else serving.http_url


def counted(serving: Serving, **labels: str) -> float:
    """Requests that ended so, whoever told: the controller or, while all cores are busy, a gateway by itself.

    A gateway tells of itself alone, and which one answers is left to chance.
    """
    by_gateway: dict[str, float] = {}
    told = 0.0

    def all_have_told() -> bool:
        nonlocal told
        metrics = serving.metrics(f"{serving.http_url}/metrics")
        told = total(metrics, "clockwork_requests_total", **labels)
        (gateway,) = {dict(pairs)["gateway"] for name, pairs in metrics if name == "clockwork_gateway_open"}
        by_gateway[gateway] = total(metrics, "clockwork_gateway_requests_total", **labels)
        return len(by_gateway) == GATEWAYS

    until("each gateway has told", all_have_told)
    return told + sum(by_gateway.values())


def load(serving: Serving, folder: Path, protocol: str, rate: int, **options: object) -> BenchReport:
    url = serving.grpc_url if protocol == "grpc" else serving.http_url
    given = {"renamed": {"m": "net{i}"}, "protocol": protocol, **options}
    return ran(folder, url, SCENARIO.format(rate=rate), **given).report


@pytest.mark.parametrize("protocol", ["http", "grpc"])
def test_what_is_reported_is_what_the_server_counted(
    serving: Serving, tmp_path: Path, protocol: str, timing: Timing
) -> None:
    all_before = counted(serving)
    before = [counted(serving, outcome=name) for name in ("ok", "rejected", "expired")]
    # With a deadline of gRPC's own, its core drops what the server answers a moment before it.
    report = load(serving, tmp_path, protocol, rate=900, processes=2, deadline="header")
    asked = report.total
    sent = asked.offered - asked.unsent  # on a machine that has no core for the client, a few are not
    until("the gateways told", lambda: counted(serving) - all_before >= sent)
    after = [counted(serving, outcome=name) for name in ("ok", "rejected", "expired")]

    ok, rejected, expired = (int(now - then) for then, now in zip(before, after, strict=True))
    with timing.judged():
        assert asked.unsent <= asked.offered / 50
        assert asked.rejected > 100
        assert asked.good > 100
    # Over gRPC the books count as late what the core reports too late to have been sent, though a client may
    # have had it in time; they never count more as good than clients saw.
    unsure = asked.good + asked.late - ok
    assert unsure == 0 if protocol == "http" else unsure >= 0
    with timing.judged():
        assert unsure <= asked.offered / 50
    assert (asked.rejected, asked.expired) == (rejected, expired - unsure)
    assert asked.failed == asked.reset == asked.broken == asked.unanswered == 0
    assert sent == ok + rejected + expired
    assert any(reason.reason.endswith(" would_miss_deadline") for reason in report.reasons)
    assert sum(group.offered for group in report.loads) == asked.offered
    assert {group.name for group in report.models} == {f"m-000{n} (net{n})" for n in range(3)}
    assert {group.name for group in report.slos} == {"120 ms", "400 ms"}


@pytest.mark.parametrize(
    ("protocol", "deadline"), [("http", "timeout"), ("http", "none"), ("grpc", "grpc"), ("grpc", "timeout")]
)
def test_the_server_hears_of_deadlines(
    serving: Serving, tmp_path: Path, protocol: str, deadline: str, timing: Timing
) -> None:
    report = load(serving, tmp_path, protocol, rate=600, deadline=deadline)
    # Without a word, its own default stands: 100 ms.
    with timing.judged():
        assert report.total.rejected > 20
    assert report.total.failed == report.total.reset == report.total.unanswered == 0


def test_a_load_that_fits_is_answered(serving: Serving, tmp_path: Path, timing: Timing) -> None:
    total_of_all = load(serving, tmp_path, "grpc", rate=20).total
    with timing.judged():
        assert total_of_all.satisfaction > 0.8
    assert total_of_all.failed == total_of_all.reset == 0


@pytest.mark.parametrize("protocol", ["http", "grpc"])
@pytest.mark.parametrize(("name", "rate"), [("net{i}", 300), ("wide", 20)])
def test_over_tls_it_is_the_same(
    secure: tuple[Serving, Certificates], tmp_path: Path, protocol: str, name: str, rate: int, timing: Timing
) -> None:
    serving, files = secure
    report = ran(
        tmp_path, secure_url(serving, protocol), SCENARIO.format(rate=rate), renamed={"m": name},
        protocol=protocol, ca=files.ca, deadline="header",
    ).report  # fmt: skip
    asked = report.total
    with timing.judged():
        assert asked.good > 20
    assert asked.offered == asked.good + asked.late + asked.rejected + asked.expired


@pytest.mark.parametrize("protocol", ["http", "grpc"])
def test_what_the_system_trusts_is_trusted(
    secure: tuple[Serving, Certificates], tmp_path: Path, protocol: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    serving, files = secure
    monkeypatch.setenv("SSL_CERT_FILE", files.ca)
    scenario, url = SCENARIO.format(rate=20), secure_url(serving, protocol)
    found = ran(tmp_path, url, scenario, renamed={"m": "net{i}"}, protocol=protocol, seconds=1.0).report
    assert found.total.good


@pytest.mark.parametrize("protocol", ["http", "grpc", "raw"])
def test_a_certificate_that_is_not_trusted_is_one_clear_line(
    secure: tuple[Serving, Certificates], tmp_path: Path, protocol: str, capfd: pytest.CaptureFixture[str]
) -> None:
    more = ["--path", "/v2/models/net0/infer"] if protocol == "raw" else []
    url = secure_url(secure[0], protocol)
    code = run(["bench", written(tmp_path), "--url", url, "--protocol", protocol, *more])
    said = capfd.readouterr().err
    assert (code, said.count("\n")) == (1, 1)
    assert said.startswith("error: url: expected a trusted certificate from https://127.0.0.1:")
    assert said.endswith("name its authority: --ca FILE\n")


@pytest.mark.parametrize("protocol", ["http", "grpc"])
def test_a_server_that_asks_for_a_certificate_is_shown_one(
    mutual: tuple[Serving, Certificates], tmp_path: Path, protocol: str
) -> None:
    serving, files = mutual
    scenario, url = SCENARIO.format(rate=20), secure_url(serving, protocol)
    found = ran(
        tmp_path, url, scenario, renamed={"m": "net0"}, protocol=protocol, seconds=1.0, ca=files.ca,
        cert=files.client_certificate, key=files.client_key,
    ).report  # fmt: skip
    assert found.total.good
    assert not found.total.reset


@pytest.mark.parametrize("protocol", ["http", "grpc", "raw"])
def test_without_one_it_is_asked_for_before_any_load(
    mutual: tuple[Serving, Certificates], tmp_path: Path, protocol: str, capfd: pytest.CaptureFixture[str]
) -> None:
    serving, files = mutual
    more = ["--path", "/v2/models/net0/infer"] if protocol == "raw" else []
    url = secure_url(serving, protocol)
    code = run(["bench", written(tmp_path), "--url", url, "--protocol", protocol, "--ca", files.ca, *more])
    said = capfd.readouterr().err
    assert (code, said.count("\n")) == (1, 1)
    assert said.startswith("error: url: expected a connection over TLS to https://127.0.0.1:")
    assert said.endswith("if it requires a client certificate, give one: --cert FILE --key FILE\n")

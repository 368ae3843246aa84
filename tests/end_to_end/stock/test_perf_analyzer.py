"""Triton's perf_analyzer, unmodified, in the modes that ``docs/use/clients.md`` names."""

from __future__ import annotations

import csv
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path

import pytest

from harness.serving import Serving
from qa.books import books, gateways_of
from tests.end_to_end.conftest import example_models
from tests.timing import CouldNotJudge

ANALYZER = shutil.which("perf_analyzer", path=str(Path(sys.executable).parent))
COUNT = 40
HUNG_S = 120
GPU_COLUMNS = ("Avg GPU Utilization", "Avg GPU Power Usage", "Max GPU Memory Usage", "Total GPU Memory")

pytestmark = [
    pytest.mark.skipif(
        ANALYZER is None, reason="perf_analyzer is not here: it is for x86-64 with glibc 2.38 or later"
    ),
    # It hung once in hundreds of runs, with every request answered: then it is run again.
    pytest.mark.usefixtures("timing"),
]


@pytest.fixture(scope="module")
def sharing(
    tmp_path_factory: pytest.TempPathFactory, start: Callable[..., AbstractContextManager[Serving]]
) -> Iterator[Serving]:
    """A server that takes every key, as this client chooses them by the names of tensors."""
    with start(example_models(tmp_path_factory.mktemp("sharing") / "models"), shared_memory="/") as serving:
        yield serving


def analyze(server: Serving, protocol: str, *options: str) -> str:
    """All that it prints. Its exit code is 0 whatever happened."""
    assert ANALYZER is not None
    url = server.grpc_url if protocol == "grpc" else server.http_url.removeprefix("http://")
    command = [ANALYZER, "-i", protocol, "-u", url, *options]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=HUNG_S, check=False)
    except subprocess.TimeoutExpired as hung:
        owed = {
            what: count
            for what, count in books(server.http_url, gateways_of(server.server.names)).items()
            if count
        }
        if owed:
            pytest.fail(f"it waits for what the server owes: {owed}; it said {hung.stdout} {hung.stderr}")
        why = f"it hung for {HUNG_S} s though all was answered; it said {hung.stderr}"
        raise CouldNotJudge(f"could not be judged: {why}") from hung
    return done.stdout + done.stderr


def measured(server: Serving, protocol: str, path: Path, *options: str) -> tuple[dict[str, str], str]:
    """The row of its report, and all that it printed; it must have measured all requests."""
    said = analyze(server, protocol, "--request-count", str(COUNT), "-f", str(path), *options)
    assert f"Request count: {COUNT}" in said, said
    with path.open(encoding="utf-8", newline="") as file:
        (row,) = csv.DictReader(file)
    assert float(row["Inferences/Second"]) > 0
    # It asked for statistics too, before and after.
    assert float(row["Server Compute Infer"]) > 0
    return row, said


@pytest.mark.parametrize(
    ("protocol", "options"),
    [
        ("http", "-m mlp"),
        ("grpc", "-m mlp"),
        ("http", "-m mlp -x 1 -b 4 --async --concurrency-range 4"),
        ("grpc", "-m mlp -b 4 --async --concurrency-range 4"),
        # One refusal ends its measurement, and of four streams at once a busy machine may refuse one.
        ("grpc", "-m mlp --streaming --async --concurrency-range 4 --request-parameter slo_ms:5000:int"),
        ("http", "-m mlp --request-rate-range 40 --request-distribution poisson"),
        ("grpc", "-m mlp --request-rate-range 40"),
        ("http", "-m mlp -H x-slo-ms:2000"),
        ("grpc", "-m mlp --request-parameter slo_ms:2000:int"),
        ("grpc", "-m mlp --grpc-compression-algorithm gzip"),
        ("http", "-m add_sub --input-tensor-format json --output-tensor-format json"),
        ("http", "-m words --string-length 12"),
        ("grpc", "-m words --string-data word"),
        ("http", "-m echo_FP16 --input-data zero"),
        ("grpc", "-m echo_BF16 --input-data zero"),
        ("http", "-m mlp --trace-level OFF"),
    ],
)
def test_it_measures(stock_server: Serving, tmp_path: Path, protocol: str, options: str) -> None:
    measured(stock_server, protocol, tmp_path / "report.csv", *options.split())


@pytest.mark.parametrize("protocol", ["http", "grpc"])
def test_it_measures_with_shared_memory_and_ends_without_a_warning(
    sharing: Serving, tmp_path: Path, protocol: str
) -> None:
    path = tmp_path / "report.csv"
    _, said = measured(sharing, protocol, path, "-m", "mlp", "--shared-memory", "system")
    assert "shared memory" not in said.lower(), "it unregisters all, of CUDA too"


@pytest.mark.parametrize("protocol", ["http", "grpc"])
def test_metrics_of_a_gpu_that_is_not_there_are_absent_and_never_zero(
    stock_server: Serving, tmp_path: Path, protocol: str
) -> None:
    url = stock_server.server.metrics_url.removeprefix("http://")
    collect = ("--collect-metrics", "--verbose-csv", "--metrics-interval", "20", "--metrics-url", url)
    row, said = measured(stock_server, protocol, tmp_path / "report.csv", "-m", "mlp", *collect)
    assert "Unable to parse 'nv_gpu_utilization' metric" in said
    assert [row[column] for column in GPU_COLUMNS] == ["", "", "", ""]


@pytest.mark.parametrize("protocol", ["http", "grpc"])
@pytest.mark.parametrize(
    ("options", "words"),
    [
        ("-m nosuch", "Request for unknown model: 'nosuch' is not found"),
        ("-m mlp --trace-level TIMESTAMPS", "trace setting 'trace_level' cannot be changed"),
    ],
)
def test_it_passes_on_why_it_was_refused(
    stock_server: Serving, protocol: str, options: str, words: str
) -> None:
    assert words in analyze(stock_server, protocol, "--request-count", str(COUNT), *options.split())


def test_it_stops_at_the_first_request_that_is_late(stock_server: Serving) -> None:
    said = analyze(stock_server, "http", "-m", "slow", "-H", "x-slo-ms:1", "--request-count", "4")
    assert "Failed to maintain requested inference load" in said
    assert "deadline" in said

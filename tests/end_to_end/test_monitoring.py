"""The rules and the dashboard of ``examples/monitoring`` on a real server: it has what they ask for.

Prometheus is used where it is installed; what a scrape says is checked everywhere.
"""

from __future__ import annotations

import hashlib
import json
import re
import shutil
import subprocess
import urllib.parse
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import pytest
import yaml
from prometheus_client.parser import text_string_to_metric_families

from clockwork_serve.controller import ControllerConfig
from clockwork_serve.telemetry import Counters, render
from harness import repositories
from harness.serving import Serving, until
from tests.end_to_end.conftest import call, x_json
from tests.examples import monitoring

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

Known = dict[str, frozenset[str]]
KEY = "a-key-that-may-do-everything"
KEYS = f"""
[[tenants]]
name = "team"
device_ms_per_s = 500
burst_s = 60

[[keys]]
name = "team-1"
sha256 = "{hashlib.sha256(KEY.encode()).hexdigest()}"
may = ["infer", "metrics", "admin"]
tenant = "team"
"""
ODD = repositories.echoing(
    "import os, time",
    """
    if mood == 3.0:
        time.sleep(1.7)  # not hung yet
    if mood == 13.0:
        raise ValueError("thirteen is not served")
    if mood == 666.0:
        os.abort()
    """,
)
LONG = 3.0
"""Makes a model take 1.7 s, where it was measured to take next to nothing."""
QUIET = {
    "Refused by quota", "Lost and started again", "Cache", "Good answers that waited for a LOAD",
    "Batches that took longer than expected",
}  # fmt: skip
"""Panels that show something only once it has happened, or while it happens."""
LASTS_S = 90.0
"""For what happens within a second or two on a machine that is not busy."""


@pytest.fixture(scope="module")
def serving(
    tmp_path_factory: pytest.TempPathFactory, start: Callable[..., AbstractContextManager[Serving]]
) -> Iterator[Serving]:
    folder = tmp_path_factory.mktemp("monitored")
    for name in ("odd", "deadly", "watched"):
        repositories.python_model(folder / "models", name, ODD)
    (folder / "keys.toml").write_text(KEYS)
    (folder / "keys.toml").chmod(0o600)
    controller = ControllerConfig(quarantine_after=1)
    settings = {"api_keys": str(folder / "keys.toml"), "triton": True}
    with start(folder / "models", controller=controller, **settings) as found:
        ask_for_every_end(found)
        yield found


def ask(serving: Serving, mood: float, model: str = "odd", **parameters: float) -> tuple[int, str]:
    """The status and reason of one request."""
    body = x_json([mood, 0.0, 0.0, 0.0], parameters={"slo_ms": 20_000, **parameters})
    answer = call(serving.http_url, f"/v2/models/{model}/infer", body, {"authorization": f"Bearer {KEY}"})
    return answer.status, (answer.json or {}).get("reason", "")


def ask_for_every_end(serving: Serving) -> None:
    """Requests that end well, badly in each way, and too late after a promise."""
    assert ask(serving, 0.0) == (200, "")
    assert ask(serving, 0.0, decide_ms=0) == (200, "")
    assert ask(serving, 13.0) == (500, "model_raised")
    assert ask(serving, 0.0, slo_ms=0.01)[0] in (503, 504)
    wrong = call(serving.http_url, "/v2/models/odd/infer", x_json([1.0]), {"authorization": f"Bearer {KEY}"})
    assert wrong.status == 400
    assert ask(serving, LONG, slo_ms=1000, decide_ms=0)[0] == 503
    until("the late one is counted", lambda: late(serving), LASTS_S, every_s=0.1)
    until(
        "it is quarantined",
        lambda: ask(serving, 666.0, "deadly") == (500, "quarantined"),
        LASTS_S,
        every_s=0.1,
    )
    until("the worker is back", lambda: ask(serving, 0.0) == (200, ""), LASTS_S, every_s=0.1)


def scrape(serving: Serving) -> str:
    """The page of metrics."""
    with_key = {"authorization": f"Bearer {KEY}"}
    page: bytes = call(serving.server.metrics_url.removesuffix("/metrics"), "/metrics", None, with_key).json
    return page.decode()


def labels_of(page: str) -> Known:
    """The labels of each metric of a page; none for one that has no sample."""
    found: dict[str, set[str]] = {}
    for family in text_string_to_metric_families(page):
        for sample in family.samples:
            found.setdefault(sample.name, set()).update(sample.labels)
    for name in re.findall(r"^# TYPE (\S+)", page, re.MULTILINE):
        found.setdefault(name, set())
    return {name: frozenset(labels) | monitoring.BY_PROMETHEUS for name, labels in found.items()}


def late(serving: Serving) -> bool:
    return re.search(r"^clockwork_requests_late_total 0$", scrape(serving), re.MULTILINE) is None


def test_everything_that_is_asked_for_is_what_a_server_exposes(serving: Serving) -> None:
    page = scrape(serving)
    # What does not happen here has its labels from the same code.
    rare = labels_of(
        render(Counters(damaged_files={"weights": 1}, processes_ended={"gateway-0": 1})).decode()
    )
    known = labels_of(page)
    known |= {
        name: rare[name] for name in ("clockwork_cache_damaged_total", "clockwork_processes_ended_total")
    }
    known |= monitoring.recorded() | {"up": monitoring.BY_PROMETHEUS}

    lacking = {query.where: monitoring.lacking(query, known) for query in monitoring.queries()}
    assert {where: names for where, names in lacking.items() if names} == {}
    assert known["clockwork_model_promises_broken_total"] >= {"model", "cause"}
    assert known["clockwork_model_quarantined"] >= {"model"}


def test_triton_s_names_say_what_its_statistics_extension_says(serving: Serving) -> None:
    with_key = {"authorization": f"Bearer {KEY}"}
    stats = call(serving.http_url, "/v2/models/odd/stats", None, with_key).json["model_stats"][0]
    page = scrape(serving)

    def of_odd(name: str, **labels: str) -> float:
        return sum(
            sample.value
            for family in text_string_to_metric_families(page)
            for sample in family.samples
            if sample.name.removesuffix("_total") == f"nv_inference_{name}"
            and {"model": "odd", **labels}.items() <= sample.labels.items()
        )

    told = stats["inference_stats"]
    assert of_odd("request_success") == told["success"]["count"] > 0
    assert of_odd("request_failure") == told["fail"]["count"]
    assert (of_odd("request_failure", reason="BACKEND"), of_odd("request_failure", reason="OTHER")) == (1, 1)
    assert of_odd("request_duration_us") == told["success"]["ns"] // 1000
    assert of_odd("queue_duration_us") == told["queue"]["ns"] // 1000
    assert of_odd("compute_infer_duration_us") == told["compute_infer"]["ns"] // 1000
    assert of_odd("count") == stats["inference_count"]
    assert of_odd("exec_count") == stats["execution_count"]


class Prometheus:
    """A running Prometheus, asked by its HTTP interface."""

    def __init__(self, url: str) -> None:
        self.url = url

    def get(self, path: str, **parameters: str) -> Any:
        found = call(self.url, f"/api/v1/{path}?{urllib.parse.urlencode(parameters)}").json
        assert found["status"] == "success", (path, parameters, found)
        return found["data"]

    def firing(self) -> dict[str, dict[str, str]]:
        """The labels of each alert that fires, by its name."""
        alerts = self.get("alerts")["alerts"]
        return {one["labels"]["alertname"]: one["labels"] for one in alerts if one["state"] == "firing"}

    def up(self) -> bool:
        return [one["health"] for one in self.get("targets")["activeTargets"]] == ["up"]


@contextmanager
def prometheus(folder: Path, serving: Serving) -> Iterator[Prometheus]:
    """One that scrapes a server as ``prometheus.yml`` says, but every second."""
    config = yaml.safe_load((monitoring.FOLDER / "prometheus.yml").read_text(encoding="utf-8"))
    config["global"] = {"scrape_interval": "1s", "evaluation_interval": "1s"}
    config["rule_files"] = [str(monitoring.FOLDER / name) for name in config["rule_files"]]
    (job,) = config["scrape_configs"]
    job["static_configs"] = [{"targets": [target(serving)]}]
    job["authorization"] = {"credentials": KEY}
    (folder / "prometheus.yml").write_text(json.dumps(config))
    log = folder / "log"
    with log.open("w") as written:
        process = subprocess.Popen(
            ["prometheus", "--config.file", "prometheus.yml", "--storage.tsdb.path", "data",
             "--web.listen-address", "127.0.0.1:0"],
            cwd=folder, stderr=written,
        )  # fmt: skip
    try:
        listens = r'msg="Listening on".* address=(\S+)'
        found = until("it listens", lambda: re.search(listens, log.read_text()), LASTS_S, every_s=0.1)
        url = f"http://{found[1]}"
        until("it is ready", lambda: call(url, "/-/ready").status == 200, LASTS_S, every_s=0.1)
        yield Prometheus(url)
    finally:
        process.terminate()
        process.wait(LASTS_S)


def target(serving: Serving) -> str:
    return serving.server.metrics_url.removeprefix("http://").removesuffix("/metrics")


@pytest.mark.skipif(
    shutil.which("prometheus") is None,
    reason="Prometheus is not installed; Debian's package prometheus has it",
)
def test_a_late_answer_is_seen_by_prometheus_and_fires(tmp_path: Path, serving: Serving) -> None:
    with prometheus(tmp_path, serving) as watching:
        until("it scrapes", watching.up, LASTS_S, every_s=0.2)
        assert ask(serving, 0.0, "watched") == (200, "")
        until(
            "the rules were evaluated",
            lambda: all(
                rule["health"] == "ok" for group in watching.get("rules")["groups"] for rule in group["rules"]
            ),
            LASTS_S, every_s=0.2,
        )  # fmt: skip
        before = watching.firing()
        assert "ClockworkAnswersLate" not in before, before

        assert ask(serving, LONG, "watched", slo_ms=1000)[0] == 504
        found = until(
            "the alert fires", lambda: watching.firing().get("ClockworkAnswersLate"), LASTS_S, every_s=0.2
        )
        assert found["severity"] == "page"
        assert found["instance"] == target(serving)

        panels = {panel["title"] for panel in monitoring.dashboard()["panels"]}
        empty = {
            query.where
            for query in monitoring.queries(target(serving))
            if not watching.get("query", query=query.expression)["result"] and query.where in panels
        }
        assert empty <= QUIET

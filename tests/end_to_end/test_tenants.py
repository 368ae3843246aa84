"""Two tenants of one device, as a server with their keys serves them: what one asks for beyond its quota."""

from __future__ import annotations

import hashlib
import random
import urllib.request
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import tritonclient.grpc
from tritonclient.utils import InferenceServerException

from harness import repositories
from harness.http_load import Sample, Shot, infer_message, open_loop, poisson, reason_of, run
from harness.serving import Serving, until
from tests.end_to_end.conftest import call, x_json
from tests.timing import Timing

Start = Callable[..., AbstractContextManager[Serving]]
X = [("x", "FP32", (1, 4), bytes(16))]
LASTS_MS = 10
QUOTA_MS = 200
"""Of device time a second: twenty requests."""
SECONDS = 6.0
TIGHTEST_MS, MODEST_SLO_MS = 2000, 2500
"""What the greedy tenant may ask for, and what the other asks for: a busy machine keeps both."""
BODY = x_json([0.0] * 4)

KEYS = """
[[tenants]]
name = "greedy"
device_ms_per_s = {quota}
burst_s = 0.1
min_slo_ms = {tightest}
max_priority = 8

[[keys]]
name = "greedy-1"
sha256 = "{greedy_1}"
may = ["infer"]
tenant = "greedy"

[[keys]]
name = "greedy-2"
sha256 = "{greedy_2}"
may = ["infer"]
tenant = "greedy"

[[keys]]
name = "modest"
sha256 = "{modest}"
may = ["infer", "metrics"]
"""


def write_keys(path: Path, quota: float = QUOTA_MS) -> None:
    names = ("greedy_1", "greedy_2", "modest")
    hashes = {name: hashlib.sha256(name.encode()).hexdigest() for name in names}
    new = path.with_suffix(".new")
    new.touch(0o600)
    new.write_text(KEYS.format(quota=quota, tightest=TIGHTEST_MS, **hashes))
    new.replace(path)


class Two(NamedTuple):
    serving: Serving
    keys: Path


@pytest.fixture
def two(tmp_path: Path, start: Start) -> Iterator[Two]:
    """A server with a model for each tenant, both warm, through two gateways."""
    root, keys = tmp_path / "models", tmp_path / "keys.toml"
    for name in ("mine", "theirs"):
        repositories.emulated(root, name, {1: LASTS_MS})
    write_keys(keys)
    with start(root, device="emulated", gateways=2, api_keys=str(keys)) as serving:
        for name in ("mine", "theirs"):
            assert asked(serving, "modest", name).status == 200
        yield Two(serving, keys)


def asked(serving: Serving, key: str, model: str = "theirs", **headers: str):  # type: ignore[no-untyped-def]
    return call(serving.http_url, f"/v2/models/{model}/infer", BODY, {"x-api-key": key, **headers})


def shots(url: str, key: str, model: str, rate: float, slo_ms: float, seed: int) -> list[Shot]:
    message = infer_message(url, model, X, slo_ms=slo_ms)
    line, rest = message.split(b"\r\n", 1)
    message = b"%s\r\nx-api-key: %s\r\n%s" % (line, key.encode(), rest)
    return [Shot(at_ns, message, key) for at_ns in poisson(rate, SECONDS, random.Random(seed))]


def played(serving: Serving, greedy_rps: float) -> dict[str, list[Sample]]:
    url = serving.http_url
    loads = shots(url, "modest", "mine", 25, MODEST_SLO_MS, 1)
    for at, key in enumerate(("greedy_1", "greedy_2")):
        loads += shots(url, key, "theirs", greedy_rps / 2, 5, 2 + at) if greedy_rps else []
    report = run(open_loop(url, sorted(loads, key=lambda shot: shot.at_ns)))
    found: dict[str, list[Sample]] = {"modest": [], "greedy": []}
    for sample in report.samples:
        found[sample.name.partition("_")[0]].append(sample)
    return found


def answered(samples: list[Sample]) -> int:
    return sum(sample.status == 200 for sample in samples)


def metrics(serving: Serving, name: str) -> dict[str, float]:
    request = urllib.request.Request(serving.server.metrics_url, headers={"x-api-key": "modest"})
    with urllib.request.urlopen(request, timeout=60) as response:
        lines = response.read().decode().splitlines()
    pairs = [line.rsplit(" ", 1) for line in lines if line.startswith(name)]
    return {labels.removeprefix(name): float(value) for labels, value in pairs}


def charged_s(serving: Serving) -> float:
    """Device time that the one tenant with a quota was charged for."""
    said = metrics(serving, "clockwork_tenant_device_seconds_total")
    assert list(said) == ['{tenant="greedy"}'], "only who has a quota has metrics"
    return said['{tenant="greedy"}']


@pytest.mark.slow
def test_ten_times_a_quota_at_the_tightest_slo_leaves_anothers_answers_in_time(
    two: Two, timing: Timing
) -> None:
    alone, within = [played(two.serving, rate) for rate in (0, 12)]
    before_s = charged_s(two.serving)
    beyond = played(two.serving, 200)
    spent_s = charged_s(two.serving) - before_s
    greedy = beyond["greedy"]
    most = QUOTA_MS / LASTS_MS * SECONDS
    assert answered(greedy) <= 1.05 * most + QUOTA_MS * 0.1 / LASTS_MS
    refusals = Counter((sample.status, reason_of(sample)) for sample in greedy if sample.status != 200)
    with timing.judged():
        for found in (alone, within, beyond):
            assert len(found["modest"]) == len(alone["modest"])
            assert answered(found["modest"]) >= len(found["modest"]) - 1, "one may meet a hiccup of the host"
        assert spent_s >= 0.8 * QUOTA_MS / 1000 * SECONDS
        assert refusals[429, "tenant_quota"] >= 0.99 * refusals.total()

    seconds = LASTS_MS / 1000 * answered(greedy)
    # It pays for what its requests took, which on a busy machine is more.
    assert 0.9 * seconds <= spent_s <= 1.5 * seconds


def test_what_a_tenant_may_ask_for_is_capped_and_its_refusal_says_when_to_come_back(two: Two) -> None:
    tight = asked(two.serving, "greedy_1", **{"x-slo-ms": "5"})
    assert (tight.status, tight.json["parameters"]["slo_ms"]) == (200, TIGHTEST_MS)
    assert "slo_ms" not in asked(two.serving, "modest", **{"x-slo-ms": "5000"}).json["parameters"]

    with ThreadPoolExecutor(20) as pool:  # one after the other, on a busy machine, none would be too many
        found = list(pool.map(partial(asked, two.serving), ("greedy_1", "greedy_2") * 10))
    refused = [one for one in found if one.status == 429]
    assert refused
    assert refused[0].json["reason"] == "tenant_quota"
    told: str = refused[0].json["error"]
    assert told.startswith(
        "tenant_quota: device_ms_per_s of tenant greedy: expected at most 200 ms of device"
    )
    assert 0 < refused[0].json["retry_after_ms"] <= 100
    assert refused[0].headers["retry-after"] in ("1", "2")


def test_over_grpc_it_hears_the_same(two: Two) -> None:
    tensor = tritonclient.grpc.InferInput("x", [1, 4], "FP32")
    tensor.set_data_from_numpy(np.zeros((1, 4), np.float32))
    with (
        tritonclient.grpc.InferenceServerClient(two.serving.grpc_url) as client,
        ThreadPoolExecutor(20) as pool,
    ):

        def end(_: int) -> tuple[str, str]:
            try:
                client.infer("theirs", [tensor], headers={"x-api-key": "greedy_1"})
            except InferenceServerException as error:
                return error.status(), error.message().partition(":")[0]
            return "", ""

        ends = set(pool.map(end, range(20)))
    assert ends == {("", ""), ("StatusCode.RESOURCE_EXHAUSTED", "tenant_quota")}


def test_a_tenant_is_named_by_its_key_alone(two: Two) -> None:
    for _ in range(20):
        found = asked(two.serving, "modest", tenant="greedy", **{"x-tenant": "greedy", "x-slo-ms": "5000"})
        assert found.status == 200
    said = metrics(two.serving, "clockwork_tenant_requests_total")
    assert said == {}


def test_quotas_are_read_again_when_the_file_changes(two: Two) -> None:
    write_keys(two.keys, quota=0.5)
    until(
        "they are",
        lambda: metrics(two.serving, "clockwork_tenant_device_quota") == {'{tenant="greedy"}': 0.0005},
    )
    assert {asked(two.serving, "greedy_1").status for _ in range(3)} == {200, 429}

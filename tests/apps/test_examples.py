"""The client examples run as they stand, against a server with the example models."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from clockwork_serve.config import Settings
from clockwork_serve.devices import DeviceConfig
from clockwork_serve.serve.supervisor.server import ServerConfig, running_server
from clockwork_serve.store import StoreConfig
from tests.end_to_end.conftest import example_models

EXAMPLES = Path(__file__).parents[2] / "examples"
# Where there are several: so little time may be over before anybody can say that it will not do.
SAID: dict[str, list[str | tuple[str, ...]]] = {
    "01_infer_http.py": ["sum:        [ 0  2  4  6  8 10"],
    "02_infer_grpc.py": ["4 words; backwards: neve ro ddo reven"],
    "03_deadlines.py": ["SLO   0.01 ms, answered after", (": 429: ", ": 504: ")],
    "04_many_at_once.py": ["100 of 100 right"],
    "05_client.py": [
        "plenty of time: 98% sure that they differ, after ",
        ("no time at all: rejected, would_miss_deadline", "no time at all: Expired: "),
        "three bits: input 'bits' is wrong: unexpected shape",
        "a list of bits: input 'bits' is wrong: input 'bits': expected a numpy array, found list",
        "no such model: model 'nope' is wrong",
        "200 in 5 ms each: ",
        "200 in 5 ms each, with retries: ",
    ],
    "06_async_client.py": ["1000 of 1000 right, 0 not in time", "batches so far", "cancelled: True"],
    "07_grpc_aio.py": [
        "'no lemon no melon' backwards: 'nolem on nomel on'",
        "in no time: StatusCode.",
    ],
    "08_no_packages.py": [
        "[0, 1]: equal, different = [0.01798",
        ("[1, 1] in 0.2 ms: 429 rejected: would_miss_deadline", "[1, 1] in 0.2 ms: 504 expired: "),
        "[1, 1, 1] in 1000 ms: 400 invalid: unexpected shape for input 'bits'",
    ],
    "09_curl.sh": [
        'ready:   {"ready":true}',
        '"mlp"',
        'answer:  {"model_name":"mlp"',
        ("(status 429)", "(status 504)"),
    ],
}


def test_every_example_has_an_expectation():
    assert sorted(SAID) == sorted(path.name for path in EXAMPLES.glob("0*"))


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    config = ServerConfig(
        settings=Settings(
            repository=str(example_models(tmp_path_factory.mktemp("examples") / "models")),
            http_port=0,
            grpc_port=0,
            metrics_port=None,
            log_level="warning",
            slo_ms=20_000,
        ),
        store=StoreConfig(cache_dir=str(tmp_path_factory.mktemp("cache"))),
        devices=(DeviceConfig(device="cpu:0", memory_bytes=4 << 20),),
    )
    with running_server(config) as server:
        yield server


@pytest.mark.system
@pytest.mark.parametrize("name", SAID)
def test_an_example_says_what_it_should(name, server):
    url = server.grpc_url if "grpc" in name else server.http_url.removeprefix("http://")
    if name.endswith(".sh") and shutil.which("curl") is None:
        pytest.skip("curl is not there")
    run = [str(EXAMPLES / name)] if name.endswith(".sh") else [sys.executable, str(EXAMPLES / name)]
    done = subprocess.run(
        [*run, url], env=dict(os.environ), capture_output=True, text=True, timeout=240, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "None" not in done.stdout
    for words in SAID[name]:
        assert any(each in done.stdout for each in ([words] if isinstance(words, str) else words)), words

"""The client examples run as they stand, against a server with the example models."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from clockwork_serve.devices import DeviceConfig
from clockwork_serve.serve.server import ServerConfig, running_server
from clockwork_serve.store import StoreConfig

EXAMPLES = Path(__file__).parents[2] / "examples"
SAID = {
    "01_infer_http.py": "sum:        [ 0  2  4  6  8 10",
    "02_infer_grpc.py": "4 words; backwards: neve ro ddo reven",
    "03_deadlines.py": "SLO   0.01 ms",
    "04_many_at_once.py": "100 of 100 right",
}


def test_every_example_has_an_expectation():
    assert sorted(SAID) == sorted(path.name for path in EXAMPLES.glob("0*.py"))


@pytest.fixture(scope="module")
def environment(tmp_path_factory):
    config = ServerConfig(
        repository=str(EXAMPLES / "models"),
        store=StoreConfig(cache_dir=str(tmp_path_factory.mktemp("cache"))),
        devices=(DeviceConfig(device="cpu:0", memory_bytes=4 << 20),),
        http_port=0, grpc_port=0, metrics_port=None, log_level="warning",
    )  # fmt: skip
    with running_server(config) as server:
        yield os.environ | {
            "CLOCKWORK_HTTP": server.http_url.removeprefix("http://"),
            "CLOCKWORK_GRPC": server.grpc_url,
        }


@pytest.mark.system
@pytest.mark.parametrize("name", SAID)
def test_an_example_says_what_it_should(name, environment):
    done = subprocess.run(
        [sys.executable, str(EXAMPLES / name)],
        env=environment,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert SAID[name] in done.stdout

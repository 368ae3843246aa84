"""A whole server with TLS, API keys and two gateways, as its operator starts it and stock clients ask it."""

from __future__ import annotations

import gc
import json
import os
import ssl
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tritonclient.grpc
import tritonclient.http
from tritonclient.utils import InferenceServerException

from tests.end_to_end.commands import command, started
from tests.end_to_end.conftest import ROOT, example_models
from tests.serve.certificates import Certificates, certificates

# What the stock client does to check a name, and its destructor, are no business of ours.
pytestmark = [
    pytest.mark.filterwarnings("ignore:.*InferenceServerClient.__del__"),
    pytest.mark.filterwarnings("ignore:ssl.match_hostname"),
]


def clockwork(*arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
    """Our own command, to its end."""
    return subprocess.run(
        [sys.executable, "-m", "clockwork_serve", *arguments],
        capture_output=True, text=True, timeout=240, check=False, env=os.environ | variables,
    )  # fmt: skip


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Certificates:
    return certificates(tmp_path_factory.mktemp("certificates"))


@pytest.fixture(scope="module")
def keys(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, str]]:
    """The file and the keys by their holders, made as an operator makes them."""
    path = tmp_path_factory.mktemp("keys") / "keys.toml"
    path.touch(0o600)
    made: dict[str, str] = {}
    for name, rights in (("team-a", ["infer"]), ("ops", ["infer", "admin"]), ("prometheus", ["metrics"])):
        done = clockwork("key", name, *(word for right in rights for word in ("--may", right)))
        with path.open("a") as file:
            file.write(done.stdout)
        made[name] = done.stderr.split()[-1]
    return path, made


@pytest.fixture(scope="module")
def ready(
    tmp_path_factory: pytest.TempPathFactory, cache: Path, files: Certificates,
    keys: tuple[Path, dict[str, str]],
) -> Iterator[dict[str, Any]]:  # fmt: skip
    options = [
        "--gateways", "2", "--tls-certificate", files.certificate, "--tls-key", files.key,
        "--api-keys", str(keys[0]),
    ]  # fmt: skip
    models = example_models(tmp_path_factory.mktemp("door") / "models")
    with started(command(models, cache, *options)) as (_, said):
        yield said
    gc.collect()  # what stock clients left, in their own thread


def asked(module: Any) -> Any:
    found = module.InferInput("bits", [1, 2], "FP32")
    found.set_data_from_numpy(np.array([[0, 1]], np.float32))
    return found


def test_stock_clients_infer_over_tls_with_their_keys(
    ready: dict[str, Any], files: Certificates, keys: tuple[Path, dict[str, str]]
) -> None:
    key = f"Bearer {keys[1]['team-a']}"
    assert ready["http"].startswith("https://")
    context = ssl.create_default_context(cafile=files.ca)
    http = tritonclient.http.InferenceServerClient(
        ready["http"].removeprefix("https://"), ssl=True, ssl_context_factory=lambda: context
    )
    over_grpc = tritonclient.grpc.InferenceServerClient(ready["grpc"], ssl=True, root_certificates=files.ca)
    with closing(http), closing(over_grpc):
        for client, module in ((http, tritonclient.http), (over_grpc, tritonclient.grpc)):
            assert client.is_server_ready()
            found = client.infer("mlp", [asked(module)], headers={"authorization": key})
            assert found.as_numpy("probability").shape == (1, 2)
            with pytest.raises(InferenceServerException, match="API key: expected"):
                client.infer("mlp", [asked(module)])
            with pytest.raises(InferenceServerException, match="'admin'"):
                client.unload_model("mlp", headers={"authorization": key})


def test_models_are_administered_with_a_key_that_may(
    ready: dict[str, Any], files: Certificates, keys: tuple[Path, dict[str, str]]
) -> None:
    def models(holder: str, *words: str) -> subprocess.CompletedProcess[str]:
        key = {"CLOCKWORK_API_KEY": keys[1][holder]} if holder else {}
        return clockwork("models", "--url", ready["http"], "--ca", files.ca, *words, **key)

    assert "model versions ready" in models("team-a", "list").stdout
    assert models("ops", "load", "mlp").stdout == "mlp: loaded\n"
    assert "403" in models("team-a", "load", "mlp").stderr
    assert "401" in models("", "list").stderr


def test_metrics_want_a_key_and_tls(
    ready: dict[str, Any], files: Certificates, keys: tuple[Path, dict[str, str]]
) -> None:
    context = ssl.create_default_context(cafile=files.ca)
    scrape = urllib.request.Request(
        ready["metrics"], headers={"Authorization": f"Bearer {keys[1]['prometheus']}"}
    )
    with urllib.request.urlopen(scrape, timeout=60, context=context) as response:
        assert b"clockwork_ready 1" in response.read()
    with pytest.raises(urllib.error.HTTPError) as caught:
        urllib.request.urlopen(ready["metrics"], timeout=60, context=context)
    with caught.value as refused:
        assert refused.code == 401
        assert "Authorization: Bearer KEY" in json.load(refused)["error"]


def test_a_certificate_without_its_key_ends_the_command_at_once(cache: Path, files: Certificates) -> None:
    done = clockwork(
        *command(ROOT / "examples" / "models", cache)[3:], "--tls-certificate", files.certificate
    )
    assert done.returncode == 2
    assert done.stderr.startswith("error: tls_key: expected a PEM file")
    done = clockwork(
        *command(ROOT / "examples" / "models", cache)[3:], "--tls-certificate", files.certificate,
        "--tls-key", files.other_key,
    )  # fmt: skip
    assert done.returncode == 2
    assert "tls_key: expected the key of" in done.stderr

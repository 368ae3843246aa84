"""Trace and log settings: readable over both protocols; changes are rejected with a reason."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from types import ModuleType
from typing import Any

import pytest
import tritonclient.grpc
import tritonclient.http
from tritonclient.utils import InferenceServerException

from tests.serve.gateway.running import RunningGateway, running_gateway
from tests.serve.http.requests import ask, get, post

pytestmark = pytest.mark.filterwarnings("ignore:.*InferenceServerClient.__del__")


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningGateway]:
    with running_gateway(tmp_path_factory.mktemp("gateway"), grpc_port=0) as found:
        yield found


@pytest.fixture(params=[tritonclient.http, tritonclient.grpc], ids=["http", "grpc"])
def client(gateway: RunningGateway, request: pytest.FixtureRequest) -> Iterator[Any]:
    module: ModuleType = request.param
    url = gateway.http_url if module is tritonclient.http else gateway.grpc_url
    found = module.InferenceServerClient(url)
    yield found
    found.close()


def plain(found: Any) -> dict[str, Any]:
    """Settings of either protocol as plain values."""
    if isinstance(found, dict):
        return found
    values = {}
    for name, setting in found.settings.items():
        if hasattr(setting, "value"):
            values[name] = list(setting.value)
        else:
            values[name] = getattr(setting, setting.WhichOneof("parameter_choice"))
    return values


def refused(status: str) -> bool:
    return status in {"501", "StatusCode.UNIMPLEMENTED"}


@pytest.mark.parametrize("model", [None, "ident"])
def test_traces_are_off(client: Any, model: str | None) -> None:
    assert plain(client.get_trace_settings(model)) == {"trace_level": ["OFF"]}


@pytest.mark.parametrize(
    "settings", [{}, {"trace_level": "OFF"}, {"trace_level": ["OFF"]}, {"trace_rate": None}]
)
def test_trace_settings_that_change_nothing_are_accepted(client: Any, settings: dict[str, Any]) -> None:
    assert plain(client.update_trace_settings("ident", settings)) == {"trace_level": ["OFF"]}


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (
            {"trace_level": ["TIMESTAMPS"]},
            r"'trace_level' cannot be changed from \['OFF'\] to \['TIMESTAMPS'\]",
        ),
        ({"trace_rate": "100"}, "trace setting 'trace_rate' is not supported"),
    ],
)
def test_traces_cannot_be_switched_on(client: Any, settings: dict[str, Any], words: str) -> None:
    for model in (None, "ident"):
        with pytest.raises(InferenceServerException, match=f"{words}.*--journal") as caught:
            client.update_trace_settings(model, settings)
        assert refused(caught.value.status())


def test_settings_of_an_unknown_model_are_not_found(client: Any) -> None:
    for asked in (client.get_trace_settings, client.update_trace_settings):
        with pytest.raises(InferenceServerException, match="unknown model: 'nope'") as caught:
            asked("nope")
        assert caught.value.status() in {"404", "StatusCode.NOT_FOUND"}


def test_log_settings_are_those_of_the_process(client: Any) -> None:
    level = logging.getLogger().getEffectiveLevel()
    assert plain(client.get_log_settings()) == {
        "log_file": "", "log_info": level <= logging.INFO, "log_warning": level <= logging.WARNING,
        "log_error": level <= logging.ERROR, "log_verbose_level": int(level <= logging.DEBUG),
    }  # fmt: skip


def test_log_settings_cannot_be_changed(client: Any) -> None:
    now = plain(client.get_log_settings())
    assert plain(client.update_log_settings(now)) == now
    assert plain(client.update_log_settings({"log_file": None})) == now
    for changed in ({"log_file": "/tmp/log"}, {"log_error": not now["log_error"]}, {"log_format": "ISO8601"}):
        with pytest.raises(
            InferenceServerException, match="start the server with another --log-level"
        ) as caught:
            client.update_log_settings(changed)
        assert refused(caught.value.status())


def test_methods_and_bodies_matter(gateway: RunningGateway) -> None:
    for path in ("/v2/trace/setting", "/v2/models/ident/trace/setting", "/v2/logging"):
        found = ask(gateway, get(path, method="DELETE"))
        assert (found.status, found.headers["allow"]) == (405, "GET, POST")
        assert ask(gateway, get(path, method="HEAD")).status == 200
        assert ask(gateway, post(path, b"[]")).status == 400
    assert ask(gateway, post("/v2/logging", b'{"log_info":"yes"}')).status == 501


@pytest.mark.parametrize("body", [b'{"log_verbose_level":false}', b'{"log_info":0}', b'{"log_error":1}'])
def test_numbers_and_booleans_are_not_interchangeable(gateway: RunningGateway, body: bytes) -> None:
    assert ask(gateway, post("/v2/logging", body)).status == 501


@pytest.mark.parametrize("value", [b"{}", b'""', b"0", b"false"])
def test_falsy_values_are_no_trace_level(gateway: RunningGateway, value: bytes) -> None:
    assert ask(gateway, post("/v2/trace/setting", b'{"trace_level":%s}' % value)).status == 501


def test_settings_of_a_version_that_is_not_served_are_not_found(gateway: RunningGateway) -> None:
    assert ask(gateway, get("/v2/models/ident/versions/1/trace/setting")).status == 200
    found = ask(gateway, get("/v2/models/ident/versions/7/trace/setting"))
    assert (found.status, "version 7" in found.json["error"]) == (404, True)

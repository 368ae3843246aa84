"""The description of the HTTP port: valid OpenAPI, and as complete as the routes and the statuses are."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from clockwork_serve.errors import InvalidRequest
from clockwork_serve.messages import DATATYPES, Outcome, Reason
from clockwork_serve.oip import (
    Forbidden,
    TooLarge,
    UnknownModel,
    Unsupported,
    http_description,
    status_of,
    status_of_error,
)
from clockwork_serve.serve.http import routes as gateway_routes
from clockwork_serve.serve.http.routes import find_route

DOCUMENT = http_description("1.2.3")
PAGE = Path(__file__).resolve().parents[2] / "docs" / "use" / "rest.md"
NAMES = {"{model}": "m", "{version}": "1", "{region}": "r"}


def operations() -> dict[tuple[str, str], dict[str, Any]]:
    return {
        (method, path): operation
        for path, item in DOCUMENT["paths"].items()
        for method, operation in item.items()
        if method != "parameters"
    }


def concrete(path: str) -> bytes:
    for name, value in NAMES.items():
        path = path.replace(name, value)
    return path.encode()


def test_it_is_valid_openapi() -> None:
    validator = pytest.importorskip("openapi_spec_validator")
    validator.validate(DOCUMENT)
    assert (DOCUMENT["openapi"], DOCUMENT["info"]["version"]) == ("3.1.0", "1.2.3")


def test_each_path_is_routed_and_takes_the_methods_that_are_described() -> None:
    for path, item in DOCUMENT["paths"].items():
        route = find_route(concrete(path))
        assert route is not None, path
        described = {method.upper() for method in item if method != "parameters"}
        assert set(route.method.decode().split(", ")) == described, path


def test_each_route_is_described() -> None:
    described = {re.sub(r"^/", "", path) for path in DOCUMENT["paths"]}
    assert set(gateway_routes._FIXED) <= described
    for tail in (*gateway_routes._MODEL, "infer"):
        for base in ("v2/models/{model}", "v2/models/{model}/versions/{version}"):
            assert f"{base}/{tail}".rstrip("/") in described
    for kind, verbs in gateway_routes._REGIONS.items():
        assert {f"v2/{kind}/region/{{region}}/{verb}" for verb in verbs} <= described
        assert {f"v2/{kind}/status", f"v2/{kind}/unregister"} <= described
    assert {f"v2/repository/models/{{model}}/{verb}" for verb in gateway_routes._REPOSITORY} <= described


def test_inference_has_every_status_that_a_request_can_end_with() -> None:
    told = {
        status_of(outcome, reason, triton=triton).http
        for outcome in Outcome if outcome is not Outcome.CANCELLED
        for reason in Reason
        for triton in (False, True)
    }  # fmt: skip
    told |= {
        status_of_error(error("x")).http
        for error in (InvalidRequest, UnknownModel, TooLarge, Unsupported, Forbidden)
    }
    for path in ("/v2/models/{model}/infer", "/v2/models/{model}/versions/{version}/infer"):
        responses = operations()["post", path]["responses"]
        assert {str(status) for status in told} <= set(responses)
        assert {"401", "408", "417", "431"} <= set(responses), "what ends it before it is a request"


def test_outcomes_and_reasons_are_all_there() -> None:
    fields = DOCUMENT["components"]["schemas"]["Refusal"]["properties"]
    assert set(fields["outcome"]["enum"]) == {str(each) for each in Outcome} - {"ok"}
    assert set(fields["reason"]["enum"]) == {str(each) for each in Reason}
    assert DOCUMENT["components"]["schemas"]["Datatype"]["enum"] == list(DATATYPES)


def test_every_operation_may_end_before_it_is_understood() -> None:
    early = {code for code in DOCUMENT["components"]["responses"] if code.isdigit()}
    assert early == {"400", "401", "403", "408", "413", "417", "429", "431", "501"}
    for (_, path), operation in operations().items():
        of_infer = "Infer" if path.endswith("/infer") else ""
        for code in early:
            assert operation["responses"][code] == {"$ref": f"#/components/responses/{of_infer}{code}"}


def test_a_model_s_versions_are_described_as_the_model_is() -> None:
    for path, item in DOCUMENT["paths"].items():
        if path.startswith("/v2/models/{model}") and "{version}" not in path:
            versioned = DOCUMENT["paths"][path.replace("{model}", "{model}/versions/{version}")]
            assert versioned["parameters"][:1] == item["parameters"]
            assert [each["name"] for each in versioned["parameters"]] == ["model", "version"]
            for method in item.keys() - {"parameters"}:
                operation = versioned[method]
                assert operation | {"operationId": ""} == item[method] | {"operationId": ""}


def test_every_operation_has_a_name_of_its_own() -> None:
    names = [operation["operationId"] for operation in operations().values()]
    assert len(set(names)) == len(names)
    assert all(re.fullmatch("[a-zA-Z]+", name) for name in names)


def test_health_alone_needs_no_key() -> None:
    free = {path for (_, path), operation in operations().items() if operation.get("security") == [{}]}
    assert free == {path for path in DOCUMENT["paths"] if path.endswith(("/ready", "/live"))}


def test_the_page_lists_every_path() -> None:
    listed = re.findall(r"^\| (GET|POST|GET, POST) \| `(\S+)` \|", PAGE.read_text(), re.MULTILINE)
    found = {
        (tuple(methods.lower().split(", ")), path.replace("[/versions/{version}]", ""))
        for methods, path in listed
    }
    described = {
        (tuple(method for method in ("get", "post") if method in item), path)
        for path, item in DOCUMENT["paths"].items()
        if "{version}" not in path
    }
    assert found == described

"""The catalogue of a gateway."""

from __future__ import annotations

import pytest

from clockwork_serve.oip import UnknownModel
from clockwork_serve.serve.gateway.controller_link import GatewayModels
from clockwork_serve.units import ms
from tests.serve.gateway.fake_controller import served, spec

X, Y = (spec("X", "FP32", 2),), (spec("Y", "FP32", 2),)


def models(
    *versions: str, name: str = "a", server_slo_ns: int | None = None, **fields: object
) -> GatewayModels:
    found = GatewayModels(server_slo_ns)
    for version in versions:
        code, model = served(name, X, Y, version=version, **fields)  # type: ignore[arg-type]
        found.add_code(code)
        found.add(model.model)
    return found


def test_the_highest_version_is_the_default() -> None:
    found = models("2", "10", "9")
    assert found.find("a").model.version == "10"
    assert found.find("a", "2").model.version == "2"
    assert found.versions("a") == ["2", "9", "10"]
    found.remove("a/10")
    assert found.find("a").model.version == "9"


def test_an_unknown_model_is_named() -> None:
    found = models("1")
    with pytest.raises(UnknownModel, match="unknown model: 'b' is not found"):
        found.find("b")
    with pytest.raises(UnknownModel, match="unknown model: 'a' version 9 is not found"):
        found.find("a", "9")
    found.remove("a/1")
    found.remove("a/1")
    with pytest.raises(UnknownModel):
        found.find("a")
    assert found.versions("a") == found.names() == []


def test_a_model_added_again_is_replaced() -> None:
    found = models("1")
    code, model = served("a", X, Y, slo_ns=ms(7))
    found.add_code(code)
    found.add(model.model)
    assert found.find("a").default_slo_ns == ms(7)
    assert found.versions("a") == ["1"]


def test_the_default_slo_is_the_models_else_the_servers_else_from_the_profile() -> None:
    assert models("1", server_slo_ns=ms(30), slo_ns=ms(7)).find("a").default_slo_ns == ms(7)
    assert models("1", server_slo_ns=ms(30)).find("a").default_slo_ns == ms(30)
    assert models("1").find("a").default_slo_ns == ms(100)

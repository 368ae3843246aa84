"""Our messages are the published ones, and live beside a client's in one process."""

from __future__ import annotations

from typing import Any

import pytest
import tritonclient.grpc
from google.protobuf import descriptor_pool
from tritonclient.grpc import model_config_pb2, service_pb2

from clockwork_serve.oip import build_descriptor, protobuf


def test_the_committed_descriptors_are_those_of_the_sources() -> None:
    pytest.importorskip("grpc_tools")
    assert build_descriptor.build() == protobuf.DESCRIPTORS.read_bytes()


def test_the_pool_is_our_own() -> None:
    theirs = descriptor_pool.Default().FindMessageTypeByName("inference.ModelInferRequest")
    assert theirs is tritonclient.grpc.service_pb2.ModelInferRequest.DESCRIPTOR
    assert protobuf.ModelInferRequest.DESCRIPTOR is not theirs


def messages(file: Any) -> dict[str, Any]:
    found: dict[str, Any] = {}
    pending = list(file.message_types_by_name.values())
    while pending:
        each = pending.pop()
        found[each.full_name] = each
        pending += each.nested_types
    return found


@pytest.mark.parametrize(
    "theirs", [service_pb2.DESCRIPTOR, model_config_pb2.DESCRIPTOR], ids=["service", "model_config"]
)
def test_every_field_has_the_published_number_and_type(theirs: Any) -> None:
    published = messages(theirs)
    checked = 0
    for name, ours in messages(
        protobuf.pool.FindFileByName(
            "inference.proto" if theirs is service_pb2.DESCRIPTOR else "model_config.proto"
        )
    ).items():
        for field in ours.fields:
            other = published[name].fields_by_name[field.name]
            assert (field.number, field.type, field.is_repeated) == (
                other.number, other.type, other.is_repeated,
            ), f"{name}.{field.name}"  # fmt: skip
            checked += 1
    assert checked > 50


def test_the_service_is_the_published_one() -> None:
    theirs = service_pb2.DESCRIPTOR.services_by_name["GRPCInferenceService"]
    ours = protobuf.rpcs(protobuf.INFERENCE_SERVICE)
    assert list(ours) == [method.name for method in theirs.methods]
    for method in theirs.methods:
        rpc = ours[method.name]
        assert rpc.request.DESCRIPTOR.full_name == method.input_type.full_name
        assert rpc.response.DESCRIPTOR.full_name == method.output_type.full_name
        assert (rpc.client_streaming, rpc.server_streaming) == (
            method.client_streaming,
            method.server_streaming,
        )
    assert list(protobuf.rpcs(protobuf.HEALTH_SERVICE)) == ["Check", "Watch"]

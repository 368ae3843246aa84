"""Reflection tells what is there, with all that it imports, and says what is not."""

from __future__ import annotations

from typing import Any

import pytest
from google.protobuf import descriptor_pb2

from clockwork_serve.oip import protobuf
from clockwork_serve.oip.protobuf import reflect

REQUEST = protobuf.message("grpc.reflection.v1.ServerReflectionRequest")


def files(response: Any) -> list[str]:
    return [
        descriptor_pb2.FileDescriptorProto.FromString(file).name
        for file in response.file_descriptor_response.file_descriptor_proto
    ]


def test_services_are_listed() -> None:
    found = reflect(REQUEST(host="here", list_services=""))
    assert [service.name for service in found.list_services_response.service] == [
        protobuf.HEALTH_SERVICE, protobuf.REFLECTION_SERVICE, protobuf.INFERENCE_SERVICE,
    ]  # fmt: skip
    assert (found.valid_host, found.original_request.host) == ("here", "here")


@pytest.mark.parametrize(
    ("field", "value", "expected"),
    [
        ("file_by_filename", "health.proto", ["health.proto"]),
        ("file_containing_symbol", protobuf.INFERENCE_SERVICE, ["model_config.proto", "inference.proto"]),
        (
            "file_containing_symbol",
            f"{protobuf.INFERENCE_SERVICE}.ModelInfer",
            ["model_config.proto", "inference.proto"],
        ),
        ("file_containing_symbol", "inference.DataType", ["model_config.proto"]),
        ("file_containing_symbol", protobuf.REFLECTION_SERVICE, ["reflection.proto"]),
    ],
)
def test_a_file_comes_after_all_that_it_imports(field: str, value: str, expected: list[str]) -> None:
    assert files(reflect(REQUEST(**{field: value}))) == expected


@pytest.mark.parametrize(
    ("fields", "code", "words"),
    [
        ({"file_by_filename": "nope.proto"}, 5, "nope.proto"),
        ({"file_containing_symbol": "inference.Nope"}, 5, "inference.Nope"),
        ({"file_containing_symbol": f"{protobuf.INFERENCE_SERVICE}.Nope"}, 5, "Nope"),
        ({"all_extension_numbers_of_type": "inference.Nope"}, 5, "inference.Nope"),
        (
            {
                "file_containing_extension": {
                    "containing_type": "inference.ModelConfig",
                    "extension_number": 9,
                }
            },
            5,
            "extension 9 of inference.ModelConfig",
        ),
        ({}, 3, "expected one of its fields, found none"),
    ],
)
def test_what_is_not_there_is_an_error_inside(fields: dict[str, Any], code: int, words: str) -> None:
    found = reflect(REQUEST(**fields))
    assert found.error_response.error_code == code
    assert words in found.error_response.error_message
    assert found.original_request == REQUEST(**fields)


def test_no_message_has_extensions() -> None:
    found = reflect(REQUEST(all_extension_numbers_of_type="inference.ModelConfig"))
    assert found.all_extension_numbers_response.base_type_name == "inference.ModelConfig"
    assert list(found.all_extension_numbers_response.extension_number) == []


def test_every_field_has_the_published_number_and_type() -> None:
    published = pytest.importorskip("grpc_reflection.v1alpha.reflection_pb2")
    ours = protobuf.pool.FindFileByName("reflection.proto").message_types_by_name
    theirs = published.DESCRIPTOR.message_types_by_name
    assert ours.keys() == theirs.keys()
    for name, message in ours.items():
        assert {field.name: (field.number, field.is_repeated) for field in message.fields} == {
            field.name: (field.number, field.is_repeated) for field in theirs[name].fields
        }
        for field in message.fields:
            # Text and bytes are the same on the wire.
            other = theirs[name].fields_by_name[field.name].type
            text = {field.TYPE_STRING, field.TYPE_BYTES}
            assert field.type == other or {field.type, other} == text, f"{name}.{field.name}"

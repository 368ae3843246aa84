"""What clients ask of shared memory: which keys are names of objects, which references lie within bounds."""

from __future__ import annotations

from typing import Any

import pytest

from clockwork_serve.errors import InvalidRequest
from clockwork_serve.oip import (
    Forbidden,
    SharedRef,
    SharedRegion,
    object_name,
    shared_region,
    status_of_error,
)
from clockwork_serve.oip.shared_memory import shared_ref

REGION = SharedRegion("r", "/clockwork-0", 64, 128)


@pytest.mark.parametrize("key", ["/clockwork-0", "clockwork-0", "/clockwork-", "/clockwork-ä b..c"])
def test_a_key_with_the_prefix_names_an_object(key: str) -> None:
    assert object_name(key, "/clockwork-") == key.removeprefix("/")


@pytest.mark.parametrize(
    "key",
    ["", "/", "/.", "..", "/..", "//clockwork-0", "/clockwork-0/x", "/clockwork-/../x",
     "/../dev/shm/clockwork-0", "clockwork-0/", "/clockwork-\0", "/clockwork-\ud800",
     "/clockwork-" + "x" * 250, "/clockwork-" + "ä" * 125],
)  # fmt: skip
def test_a_key_that_is_no_plain_name_is_refused(key: str) -> None:
    with pytest.raises(
        InvalidRequest, match=r"Unable to open shared memory region: .*expected a key of"
    ) as caught:
        object_name(key, "/clockwork-")
    assert status_of_error(caught.value).http == 400


@pytest.mark.parametrize("key", ["/other", "clockwork", "/Clockwork-0", "/xclockwork-0"])
def test_a_key_without_the_prefix_is_forbidden(key: str) -> None:
    with pytest.raises(Forbidden, match=f"'{key}': expected a key that begins with '/clockwork-'") as caught:
        object_name(key, "/clockwork-")
    assert status_of_error(caught.value) == (403, "PERMISSION_DENIED")


def test_a_slash_alone_as_prefix_allows_every_key() -> None:
    assert object_name("/X_0_0", "/") == "X_0_0"
    with pytest.raises(InvalidRequest):
        object_name("/a/b", "/")


@pytest.mark.parametrize(
    ("offset", "nbytes", "start"), [(0, 128, 64), (127, 1, 191), (100, 28, 164), (5, 0, 69)]
)
def test_a_reference_inside_its_region_has_a_place(offset: int, nbytes: int, start: int) -> None:
    assert REGION.start(SharedRef("r", offset, nbytes)) == start


@pytest.mark.parametrize(("offset", "nbytes"), [(128, 0), (1 << 63, 1), (1, 128), (127, 2), (0, 1 << 64)])
def test_a_reference_outside_its_region_is_refused(offset: int, nbytes: int) -> None:
    with pytest.raises(InvalidRequest, match=r"Invalid offset.* for shared memory region: 'r'.* 128 bytes"):
        REGION.start(SharedRef("r", offset, nbytes))


@pytest.mark.parametrize(
    ("parameters", "words"),
    [
        ({"shared_memory_byte_size": 1}, "'shared_memory_byte_size': expected 'shared_memory_region' too"),
        ({"shared_memory_offset": 1}, "'shared_memory_offset': expected 'shared_memory_region' too"),
        ({"shared_memory_region": ""}, "'shared_memory_region': expected a region's name, found ''"),
        ({"shared_memory_region": 7}, "expected a region's name, found 7"),
        ({"shared_memory_region": "r"}, "'shared_memory_byte_size': expected a number .*, found None"),
        ({"shared_memory_region": "r", "shared_memory_byte_size": -1}, "byte_size'.* found -1"),
        ({"shared_memory_region": "r", "shared_memory_byte_size": True}, "found True"),
        ({"shared_memory_region": "r", "shared_memory_byte_size": 1.5}, "found 1.5"),
        ({"shared_memory_region": "r", "shared_memory_byte_size": 1, "shared_memory_offset": ""}, "_offset'"),
    ],
)  # fmt: skip
def test_wrong_parameters_say_which(parameters: dict[str, Any], words: str) -> None:
    with pytest.raises(InvalidRequest, match=f"inference input 'X': parameter .*{words}|{words}"):
        shared_ref("input", "X", parameters)


def test_parameters_of_other_things_mean_no_shared_memory() -> None:
    assert shared_ref("input", "X", {"binary_data_size": 8}) is None


def test_a_registration_has_a_key_and_a_size() -> None:
    assert shared_region("r", {"key": "/k", "byte_size": 8}) == SharedRegion("r", "/k", 0, 8)
    assert shared_region("r", {"key": "/k", "byte_size": 8, "offset": 4}).offset == 4


@pytest.mark.parametrize(
    ("name", "fields", "words"),
    [
        ("", {"key": "/k", "byte_size": 8}, "name: expected 1 to 255 bytes"),
        ("x" * 256, {"key": "/k", "byte_size": 8}, "name: expected 1 to 255 bytes, found 256"),
        ("r", {"byte_size": 8}, "key: expected text"),
        ("r", {"key": 5, "byte_size": 8}, "key: expected text.*found 5"),
        ("r", {"key": "/k"}, "byte_size: expected a number of bytes, found None"),
        ("r", {"key": "/k", "byte_size": 0}, "byte_size: expected at least 1, found 0"),
        ("r", {"key": "/k", "byte_size": 8, "offset": -1}, "offset: expected a number of bytes, found -1"),
    ],
)
def test_a_wrong_registration_says_which_field(name: str, fields: dict[str, Any], words: str) -> None:
    with pytest.raises(InvalidRequest, match=f"failed to register shared memory region '{name}': {words}"):
        shared_region(name, fields)

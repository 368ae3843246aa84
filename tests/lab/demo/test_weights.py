"""Weights are read out of files whose bytes are written here by hand; a file cannot make us run anything."""

from __future__ import annotations

import json
import pickle

import numpy as np
import pytest

from clockwork_lab.demo.graphs import read_safetensors, read_torch


def short(text: bytes) -> bytes:
    return b"X" + len(text).to_bytes(4, "little") + text


def number(value: int) -> bytes:
    return b"K" + bytes([value])


def tensor(key: bytes, elements: int, offset: int, shape: bytes, strides: bytes) -> bytes:
    """The opcodes with which torch pickles a view of a storage."""
    storage = b"(" + short(b"storage") + b"ctorch\nFloatStorage\n" + short(key) + short(b"cpu")
    storage += number(elements) + b"NtQ"
    return b"ctorch._utils\n_rebuild_tensor_v2\n(" + storage + number(offset) + shape + strides + b"\x89NtR"


def torch_file(state: bytes, keys: list[str], storages: bytes) -> bytes:
    magic = b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."
    others = [pickle.dumps(1001, 2), pickle.dumps({"little_endian": True}, 2)]
    return b"".join([magic, *others, b"\x80\x02" + state + b".", pickle.dumps(keys, 2), storages])


def storage_of(values: np.ndarray) -> bytes:
    return len(values).to_bytes(8, "little") + values.astype("<f4").tobytes()


def two_views() -> tuple[bytes, np.ndarray]:
    values = np.arange(7, dtype=np.float32)
    matrix = tensor(b"0", 7, 1, number(2) + number(3) + b"\x86", number(3) + number(1) + b"\x86")
    turned = tensor(b"0", 7, 1, number(3) + number(2) + b"\x86", number(1) + number(3) + b"\x86")
    state = b"ccollections\nOrderedDict\n)R(" + short(b"w") + matrix + short(b"v") + turned + b"u"
    return state, values


def test_torch_views_share_their_storage():
    state, values = two_views()
    arrays = read_torch(torch_file(state, ["0"], storage_of(values)))
    np.testing.assert_array_equal(arrays["w"], values[1:].reshape(2, 3))
    np.testing.assert_array_equal(arrays["v"], values[1:].reshape(2, 3).T)


def test_a_torch_file_that_asks_for_more_is_refused():
    evil = b"cos\nsystem\n(" + short(b"true") + b"tR"
    with pytest.raises(pickle.UnpicklingError, match=r"refused.*os\.system"):
        read_torch(torch_file(evil, [], b""))


def test_a_torch_file_cut_short_is_an_error():
    state, values = two_views()
    whole = torch_file(state, ["0"], storage_of(values))
    with pytest.raises(ValueError, match="cut short"):
        read_torch(whole[:-2])


def test_a_view_outside_its_storage_is_an_error():
    state = b"}(" + short(b"w") + tensor(b"0", 3, 1, number(3) + b"\x85", number(1) + b"\x85") + b"u"
    with pytest.raises(ValueError, match="outside its storage"):
        read_torch(torch_file(state, ["0"], storage_of(np.zeros(3))))


def test_other_formats_are_named():
    with pytest.raises(ValueError, match="not a torch file"):
        read_torch(b"PK\x03\x04")


def test_safetensors_by_name():
    first, second = np.arange(6, dtype="<f4").reshape(2, 3), np.array([7], "<i8")
    header = {
        "__metadata__": {"format": "pt"},
        "a": {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]},
        "b": {"dtype": "I64", "shape": [1], "data_offsets": [24, 32]},
    }
    text = json.dumps(header).encode()
    arrays = read_safetensors(len(text).to_bytes(8, "little") + text + first.tobytes() + second.tobytes())
    assert arrays.keys() == {"a", "b"}
    np.testing.assert_array_equal(arrays["a"], first)
    np.testing.assert_array_equal(arrays["b"], second)


def test_a_header_longer_than_the_file_is_an_error():
    with pytest.raises(ValueError, match="header does not fit"):
        read_safetensors((1 << 40).to_bytes(8, "little") + b"{}")

"""Arrays to tensors in wire form and back: every datatype, every layout in memory, every mistake."""

from __future__ import annotations

import numpy as np
import pytest

from clockwork_client import Failed, Invalid
from clockwork_client.tensors import COPIED_BYTES, decode, encode
from clockwork_serve.messages import DATATYPES
from tests.client.arrays import ARRAYS


def test_every_datatype_of_the_protocol_is_tried():
    assert set(ARRAYS) == set(DATATYPES)


@pytest.mark.parametrize("datatype", ARRAYS)
def test_an_array_comes_back_as_it_went(datatype):
    array = ARRAYS[datatype]
    found, data = encode("x", array)
    back = decode("x", datatype, array.shape, data)

    assert found == datatype
    assert back.dtype == array.dtype
    np.testing.assert_array_equal(back, array)


@pytest.mark.parametrize(
    "array",
    [
        np.arange(12, dtype=np.int32).reshape(3, 4).T,
        np.arange(12, dtype=np.int32)[::-2],
        np.arange(12, dtype=">i4").reshape(3, 4),
        np.array(7, np.int32),
        np.empty((0, 3), np.int32),
        np.arange(COPIED_BYTES, dtype=np.int32).reshape(4, -1).T,
        np.arange(COPIED_BYTES, dtype=np.int32).reshape(4, -1)[:, ::2],
    ],
    ids=["turned", "backwards", "big-endian", "a number", "empty", "large and turned", "large with gaps"],
)
def test_the_layout_in_memory_does_not_matter(array):
    datatype, data = encode("x", array)

    assert datatype == "INT32"
    assert bytes(data) == array.astype("<i4").tobytes()


def test_a_large_array_is_not_copied():
    array = np.zeros(COPIED_BYTES, np.float32)
    _, data = encode("x", array)
    array[0] = 1

    assert bytes(data[:4]) == np.float32(1).tobytes()


def test_an_answer_is_the_callers_own_to_write_to():
    data = bytes(9)
    array = decode("y", "FP32", (2,), memoryview(data)[1:])

    assert array.flags.writeable
    assert array.flags.aligned


@pytest.mark.parametrize(
    "array",
    [
        np.array(["ä", "b"]), np.array(["ä", "b"], object), np.array([b"\xc3\xa4", b"b"]),
        np.array(["ä", "b"], np.dtypes.StringDType()),
    ],
    ids=["U", "str objects", "S", "StringDType"],
)  # fmt: skip
def test_every_kind_of_text_is_sent_as_utf_8(array):
    assert encode("x", array) == ("BYTES", b"\x02\x00\x00\x00\xc3\xa4\x01\x00\x00\x00b")


def test_sixteen_bits_are_bf16_only_where_the_caller_says_so():
    bits = np.array([0x3F80], np.uint16)

    assert encode("x", bits)[0] == "UINT16"
    assert encode("x", bits, "BF16") == ("BF16", b"\x80\x3f")


@pytest.mark.parametrize(
    ("array", "wanted", "words"),
    [
        ([1, 2], "", "input 'x': expected a numpy array, found list; use numpy.asarray"),
        (np.array([1j]), "", "found complex128; convert it with astype"),
        (np.array(["2020-01-01"], "M8[D]"), "", "found datetime64"),
        (np.array([b"a", 3], object), "", "input 'x': element 1: expected bytes or str, found int"),
        (np.array(["a", "\ud800"], object), "", "input 'x': element 1: expected Unicode: 'utf-8' codec"),
        (np.array([1.0]), "FP32", "input 'x': expected FP32, found float64, which is FP64"),
        (np.array([b"a"]), "FP32", "expected FP32, found |S1, which is BYTES"),
        (np.array([1], np.int16), "BF16", "expected BF16, found int16, which is INT16"),
    ],
)
def test_what_cannot_be_sent_is_named(array, wanted, words):
    with pytest.raises(Invalid) as caught:
        encode("x", array, wanted)

    assert words in str(caught.value)
    assert (caught.value.field, caught.value.status) == ("input 'x'", 0)


@pytest.mark.parametrize(
    ("datatype", "shape", "data"),
    [
        ("FP32", (2,), bytes(7)), ("FP32", (2,), bytes(12)), ("FP99", (1,), bytes(4)),
        ("BYTES", (1,), b"\x02\x00\x00\x00a"), ("BYTES", (1,), b"\x01\x00"), ("BYTES", (2,), bytes(4)),
        ("BYTES", (1,), bytes(8)), ("BYTES", (0,), bytes(4)), ("FP32", (-1,), b""),
    ],
)  # fmt: skip
def test_an_answer_that_does_not_fit_its_shape_is_refused(datatype, shape, data):
    with pytest.raises(Failed, match="output 'y'"):
        decode("y", datatype, shape, data)

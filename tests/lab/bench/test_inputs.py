"""Tensors that match a model, and the errors of those that do not."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from clockwork_client.datatypes import decode_strings
from clockwork_client.tensors import DTYPES
from clockwork_lab.bench.messages import Data, read_shapes
from clockwork_lab.bench.server import TensorInfo
from clockwork_serve.errors import ConfigError

X = TensorInfo("x", "FP32", (-1, 4))
WORDS = TensorInfo("words", "BYTES", (2,))


@pytest.mark.parametrize("datatype", sorted(DTYPES))
@pytest.mark.parametrize("source", ["random", "zeros"])
def test_every_datatype_is_filled(datatype: str, source: str) -> None:
    (tensor,) = Data(source, 1).tensors("m", [TensorInfo("x", datatype, (3, 5))], {})
    assert len(tensor.data) == 15 * DTYPES[datatype].itemsize
    values = np.frombuffer(tensor.data, DTYPES[datatype]).astype(float)
    assert (values == 0).all() == (source == "zeros")
    if datatype in ("FP16", "FP32", "FP64"):
        assert ((values >= 0) & (values <= 1)).all()
    again = Data(source, 1).tensors("m", [TensorInfo("x", datatype, (3, 5))], {})[0]
    assert again == tensor


def test_strings_are_words() -> None:
    (tensor,) = Data("random", 1).tensors("m", [WORDS], {})
    words = list(decode_strings(tensor.data))
    assert [len(word) for word in words] == [8, 8]
    assert b"".join(words).isalpha()


def test_an_open_first_size_is_a_batch_of_one_and_shape_says_others() -> None:
    assert Data("zeros", 1).tensors("m", [X], {})[0].shape == (1, 4)
    shapes = read_shapes(["x:7,4", "other:x:2,4"])
    assert Data("zeros", 1).tensors("m", [X], shapes)[0].shape == (7, 4)
    assert Data("zeros", 1).tensors("other", [X], shapes)[0].shape == (2, 4)


def test_a_file_of_numpy_is_sent_as_it_is(tmp_path: Path) -> None:
    array = np.arange(8, dtype=np.float32).reshape(2, 4)
    np.save(tmp_path / "x.npy", array)
    (tensor,) = Data(str(tmp_path / "x.npy"), 1).tensors("m", [X], {})
    assert (tensor.shape, tensor.data) == ((2, 4), array.tobytes())
    np.savez(tmp_path / "both.npz", x=array, words=np.array(["a", "bc"]))
    x, words = Data(str(tmp_path / "both.npz"), 1).tensors("m", [X, WORDS], {})
    assert x.data == array.tobytes()
    assert list(decode_strings(words.data)) == [b"a", b"bc"]


@pytest.mark.parametrize("text", ["x", "x:", "x:1,,2", "x:-1", "x:1.5", ":1", "a:b:c:1", ""])
def test_a_shape_that_is_none_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match=r"shape: expected \[MODEL:\]INPUT:1,3,224,224, found"):
        read_shapes([text])


def test_what_does_not_fit_is_named(tmp_path: Path) -> None:
    np.save(tmp_path / "x.npy", np.zeros((2, 5), np.float32))
    np.save(tmp_path / "ints.npy", np.zeros((2, 4), np.int64))
    np.savez(tmp_path / "y.npz", y=np.zeros((2, 4), np.float32))
    (tmp_path / "no.npy").write_bytes(b"nothing of numpy's")
    image = TensorInfo("image", "FP32", (-1, 3, -1, -1))

    def complaint(source: str, infos: list[TensorInfo], *shapes: str) -> str:
        with pytest.raises(ConfigError) as caught:
            Data(source if source == "random" else str(tmp_path / source), 1).tensors(
                "m", infos, read_shapes(shapes)
            )
        return str(caught.value)

    assert "give --shape image:1,3,N,N with numbers for N" in complaint("random", [image])
    assert "expected [-1, 4] for input 'x' of model 'm', found [4, 5] in --shape" in complaint(
        "random", [X], "x:4,5"
    )
    assert "expected [-1, 4]" in complaint("x.npy", [X])
    assert "expected FP32 for input 'x' of model 'm', found int64" in complaint("ints.npy", [X])
    assert "expected an array called 'x'" in complaint("y.npz", [X])
    assert "write them with numpy.savez" in complaint("x.npy", [X, WORDS])
    assert "input_data: expected random, zeros, or a file" in complaint("no.npy", [X])
    assert "input_data: expected random, zeros, or a file" in complaint("missing.npy", [X])

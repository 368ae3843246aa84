"""Graphs built by hand compute the same as an independent numpy version of their architecture."""

from __future__ import annotations

import json
import pickle

import numpy as np
import onnxruntime as ort
import pytest

from clockwork_lab.demo import graphs
from clockwork_lab.demo.graphs import read_safetensors, read_torch


def session(model):
    return ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])


def minilm_state(dice, vocabulary):
    def w(*shape):
        return (0.05 * dice.standard_normal(shape)).astype(np.float32)

    state = {
        "embeddings.word_embeddings.weight": w(vocabulary, 384),
        "embeddings.position_embeddings.weight": w(512, 384),
        "embeddings.token_type_embeddings.weight": w(2, 384),
    }
    norms, linears = ["embeddings.LayerNorm"], {}
    for layer in range(graphs.LAYERS):
        name = f"encoder.layer.{layer}"
        norms += [f"{name}.attention.output.LayerNorm", f"{name}.output.LayerNorm"]
        linears |= {f"{name}.attention.self.{part}": (384, 384) for part in ("query", "key", "value")}
        linears |= {f"{name}.attention.output.dense": (384, 384)}
        linears |= {f"{name}.intermediate.dense": (1536, 384), f"{name}.output.dense": (384, 1536)}
    for name in norms:
        state |= {f"{name}.weight": 1 + w(384), f"{name}.bias": w(384)}
    for name, shape in linears.items():
        state |= {f"{name}.weight": w(*shape), f"{name}.bias": w(shape[0])}
    return state


def numpy_minilm(state, ids):
    """One sentence without padding, in float64."""
    from math import erf

    s = {name: array.astype(np.float64) for name, array in state.items()}

    def norm(x, name):
        spread = np.sqrt(x.var(axis=-1, keepdims=True) + 1e-12)
        return (x - x.mean(axis=-1, keepdims=True)) / spread * s[f"{name}.weight"] + s[f"{name}.bias"]

    def linear(x, name):
        return x @ s[f"{name}.weight"].T + s[f"{name}.bias"]

    x = s["embeddings.word_embeddings.weight"][ids] + s["embeddings.position_embeddings.weight"][: len(ids)]
    x = norm(x + s["embeddings.token_type_embeddings.weight"][0], "embeddings.LayerNorm")
    for layer in range(graphs.LAYERS):
        name = f"encoder.layer.{layer}"
        q, k, v = (
            linear(x, f"{name}.attention.self.{p}").reshape(len(ids), 12, 32)
            for p in ("query", "key", "value")
        )
        scores = np.einsum("ihd,jhd->hij", q, k) / np.sqrt(32)
        share = np.exp(scores - scores.max(axis=-1, keepdims=True))
        share /= share.sum(axis=-1, keepdims=True)
        heard = np.einsum("hij,jhd->ihd", share, v).reshape(len(ids), 384)
        x = norm(x + linear(heard, f"{name}.attention.output.dense"), f"{name}.attention.output.LayerNorm")
        wide = linear(x, f"{name}.intermediate.dense")
        wide = wide * 0.5 * (1 + np.vectorize(erf)(wide / np.sqrt(2)))
        x = norm(x + linear(wide, f"{name}.output.dense"), f"{name}.output.LayerNorm")
    mean = x.mean(axis=0)
    return mean / np.linalg.norm(mean)


def test_minilm_equals_numpy_and_ignores_padding():
    state = minilm_state(np.random.default_rng(1), vocabulary=20)
    ids = np.array([2, 19, 7, 3])
    wanted = numpy_minilm(state, ids)
    model = session(graphs.minilm_l6(state))
    for length in (4, 9):
        padded, mask = np.zeros((1, length), np.int64), np.zeros((1, length), np.int64)
        padded[0, :4], mask[0, :4] = ids, 1
        found = model.run(None, {"input_ids": padded, "attention_mask": mask})[0][0]
        np.testing.assert_allclose(found, wanted, atol=2e-6)


def conv_state(dice, shapes):
    """Convolutions with batch normalisations: name of the convolution -> (name of its norm, shape)."""
    state = {}
    for name, (norm, shape) in shapes.items():
        state[f"{name}.weight"] = (dice.standard_normal(shape) / np.sqrt(np.prod(shape[1:]))).astype("f4")
        for part in ("weight", "running_var"):
            state[f"{norm}.{part}"] = dice.uniform(0.5, 1.5, shape[0]).astype("f4")
        for part in ("bias", "running_mean"):
            state[f"{norm}.{part}"] = dice.normal(0, 0.3, shape[0]).astype("f4")
    return state


def plain_conv(state, name, norm, x, stride, pads, epsilon):
    """Convolution, then normalisation, then ReLU6, one output value at a time."""
    kernel = state[f"{name}.weight"].astype("f8")
    outs, ins, size, _ = kernel.shape
    padded = np.pad(x.astype("f8"), ((0, 0), pads, pads))
    side = (padded.shape[1] - size) // stride + 1
    groups = x.shape[0] // ins
    y = np.empty((outs, side, side))
    for out in range(outs):
        first = out * groups // outs * ins
        for row in range(side):
            for column in range(side):
                at = np.s_[
                    first : first + ins,
                    row * stride : row * stride + size,
                    column * stride : column * stride + size,
                ]
                y[out, row, column] = (padded[at] * kernel[out]).sum()
    scale = state[f"{norm}.weight"] / np.sqrt(state[f"{norm}.running_var"].astype("f8") + epsilon)
    shifted = (y - state[f"{norm}.running_mean"][:, None, None]) * scale[:, None, None]
    return np.clip(shifted + state[f"{norm}.bias"][:, None, None], 0, 6)


@pytest.mark.parametrize(
    ("shape", "side", "stride", "same", "pads"),
    [
        ((4, 3, 3, 3), 8, 2, True, (0, 1)),
        ((4, 3, 3, 3), 8, 2, False, (1, 1)),
        ((3, 1, 5, 5), 8, 2, True, (1, 2)),
        ((4, 3, 1, 1), 5, 1, False, (0, 0)),
    ],
)
def test_a_convolution_with_its_normalisation_folded_in(shape, side, stride, same, pads):
    dice = np.random.default_rng(2)
    state = conv_state(dice, {"c": ("n", shape)})
    x = dice.standard_normal((3, side, side)).astype("f4")
    graph = graphs.Graph("one")
    y = graphs._Convolutions(graph, state, 1e-3)("x", "c", "n", stride=stride, same=same)
    tensors = [
        graphs.helper.make_tensor_value_info(name, graphs.TensorProto.FLOAT, ["b", "c", "h", "w"])
        for name in ("x", y)
    ]
    found = session(graph.model(tensors[:1], tensors[1:])).run(None, {"x": x[None]})[0][0]
    np.testing.assert_allclose(found, plain_conv(state, "c", "n", x, stride, pads, 1e-3), atol=1e-5)


def mobilenet_shapes():
    shapes, channels, block = {"features.0.0": ("features.0.1", (32, 3, 3, 3))}, 32, 1
    for repeats, _, expansion, out in graphs.MOBILENET_STAGES:
        for _ in range(repeats):
            hidden, name, at = channels * expansion, f"features.{block}.conv", 0
            if expansion > 1:
                shapes[f"{name}.0"], at = (f"{name}.1", (hidden, channels, 1, 1)), 3
            shapes[f"{name}.{at}"] = (f"{name}.{at + 1}", (hidden, 1, 3, 3))
            shapes[f"{name}.{at + 3}"] = (f"{name}.{at + 4}", (out, hidden, 1, 1))
            channels, block = out, block + 1
    return shapes | {"features.18.0": ("features.18.1", (1280, 320, 1, 1))}


def test_mobilenet_has_its_shape_at_any_batch():
    state = conv_state(np.random.default_rng(3), mobilenet_shapes())
    model = session(graphs.mobilenet_v2(state))
    pictures = np.random.default_rng(4).standard_normal((2, 3, 224, 224)).astype("f4")
    both = model.run(None, {"image": pictures})[0]
    assert both.shape == (2, 1280)
    np.testing.assert_allclose(both[1:], model.run(None, {"image": pictures[1:]})[0], atol=1e-5)
    assert np.ptp(both) > 0


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

"""A program's constants become its blob by a recipe: views are followed, normalisations are folded in."""

from __future__ import annotations

import numpy as np
import pytest

from clockwork_serve.store.torch.program import (
    BLOB_ALIGN,
    BlobPiece,
    BlobRecipe,
    Norm,
    StoredConstant,
    laid_out,
)


def source(shape, stride, offset=0, dtype="float32", item_bytes=4):
    return StoredConstant(
        entry="e", dtype=dtype, item_bytes=item_bytes, shape=shape, stride=stride, offset=offset
    )


def recipe(*pieces_and_shapes):
    named = [(f"w{n}", "float32", shape, 4) for n, (_, shape) in enumerate(pieces_and_shapes)]
    tensors, blob_bytes = laid_out(named)
    return BlobRecipe(tensors=tensors, pieces=tuple(p for p, _ in pieces_and_shapes), blob_bytes=blob_bytes)


def opaque(array):
    return np.ascontiguousarray(array, np.float32).view("V4")


def test_a_view_of_a_larger_tensor_is_read_by_its_strides():
    data = np.arange(12, dtype=np.float32)
    turned = source((3, 2), (1, 4), offset=1).values(data.tobytes()).view(np.float32)
    np.testing.assert_array_equal(turned, data.reshape(3, 4).T[1:, :2])
    assert source((), ()).values(data.tobytes()).view(np.float32) == 0
    assert source((0, 4), (4, 1)).values(b"").shape == (0, 4)


@pytest.mark.parametrize(("shape", "stride", "offset"), [((5,), (1,), 0), ((2,), (1,), 3), ((2,), (-1,), 1)])
def test_a_tensor_that_leaves_its_entry_is_refused(shape, stride, offset):
    with pytest.raises(ValueError, match="too few"):
        source(shape, stride, offset).values(bytes(16))


def test_tensors_of_a_blob_start_aligned_and_lie_dense():
    tensors, blob_bytes = laid_out([("w0", "float32", (3, 2), 4), ("w1", "int64", (), 8)])
    assert [(t.offset, t.size, t.stride) for t in tensors] == [(0, 24, (2, 1)), (BLOB_ALIGN, 8, ())]
    assert blob_bytes == 2 * BLOB_ALIGN


def test_a_folded_normalisation_computes_what_both_computed():
    random = np.random.default_rng(1)
    weight, bias, mean, scale, shift = (
        random.normal(size=size).astype(np.float32) for size in ((4, 3, 1, 1), 4, 4, 4, 4)
    )
    variance = random.uniform(0.1, 2, 4).astype(np.float32)
    norm = Norm(mean=2, variance=3, scale=4, shift=5, epsilon=1e-3)
    made = recipe(
        (BlobPiece(source=0, norm=norm), (4, 3, 1, 1)),
        (BlobPiece(source=1, norm=norm, bias=True), (4,)),
        (BlobPiece(source=0), (4, 3, 1, 1)),
    )
    constants = [opaque(each) for each in (weight, bias, mean, variance, scale, shift)]
    blob = made.blob(lambda number: constants[number])
    folded, moved, plain = (
        blob[t.offset : t.offset + t.size].view(np.float32).reshape(t.shape) for t in made.tensors
    )
    x = random.normal(size=3)
    wanted = (weight[:, :, 0, 0] @ x + bias - mean) / np.sqrt(variance + 1e-3) * scale + shift
    np.testing.assert_allclose(folded[:, :, 0, 0] @ x + moved, wanted, rtol=1e-5)
    np.testing.assert_array_equal(plain, weight)


def test_a_normalisation_without_scale_and_a_convolution_without_bias_fold_too():
    norm = Norm(mean=1, variance=2, scale=None, shift=None, epsilon=0.0)
    made = recipe((BlobPiece(source=None, norm=norm, bias=True), (2,)))
    constants = {1: opaque([3.0, 4.0]), 2: opaque([4.0, 16.0])}
    assert made.blob(constants.__getitem__)[:8].view(np.float32).tolist() == [-1.5, -1.0]
    assert made.entries([source((2,), (1,))] * 3) == ["e"]


def test_a_constant_of_another_size_than_the_first_had_is_refused():
    with pytest.raises(ValueError, match="w0: expected 8 bytes, found 12"):
        recipe((BlobPiece(source=0), (2,))).blob(lambda _: opaque([1, 2, 3]))

"""Made-up inputs that run, and what two runs say about each other."""

from __future__ import annotations

import numpy as np
import pytest

from clockwork_serve.store.trial import (
    Fill,
    GraphTensor,
    Interface,
    RunError,
    Trial,
    difference,
    find_trial,
    generate_inputs,
    variants,
)

ONE = np.array([[1.0, -2.0]], np.float32)


@pytest.mark.parametrize(
    ("got", "wanted", "gap"),
    [
        (ONE, ONE, 0.0),
        (ONE + np.float32(0.5), ONE, 0.25),
        (ONE * 0, ONE * 0, 0.0),
        (ONE, ONE * 0, float("inf")),
        (ONE[0], ONE, float("inf")),
        (ONE.astype("f8"), ONE, float("inf")),
        (np.array([np.nan, 1.0]), np.array([np.nan, 1.0]), 0.0),
        (np.array([np.nan, 1.0]), np.array([1.0, 1.0]), float("inf")),
        (np.array([np.inf, 1.0]), np.array([np.inf, 1.0]), 0.0),
        (np.array([-np.inf, 1.0]), np.array([np.inf, 1.0]), float("inf")),
        (np.array([np.nan, 1.0]), np.array([np.inf, 1.0]), float("inf")),
        (np.array([np.nan, np.inf]), np.array([np.nan, 1.0]), float("inf")),
        (np.array([1, 2]), np.array([1, 2]), 0.0),
        (np.array([1, 3]), np.array([1, 2]), float("inf")),
        (np.array(["a"], object), np.array(["b"], object), float("inf")),
    ],
)
def test_difference_is_relative_to_the_largest_answer(got, wanted, gap):
    assert difference([ONE, got], [ONE, wanted]) == pytest.approx(gap)


class Picky:
    """Runs only on inputs of one size, and answers with the sum of each row."""

    def __init__(self, size: int, most_rows: int = 100) -> None:
        self.size = size
        self.most_rows = most_rows

    def run(self, inputs):
        x = inputs["x"]
        if x.shape[1] != self.size or len(x) > self.most_rows:
            raise RunError(f"expected {self.size}\nand more words")
        return [x.sum(axis=1, keepdims=True)]


def interface(*dims) -> Interface:
    return Interface((GraphTensor("x", "FP32", dims),), (GraphTensor("y", "FP32", ("N", 1)),))


def test_sizes_are_tried_until_one_runs():
    trial = find_trial(Picky(512), interface("N", "T"), batched=True)
    assert isinstance(trial, Trial)
    assert trial.fills == (Fill(name="x", datatype="FP32", shape=(1, 512)),)
    assert trial.outputs_of_two[0].shape == (2, 1)
    assert trial.mixed == ""
    assert [inputs["x"].shape for inputs in variants(trial)] == [(1, 512), (2, 512)]


def test_a_model_that_refuses_everything_says_why_in_one_line():
    assert find_trial(Picky(7), interface("N", "T"), batched=True) == "expected 7"


def test_a_model_that_refuses_two_rows_says_why():
    trial = find_trial(Picky(32, most_rows=1), interface("N", 32), batched=True)
    assert isinstance(trial, Trial)
    assert trial.two_failed == "expected 32"


@pytest.mark.parametrize(
    ("datatype", "kind"),
    [
        ("BOOL", "?"), ("UINT8", "u1"), ("UINT16", "u2"), ("INT8", "i1"), ("INT32", "i4"), ("UINT64", "u8"),
        ("FP16", "f2"), ("FP32", "f4"), ("FP64", "f8"), ("BF16", "u2"), ("BYTES", "O"),
    ],
)  # fmt: skip
def test_every_element_type_can_be_made_up(datatype, kind):
    fill = Fill(name="x", datatype=datatype, shape=(1, 5), high=300)
    array = generate_inputs([fill], rows=3)["x"]
    assert array.dtype == np.dtype(kind)
    assert array.shape == (3, 5)
    np.testing.assert_array_equal(array, generate_inputs([fill], rows=3)["x"])


@pytest.mark.parametrize("datatype", ["INT8", "UINT8", "INT16", "UINT64"])
@pytest.mark.parametrize(("dims", "low", "high"), [((), 16000, 16000), ((1,), 16000, 16000), ((1,), 0, 1)])
def test_values_of_single_integers_fit_their_type(datatype, dims, low, high):
    fill = Fill(name="n", datatype=datatype, shape=dims, low=low, high=high)
    one = generate_inputs([fill])
    most = np.iinfo(one["n"].dtype).max
    values = [int(found["n"].reshape(-1)[0]) for found in variants(Trial((fill,), one, []))]
    assert values[1:] == [min(value, most) for value in (16000, 8000, 1, 0, 2)]


class Grows:
    """Answers with as many numbers as it is told, squared; ``least`` is the fewest it does."""

    def __init__(self, least: int = 0) -> None:
        self.least = least
        self.asked: list[int] = []

    def run(self, inputs):
        (count,) = inputs["n"]
        self.asked.append(int(count))
        if count < self.least:
            raise RunError("too few")
        return [np.empty((count, count), np.float32)]


def test_a_number_that_asks_for_huge_outputs_is_tried_no_more():
    interface = Interface((GraphTensor("n", "INT64", (1,)),), (GraphTensor("y", "FP32", None),))
    session = Grows()
    trial = find_trial(session, interface, batched=False)
    assert isinstance(trial, Trial)
    assert (session.asked, trial.outputs[0].shape) == ([16000, 8000, 1], (1, 1))
    assert [int(found["n"][0]) for found in variants(trial)] == [1, 1, 0, 2]
    trial = find_trial(Grows(least=9), interface, batched=False)
    assert isinstance(trial, Trial)
    assert trial.outputs[0].shape == (16000, 16000)  # for no other runs


def test_inputs_that_have_a_default_are_left_out():
    class Doubles:
        def run(self, inputs):
            assert list(inputs) == ["x"]
            return [inputs["x"] * 2]

    optional = GraphTensor("k", "FP32", (1,), optional=True)
    inputs = (GraphTensor("x", "FP32", (4,)), optional)
    trial = find_trial(Doubles(), Interface(inputs, (GraphTensor("y", "FP32", (4,)),)), batched=False)
    assert isinstance(trial, Trial)
    assert [fill.name for fill in trial.fills] == ["x"]

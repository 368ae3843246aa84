"""What runs show about rows: every kind of neighbour, every row, at several batch sizes."""

from __future__ import annotations

import numpy as np
import pytest

from clockwork_serve.store.onnx.row_trial import BatchingVerdict, batching_verdict, compare_rows
from clockwork_serve.store.trial import GraphTensor, Interface, RunError, Trial, find_trial


class Model:
    """A function of arrays, as a session."""

    def __init__(self, function) -> None:
        self._function = function
        self.sizes: list[int] = []

    def run(self, inputs):
        self.sizes.append(len(next(iter(inputs.values()))))
        with np.errstate(all="ignore"):
            return [np.asarray(self._function(**inputs))]


def tried(function, **inputs) -> Trial:
    """The trial of a function whose inputs have these element types (rows of four)."""
    interface = Interface(
        tuple(GraphTensor(name, datatype, ("n", 4)) for name, datatype in inputs.items()),
        (GraphTensor("y", "FP32", ("n", 4)),),
    )
    model = Model(function)
    trial = find_trial(model, interface, batched=True)
    assert isinstance(trial, Trial)
    return compare_rows(model, interface, trial)


def first_of_ties(x):
    best = x.sum(axis=1).argmax()
    return np.arange(len(x))[:, None] == best


APART = {
    "its own sum": lambda x: x.sum(axis=1, keepdims=True) * x,
    "its own extremes": lambda x: np.sort(x, axis=1),
}
MIXED = {
    "earlier rows": lambda x: np.cumsum(x, axis=0),
    "later rows": lambda x: np.cumsum(x[::-1], axis=0)[::-1],
    "the largest of all": lambda x: x / np.max(np.abs(x)),
    "the smallest of all": lambda x: x - np.min(x),
    "the last row of many": lambda x: x + (x[-1] if len(x) > 4 else 0),
    "the place in the batch": lambda x: x + np.arange(len(x), dtype="f4")[:, None],
    "a place that no row has alone": lambda x: x + (np.arange(len(x), dtype="f4")[:, None] == 4),
    "how many there are": lambda x: x + np.float32(len(x)),
    "any number that is none": lambda x: x * 0 if np.isnan(x).any() else x,
    "any large number": lambda x: x * 0 if (x > 500).any() else x,
    "equal rows": lambda x: x + np.float32(len(np.unique(x, axis=0))),
    "the best row": lambda x: x * first_of_ties(x),
    "the place, and nothing that was asked": lambda x: np.eye(len(x), 4, dtype="f4"),
}


@pytest.mark.parametrize("kind", APART)
def test_rows_that_are_apart_show_nothing(kind):
    assert tried(APART[kind], x="FP32").mixed == ""


@pytest.mark.parametrize("kind", MIXED)
def test_an_answer_that_depends_on_other_rows_is_seen(kind):
    assert tried(MIXED[kind], x="FP32").mixed.startswith("output 'y'")


@pytest.mark.parametrize("datatype", ["BOOL", "INT8", "UINT16", "INT64", "FP16", "FP64", "BYTES"])
def test_neighbours_of_every_element_type_are_replaced(datatype):
    def compares(x):
        return np.asarray(x == x[:1])

    def alone(x):
        return np.asarray(x == x[:, :1])

    assert tried(compares, x=datatype).mixed
    assert tried(alone, x=datatype).mixed == ""


def test_what_only_long_texts_show_is_seen():
    assert tried(lambda x: np.full(x.shape, max(map(len, x.flat))), x="BYTES").mixed


def test_an_input_that_another_one_hides_is_tried_alone():
    def masked(x, mask):
        return x + np.float32(0 if not mask.all() else np.max(x))

    assert tried(masked, x="FP32", mask="FP32").mixed


def test_values_that_are_refused_show_nothing():
    def looks_up(x):
        if (x < 0).any() or (x > 9).any():
            raise RunError("out of range")
        return np.arange(10, dtype="f4")[x]

    assert tried(looks_up, x="INT64").mixed == ""


def test_no_integer_is_larger_than_what_ran_before_for_it_may_be_a_size_or_a_number_of_turns():
    largest = []

    def sees(x):
        largest.append(int(x.max()))
        return x

    assert tried(sees, x="INT64").mixed == ""
    assert max(largest) <= 100


def test_rounding_that_moves_with_the_place_is_no_mixing():
    def rounds(x):
        nudge = np.where(np.arange(len(x)) % 2, np.float32(1 + 2e-7), np.float32(1))[:, None]
        return (x * nudge).astype("f4")

    assert tried(rounds, x="FP32").mixed == ""


def test_answers_that_differ_when_asked_again_are_random():
    dice = np.random.default_rng(0)
    assert "repeated runs" in tried(lambda x: x + dice.random(x.shape, np.float32), x="FP32").mixed


def test_a_number_of_rows_that_does_not_run_is_said():
    def small(x):
        if len(x) > 3:
            raise RunError("at most three rows\nand more words")
        return x

    assert tried(small, x="FP32").two_failed == "at most three rows"


def test_a_declaration_overrules_an_objection_but_no_run():
    interface = Interface((GraphTensor("x", "FP32", ("n", 4)),), (GraphTensor("y", "FP32", ("n", 4)),))

    def verdict(function, *, asked: bool, trial=None):
        model = Model(function)
        trial = trial or find_trial(model, interface, batched=True)
        return batching_verdict(model, interface, trial, asked=asked, objection="Loop 'y' is in the way")

    assert verdict(MIXED["how many there are"], asked=True).lost.startswith(
        "max_batch_size was asked for, but"
    )
    assert "Loop 'y' is in the way" in verdict(APART["its own sum"], asked=False).lost
    assert verdict(APART["its own sum"], asked=True) == BatchingVerdict()
    assert "without a check" in verdict(None, asked=True, trial="no memory").warning

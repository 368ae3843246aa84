"""Which torch programs the analysis proves to keep rows apart, and which operator it names for the others."""

from __future__ import annotations

import pytest

torch = pytest.importorskip("torch", reason="torch is not installed")

from clockwork_serve.store.torch.rows import veto  # noqa: E402 - it needs torch
from tests.store import torch_models  # noqa: E402

pytestmark = pytest.mark.slow  # torch takes its time, to be imported too

ROWS = torch.export.Dim("batch", min=1, max=64)


class Calls(torch.nn.Module):
    """A module that is one function."""

    def __init__(self, function) -> None:
        super().__init__()
        self.function = function

    def forward(self, x):
        return self.function(x)


def verdict(model, *rows) -> str:
    """The analysis of a model with inputs for rows like these two."""
    program = torch.export.export(model.eval(), rows, dynamic_shapes=tuple({0: ROWS} for _ in rows))
    return veto(program.module(), lambda count: [torch.cat([row] * 3)[:count] for row in rows], 8)


def centred_in_place(x):
    y = x * 1
    y.sub_(x.mean(0))
    return y


MIXED = {
    "cumsum": lambda x: x.cumsum(0),
    "mean": lambda x: x - x.mean(0),
    "max": lambda x: x / x.abs().max(),
    "sort": lambda x: x.sort(0)[0],
    "add": lambda x: x + torch.arange(x.shape[0])[:, None],
    "mul": lambda x: x * x.shape[0],
    "matmul": lambda x: (x @ x.T).sum(1, keepdim=True),
    "rand_like": lambda x: x + torch.rand_like(x),
    "slice": lambda x: x - x[0:1],
    "select": lambda x: x - x[0],
    "flip": lambda x: x.flip(0),
    "index": lambda x: x[torch.tensor([0])] + x,
    "softmax": lambda x: x.softmax(0),
    "sub": centred_in_place,
}
APART = {
    "a product": lambda x: (x @ torch.ones(4, 3)).softmax(-1),
    "parts of rows": lambda x: x.reshape(x.shape[0] * 2, 2).softmax(1).reshape(x.shape[0], 4),
    "zeros beside rows": lambda x: torch.cat([torch.zeros(x.shape[0], 1), x], 1),
    "a sum of each": lambda x: x - x.mean(1, keepdim=True),
    "sorted each": lambda x: x.sort(1)[0],
}


@pytest.mark.parametrize("operator", MIXED)
def test_what_may_mix_rows_is_vetoed_and_its_operator_is_named(operator):
    assert verdict(Calls(MIXED[operator]), torch.rand(2, 4)).startswith(operator)


@pytest.mark.parametrize("kind", APART)
def test_rows_that_are_apart_are_proved_to_be(kind):
    assert verdict(Calls(APART[kind]), torch.rand(2, 4)) == ""


@pytest.mark.filterwarnings("ignore")  # of torch's own, about what it exports
def test_models_of_every_kind_keep_their_batches():
    ids = torch.randint(0, 5, (2, 12))
    assert verdict(torch_models.Encoder(), ids, torch.ones_like(ids)) == ""
    assert verdict(torch_models.Recurrent(), torch.rand(2, 9, 16)) == ""
    assert verdict(torch_models.Small(), torch.rand(2, 3, 8, 8)) == ""

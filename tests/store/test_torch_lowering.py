"""The flat graph computes what the program does, normalisations folded or not; nothing is compiled here."""

from __future__ import annotations

import numpy as np
import pytest

from clockwork_serve.store.torch.archive import read_archive, write_archive
from clockwork_serve.store.torch.program import read_program
from clockwork_serve.store.trial import difference
from tests.store.torch_models import Encoder, Recurrent, exported, put, small, torch, vision

pytestmark = [
    pytest.mark.slow,  # torch takes its time, to be imported too
    pytest.mark.filterwarnings("ignore"),  # what torch itself says while it exports
]


@pytest.fixture
def opened(tmp_path):
    """A program as the process that compiles it has it: opened from the checked copy, and its constants."""

    def opened(program):
        write_archive(read_archive(put(tmp_path, "m", program)), tmp_path / "checked.pt2")
        archive = read_archive(tmp_path / "checked.pt2")
        record = read_program(archive)
        entries = archive.read([source.entry for source in record.sources])

        def values(number):
            return record.sources[number].values(entries[record.sources[number].entry])

        return torch.export.load(tmp_path / "checked.pt2"), record, values

    return opened


def flat(opened, *, fold):
    from clockwork_serve.store.torch.packages import lowered

    exported_, record, values = opened
    made = lowered(exported_, record, "cpu", fold=fold)
    return made, made.module(values)


def answers(module, *inputs):
    with torch.no_grad():
        outputs = module(*inputs)
    outputs = outputs.values() if isinstance(outputs, dict) else outputs
    return [each.numpy() for each in ([outputs] if isinstance(outputs, torch.Tensor) else outputs)]


@pytest.mark.parametrize("fold", [False, True])
@pytest.mark.parametrize(
    ("make", "inputs", "folds"),
    [
        (small, lambda: (torch.rand(3, 3, 8, 8),), 1),
        (lambda: vision("mobilenet_v3_small"), lambda: (torch.rand(3, 3, 64, 64),), 34),
        (lambda: Encoder().eval(), lambda: (torch.ones(3, 12, dtype=torch.int64), torch.ones(3, 12)), 0),
        (lambda: Recurrent().eval(), lambda: (torch.rand(3, 9, 16),), 0),
    ],
)
def test_a_flat_graph_computes_what_the_model_does(opened, make, inputs, folds, fold):
    model, given = make(), inputs()
    made, module = flat(opened(exported(model, *given)), fold=fold)
    assert made.folded == (folds if fold else 0)
    assert difference(answers(module, *given), answers(model, *given)) < 1e-5


def test_a_weight_with_two_names_is_kept_once(opened):
    class Tied(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.up = torch.nn.Linear(4, 4, bias=False)
            self.down = torch.nn.Linear(4, 4, bias=False)
            self.down.weight = self.up.weight

        def forward(self, x):
            return self.down(self.up(x))

    made, _ = flat(opened(exported(Tied(), torch.rand(2, 4))), fold=True)
    assert len(made.recipe.tensors) == 1


def test_a_convolution_with_another_reader_keeps_its_normalisation(opened):
    class Both(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = small(1)

        def forward(self, x):
            seen = self.inner.conv(x)
            return seen + self.inner.norm(seen)

    model, x = Both().eval(), torch.rand(2, 3, 8, 8)
    made, module = flat(opened(exported(model, x)), fold=True)
    assert made.folded == 0
    assert difference(answers(module, x), answers(model, x)) < 1e-5


def test_other_weights_have_the_same_signs_and_scale_and_integers_stay():
    from clockwork_serve.store.torch.packages import scrambled

    variances = np.linspace(0.5, 2, 100, dtype=np.float32)
    places = np.arange(5)
    constants = [variances.view("V4"), places.view("V8")]
    other = scrambled(constants.__getitem__, ["float32", "int64"])
    made = other(0).view(np.float32)
    assert (made > 0.3).all()
    assert (made != variances).mean() > 0.9
    assert other(1).view(np.int64).tolist() == [0, 1, 2, 3, 4]
    assert other(0) is other(0)

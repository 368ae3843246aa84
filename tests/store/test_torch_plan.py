"""What a program is compiled for: its batch axis, names, and sizes, and what cannot be served at all."""

from __future__ import annotations

import pytest

from clockwork_serve.store import ModelSettings, ProblemError, StoreConfig
from clockwork_serve.store.settings import TensorSettings, read_toml
from clockwork_serve.store.torch.archive import read_archive
from clockwork_serve.store.torch.plan import planned
from clockwork_serve.store.torch.program import read_program
from tests.store.torch_models import BATCH, Encoder, exported, put, small, torch

pytestmark = [
    pytest.mark.slow,  # torch takes its time, to be imported too
    pytest.mark.filterwarnings("ignore"),  # what torch itself says while it exports
]
Dim = torch.export.Dim
IMAGES = (2, 3, 8, 8)


@pytest.fixture
def plan_of(tmp_path):
    def plan(program, toml="", **config):
        path = put(tmp_path, "m", program)
        settings = read_toml(toml) if toml else ModelSettings()
        return planned(
            read_program(read_archive(path)), settings, StoreConfig(cache_dir=str(tmp_path), **config)
        )

    return plan


def program_of(tmp_path, program, name="m"):
    return read_program(read_archive(put(tmp_path, name, program)))


class Two(torch.nn.Module):
    """Two inputs, two outputs, a state that is a constant."""

    def __init__(self):
        super().__init__()
        self.register_buffer("table", torch.arange(6.0), persistent=False)

    def forward(self, a, b):
        return a + self.table, (b * 2).sum(1)


def pair(dynamic=True, rows=2):
    return exported(Two(), torch.rand(rows, 6), torch.rand(rows, 4), dynamic=dynamic)


class Numbered(torch.nn.Module):
    """Rows whose results depend on how many there are from six on."""

    def forward(self, x):
        count = x.shape[0]
        return x + torch.ones(count * (4 + count // 6)).view(count, -1).sum(1, keepdim=True)


@pytest.mark.parametrize(("model", "shape"), [(small(), IMAGES), (Numbered(), (2, 4))])
def test_a_program_is_batched_only_where_that_is_declared(plan_of, model, shape):
    plan = plan_of(exported(model, torch.rand(shape)))
    assert (plan.batched, plan.sizes) == (False, (1,))
    assert plan.lost.endswith("declare it with max_batch_size = 16 in clockwork.toml")


def test_a_free_axis_0_is_the_batch(plan_of):
    plan = plan_of(exported(small(), torch.rand(IMAGES)), "max_batch_size = 16")
    assert (plan.batched, plan.max_batch_size, plan.sizes) == (True, 16, (1, 2, 4, 8, 16))
    (tensor,) = plan.interface.inputs
    assert (tensor.name, tensor.datatype, tensor.dims) == ("x", "FP32", ("batch", 3, 8, 8))
    assert plan.interface.outputs[0].name == "output__0"


def test_max_batch_size_is_what_was_asked_for(plan_of):
    assert plan_of(pair(), "max_batch_size = 6").sizes == (1, 2, 4, 6)


def test_a_program_exported_for_fewer_rows_gets_fewer_and_says_so(plan_of):
    narrow = ({0: Dim("n", min=1, max=8)},)
    program = exported(small(), torch.rand(IMAGES), dynamic=narrow)
    plan = plan_of(program, "max_batch_size = 20")
    assert plan.max_batch_size == 8
    assert "at most 8 rows" in plan.lost


def test_max_batch_size_0_shows_no_batch_axis_and_runs_one_row(plan_of):
    plan = plan_of(pair(), "max_batch_size = 0")
    assert (plan.batched, plan.sizes) == (False, (1,))
    assert [tensor.dims for tensor in plan.interface.inputs] == [(1, 6), (1, 4)]


def test_a_static_program_is_served_with_the_shapes_it_was_exported_with(plan_of):
    plan = plan_of(pair(dynamic=False))
    assert (plan.batched, plan.max_batch_size) == (False, 0)
    assert [tensor.dims for tensor in plan.interface.inputs] == [(2, 6), (2, 4)]
    assert "fixed to 2" in plan.lost


def test_a_static_program_of_one_row_is_batched_at_1_if_that_is_asked_for(plan_of):
    plan = plan_of(pair(dynamic=False, rows=1), "max_batch_size = 4")
    assert (plan.batched, plan.max_batch_size, plan.sizes) == (True, 1, (1,))
    assert "at most 1 rows" in plan.lost


def test_outputs_are_called_as_a_dictionary_calls_them(plan_of):
    plan = plan_of(exported(Encoder(), torch.ones(2, 12, dtype=torch.int64), torch.ones(2, 12)))
    assert [tensor.name for tensor in plan.interface.inputs] == ["ids", "mask"]
    assert {tensor.name for tensor in plan.interface.outputs} == {"logits", "hidden"}


def test_declared_names_stand_for_places(plan_of):
    toml = 'inputs = [{name = "INPUT__1"}, {name = "INPUT__0"}]\noutputs = [{name = "sum"}, {name = "rows"}]'
    plan = plan_of(pair(), toml)
    assert [tensor.name for tensor in plan.interface.inputs] == ["INPUT__0", "INPUT__1"]
    assert [tensor.name for tensor in plan.interface.outputs] == ["sum", "rows"]


def test_another_open_dimension_is_a_problem_that_says_what_to_declare(plan_of):
    class Average(torch.nn.Module):
        def forward(self, frames):
            return frames.mean(1)

    program = exported(Average(), torch.rand(2, 9, 16), dynamic=({0: BATCH, 1: Dim("frames", max=100)},))
    with pytest.raises(ProblemError, match=r"input 'frames' has not, found dims \[-1, 16\]; declare inputs"):
        plan_of(program, "max_batch_size = 4")
    fixed = 'inputs = [{name = "frames", dims = [20, 16]}]'
    assert plan_of(program, fixed).interface.inputs[0].dims == (1, 20, 16)
    assert plan_of(program, f"max_batch_size = 4\n{fixed}").interface.inputs[0].dims == ("batch", 20, 16)
    with pytest.raises(ProblemError, match="found 200"):
        plan_of(program, 'inputs = [{name = "frames", dims = [200, 16]}]')


@pytest.mark.parametrize(
    ("said", "found"),
    [
        (TensorSettings(name="x", datatype="INT64"), "datatype: expected FP32, found INT64"),
        (TensorSettings(name="x", dims=(3, 9, 9)), r"dims: expected \[3, 8, 8\]"),
        (TensorSettings(name="y", dims=(3, 8, 8)), "expected a tensor of the model, found y"),
        (TensorSettings(name="IN__3"), "expected 1 inputs, found the declared 'IN__3'"),
    ],
)
def test_what_was_declared_has_to_be_what_the_program_has(tmp_path, said, found):
    program = program_of(tmp_path, exported(small(), torch.rand(IMAGES)))
    with pytest.raises(ProblemError, match=found):
        planned(
            program, ModelSettings(inputs=(said,), max_batch_size=4), StoreConfig(cache_dir=str(tmp_path))
        )


def test_a_batch_that_starts_above_1_is_a_problem(plan_of):
    program = exported(small(), torch.rand(8, 3, 8, 8), dynamic=({0: Dim("n", min=4, max=64)},))
    with pytest.raises(ProblemError, match="one that starts at 4"):
        plan_of(program)


def test_a_complex_input_is_a_problem_that_names_it(plan_of):
    class Length(torch.nn.Module):
        def forward(self, z):
            return z.abs()

    with pytest.raises(ProblemError, match="Protocol for input 'z', found complex64"):
        plan_of(exported(Length(), torch.rand(2, 3).to(torch.complex64)))


def test_a_program_that_writes_its_buffers_is_a_problem(plan_of):
    class Counts(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("seen", torch.zeros(1))

        def forward(self, x):
            self.seen.add_(1)
            return x + self.seen

    program = exported(Counts(), torch.rand(2, 3)).run_decompositions({})
    with pytest.raises(ProblemError, match="keeps nothing between calls, found a buffer mutation"):
        plan_of(program)


def test_copies_have_equal_texts_whatever_their_weights_and_names(tmp_path):
    class Inside(torch.nn.Module):
        def __init__(self, model):
            super().__init__()
            self.backbone = model

        def forward(self, x):
            return self.backbone(x)

    programs = [small(1), small(2), Inside(small(3)), small(4, scale=3.0), small(5, width=6)]
    texts = [
        program_of(tmp_path, exported(each, torch.rand(IMAGES)), str(n)).text
        for n, each in enumerate(programs)
    ]
    assert texts[0] == texts[1] == texts[2]
    assert len(set(texts)) == 3

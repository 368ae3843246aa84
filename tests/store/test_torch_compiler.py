"""A program's packages answer as the program does, whatever weights they are given; copies share them."""

from __future__ import annotations

import dataclasses
import os
import pickle
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import msgspec
import numpy as np
import pytest

from clockwork_serve.messages import TorchIndex
from clockwork_serve.store import (
    Cache,
    Compiler,
    Problem,
    Repository,
    ServedVersion,
    StoreConfig,
    compile_all,
)
from clockwork_serve.store.torch.plan import CompileReport
from clockwork_serve.store.trial import difference
from tests.store.torch_models import (
    Encoder,
    Recurrent,
    exported,
    mobilenet,
    needs_compiler,
    put,
    small,
    torch,
)

pytestmark = [
    needs_compiler,
    pytest.mark.slow,
    pytest.mark.timeout(1800),
    pytest.mark.filterwarnings("ignore"),  # what torch itself says while it exports and loads
]
SAME = 1e-5
DECLARED = "max_batch_size = 16"
IMAGE = (2, 3, 8, 8)


@dataclasses.dataclass
class Works:
    """A cache for all tests of this file, so that what one compiled the next one finds."""

    folder: Path
    cache: Cache

    def compile(self, name, models, *, sizes=(1, 4), threads=1, **config):
        """Models by name from a new repository, the problems, the reported steps, and the compiler."""
        root = self.folder / name
        root.mkdir()
        for each, (program, toml) in models.items():
            put(root, each, program, toml=toml or DECLARED)
        return self.again(root, sizes=sizes, threads=threads, **config)

    def again(self, root, *, sizes=(1, 4), threads=1, **config):
        told: list[str] = []
        config = StoreConfig(cache_dir=str(self.cache.root.parent), **config)
        compiler = Compiler(self.cache, config)
        compiler.torch.sizes_of = lambda most: tuple(size for size in sizes if size <= most) or (1,)
        served, problems = compile_all(
            Repository(root, config), self.cache, lambda *step: told.append(step[2]),
            compiler=compiler, threads=threads,
        )  # fmt: skip
        return Done({each.model.name: each for each in served}, problems, told, compiler)


@dataclasses.dataclass
class Done:
    served: dict[str, ServedVersion]
    problems: list[Problem]
    told: list[str]
    compiler: Compiler

    def only(self):
        assert not self.problems
        (served,) = self.served.values()
        return served


@pytest.fixture(scope="module")
def works(tmp_path_factory):
    folder = tmp_path_factory.mktemp("torch")
    with Cache(folder / "cache") as cache:
        yield Works(folder, cache)


def answers(served: ServedVersion, size: int, *inputs):
    """The results of a package, with its constants read from the model's blob as the index describes."""
    folder = Path(served.code.path)
    index = msgspec.json.decode((folder / "index.json").read_bytes(), type=TorchIndex)
    blob = torch.from_numpy(np.fromfile(served.model.weights.path, np.uint8))
    assert len(blob) == index.blob_bytes == served.model.weights.size
    constants = {}
    for tensor in index.tensors:
        assert tensor.offset % 256 == 0
        part = blob[tensor.offset : tensor.offset + tensor.size].view(getattr(torch, tensor.dtype))
        constants[tensor.name] = part.as_strided(tensor.shape, tensor.stride)
    runner = torch._inductor.aoti_load_package(str(folder / f"{size}.pt2"))
    assert set(runner.get_constant_fqns()) == set(constants)
    runner.load_constants(constants, check_full_update=True, user_managed=True)
    with torch.no_grad():
        return [output.numpy().copy() for output in runner(*inputs)]


def wanted(model, *inputs):
    with torch.no_grad():
        outputs = model(*inputs)
    outputs = outputs.values() if isinstance(outputs, dict) else [outputs]
    return [output.numpy() for output in outputs]


def images(rows, side=64):
    return (torch.rand(rows, 3, side, side),)


MODELS = {
    "mobilenet": (mobilenet, images, (1, 16)),
    "encoder": (
        lambda: Encoder(depth=1).eval(),
        lambda rows: (torch.randint(0, 50, (rows, 12)), torch.ones(rows, 12, dtype=torch.int64)),
        (1, 4, 16),
    ),
    "lstm": (lambda: Recurrent().eval(), lambda rows: (torch.rand(rows, 3, 16),), (1, 16)),
}


@pytest.fixture(scope="module")
def zoo(works):
    """Each of MODELS with what it compiled to, two at a time. Torch saves programs in one thread only."""
    models = {name: make() for name, (make, _, _) in MODELS.items()}
    for name, (_, inputs, _) in MODELS.items():
        put(works.folder / name, name, exported(models[name], *inputs(2)), toml=DECLARED)
    with ThreadPoolExecutor(2) as pool:
        done = {
            name: pool.submit(works.again, works.folder / name, sizes=sizes)
            for name, (_, _, sizes) in MODELS.items()
        }
    return {name: (models[name], done[name].result().only()) for name in MODELS}


def test_torch_keeps_its_own_where_its_variable_says(zoo, works):
    assert zoo
    named = Path(os.environ["TORCHINDUCTOR_CACHE_DIR"])
    assert list(named.glob("torchinductor_*/precompiled_headers/*")), "not in /tmp, where others may write"
    assert not (works.cache.root / "inductor").exists()


@pytest.mark.parametrize("name", MODELS)
def test_packages_answer_as_the_program_does_at_every_batch_size(zoo, name):
    model, served = zoo[name]
    _, inputs, sizes = MODELS[name]
    assert (served.code.backend, served.code.lifted, served.code.batched) == ("torch", True, True)
    assert served.model.max_batch_size == 16
    assert served.code.batch_sizes[0] == 1
    assert served.code.batch_sizes[-1] == 16
    for size in served.code.batch_sizes:
        given = inputs(size)
        assert difference(answers(served, size, *given), wanted(model, *given)) < SAME
    report = msgspec.json.decode((Path(served.code.path) / "report.json").read_bytes(), type=CompileReport)
    assert report.difference < SAME
    assert set(served.code.batch_sizes) <= set(report.row_ns) <= set(sizes)


@pytest.fixture(scope="module")
def folded(works):
    """A small model, compiled."""
    return works.compile("folded", {"m": (exported(small(3), torch.rand(IMAGE)), None)})


@pytest.fixture(scope="module")
def scaled(works, folded):
    """One with another literal, compiled after it."""
    assert folded.served
    return works.compile("scaled", {"one": (exported(small(1, scale=5.0), torch.rand(IMAGE)), None)})


def test_a_copy_with_other_weights_is_a_blob_and_nothing_is_compiled(works, scaled):
    first, second = small(1, scale=5.0), small(2, scale=5.0)
    assert any(step.startswith("one/1: batch size 1 of 4") for step in scaled.told)
    two = works.compile("second", {"two": (exported(second, torch.rand(IMAGE)), None)})
    assert two.compiler.torch.runs == 0
    assert two.told == ["two/1"]
    a, b = scaled.only(), two.only()
    assert a.code == b.code
    assert a.model.weights != b.model.weights
    x = torch.rand(4, 3, 8, 8)
    assert difference(answers(b, 4, x), wanted(second, x)) < SAME
    assert difference(answers(a, 4, x), wanted(first, x)) < SAME
    assert difference(answers(a, 4, x), wanted(second, x)) > SAME, "the weights differ"


@pytest.mark.parametrize("part", [1e-30, 1e30])
def test_a_copy_answers_as_its_program_does_whatever_its_magnitudes(works, scaled, part):
    model = small(2, scale=5.0)
    model.conv.weight.data *= part
    model.norm.running_mean *= part
    model.norm.running_var *= part
    model.norm.weight.data *= part**-0.5
    served = works.compile(f"far-{part}", {"far": (exported(model, torch.rand(IMAGE)), None)}).only()
    assert served.code == scaled.only().code
    x = torch.rand(4, 3, 8, 8)
    assert difference(answers(served, 4, x), wanted(model, x)) < SAME


def test_a_normalisation_after_a_convolution_is_part_of_it(folded):
    served = folded.only()
    index = msgspec.json.decode((Path(served.code.path) / "index.json").read_bytes(), type=TorchIndex)
    assert [tensor.shape for tensor in index.tensors] == [(4, 3, 3, 3), (4,), (5, 4), (5,)]
    assert (index.target, index.inputs, index.outputs) == ("cpu", ("x",), ("output__0",))
    assert index.torch_version == torch.__version__


def test_a_literal_of_the_graph_is_not_shared(folded, scaled):
    assert scaled.only().code != folded.only().code
    x = torch.rand(1, 3, 8, 8)
    assert difference(answers(scaled.only(), 1, x), wanted(small(1, scale=5.0), x)) < SAME
    assert scaled.compiler.torch.runs == 1


def test_settings_name_tensors_and_limit_the_batch(works):
    toml = 'max_batch_size = 1\ninputs = [{name = "INPUT__0"}]\noutputs = [{name = "scores", dims = [5]}]'
    served = works.compile("named", {"m": (exported(small(1), torch.rand(IMAGE)), toml)}).only()
    assert [(spec.name, spec.shape) for spec in served.code.inputs] == [("INPUT__0", (3, 8, 8))]
    assert [(spec.name, spec.shape) for spec in served.code.outputs] == [("scores", (5,))]
    assert served.model.max_batch_size == 1
    assert served.model.platform == "pytorch_libtorch"


def test_a_model_in_bfloat16_is_served_in_bfloat16(works):
    class Halves(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = torch.nn.Linear(8, 4, dtype=torch.bfloat16)

        def forward(self, x):
            return self.inner(x).float()

    program = exported(Halves(), torch.rand(2, 8, dtype=torch.bfloat16))
    served = works.compile("halves", {"m": (program, None)}, sizes=(1,)).only()
    assert (served.code.inputs[0].datatype, served.code.outputs[0].datatype) == ("BF16", "FP32")
    assert served.model.weights.size == 2 * 256


def test_rows_that_depend_on_each_other_are_not_batched_whatever_is_declared(works):
    class Mixes(torch.nn.Module):
        def forward(self, x):
            return x - x.mean(0, keepdim=True)

    served = works.compile("mixes", {"m": (exported(Mixes(), torch.rand(2, 4)), None)}).only()
    assert (served.code.batched, served.model.max_batch_size) == (False, 0)
    assert served.code.inputs[0].shape == (1, 4)
    assert "depends on the rows beside it" in " ".join(served.model.warnings)


def test_what_cannot_be_compiled_is_a_problem_and_the_others_are_served(works):
    root = works.folder / "bad"
    put(root, "good", exported(small(1), torch.rand(IMAGE)))
    whole = (root / "good" / "1" / "model.pt2").read_bytes()
    script = root / "script" / "1" / "model.pt2"
    for name, data in {
        "cut": whole[: len(whole) // 2],
        "pickle": pickle.dumps(small()),
        "script": b"",
    }.items():
        (root / name / "1").mkdir(parents=True)
        (root / name / "1" / "model.pt2").write_bytes(data)
    torch.jit.save(torch.jit.trace(small(1), torch.rand(IMAGE)), str(script))
    done = works.again(root)
    assert list(done.served) == ["good"]
    found = {problem.model: problem for problem in done.problems}
    assert "truncated" in found["cut"].advice
    assert "pickled" in found["pickle"].found
    assert "TorchScript" in found["script"].found
    assert all(problem.field == "model.pt2" and problem.version == "1" for problem in done.problems)


def test_what_was_compiled_is_found_again_without_reading_the_weights(works):
    done = works.compile("found", {"m": (exported(small(7), torch.rand(IMAGE)), None)})
    path = works.folder / "found" / "m" / "1" / "model.pt2"
    size = path.stat().st_size
    again = works.again(works.folder / "found")
    assert again.only().model == done.only().model
    path.write_bytes(bytes(size))
    assert works.again(works.folder / "found").problems


def test_a_server_without_a_torch_device_says_so(works):
    done = works.compile("none", {"m": (exported(small(1), torch.rand(IMAGE)), None)}, torch_target="")
    (problem,) = done.problems
    assert problem.model == "m"
    assert "--device torch-cpu or cuda:0" in problem.advice


def test_a_gpu_that_is_not_here_is_a_problem(works):
    done = works.compile(
        "gpu", {"m": (exported(small(9), torch.rand(IMAGE)), None)}, torch_target="cuda:sm_1"
    )
    (problem,) = done.problems
    assert problem.expected == "cuda:sm_1 on this machine"

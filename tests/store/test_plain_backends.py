"""Emulated models and user's classes: declared in clockwork.toml, checked without being run."""

from __future__ import annotations

from pathlib import Path

import msgspec
import pytest

from clockwork_serve.messages import TensorSpec
from clockwork_serve.store import Repository
from clockwork_serve.units import MIB

TENSORS = """
inputs = [{name = "x", dims = [3, 8], datatype = "FP32"}]
outputs = [{name = "y", dims = [10], datatype = "FP32"}]
"""
EMULATED = TENSORS + "[emulated]\nweights_mb = 2.5\ninfer_ms = {1 = 2, 2 = 3, 8 = 9}\nload_ms = 1.5\n"
CLASS = """
raise SystemExit("a model is not imported while it is compiled")

class Model:
    def load(self, path): ...
    def infer(self, inputs): ...
    def unload(self): ...
"""


def test_an_emulated_model_needs_no_file_at_all(shop):
    (shop.root / "m").mkdir()
    (shop.root / "m" / "clockwork.toml").write_text(EMULATED)
    served, problems = shop.compile()
    assert not problems
    code, model = served["m/1"].code, served["m/1"].model
    assert (code.backend, code.lifted, code.batched) == ("emulated", False, True)
    assert code.batch_sizes == model.batch_sizes == (1, 2, 8)
    assert model.max_batch_size == 8
    assert code.inputs == (TensorSpec(name="x", datatype="FP32", shape=(3, 8)),)
    assert model.weights.size == 2.5 * MIB
    assert model.output_bytes == 64
    profile = msgspec.json.decode((Path(code.path) / "profile.json").read_bytes())
    assert profile == {"infer_ns": {"1": 2_000_000, "2": 3_000_000, "8": 9_000_000}, "load_ns": 1_500_000}


def test_emulated_models_of_one_profile_share_a_code_but_not_their_weights(shop):
    for name in "ab":
        shop.add(name, None, toml=EMULATED)
    served, _ = shop.compile()
    assert served["a/1"].code == served["b/1"].code
    assert served["a/1"].model.weights.weights_id != served["b/1"].model.weights.weights_id


@pytest.mark.parametrize(("asked", "batched", "sizes"), [(0, False, (1,)), (2, True, (1, 2))])
def test_an_emulated_model_is_batched_as_far_as_it_is_told(shop, asked, batched, sizes):
    served = shop.served("m", None, toml=f"max_batch_size = {asked}\n{EMULATED}")
    assert (served.model.max_batch_size, served.code.batched, served.code.batch_sizes) == (
        asked,
        batched,
        sizes,
    )


@pytest.mark.parametrize(
    ("toml", "field"),
    [
        ('backend = "emulated"' + TENSORS, "emulated"),
        ("max_batch_size = 16\n" + EMULATED, "emulated.infer_ms"),
        (EMULATED.replace("outputs", "# outputs"), "outputs"),
        (EMULATED.replace(', datatype = "FP32"}]\noutputs', "}]\noutputs"), "inputs 'x' datatype"),
    ],
)
def test_what_an_emulated_model_lacks_is_named(shop, toml, field):
    shop.add("m", None, toml=toml)
    _, (problem,) = shop.compile()
    assert problem.field == field


def python_model(shop, name="m", source=CLASS, toml=TENSORS):
    (shop.add(name, None, toml=toml) / "model.py").write_text(source)


def test_a_users_class_stays_where_it_is_and_is_not_imported(shop):
    python_model(shop, toml=TENSORS + "max_batch_size = 4\nmemory_bytes = 1000")
    served, problems = shop.compile()
    assert not problems
    code, model = served["m/1"].code, served["m/1"].model
    assert (code.backend, code.lifted) == ("python", False)
    assert code.path == model.weights.path == str(shop.root / "m" / "1")
    assert code.batch_sizes == (1, 2, 3, 4)
    assert model.weights.size == 1000
    assert model.platform == "python"
    # As Triton has it, which names a platform in its metadata and none in its configuration.
    config = msgspec.json.decode(model.config)
    assert (config["platform"], config["backend"]) == ("", "python")


def test_a_users_class_that_changed_is_another_code(shop):
    python_model(shop)
    first = shop.compile()[0]["m/1"].code.code_id
    assert shop.compile()[0]["m/1"].code.code_id == first
    python_model(shop, source=CLASS + "# changed")
    second = shop.compile()[0]["m/1"].code.code_id
    (shop.root / "m" / "1" / "table.csv").write_text("1,2")
    assert len({first, second, shop.compile()[0]["m/1"].code.code_id}) == 3


def test_equal_classes_in_two_folders_are_two_codes(shop):
    python_model(shop, "a")
    python_model(shop, "b")
    served, _ = shop.compile()
    assert served["a/1"].code.code_id != served["b/1"].code.code_id


@pytest.mark.parametrize(
    ("source", "field", "found"),
    [
        ("class Model(:", "model.py", "invalid syntax"),
        ("class Other: ...", "model.py", "none at the top level"),
        ("class Model:\n    def load(self, path): ...", "model.py class Model", "no infer, unload"),
        ("\0", "model.py", "null bytes"),
        ("class TritonPythonModel: ...", "model.py", "Triton's class TritonPythonModel"),
    ],
)
def test_a_file_without_the_class_is_refused(shop, source, field, found):
    python_model(shop, source=source)
    _, (problem,) = shop.compile()
    assert problem.field == field
    assert found in problem.found


def test_a_class_may_inherit_its_methods(shop):
    python_model(shop, source="from base import Base\nclass Model(Base): ...")
    assert not shop.compile()[1]


def test_the_backend_is_known_by_the_file(shop):
    python_model(shop)
    (entry,) = Repository(shop.root, shop.config).scan()
    assert entry.backend == "python"


def test_a_class_may_lie_beside_files_whose_names_are_no_text(shop):
    shop.add("m", None, toml=f'backend = "python"\n{TENSORS}')
    folder = shop.root / "m" / "1"
    folder.mkdir(exist_ok=True)
    (folder / "model.py").write_text(CLASS)
    first, _ = shop.compile()
    for name in ("\udcff", "\udcfe\n"):
        (folder / name).touch()
    second, problems = shop.compile()
    assert not problems
    assert first["m/1"].code.code_id != second["m/1"].code.code_id


@pytest.mark.parametrize(
    ("source", "field", "found"),
    [
        ("x = " + "(" * 5000, "model.py", "SyntaxError: too many nested parentheses"),
        ("x = " + "-" * 100_000 + "1", "model.py", "Error"),
        ("#" * (16 * MIB + 1), "model.py", "16777217 bytes"),
    ],
    ids=["nested", "deep", "large"],
)
def test_a_source_that_no_parser_takes_is_a_problem(shop, source, field, found):
    shop.add("m", None, toml=f'backend = "python"\n{TENSORS}')
    (shop.root / "m" / "1").mkdir(exist_ok=True)
    (shop.root / "m" / "1" / "model.py").write_text(source)
    _, (problem,) = shop.compile()
    assert problem.field == field
    assert found in problem.found

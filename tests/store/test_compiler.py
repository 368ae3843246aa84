"""Compiling a repository: what is reused, what is compiled again, and the records of served models."""

from __future__ import annotations

import os

import pytest

from clockwork_serve.store import Cache, Compiler, Problem, ProblemError, Repository, compile_all
from clockwork_serve.store.onnx.source import FileFacts
from clockwork_serve.units import MIB, ms
from tests.store import graphs


class ReadNothing:
    """An optimiser that may not be used."""

    runs = 0

    def optimise(self, model):
        raise AssertionError("optimised again")


def reopened(shop):
    """The same repository and cache, in what could be the next process."""
    cache = Cache(shop.config.cache_dir)
    compiler = Compiler(cache, shop.config, ReadNothing())
    served, problems = compile_all(Repository(shop.root, shop.config), cache, compiler=compiler)
    cache.close()
    return {each.model.key: each for each in served}, problems


def test_what_was_compiled_is_found_again_without_optimising(shop):
    for number in range(4):
        shop.add(f"m{number}", graphs.convnet(number))
    shop.add("other", graphs.recurrent())
    assert reopened_after_settling(shop) == shop.compile()


def reopened_after_settling(shop):
    """Files that changed a moment ago are read again; these pretend to be old."""
    shop.compile()
    for path in shop.root.glob("*/*/model.onnx"):
        os.utime(path, ns=(10**18, 10**18))
    return reopened(shop)


def test_a_file_that_changed_is_compiled_anew(shop):
    path = shop.add("m", graphs.mlp(1)) / "model.onnx"
    first, _ = shop.compile()
    path.write_bytes(graphs.mlp(2).SerializeToString())
    second, _ = shop.compile()
    assert first["m/1"].code == second["m/1"].code
    assert first["m/1"].model.weights != second["m/1"].model.weights


def test_a_file_of_equal_size_and_times_but_another_inode_is_read(shop):
    path = shop.add("m", graphs.mlp(1)) / "model.onnx"
    os.utime(path, ns=(10**18, 10**18))
    first, _ = shop.compile()
    new = path.with_name("new.onnx")
    new.write_bytes(graphs.mlp(2).SerializeToString())
    os.utime(new, ns=(10**18, 10**18))
    new.rename(path)
    assert shop.compile()[0]["m/1"].model.weights != first["m/1"].model.weights


def test_facts_of_a_file_just_written_are_not_trusted(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(b"x")
    assert not FileFacts.of(path).settled
    facts = FileFacts.of(path)
    assert FileFacts(facts.path, facts.size, 10**18, 10**18, facts.inode).settled


def test_settings_that_compiling_depends_on_compile_anew_and_others_do_not(shop):
    first = shop.served("m", graphs.mlp())
    runs = shop.compiler.optimiser.runs
    second = shop.served("m", graphs.mlp(), toml="slo_ms = 20\nqueue_limit = 7\npriority = 3")
    assert shop.compiler.optimiser.runs == runs
    assert (second.model.slo_ns, second.model.queue_limit, second.model.priority) == (ms(20), 7, 3)
    third = shop.served("m", graphs.mlp(), toml="max_batch_size = 4")
    assert third.code.code_id != first.code.code_id


def test_defaults_of_a_served_model(shop):
    model = shop.served("m", graphs.mlp()).model
    assert (model.key, model.name, model.version) == ("m/1", "m", "1")
    assert model.platform == "onnxruntime_onnx"
    assert (model.slo_ns, model.queue_limit, model.priority) == (None, 1000, 0)
    assert model.warnings == ()
    assert model.output_bytes == 64


def test_room_for_outputs_is_exact_where_sizes_are_known_and_configured_where_not(shop):
    toml = f"output_bytes = {9 * MIB}"
    assert shop.served("a", graphs.mlp(), toml=toml).model.output_bytes == 64
    assert shop.served("b", graphs.image_to_image(), toml=toml).model.output_bytes == 9 * MIB


def test_labels_of_what_is_no_output_are_said_to_be_ignored(shop):
    served = shop.served("m", graphs.mlp(), toml='labels = {y = ["a", "b", "c"], z = ["d"]}')
    assert served.model.labels["y"] == ("a", "b", "c")
    assert "labels for ['z']" in served.model.warnings[0]


def test_a_warning_that_quotes_a_file_is_short_and_moves_no_cursor(shop):
    labels = ", ".join(f'"\\u001b[2J{number}" = ["a"]' for number in range(1000))
    served = shop.served("m", graphs.mlp(), toml=f"labels = {{{labels}}}")
    (warning,) = served.model.warnings
    assert warning.isprintable()
    assert len(warning) == 1000


def test_settings_that_the_backend_has_no_use_for_are_said_to_be_ignored(shop):
    toml = 'memory_bytes = 9\ninputs = [{name = "x", optional = true}]'
    warnings = shop.served("m", graphs.mlp(), toml=toml).model.warnings
    assert [warning.partition(" has")[0] for warning in warnings] == [
        "memory_bytes", "optional, of inputs without a default in the graph,",
    ]  # fmt: skip


def test_warnings_of_the_configuration_are_the_models(shop):
    served = shop.served("m", graphs.mlp(), pbtxt="instance_group { count: 2 }")
    assert served.model.warnings == ("config.pbtxt: instance_group.count has no meaning here and is ignored",)


@pytest.mark.parametrize(
    ("toml", "field", "advice"),
    [
        ('inputs = [{name = "X", dims = [8]}]', "inputs 'X'", "did you mean x?"),
        ('inputs = [{name = "x", dims = [9]}]', "inputs 'x' dims", "declare the dims"),
        ('inputs = [{name = "x", dims = [1, 8]}]', "inputs 'x' dims", "declare the dims"),
        ('inputs = [{name = "x", dims = [-1]}]', "inputs 'x' dims", "declare the dims"),
        ('inputs = [{name = "x", datatype = "FP64"}]', "inputs 'x' datatype", "declare what the model has"),
        ('max_batch_size = 0\ninputs = [{name = "x", dims = [8]}]', "inputs 'x' dims", "declare the dims"),
    ],
)
def test_a_configuration_that_the_graph_contradicts_is_refused(shop, toml, field, advice):
    shop.add("m", graphs.mlp(), toml=toml)
    served, (problem,) = shop.compile()
    assert not served
    assert (problem.model, problem.version, problem.field) == ("m", "1", field)
    assert advice in problem.advice


def test_progress_is_told_for_every_version(shop):
    shop.add("a", graphs.mlp())
    shop.add("b", b"nonsense")
    told = []
    compile_all(Repository(shop.root, shop.config), shop.cache, lambda *each: told.append(each))
    assert told == [(1, 2, "a/1"), (2, 2, "b/1 cannot be served")]


def test_urgent_models_are_compiled_first_and_each_result_is_told_at_once(shop):
    for name in "abcd":
        shop.add(name, graphs.mlp())
    shop.add("e", b"nonsense")
    told = []
    urgent = ["c", "nobody"]

    def tell(entry, version, found):
        told.append((entry.name, version, type(found).__name__))
        if entry.name == "c" and found is not None:
            urgent[:] = ["e", "b", "c"]

    repository = Repository(shop.root, shop.config)
    served, problems = compile_all(
        repository, shop.cache, compiler=shop.compiler, threads=1, urgent=lambda: urgent, tell=tell
    )
    begun = [name for name, _, found in told if found == "NoneType"]
    assert (begun[:3], sorted(begun[3:])) == (["c", "e", "b"], ["a", "d"])
    assert told[:4] == [
        ("c", 1, "NoneType"), ("c", 1, "ServedVersion"), ("e", 1, "NoneType"), ("e", 1, "Problem"),
    ]  # fmt: skip
    assert [each.model.name for each in served] == ["a", "b", "c", "d"], "in the order of names all the same"
    assert [problem.model for problem in problems] == ["e"]


def test_an_interruption_from_the_progress_callback_stops_the_rest(shop):
    for number in range(40):
        shop.add(f"m{number:02d}", graphs.normalised(number))

    def interrupt(done, total, text):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        compile_all(Repository(shop.root, shop.config), shop.cache, interrupt, threads=2)
    assert len(list(shop.cache.root.glob("compiled/*"))) < 40


class Exploding(Compiler):
    """A compiler with a fault of its own for one model."""

    def compile(self, entry, version, on_step):
        if entry.name == "b":
            raise ZeroDivisionError("oops")
        return super().compile(entry, version, on_step)


def test_a_fault_of_the_compiler_costs_one_model(shop):
    for name in "abc":
        shop.add(name, graphs.mlp())
    compiler = Exploding(shop.cache, shop.config)
    served, problems = compile_all(Repository(shop.root, shop.config), shop.cache, compiler=compiler)
    assert [each.model.name for each in served] == ["a", "c"]
    assert isinstance(problems[0], Problem)
    assert problems[0].found == "ZeroDivisionError: oops"


def test_one_version_can_be_compiled_alone(shop):
    shop.add("m", graphs.mlp(1), version=1)
    shop.add("m", graphs.mlp(2), version=2)
    repository, compiler = Repository(shop.root, shop.config), Compiler(shop.cache, shop.config)
    entry = repository.find("m")
    assert compiler.compile(entry, 1).model.key == "m/1"
    with pytest.raises(ProblemError, match="model 'm' version 3: path"):
        compiler.compile(entry, 3)
    shop.add("bad", b"", toml="nonsense")
    with pytest.raises(ProblemError, match=r"model 'bad' version 1: clockwork\.toml"):
        compiler.compile(repository.find("bad"), 1)

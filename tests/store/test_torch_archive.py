"""What is no torch.export program, or would run code when it is opened, is refused before torch sees it."""

from __future__ import annotations

import pickle
import zipfile

import pytest

from clockwork_serve.store import ProblemError
from clockwork_serve.store.torch.archive import check_expression, read_archive, write_archive
from tests.store.archives import Archive, Bomb

GRAPH = "m/models/model.json"
CONFIG = "m/data/weights/model_weights_config.json"


@pytest.fixture
def file(tmp_path):
    return Archive(tmp_path)


def refused(path):
    with pytest.raises(ProblemError) as caught:
        read_archive(path)
    found = caught.value.problem
    assert found.field == "model.pt2"
    assert found.advice
    return found


def test_a_program_is_read_without_torch_and_only_what_is_computed_is_kept(file):
    archive = read_archive(file.write())
    assert list(archive.tensors) == ["w"]
    assert archive.read(["m/data/weights/weight_0"]) == {"m/data/weights/weight_0": b"\0" * 8}
    assert archive.program["guards_code"] == []
    assert archive.program["graph_module"]["graph"]["nodes"][0]["metadata"] == {}
    assert archive.tensors["w"].meta["device"]["type"] == "cpu"


def test_what_torch_gets_to_open_has_no_sample_inputs_which_are_a_pickle(file, tmp_path):
    write_archive(read_archive(file.write()), tmp_path / "clean.pt2")
    with zipfile.ZipFile(tmp_path / "clean.pt2") as clean:
        assert clean.read("program/data/sample_inputs/model.pt") == b""
        assert b"__import__" not in clean.read("program/models/model.json")
    assert read_archive(tmp_path / "clean.pt2").program["graph_module"]["graph"]


def test_an_empty_file_is_refused(file):
    file.path.write_bytes(b"")
    assert "empty" in refused(file.path).found


def test_a_pickle_is_refused_by_its_name(file):
    file.path.write_bytes(pickle.dumps(Bomb()))
    assert "pickled" in refused(file.path).found


def test_a_truncated_file_is_refused(file):
    whole = file.write().read_bytes()
    file.path.write_bytes(whole[: len(whole) // 2])
    assert "truncated" in refused(file.path).advice


def test_a_torchscript_file_is_refused_by_its_name(file):
    file.entries = {"m/data.pkl": b"", "m/constants.pkl": b"", "m/code/__torch__.py": b""}
    assert refused(file.write()).found == "a TorchScript file"


def test_a_file_of_torch_save_is_refused_by_its_name(file):
    file.entries = {"m/data.pkl": b"", "m/data/0": b""}
    assert "torch.save" in refused(file.write()).found


def test_a_package_of_compiled_code_is_refused(file):
    file.entries["m/data/aotinductor/model/x.so"] = b"\x7fELF"
    assert "compiled" in refused(file.write()).found


def test_another_archive_is_refused(file):
    file.entries = {"m/readme.txt": b"hello"}
    assert "readme.txt" in refused(file.write()).found


def test_compressed_entries_are_refused_for_they_may_become_large(file):
    file.entries["m/data/weights/weight_0"] = b"\0" * 10_000
    assert "not compressed" in refused(file.write(zipfile.ZIP_DEFLATED)).expected


def test_a_pickled_weight_is_refused(file):
    file.change(CONFIG, b'"use_pickle": false', b'"use_pickle": true')
    assert "'w', a pickled object" in refused(file.write()).found


def test_weights_as_one_pickle_are_refused(file):
    file.entries["m/data/weights/model.pt"] = file.entries.pop(CONFIG)
    assert "older versions" in refused(file.write()).found


def test_a_weight_that_is_not_there_is_refused(file):
    del file.entries["m/data/weights/weight_0"]
    assert "weight_0" in refused(file.write()).expected


@pytest.mark.parametrize(
    "target",
    [
        "torch.os.system", "torch.ops.aten.from_file.default", "torch.ops.mine.evil.default", "#hidden:x",
        "_operator.attrgetter", "math.__loader__", "torch.ops.higher_order.cond", "builtins.eval",
    ],
)  # fmt: skip
def test_an_operator_that_is_none_of_a_program_is_refused(file, target):
    file.change(GRAPH, b"torch.ops.aten.add.Tensor", target.encode())
    assert refused(file.write()).found == f"'{target}'"


@pytest.mark.parametrize("kind", ["as_custom_obj", "as_operator"])
def test_an_argument_that_is_an_object_is_refused(file, kind):
    file.change(
        GRAPH, b'"as_tensor": {"name": "x"}}, "kind"', f'"{kind}": {{"name": "x"}}}}, "kind"'.encode()
    )
    assert kind in refused(file.write()).found


@pytest.mark.parametrize(
    "text",
    [
        "__import__('os').system('true')", "s77.__class__", "open('x')", "[s77 for s77 in ()]", "lambda: 1",
        "Symbol('__import__')", "s77 if s77 else 1", "f'{s77}'", "(", "1" * 20_000,
    ],
)  # fmt: skip
def test_a_size_that_is_more_than_arithmetic_is_refused(text):
    with pytest.raises(ProblemError, match="arithmetic"):
        check_expression(text)


@pytest.mark.parametrize(
    "text",
    ["Symbol('s77', positive=True, integer=True)", "2*s0 + 1", "Mod(s0, 4)", "Max(1, s77//2)", "s0 >= 2"],
)
def test_arithmetic_of_sizes_is_let_through(text):
    check_expression(text)


def test_a_size_in_the_file_is_checked(file):
    file.change(GRAPH, b"Symbol('s77', positive=True, integer=True)", b"exit(1)")
    assert "exit(1)" in refused(file.write()).found


def test_a_program_of_another_layout_is_refused(file):
    file.entries[GRAPH] = b'{"graph_module": {}}'
    assert "known layout" in refused(file.write()).expected
    for data in (b"[1, 2", b"[" * 100_000):
        file.entries[GRAPH] = data
        assert "JSON" in refused(file.write()).expected

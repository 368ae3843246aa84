"""Files made to do harm: each is refused, by name, in little time and memory; none leaves its folder."""

from __future__ import annotations

import os
import resource
import time
import zipfile
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto as T
from onnx import helper as h
from onnx import numpy_helper

from clockwork_serve.store import Cache, Problem, Repository, StoreConfig, compile_all
from clockwork_serve.store.settings import ProblemError
from clockwork_serve.store.torch.archive import check_expression, read_archive
from tests.store.archives import Archive

OPSETS = [h.make_opsetid("", 17), h.make_opsetid("own", 1)]
MIB = 1 << 20


def value(name, dims=("N", 4), kind=T.FLOAT):
    return h.make_tensor_value_info(name, kind, list(dims))


def model(nodes, *, weights=(), functions=(), inputs=("x",), outputs=("y",)) -> onnx.ModelProto:
    graph = h.make_graph(
        nodes, "g", [value(name) for name in inputs], [value(name) for name in outputs], list(weights)
    )
    made = h.make_model(graph, functions=list(functions), opset_imports=OPSETS)
    made.ir_version = 9
    return made


def function(name: str, nodes: list[onnx.NodeProto]) -> onnx.FunctionProto:
    return h.make_function("own", name, ["a"], ["b"], nodes, OPSETS)


def call(name: str, source: str = "a", result: str = "b") -> onnx.NodeProto:
    return h.make_node(name, [source], [result], domain="own")


class Shop:
    """A repository with one good model and one bad one."""

    def __init__(self, root: Path) -> None:
        self.root, self.cache = root / "repository", root / "cache"
        self.put("good", model([h.make_node("Relu", ["x"], ["y"])]).SerializeToString())

    def put(self, name: str, data: bytes) -> Path:
        folder = self.root / name / "1"
        folder.mkdir(parents=True)
        (folder / "model.onnx").write_bytes(data)
        return folder

    def problem(self, *, seconds: float = 20.0, mib: int = 600) -> Problem:
        """The problem of the bad model; the good one is served. Time and memory are bounded."""
        before, start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.thread_time()
        config = StoreConfig(cache_dir=str(self.cache))
        with Cache(str(self.cache)) as cache:
            served, problems = compile_all(Repository(self.root, config), cache, threads=1)
        assert time.thread_time() - start < seconds
        assert (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024 < mib
        assert [each.model.name for each in served] == ["good"]
        (problem,) = problems
        assert "please report" not in str(problem)
        return problem


@pytest.fixture
def shop(tmp_path: Path) -> Shop:
    return Shop(tmp_path)


def external(location: str, **more: str) -> onnx.TensorProto:
    tensor = onnx.TensorProto(name="w", data_type=T.FLOAT, dims=[4], data_location=T.EXTERNAL)
    for key, text in {"location": location, **more}.items():
        tensor.external_data.add(key=key, value=text)
    return tensor


@pytest.mark.parametrize(
    ("location", "words"),
    [
        ("../../../secret", "files inside"),
        ("../../good/1/model.onnx", "files inside"),
        ("/etc/passwd", "a file beside the model"),
        ("link", "files inside"),
        ("loop", "loop"),
        ("pipe", "something else (p"),
        (".", "something else (d"),
        ("nowhere", "No such file"),
        ("*/_ORT_MEM_ADDR_/*", "No such file"),
        ("a" * 5000, "File name too long"),
        ("", "a file beside the model, found ''"),
    ],
)
def test_external_data_stays_in_the_models_folder(
    shop: Shop, tmp_path: Path, location: str, words: str
) -> None:
    (tmp_path / "secret").write_bytes(bytes(16))
    add = model([h.make_node("Add", ["x", "w"], ["y"])], weights=[external(location)])
    folder = shop.put("bad", add.SerializeToString())
    (folder / "link").symlink_to(tmp_path / "secret")
    (folder / "loop").symlink_to("loop")
    os.mkfifo(folder / "pipe")

    assert words in str(shop.problem())


@pytest.mark.parametrize(
    ("more", "words"),
    [
        ({}, "at most 2147483647 bytes with its external data, found"),
        ({"length": str(1 << 36)}, "at most 2147483647 bytes"),
        ({"offset": str(1 << 41), "length": "16"}, "expected 16 bytes at 2199023255552"),
        ({"offset": "9" * 5000}, "whole numbers for offset and length"),
    ],
)
def test_a_sparse_file_of_a_terabyte_is_not_read(shop: Shop, more: dict[str, str], words: str) -> None:
    add = model([h.make_node("Add", ["x", "w"], ["y"])], weights=[external("huge", **more)])
    with (shop.put("bad", add.SerializeToString()) / "huge").open("wb") as huge:
        huge.truncate(1 << 40)

    assert words in str(shop.problem(mib=100))


def test_a_tensor_in_another_file_says_in_which(shop: Shop) -> None:
    weight = external("w", offset="0")
    del weight.external_data[0]
    shop.put("bad", model([h.make_node("Add", ["x", "w"], ["y"])], weights=[weight]).SerializeToString())

    assert "external data of 'w': expected a file beside the model, found ''" in str(shop.problem())


def test_a_hard_link_is_a_file_like_others(shop: Shop, tmp_path: Path) -> None:
    add = model([h.make_node("Add", ["x", "w"], ["y"])], weights=[external("weights")])
    folder = shop.put("linked", add.SerializeToString())
    (tmp_path / "weights").write_bytes(np.ones(4, np.float32).tobytes())
    (folder / "weights").hardlink_to(tmp_path / "weights")
    with Cache(str(shop.cache)) as cache:
        served, problems = compile_all(Repository(shop.root, StoreConfig(cache_dir=str(shop.cache))), cache)

    assert [each.model.name for each in served] == ["good", "linked"]
    assert problems == []


def test_a_function_reads_no_file_either(shop: Shop, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """ONNX Runtime would look for it where the server was started."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "secret").write_bytes(bytes(16))
    constant = h.make_node("Constant", [], ["c"])
    constant.attribute.append(
        onnx.AttributeProto(name="value", type=onnx.AttributeProto.TENSOR, t=external("secret"))
    )
    body = function("F", [constant, h.make_node("Add", ["a", "c"], ["b"])])
    shop.put("bad", model([call("F", "x", "y")], functions=[body]).SerializeToString())

    assert "No such file" in str(shop.problem())


def test_nor_does_a_sparse_tensor(shop: Shop) -> None:
    made = model([h.make_node("Relu", ["x"], ["y"])])
    sparse = made.graph.sparse_initializer.add(dims=[4])
    sparse.values.CopyFrom(external("../../../secret"))
    shop.put("bad", made.SerializeToString())

    assert "external data of 'w'" in str(shop.problem())


def test_a_million_nodes_are_too_many(shop: Shop) -> None:
    node = h.make_node("Relu", ["x"], ["y"]).SerializeToString()
    made = model([h.make_node("Relu", ["x"], ["y"])])
    graph = made.graph.SerializeToString() + 1_000_000 * (b"\x0a" + bytes([len(node)]) + node)
    made.ClearField("graph")
    shop.put("bad", made.SerializeToString() + b"\x3a" + varint(len(graph)) + graph)

    assert "model.onnx graph: expected at most 100000 nodes, found more" in str(shop.problem(mib=900))


def test_nodes_of_a_function_that_nobody_calls_are_counted_too(shop: Shop) -> None:
    body = function("F", [h.make_node("Relu", ["a"], ["b"])] * 100_001)
    shop.put("bad", model([h.make_node("Relu", ["x"], ["y"])], functions=[body]).SerializeToString())

    assert "at most 100000 nodes, found more" in str(shop.problem())


@pytest.mark.slow
def test_two_million_names_are_too_many(shop: Shop) -> None:
    made = model([h.make_node("Relu", ["x"] * 2_000_000, ["y"])])
    shop.put("bad", made.SerializeToString())

    assert "expected at most 1000000 names of values, found more" in str(shop.problem(mib=900))


def varint(number: int) -> bytes:
    found = bytearray()
    while number > 127:
        found.append(number & 127 | 128)
        number >>= 7
    return bytes([*found, number])


def test_graphs_in_graphs_end_somewhere(shop: Shop) -> None:
    """10,000 deep; protobuf itself reads 100."""
    data = b""
    for _ in range(10_000):
        attribute = b"\x0a\x01g\x32" + varint(len(data)) + data
        node = b"\x22\x02If\x2a" + varint(len(attribute)) + attribute
        data = b"\x0a" + varint(len(node)) + node
    shop.put("bad", b"\x08\x09\x3a" + varint(len(data)) + data)

    assert "graphs inside of graphs 32 deep" in str(shop.problem())


def test_axes_end_somewhere(shop: Shop) -> None:
    """A product of a million sizes takes for ever."""
    made = model([h.make_node("Add", ["x", "w"], ["y"])])
    made.graph.initializer.add(name="w", data_type=T.FLOAT, dims=[2**62] * 200_000)
    shop.put("bad", made.SerializeToString())

    assert "tensors of at most 64 axes" in str(shop.problem())


def test_a_function_does_not_call_itself(shop: Shop) -> None:
    functions = [function("F", [call("G")]), function("G", [call("F")])]
    shop.put("bad", model([call("F", "x", "y")], functions=functions).SerializeToString())

    assert "functions that do not call themselves, found 'own.F', which does" in str(shop.problem())


def test_functions_do_not_double_without_end(shop: Shop) -> None:
    """Thirty functions, each of which calls the next one twice: a billion nodes in 3 kB."""
    functions = [
        function(f"F{n}", [call(f"F{n + 1}", "a", "c"), call(f"F{n + 1}", "c", "b")]) for n in range(30)
    ]
    functions.append(function("F30", [h.make_node("Relu", ["a"], ["b"])]))
    shop.put("bad", model([call("F0", "x", "y")], functions=functions).SerializeToString())

    assert "at most 100000 nodes, functions written out, found more" in str(shop.problem())


def test_a_circle_of_nodes_is_refused(shop: Shop) -> None:
    nodes = [
        h.make_node("Add", ["x", "b"], ["a"]),
        h.make_node("Relu", ["a"], ["b"]),
        h.make_node("Relu", ["b"], ["y"]),
    ]
    shop.put("bad", model(nodes).SerializeToString())

    assert "acyclic" in str(shop.problem())


@pytest.mark.parametrize("share", [0.1, 0.5, 0.9, 0.99])
def test_a_file_that_is_cut_is_refused(shop: Shop, share: float) -> None:
    weights = [numpy_helper.from_array(np.ones((4, 4), np.float32), "w")]
    whole = model([h.make_node("MatMul", ["x", "w"], ["y"])], weights=weights).SerializeToString()
    shop.put("bad", whole[: int(len(whole) * share)])

    assert "model.onnx" in str(shop.problem())


def test_a_repository_of_odd_names_is_read(tmp_path: Path) -> None:
    shop = Shop(tmp_path)
    for name in (b"not-\xff-text", b"new\nline", b"\x1b[2J", b"-rf", b"a" * 255, "\u202egod".encode()):
        (shop.root / os.fsdecode(name) / "1").mkdir(parents=True)
    (shop.root / "loop").symlink_to("loop")
    (shop.root / "out").symlink_to("/etc")
    for name in ("007", "1e3", "18446744073709551616", "\u0661"):
        (shop.root / "good" / name).mkdir()
    os.mkfifo(shop.root / "good" / "config.pbtxt")
    with Cache(str(shop.cache)) as cache:
        served, problems = compile_all(Repository(shop.root, StoreConfig(cache_dir=str(shop.cache))), cache)

    assert served == []
    assert len(problems) == 9
    assert all(str(problem).isprintable() and str(problem).encode() for problem in problems)
    assert "config.pbtxt: expected a file, found a folder, a pipe" in "".join(map(str, problems))


def test_an_archive_whose_entries_overlap_is_refused(tmp_path: Path) -> None:
    """A thousand entries of one megabyte, all of them the same bytes."""
    archive = Archive(tmp_path)
    archive.entries["m/data/weights/weight_0"] = bytes(MIB)
    path = archive.write()
    with zipfile.ZipFile(path, "a") as file:
        (entry,) = [info for info in file.infolist() if info.filename.endswith("weight_0")]
        for number in range(1000):
            copy = zipfile.ZipInfo(f"m/data/weights/copy_{number}")
            copy.header_offset, copy.CRC = entry.header_offset, entry.CRC
            copy.compress_size = copy.file_size = entry.file_size
            file.filelist.append(copy)
            file.NameToInfo[copy.filename] = copy
        file._didModify = True

    with pytest.raises(ProblemError, match="some that overlap"):
        read_archive(path)


@pytest.mark.parametrize(
    "text",
    [
        "9**9**9**9",
        "Pow(9, Pow(9, 9))",
        "1 << 99999999",
        "Pow(Pow(Pow(Pow(Pow(s0, 9), 9), 9), 9), 9)",
        "9" * 4000,
    ],
)
def test_a_size_that_takes_for_ever_to_work_out_is_refused(text: str) -> None:
    with pytest.raises(ProblemError, match="sizes as arithmetic expressions"):
        check_expression(text)


@pytest.mark.parametrize(
    "text",
    ["Pow(Symbol('s77', positive=True, integer=True), Integer(2))", "s0**2", "Pow(s0, Rational(1, 2))"],
)
def test_a_size_that_is_a_square_is_not(text: str) -> None:
    check_expression(text)

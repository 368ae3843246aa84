"""The content of a repository; a bad model does not affect the others."""

from __future__ import annotations

import os

import pytest

from clockwork_serve.errors import RepositoryError
from clockwork_serve.store import ProblemError, Repository
from clockwork_serve.store.repository import model_file, model_names
from tests.store import graphs


def scan(shop):
    repository = Repository(shop.root, shop.config)
    return {entry.name: entry for entry in repository.scan()}, repository.problems


def test_versions_are_whole_numbers_and_the_latest_is_served(shop):
    for version in (1, 2, 10):
        shop.add("m", graphs.mlp(), version=version)
    (shop.root / "m" / "latest").mkdir()
    (shop.root / "m" / "03").mkdir()
    (shop.root / ".git").mkdir()
    (shop.root / "README").write_text("not a model")
    entries, problems = scan(shop)
    assert not problems
    assert list(entries) == ["m"]
    assert entries["m"].present == (1, 2, 10)
    assert entries["m"].versions == (10,)


@pytest.mark.parametrize(
    ("policy", "versions"),
    [('"all"', (1, 2, 10)), ("{latest = 2}", (2, 10)), ("{specific = [1, 10]}", (1, 10))],
)
def test_version_policies(shop, policy, versions):
    for version in (1, 2, 10):
        shop.add("m", graphs.mlp(), version=version, toml=f"version_policy = {policy}")
    assert scan(shop)[0]["m"].versions == versions


def test_a_specific_version_that_is_missing_is_said_so(shop):
    shop.add("m", graphs.mlp(), toml="version_policy = {specific = [1, 7]}")
    assert "versions [7]" in scan(shop)[0]["m"].warnings[0]
    shop.add("m", graphs.mlp(), toml="version_policy = {specific = [7]}")
    (problem,) = scan(shop)[1]
    assert (problem.field, problem.found) == ("version_policy", "versions [1]")


def test_toml_goes_over_pbtxt(shop):
    shop.add("m", graphs.mlp(), toml="max_batch_size = 4", pbtxt='max_batch_size: 8 backend: "onnxruntime"')
    settings = scan(shop)[0]["m"].settings
    assert (settings.max_batch_size, settings.backend) == (4, "onnx")


def test_labels_come_from_files_of_the_model(shop):
    shop.add("m", graphs.mlp(), pbtxt='output { name: "y" label_filename: "l.txt" }')
    (shop.root / "m" / "l.txt").write_text("cat\ndog\n")
    assert scan(shop)[0]["m"].settings.labels == {"y": ("cat", "dog")}
    (shop.root / "m" / "l.txt").unlink()
    (problem,) = scan(shop)[1]
    assert problem.field == "labels.y"


@pytest.mark.parametrize("root", ["nowhere", "file"])
def test_a_root_that_is_no_folder_is_an_error(shop, root):
    (shop.root / "file").write_text("")
    with pytest.raises(RepositoryError, match="expected a readable folder"):
        Repository(shop.root / root, shop.config)


def test_a_root_whose_name_is_no_text_is_an_error_that_names_it(shop, tmp_path):
    (tmp_path / "\udcff").mkdir()
    (tmp_path / "link").symlink_to("\udcff")
    with pytest.raises(RepositoryError, match=r"model repository: expected a path in UTF-8, found .*\\udcff"):
        Repository(tmp_path / "link", shop.config)


def test_each_bad_model_is_one_problem_and_the_rest_is_served(shop):
    shop.add("good", graphs.mlp())
    shop.add("bad_toml", graphs.mlp(), toml="max_batch_size = ")
    shop.add("bad_pbtxt", graphs.mlp(), pbtxt='platform: "tensorrt_plan"')
    shop.add("bad-name!", graphs.mlp())
    shop.add("corrupt", b"\x08\x07not a model at all" * 50)
    shop.add("truncated", graphs.mlp().SerializeToString()[:-40])
    shop.add("empty", b"")
    (shop.root / "unversioned").mkdir()
    (shop.root / "unversioned" / "model.onnx").write_bytes(b"")
    shop.add("no_file", None)
    shop.add("foreign", None).joinpath("model.plan").write_bytes(b"x")
    served, problems = shop.compile()
    assert list(served) == ["good/1"]
    by_model = {problem.model: problem for problem in problems}
    assert len(problems) == len(by_model) == 9
    assert by_model["bad_toml"].field == "clockwork.toml"
    assert by_model["bad_pbtxt"].found == "'tensorrt_plan'"
    assert by_model["bad-name!"].field == "name"
    assert "copy it again" in by_model["corrupt"].advice
    assert "truncated" in by_model["truncated"].advice
    assert by_model["empty"].found == "an empty file"
    assert by_model["unversioned"].field == "versions"
    assert by_model["no_file"].expected == "model.onnx"
    assert by_model["foreign"].found == "model.plan (TensorRT)"
    assert str(by_model["empty"]).startswith(
        "model 'empty' version 1: model.onnx: expected an ONNX model, found"
    )


@pytest.mark.parametrize(
    ("file", "content", "found", "advice"),
    [
        (
            "model.onnx",
            b"version https://git-lfs.github.com/spec/v1\n",
            "a pointer of Git LFS",
            "git lfs pull",
        ),
        ("model.onnx", b"\n<!DOCTYPE html><html>", "a web page (HTML)", "download the file again"),
        ("model.pkl", b"\x80\x04", "model.pkl (a pickle)", "write a model.py that loads it"),
        ("notes.txt", b"", "notes.txt", "put the model file at m/1/model.onnx"),
    ],
)
def test_what_lies_in_place_of_a_model_is_called_by_its_name(shop, file, content, found, advice):
    shop.add("m", None).joinpath(file).write_bytes(content)
    _, [problem] = shop.compile()
    assert problem.found == found
    assert advice in problem.advice


def test_a_file_of_a_future_onnx_version_is_said_to_be_one(shop):
    model = graphs.mlp()
    model.ir_version = 99
    shop.add("m", model)
    _, [problem] = shop.compile()
    assert "IR version: 99, max supported" in problem.found


@pytest.mark.parametrize(
    ("where", "found", "advice"),
    [
        ("m/0/model.onnx", "m/0/model.onnx", "move it to m/1/model.onnx"),
        ("m/model.onnx", "m/model.onnx", "move it to m/1/model.onnx"),
        ("m/net.onnx", "m/net.onnx", "move it to m/1/model.onnx"),
        ("m/one/model.onnx", "m/one/model.onnx", "move it to m/1/model.onnx"),
        ("m/01/model.pt2", "m/01/model.pt2", "move it to m/1/model.pt2"),
        ("m/v1/model.py", "m/v1/model.py", "move it to m/1/model.py"),
        ("m/net/2/model.onnx", "m/net/2/model.onnx", "m is a folder of models: give "),
        ("1/model.onnx", "1/model.onnx", "1 is a version: give the folder above"),
        ("m/a/b/c/model.onnx", "none", "put the model at m/1/model.onnx"),
    ],
)
def test_a_model_file_beside_its_place_is_named_with_its_place(shop, where, found, advice):
    (shop.root / where).parent.mkdir(parents=True)
    (shop.root / where).write_bytes(b"")
    (problem,) = scan(shop)[1]
    assert (problem.model, problem.field) == (where.split("/")[0], "versions")
    assert problem.found == found
    assert problem.advice.startswith(advice)


def test_files_in_the_root_and_a_root_without_models_are_problems_of_the_repository(shop):
    (problem,) = scan(shop)[1]
    assert (problem.model, problem.field) == ("", "models")
    assert str(problem).startswith("repository: models: expected each model at MODEL/1/model.onnx")
    for name in ("model.onnx", "net.pt2", "make_models.py"):
        (shop.root / name).write_text("")
    shop.add("good", graphs.mlp())
    served, problems = shop.compile()
    assert list(served) == ["good/1"]
    assert [problem.advice.partition(",")[0] for problem in problems] == [
        "move it to MODEL/1/model.onnx", "move it to net/1/model.pt2",
    ]  # fmt: skip
    assert {problem.model for problem in problems} == {""}


def test_links_may_not_lead_out_of_the_repository(shop, tmp_path):
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "model.onnx").write_bytes(graphs.mlp().SerializeToString())
    (outside / "secret.txt").write_text("secret")
    (shop.root / "folder").symlink_to(outside)
    (shop.root / "version").mkdir()
    (shop.root / "version" / "1").symlink_to(outside)
    (shop.add("file", None) / "model.onnx").symlink_to(outside / "model.onnx")
    shop.add("labels", graphs.mlp(), toml='labels = {y = "../../outside/secret.txt"}')
    shop.add("settings", graphs.mlp())
    (shop.root / "settings" / "clockwork.toml").symlink_to(outside / "secret.txt")
    shop.add("named", graphs.mlp(), pbtxt='default_model_filename: "../1/model.onnx"')
    served, problems = shop.compile()
    assert not served
    assert {problem.model: problem.field for problem in problems} == {
        "folder": "path", "version": "path", "file": "path", "labels": "path", "settings": "path",
        "named": "default_model_filename",
    }  # fmt: skip


def test_links_inside_the_repository_are_followed(shop):
    first = shop.add("a", graphs.mlp())
    (shop.add("b", None) / "model.onnx").symlink_to(first / "model.onnx")
    served, problems = shop.compile()
    assert not problems
    assert served["a/1"].model.weights == served["b/1"].model.weights


def test_another_file_name_may_be_given(shop):
    folder = shop.add("m", None, pbtxt='default_model_filename: "net.onnx"')
    (folder / "net.onnx").write_bytes(graphs.mlp().SerializeToString())
    assert list(shop.compile()[0]) == ["m/1"]


def test_one_model_can_be_looked_at_again(shop):
    repository = Repository(shop.root, shop.config)
    repository.scan()
    shop.add("new", graphs.mlp())
    assert repository.find("new").versions == (1,)
    assert [entry.name for entry in repository.entries] == ["new"]
    for name in ("absent", "..", "", "a/b"):
        with pytest.raises(ProblemError, match="expected a folder in"):
            repository.find(name)


def test_folders_whose_names_are_no_text_and_links_without_an_end_are_listed(shop):
    (shop.root / "no\udcfftext").mkdir()
    (shop.root / "circle").symlink_to("circle")
    shop.add("m", graphs.mlp())
    (shop.root / "README").write_text("not a model")
    assert sorted(model_names(shop.root)) == ["circle", "m", "no\udcfftext"]
    entries, problems = scan(shop)
    assert list(entries) == ["circle", "m", r"no\udcfftext"]
    assert [problem.model for problem in problems] == ["circle", r"no\udcfftext"]


def test_one_file_is_a_repository_of_one_model_called_after_it(shop, tmp_path):
    file = tmp_path / "elsewhere" / "two-layers.onnx"
    file.parent.mkdir()
    file.write_bytes(graphs.mlp().SerializeToString())
    (file.parent / "clockwork.toml").write_text("not for a model")
    repository = Repository(file, shop.config)
    (entry,) = repository.scan()
    assert (entry.name, entry.versions, entry.backend) == ("two-layers", (1,), "onnx")
    assert model_file(entry, 1) == file
    assert repository.find("two-layers") == entry
    assert model_names(file) == ["two-layers"]
    with pytest.raises(ProblemError, match="none of that name"):
        repository.find("another")


def test_a_file_that_is_a_link_is_called_as_the_link_is(shop, tmp_path):
    blob = tmp_path / "blobs" / "0123"
    blob.parent.mkdir()
    blob.write_bytes(graphs.mlp().SerializeToString())
    (tmp_path / "net.pt2").symlink_to(blob)
    (entry,) = Repository(tmp_path / "net.pt2", shop.config).scan()
    assert (entry.name, entry.backend, model_file(entry, 1)) == ("net", "torch", blob)


def test_a_folder_is_a_repository_whatever_its_name(shop, tmp_path):
    (tmp_path / "folder.onnx").mkdir()
    repository = Repository(tmp_path / "folder.onnx", shop.config)
    assert repository.scan() == []
    assert [problem.field for problem in repository.problems] == ["models"]


@pytest.mark.parametrize("name", ["my net", "-net", "né"])
def test_a_file_whose_name_no_model_may_have_is_a_problem(shop, tmp_path, name):
    file = tmp_path / f"{name}.onnx"
    file.write_bytes(graphs.mlp().SerializeToString())
    repository = Repository(file, shop.config)
    assert repository.scan()[0].versions == ()
    (problem,) = repository.problems
    assert (problem.field, problem.found) == ("name", name)
    assert "rename the file" in problem.advice


def test_a_model_file_that_cannot_be_read_is_an_error(shop, tmp_path):
    os.mkfifo(tmp_path / "pipe.onnx")
    (tmp_path / "circle.onnx").symlink_to(tmp_path / "circle.onnx")
    for name in ("none.onnx", "pipe.onnx", "circle.onnx"):
        with pytest.raises(RepositoryError, match=f"model file: expected a readable file, found '.*{name}'"):
            Repository(tmp_path / name, shop.config)
    (tmp_path / "words.txt").write_text("")
    with pytest.raises(RepositoryError, match=r"or one file NAME\.onnx or NAME\.pt2"):
        Repository(tmp_path / "words.txt", shop.config)

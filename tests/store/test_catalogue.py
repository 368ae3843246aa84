"""The catalogue in a shared store: of writers at once none is lost, and who reads it compiles nothing."""

from __future__ import annotations

import subprocess
import sys
import textwrap
from pathlib import Path

import msgspec
import pytest

from clockwork_serve.errors import RepositoryError
from clockwork_serve.messages import Code, Model, Weights
from clockwork_serve.store import (
    Cache,
    CatalogueCompiler,
    CatalogueRepository,
    Repository,
    ServedVersion,
    StoreConfig,
    compile_all,
    publish,
)
from clockwork_serve.store.cache import shared_store
from clockwork_serve.store.catalogue import KIND, documents, read_catalogue
from clockwork_serve.store.shared import FolderFiles, FsspecFiles, SharedStore
from tests.store import graphs


@pytest.fixture
def folder(tmp_path) -> Path:
    folder = tmp_path / "store"
    folder.mkdir()
    return folder


def version(name: str, number: int = 1, backend: str = "onnx") -> ServedVersion:
    code = Code(
        code_id=f"code-{name}", backend=backend, path="/here", inputs=(), outputs=(), batched=False,
        batch_sizes=(1,), lifted=True,
    )  # fmt: skip
    model = Model(
        key=f"{name}/{number}", name=name, version=str(number), code_id=code.code_id, max_batch_size=0,
        weights=Weights(weights_id=f"weights-{name}", path="/here", size=1), platform="onnxruntime_onnx",
        batch_sizes=(1,), output_bytes=1,
    )  # fmt: skip
    return ServedVersion(model=model, code=code)


def keys(store: SharedStore) -> list[str]:
    return [model.key for model in read_catalogue(store, documents(store)).models]


def test_each_change_is_a_document_and_the_last_one_counts(folder):
    store = shared_store(str(folder))
    assert read_catalogue(store, documents(store)).number == 0
    assert publish(store, [version("b"), version("a"), version("a", 2)], ()).number == 1
    assert publish(store, [version("a"), version("a", 2), version("b")], ()).number == 1, "nothing changed"
    found = publish(store, [version("c")], kept=["a"])
    assert found.number == 2
    assert [model.key for model in found.models] == ["a/1", "a/2", "c/1"]
    assert [code.code_id for code in found.codes] == ["code-a", "code-c"]
    assert read_catalogue(store, documents(store)) == found
    assert "/here" not in msgspec.json.encode(found).decode()
    assert publish(store, [version("words", backend="python")], ()).models == ()


def test_a_damaged_document_is_not_read_and_its_number_not_used_again(folder):
    store = shared_store(str(folder))
    publish(store, [version("a")], ())
    publish(store, [version("b")], ())
    (last,) = folder.glob("*/catalogue/000000002.json")
    last.write_bytes(last.read_bytes()[:-1])
    other = shared_store(str(folder))
    assert keys(other) == ["a/1"]
    assert publish(other, [version("c")], kept=["a"]).number == 3
    assert keys(shared_store(str(folder))) == ["a/1", "c/1"]


WRITER = """
    import sys
    from clockwork_serve.store import publish
    from clockwork_serve.store.cache import shared_store
    from tests.store.test_catalogue import version

    place, own, times = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
    names = [f"m{writer}-{time}" for writer in range(4) for time in range(times)]
    store = shared_store(place)
    print("ready", flush=True)
    sys.stdin.readline()
    for time in range(times):
        publish(store, [version(f"m{own}-{time}")], kept=names)
"""


def test_of_four_processes_that_change_it_at_once_no_change_is_lost(folder):
    """Each adds models of its own to whatever is there; a lost update would leave one out."""
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", textwrap.dedent(WRITER), str(folder), str(own), "5"],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )
        for own in range(4)
    ]  # fmt: skip
    for process in processes:
        assert process.stdout.readline() == "ready\n"
    for process in processes:
        process.stdin.write("\n")
        process.stdin.flush()
    for process in processes:
        _, err = process.communicate(timeout=100)
        assert process.returncode == 0, err
    store = shared_store(str(folder))
    assert keys(store) == sorted(f"m{own}-{time}/1" for own in range(4) for time in range(5))
    documents = sorted(folder.glob("*/catalogue/*.json"))
    assert [int(path.stem) for path in documents] == list(range(1, 21))


class Forgetful(FolderFiles):
    """A store whose answer to the first creation is lost."""

    lost = False

    def put(self, name, source, tick, *, new=False) -> None:
        super().put(name, source, tick, new=new)
        if new and not self.lost:
            self.lost = True
            raise OSError("the connection was lost")


def test_a_document_whose_acknowledgement_was_lost_is_ours(folder):
    store = SharedStore(str(folder), "v6-0", b"{}", pauses_s=(0.0, 0.0))
    store._files = Forgetful(folder)
    assert publish(store, [version("a")], ()).number == 1
    assert store._files.lost
    assert [path.name for path in folder.glob("*/catalogue/*")] == ["000000001.json"]


def test_where_files_cannot_be_created_only_if_absent_there_is_no_catalogue(folder):
    store = SharedStore(str(folder), "v6-0", b"{}")
    store._files = FsspecFiles(f"file://{folder}")
    with pytest.raises(RepositoryError, match="catalogues and leases need a folder, or s3"):
        publish(store, [version("a")], ())


def test_it_may_be_where_fsspec_creates_files_so(tmp_path):
    store = shared_store(f"memory://{tmp_path.name}/catalogue")
    assert publish(store, [version("a")], ()).number == 1
    with pytest.raises(FileExistsError):
        store._files.put(f"{store._runtime}/{KIND}/000000001.json", b"other", lambda: None, new=True)
    assert publish(store, [version("b")], kept=["a"]).number == 2
    assert keys(store) == ["a/1", "b/1"]


# A server without a repository


def test_what_builders_prepared_is_taken_as_the_catalogue_says(shop, tmp_path, folder):
    shop.add("a", graphs.mlp(1))
    shop.add("a", graphs.mlp(2), version=2, toml='version_policy = "all"')
    shop.add("b", graphs.convnet())
    with Cache(tmp_path / "builder", store=str(folder)) as cache:
        config = StoreConfig(cache_dir=str(tmp_path / "builder"))
        served, problems = compile_all(Repository(shop.root, config), cache)
        assert not problems
        publish(cache.shared, served, ())
    config = StoreConfig(cache_dir=str(tmp_path / "server"), shared=str(folder))
    repository = CatalogueRepository(config)
    assert [(entry.name, entry.versions, entry.backend) for entry in repository.scan()] == [
        ("a", (1, 2), "onnx"), ("b", (1,), "onnx"),
    ]  # fmt: skip
    with Cache(config.cache_dir, store=config.shared) as cache:
        compiler = CatalogueCompiler(cache, repository)
        taken, problems = compile_all(repository, cache, compiler=compiler)
        assert not problems
        assert compiler.optimiser.runs == 0
        assert [each.model.key for each in taken] == ["a/1", "a/2", "b/1"]
        for here, there in zip(taken, served, strict=True):
            assert here.code == msgspec.structs.replace(there.code, path=here.code.path)
            assert Path(here.model.weights.path).read_bytes() == Path(there.model.weights.path).read_bytes()


def test_what_the_catalogue_names_and_the_store_lost_is_a_problem_of_its_model(tmp_path, folder):
    publish(shared_store(str(folder)), [version("a")], ())
    config = StoreConfig(cache_dir=str(tmp_path / "server"), shared=str(folder))
    repository = CatalogueRepository(config)
    with Cache(config.cache_dir, store=config.shared) as cache:
        served, problems = compile_all(repository, cache, compiler=CatalogueCompiler(cache, repository))
    assert served == []
    assert "model 'a' version 1: store: expected the code and the weights" in str(problems[0])


def test_without_a_catalogue_there_is_nothing_to_serve_and_how_to_make_one(tmp_path, folder):
    with pytest.raises(RepositoryError, match=rf"a catalogue for this .* found none in {folder}; run clockw"):
        CatalogueRepository(StoreConfig(cache_dir="", shared=str(folder)))
    with pytest.raises(RepositoryError, match="there is no such folder"):
        CatalogueRepository(StoreConfig(cache_dir="", shared=str(tmp_path / "none")))


def test_a_model_that_it_does_not_name_is_not_found(folder):
    publish(shared_store(str(folder)), [version("a")], ())
    repository = CatalogueRepository(StoreConfig(cache_dir="", shared=str(folder)))
    assert repository.find("a").versions == (1,)
    assert repository.find_misplaced() == []
    with pytest.raises(RepositoryError, match="model 'b': name: expected a model of the catalogue"):
        repository.find("b")

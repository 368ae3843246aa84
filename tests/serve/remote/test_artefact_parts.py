"""Artefacts part by part: what arrives is what was sent, and nothing else is kept."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest
from msgspec import structs

from clockwork_serve.errors import RepositoryError
from clockwork_serve.integrity import hash_of, sealed
from clockwork_serve.messages import (
    ArtefactDamaged,
    CodeAdded,
    CodeFile,
    Fetch,
    Frame,
    Load,
    Model,
    Part,
    Weights,
)
from clockwork_serve.serve.remote.transfer import (
    AT_ONCE,
    IncomingArtefact,
    MachineArtefacts,
    code_parts,
    weights_parts,
)
from clockwork_serve.store import Cache
from tests.serve.links import until
from tests.serve.remote.bridges import MODEL
from tests.worker.actions import CODE, load

BLOB = bytes(range(256)) * 2000


@pytest.fixture
def home(tmp_path: Path) -> Iterator[Cache]:
    with Cache(tmp_path / "home", fingerprint={}) as made:
        yield made


@pytest.fixture
def away(tmp_path: Path) -> Iterator[Cache]:
    with Cache(tmp_path / "away", fingerprint={}) as made:
        yield made


def weights(home: Cache) -> Weights:
    weights_id = home.save_weights(BLOB)
    return Weights(weights_id=weights_id, path=str(home.weights_path(weights_id)), size=len(BLOB))


def arrive(asked: Fetch, cache: Cache, parts: Iterator[Frame]) -> None:
    arriving = IncomingArtefact(asked, cache)
    try:
        for part in parts:
            assert isinstance(part, Part)
            arriving.take(part)
    finally:
        arriving.close()


def test_weights_arrive_whole(home: Cache, away: Cache) -> None:
    there = weights(home)
    asked = Fetch(what="weights", name=there.weights_id)
    arrive(asked, away, weights_parts(asked, there))
    assert away.weights_path(there.weights_id).read_bytes() == BLOB
    assert not list(away._own.rglob("blob"))


def test_weights_that_are_not_what_their_hash_says_are_not_kept(home: Cache, away: Cache) -> None:
    there = weights(home)
    Path(there.path).write_bytes(BLOB[:-1] + b"?")
    asked = Fetch(what="weights", name=there.weights_id)
    with pytest.raises(RepositoryError, match="found others"):
        arrive(asked, away, weights_parts(asked, there))
    assert not away.weights_path(there.weights_id).exists()
    assert not list(away._own.rglob("blob"))


def test_a_code_arrives_with_all_its_files(home: Cache, away: Cache) -> None:
    stored = home.save_code(CODE, {"model.onnx": BLOB, "index.json": b"{}"})
    asked = Fetch(what="code", name=CODE.code_id)
    arrive(asked, away, code_parts(asked, stored))
    found = away.code(CODE.code_id)
    assert found is not None
    assert structs.replace(found, path="", files=()) == CODE
    assert found.files == stored.files
    assert (Path(found.path) / "model.onnx").read_bytes() == BLOB


def test_a_code_that_is_another_one_or_leads_elsewhere_is_not_kept(home: Cache, away: Cache) -> None:
    stored = home.save_code(CODE, {"index.json": b"{}"})
    asked = Fetch(what="code", name="other")
    with pytest.raises(RepositoryError, match=r"code other: .*its seal does not fit"):
        arrive(asked, away, code_parts(asked, stored))
    asked = Fetch(what="code", name=CODE.code_id)
    described = (Path(stored.path) / "code.json").read_bytes()
    evil = [
        Part(what="code", name=CODE.code_id, file="code.json", data=described),
        Part(what="code", name=CODE.code_id, file="../../evil", data=b"x"),
        Part(what="code", name=CODE.code_id, last=True),
    ]
    with pytest.raises(RepositoryError, match=r"index.json: found other content"):
        arrive(asked, away, iter(evil))
    leading = structs.replace(CODE, files=(CodeFile("../../evil", hash_of(b"x")),))
    evil[0] = structs.replace(
        evil[0], data=sealed(f"codes/{CODE.code_id}/code.json", msgspec.json.encode(leading))
    )
    with pytest.raises(RepositoryError, match="lead elsewhere"):
        arrive(asked, away, iter(evil))
    assert away.code(CODE.code_id) is None


def test_a_code_of_which_a_file_is_damaged_at_home_is_not_kept_and_told(home: Cache, away: Cache) -> None:
    stored = home.save_code(CODE, {"model.onnx": BLOB, "index.json": b"{}"})
    (Path(stored.path) / "model.onnx").write_bytes(BLOB[:-1])
    asked: list[Fetch] = []
    damaged: list[ArtefactDamaged] = []
    ready: list[str] = []
    artefacts = MachineArtefacts(away, asked.append, damaged.append)
    artefacts.code(CodeAdded(code=stored), lambda added, error: ready.append(error))
    for part in code_parts(asked[0], stored):
        assert isinstance(part, Part)
        artefacts.take(part)
    assert [(one.what, one.name) for one in damaged] == [("code", CODE.code_id)]
    assert "model.onnx: found other content" in ready[0]
    assert away.code(CODE.code_id) is None


def test_python_models_are_not_sent_to_other_machines(away: Cache) -> None:
    asked: list[Fetch] = []
    told: list[str] = []
    code = structs.replace(CODE, backend="python")
    MachineArtefacts(away, asked.append).code(CodeAdded(code=code), lambda added, error: told.append(error))
    assert told[0].startswith("Python models run on the server's own machine only")
    assert not asked


def test_what_is_damaged_in_a_far_cache_is_fetched_again(home: Cache, away: Cache) -> None:
    there = weights(home)
    server = Server(home)
    artefacts = MachineArtefacts(away, server.asked.append)
    model = structs.replace(MODEL, weights=there)
    home.save_code(CODE, {"index.json": b"{}"})
    away.save_weights(BLOB)
    here = away.weights_path(there.weights_id)
    here.write_bytes(bytes(len(BLOB)))
    artefacts.damaged(ArtefactDamaged(what="weights", name=there.weights_id))
    gone: list[Load] = []
    assert not artefacts.load(structs.replace(load(1, "a", 0), weights=there), gone.append)
    server.answer(artefacts, server.asked[0], model)
    assert gone[0].weights.path == str(here)
    assert here.read_bytes() == BLOB


def test_a_python_model_is_not_sent(home: Cache) -> None:
    asked = Fetch(what="code", name="p")
    (part,) = code_parts(asked, structs.replace(CODE, backend="python", path="/"))
    assert isinstance(part, Part)
    assert "is a program" in part.error


class Server:
    """Where a far worker's questions go; answers are given when the test says so."""

    def __init__(self, home: Cache) -> None:
        self.home = home
        self.asked: list[Fetch] = []

    def answer(self, artefacts: MachineArtefacts, asked: Fetch, model: Model) -> None:
        stored = self.home.code(CODE.code_id)
        assert stored is not None
        parts = code_parts(asked, stored) if asked.what == "code" else weights_parts(asked, model.weights)
        for part in parts:
            assert isinstance(part, Part)
            artefacts.take(part)


def test_a_code_is_ready_once_it_and_the_weights_of_its_models_are_there(home: Cache, away: Cache) -> None:
    server = Server(home)
    artefacts = MachineArtefacts(away, server.asked.append)
    model = structs.replace(MODEL, weights=weights(home))
    stored = home.save_code(CODE, {"index.json": b"{}"})
    ready: list[tuple[str, str]] = []
    artefacts.add_model(model)
    artefacts.code(CodeAdded(code=stored), lambda added, error: ready.append((added.code.path, error)))
    assert sorted(asked.what for asked in server.asked) == ["code", "weights"]
    for asked in list(server.asked):
        assert not ready
        server.answer(artefacts, asked, model)
    assert ready == [(str(away.root / "codes" / CODE.code_id), "")]

    gone: list[Load] = []
    assert artefacts.load(structs.replace(load(1, "a", 0), weights=model.weights), gone.append)
    assert gone[0].weights.path == str(away.weights_path(model.weights.weights_id))
    assert len(server.asked) == 2, "nothing is asked for twice"


def test_in_a_cache_that_cannot_be_written_what_is_there_is_ready_and_the_rest_says_why(
    home: Cache, away: Cache
) -> None:
    server = Server(home)
    model = structs.replace(MODEL, weights=weights(home))
    stored = home.save_code(CODE, {"index.json": b"{}"})
    for filled in (False, True):
        if filled:
            away.save_weights(BLOB)
            away.save_code(CODE, {"index.json": b"{}"})
        artefacts = MachineArtefacts(away, server.asked.append)
        ready: list[str] = []
        away.read_only = "Read-only file system"
        artefacts.add_model(model)
        artefacts.code(CodeAdded(code=stored), lambda _, error, ready=ready: ready.append(error))
        for asked in list(server.asked):
            server.answer(artefacts, asked, model)
        away.read_only = ""
        (error,) = ready
        assert (error == "") is filled
        assert filled or "cache_dir: expected the model in the cache, or a cache that can be written" in error
        server.asked.clear()


def test_so_many_at_once_and_none_after_the_link_is_lost(home: Cache, away: Cache) -> None:
    server = Server(home)
    artefacts = MachineArtefacts(away, server.asked.append)
    for index in range(10):
        named = Weights(weights_id=f"w{index}", path=f"/x/w{index}.bin", size=1)
        artefacts.add_model(structs.replace(MODEL, key=f"m/{index}", weights=named))
    assert len(server.asked) == AT_ONCE
    artefacts.take(Part(what="weights", name=server.asked[0].name, last=True, error="no"))
    assert len(server.asked) == AT_ONCE + 1
    artefacts.forget()
    artefacts.take(Part(what="weights", name=server.asked[1].name, last=True, error="no"))
    assert len(server.asked) == AT_ONCE + 1


# A worker that has the shared store.


async def test_what_is_in_the_shared_store_is_taken_from_there_and_only_the_rest_is_asked_for(
    tmp_path: Path,
) -> None:
    (tmp_path / "store").mkdir()
    place = str(tmp_path / "store")
    with Cache(tmp_path / "builder", store=place) as builder:
        there = weights(builder)
        builder.save_code(CODE, {"index.json": b"{}"})
    asked: list[Fetch] = []
    cache, store = Cache(tmp_path / "away"), Cache(tmp_path / "away", store=place)
    artefacts = MachineArtefacts(cache, asked.append, store=store)
    model = structs.replace(MODEL, code_id=CODE.code_id, weights=there)
    artefacts.add_model(model)
    coded: list[tuple[str, str]] = []
    artefacts.code(CodeAdded(code=CODE), lambda added, error: coded.append((added.code.path, error)))
    await until(lambda: coded)
    ((path, error),) = coded
    assert (Path(path).parent.parent, error) == (cache.root, "")
    assert cache.weights_path(there.weights_id).read_bytes() == BLOB
    other = structs.replace(there, weights_id="f" * 64, path=f"/x/{'f' * 64}.bin")
    artefacts.add_model(structs.replace(model, name="other", weights=other))
    await until(lambda: asked)
    assert asked == [Fetch(what="weights", name="f" * 64)]
    artefacts.close()

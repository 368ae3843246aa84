"""Artefacts of far workers: taken from the shared store, and looked for again where they are missing."""

from __future__ import annotations

import asyncio
import shutil
from pathlib import Path

import pytest
from msgspec import structs

from clockwork_serve.messages import ArtefactDamaged, Code, CodeAdded, Load, Model, Weights
from clockwork_serve.serve.remote import artefacts as far
from clockwork_serve.serve.remote.artefacts import MachineArtefacts
from clockwork_serve.store import Cache
from tests.serve.links import until
from tests.serve.remote.bridges import MODEL
from tests.worker.actions import CODE, load

BLOB = bytes(range(256)) * 2000
FILES = {"model.onnx": b"a graph", "index.json": b"{}"}


class Place:
    """A store, and a far worker's cache before it."""

    def __init__(self, folder: Path) -> None:
        self.store = folder / "store"
        self.store.mkdir()
        self.builder = Cache(folder / "builder", store=str(self.store))
        self.cache = Cache(folder / "away", reads_weights=False, store=str(self.store))
        self.found: list[tuple[str, str]] = []
        self.artefacts = MachineArtefacts(self.cache, found=lambda *found: self.found.append(found))
        self.coded: list[tuple[Code, str]] = []

    def fill(self) -> Model:
        """Have a code and weights in the store; the model that has both."""
        self.builder.save_code(CODE, FILES)
        weights_id = self.builder.save_weights(BLOB)
        there = Weights(weights_id=weights_id, path=f"/on/the/server/{weights_id}.bin", size=len(BLOB))
        return structs.replace(MODEL, code_id=CODE.code_id, weights=there)

    def add(self, model: Model, code: Code = CODE) -> None:
        self.artefacts.add_model(model)
        self.artefacts.add_code(CodeAdded(code=code), lambda added, why: self.coded.append((added.code, why)))


@pytest.fixture
async def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Place:
    monkeypatch.setattr(far, "AGAIN_S", 0.05)
    return Place(tmp_path)


async def test_a_code_is_ready_once_it_and_the_weights_of_its_models_are_there(place: Place) -> None:
    model = place.fill()
    place.add(model)
    await until(lambda: place.coded)
    ((code, why),) = place.coded
    assert (Path(code.path).parent.parent, why) == (place.cache.root, "")
    assert (Path(code.path) / "model.onnx").read_bytes() == FILES["model.onnx"]
    assert place.cache.weights_path(model.weights.weights_id).read_bytes() == BLOB
    gone: list[tuple[Load, str]] = []
    action = structs.replace(load(1, "a", 0), weights=model.weights)
    assert place.artefacts.load(action, lambda *loaded: gone.append(loaded))
    assert gone[0][0].weights.path == str(place.cache.weights_path(model.weights.weights_id))


async def test_what_is_missing_is_said_once_and_taken_when_somebody_has_stored_it(place: Place) -> None:
    model = structs.replace(MODEL, code_id=CODE.code_id)
    place.add(model)
    await until(lambda: place.coded)
    await asyncio.sleep(0.3)
    ((_, why),) = place.coded
    assert f"store: expected it in {place.store}" in why
    assert "clockwork profile REPO --store STORE" in why
    place.fill()
    await until(lambda: len(place.coded) == 2)
    assert place.coded[1][1] == ""


async def test_a_store_that_came_back_is_read_again(place: Place, tmp_path: Path) -> None:
    model = place.fill()
    place.store.rename(tmp_path / "unmounted")
    place.add(model)
    await until(lambda: place.coded)
    assert "there is no such folder" in place.coded[0][1]
    (tmp_path / "unmounted").rename(place.store)
    await until(lambda: len(place.coded) == 2)
    assert place.coded[1][1] == ""
    await until(lambda: place.cache.weights_path(model.weights.weights_id).exists())


async def test_nothing_is_looked_for_again_after_the_link_is_lost_or_the_code_is_removed(
    place: Place,
) -> None:
    for end in (place.artefacts.forget, lambda: place.artefacts.remove_code(CODE.code_id)):
        place.coded.clear()
        place.add(structs.replace(MODEL, code_id=CODE.code_id))
        await until(lambda: place.coded)
        end()
        if end == place.artefacts.forget:
            assert not place.artefacts._again
    place.fill()
    await asyncio.sleep(0.3)
    assert len(place.coded) == 1


async def test_python_models_are_said_to_be_in_no_store(place: Place) -> None:
    place.add(MODEL, structs.replace(CODE, backend="python"))
    assert place.coded[0][1].startswith("Python models run on the server's own machine only")


async def test_what_is_damaged_in_a_far_cache_is_taken_again(place: Place) -> None:
    model = place.fill()
    place.add(model)
    await until(lambda: place.coded)
    here = place.cache.weights_path(model.weights.weights_id)
    here.write_bytes(bytes(len(BLOB)))
    place.artefacts.damaged(ArtefactDamaged(what="weights", name=model.weights.weights_id))
    gone: list[tuple[Load, str]] = []
    action = structs.replace(load(1, "a", 0), weights=model.weights)
    place.artefacts.load(action, lambda *loaded: gone.append(loaded))
    await until(lambda: gone)
    assert (here.read_bytes(), gone[0][1]) == (BLOB, "")
    weights_id = model.weights.weights_id
    assert place.found == [(weights_id, f"{here} is damaged, and is taken again"), (weights_id, "")]


@pytest.mark.parametrize("lacks", ["no file", "another file"])
async def test_weights_that_no_store_has_are_named_once_and_their_load_fails_until_they_are_there(
    place: Place, lacks: str, caplog: pytest.LogCaptureFixture
) -> None:
    model = place.fill()
    weights_id = model.weights.weights_id
    there = place.store / "objects" / weights_id[:2] / weights_id
    there.rename(place.store / "away")
    if lacks == "another file":
        there.write_bytes(bytes(len(BLOB)))
    place.add(model)
    await until(lambda: place.coded)
    assert place.coded[0][1] == "", "other models may have the code"
    gone: list[str] = []
    action = structs.replace(load(1, "a", 0), weights=model.weights)
    place.artefacts.load(action, lambda action, why: gone.append(why))
    await until(lambda: gone and not place.artefacts._taking)
    await asyncio.sleep(0.3)
    ((of, why),) = set(place.found)
    assert (of, gone) == (weights_id, [why])
    assert f"expected a valid objects/{weights_id[:2]}/{weights_id} in {place.store}" in why
    assert "clockwork profile REPO --store STORE --cache EMPTY_FOLDER" in why
    said = [record.getMessage() for record in caplog.records if record.name == far.__name__]
    assert said == [f"this worker does not serve {model.key}: weights {weights_id}: {why}"]
    (place.store / "away").replace(there)
    await until(lambda: place.found[-1] == (weights_id, ""))
    place.artefacts.load(action, lambda action, why: gone.append(why))
    assert gone[1:] == [""]


async def test_a_cache_that_cannot_be_written_serves_what_is_there_and_the_rest_says_why(
    place: Place,
) -> None:
    model = place.fill()
    place.cache.read_only = "Read-only file system"
    place.add(model)
    await until(lambda: place.coded)
    assert "cache_dir: expected the model in the cache, or a cache that can be written" in place.coded[0][1]
    place.artefacts.forget()
    place.cache.read_only = ""
    shutil.copytree(place.builder.root / "codes", place.cache.root / "codes", dirs_exist_ok=True)
    shutil.copytree(place.builder.root / "weights", place.cache.root / "weights", dirs_exist_ok=True)
    place.cache.read_only = "Read-only file system"
    place.add(model)
    await until(lambda: len(place.coded) == 2)
    assert place.coded[1][1] == ""


async def test_few_are_taken_at_a_time(place: Place) -> None:

    for index in range(10):
        named = Weights(weights_id=f"w{index}", path=f"/x/w{index}.bin", size=1)
        place.artefacts.add_model(structs.replace(MODEL, key=f"m/{index}", weights=named))
    assert len(place.artefacts._taking) == far.AT_ONCE
    place.artefacts.forget()
    assert len(place.artefacts._taking) == 0

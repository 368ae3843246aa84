"""The catalogue sends the controller what changed; damaged artefacts in it are made again."""

from __future__ import annotations

import asyncio

from clockwork_serve.errors import RepositoryError
from clockwork_serve.messages import (
    ArtefactDamaged,
    CodeAdded,
    CodeRemade,
    CodeRemoved,
    DamageCounted,
    Frame,
    ModelAdded,
    ModelRemoved,
    Profile,
)
from clockwork_serve.serve.supervisor.catalogue import Catalogue, Repairs
from clockwork_serve.serve.supervisor.preparation import PreparedRepository, SuspectArtefact
from clockwork_serve.store import Damage, Problem, ServedVersion
from harness import records
from tests.serve.supervisor.catalogues import prepared, profile, put, served

# The catalogue sends the controller what changed, new versions before old ones are removed.


def problem(name: str, version: str = "") -> Problem:
    return Problem(model=name, version=version, field="file", expected="one", found="none", advice="add it")


def added(each: ServedVersion, *profiles: Profile) -> CodeAdded:
    return CodeAdded(code=each.code, profiles=profiles)


def test_codes_come_before_models_and_each_once() -> None:
    catalogue = Catalogue()
    a, b = served("a/1"), served("b/1")
    frames = put(catalogue, ["a", "b"], [a, b], [profile(), profile("other")], [])
    assert frames == [added(a, profile()), ModelAdded(model=a.model), ModelAdded(model=b.model)]
    assert catalogue.frames() == frames
    assert put(catalogue, ["a", "b"], [a, b], [profile()], []) == []


def test_a_new_version_is_added_before_the_old_one_is_removed() -> None:
    catalogue = Catalogue()
    old, new = served("a/1"), served("a/2", "c2")
    put(catalogue, ["a", "b"], [old, served("b/1", "c3")], [profile()], [])
    assert put(catalogue, ["a"], [new], [profile("c2")], []) == [
        added(new, profile("c2")),
        ModelAdded(model=new.model),
        ModelRemoved(model="a/1"),
        CodeRemoved(code_id="c1"),
    ]
    assert [model.key for model in catalogue.models] == ["a/2", "b/1"]


def test_a_model_changed_in_place_is_sent_again() -> None:
    catalogue = Catalogue()
    put(catalogue, ["a"], [served("a/1")], [profile()], [])
    changed = served("a/1", priority=3)
    assert put(catalogue, ["a"], [changed], [], []) == [ModelAdded(model=changed.model)]


def test_new_profiles_are_sent_and_old_ones_kept_if_there_are_none() -> None:
    catalogue = Catalogue()
    a = served("a/1")
    put(catalogue, ["a"], [a], [profile()], [])
    assert put(catalogue, ["a"], [a], [], []) == []
    assert put(catalogue, ["a"], [a], [profile(infer_ns=9)], []) == [added(a, profile(infer_ns=9))]


def test_profiles_that_were_measured_again_replace_those_of_their_kind_of_device() -> None:
    catalogue = Catalogue()
    a = served("a/1")
    other = records.profile("c1", {1: 7}, load_ns=1, device_kind="gpu", load_ns_per_mib=1)
    put(catalogue, ["a"], [a], [profile(), other], [])
    again = added(a, other, profile(infer_ns=9))
    assert catalogue.refine([profile(infer_ns=9), profile("gone")]) == [again]
    assert catalogue.frames() == [again, ModelAdded(model=a.model)]


def test_the_index_names_models_that_are_being_prepared() -> None:
    catalogue = Catalogue()
    put(catalogue, ["a"], [served("a/1")], [profile()], [])
    put(catalogue, ["d"], [served("d/2")], [], [])
    index = catalogue.index(["a", "b", "c", "d"], waiting={"b": 0, "d": 0, "gone": 0})
    assert [(entry.name, entry.state, entry.reason) for entry in index] == [
        ("a", "READY", ""), ("b", "LOADING", "it is being prepared"), ("c", "", ""),
        ("d", "LOADING", "it is being prepared"),
    ]  # fmt: skip


def test_a_code_stays_while_any_model_uses_it() -> None:
    catalogue = Catalogue()
    put(catalogue, ["a", "b"], [served("a/1"), served("a/2"), served("b/1")], [], [])
    assert catalogue.remove("a") == [ModelRemoved(model="a/1"), ModelRemoved(model="a/2")]
    assert catalogue.remove("a") == []
    assert catalogue.remove("b") == [ModelRemoved(model="b/1"), CodeRemoved(code_id="c1")]
    assert catalogue.frames() == []


def test_the_index_lists_what_is_served_what_is_not_and_why() -> None:
    catalogue = Catalogue()
    put(
        catalogue,
        ["a", "b", "c"],
        [served("a/1"), served("b/10"), served("b/9")],
        [],
        [problem("c"), problem("b", "11")],
    )
    catalogue.remove("a")
    index = [(each.name, each.version, each.state) for each in catalogue.index(["a", "b", "c", "d"])]
    assert index == [
        ("a", "1", "UNAVAILABLE"), ("b", "9", "READY"), ("b", "10", "READY"), ("b", "11", "UNAVAILABLE"),
        ("c", "", "UNAVAILABLE"), ("d", "", ""),
    ]  # fmt: skip
    reasons = {each.name: each.reason for each in catalogue.index([])}
    assert reasons["a"] == "unloaded"
    assert reasons["c"] == "model 'c': file: expected one, found none; add it"


def test_a_model_loaded_again_has_no_old_problem() -> None:
    catalogue = Catalogue()
    put(catalogue, ["a"], [], [], [problem("a")])
    put(catalogue, ["a"], [served("a/1")], [], [])
    catalogue.remove("a")
    put(catalogue, ["a"], [served("a/1")], [], [])
    assert [(each.state, each.reason) for each in catalogue.index([])] == [("READY", "")]


def test_codes_are_sent_first_and_removed_if_no_model_uses_them() -> None:
    catalogue = Catalogue()
    old, new = served("a/1"), served("a/2", "c2")
    put(catalogue, ["a"], [old], [profile()], [])
    before = catalogue.frames()
    codes = catalogue.codes(prepared([], [new], [profile("c2")], []))
    assert codes == [added(new, profile("c2"))]
    assert catalogue.frames() == before
    assert catalogue.unused([*codes, added(old, profile())]) == [CodeRemoved(code_id="c2")]


def test_deferred_removals_of_what_was_added_again_are_dropped() -> None:
    catalogue = Catalogue()
    put(catalogue, ["a", "b"], [served("a/1"), served("b/1", "c2")], [], [])
    gone = [frame for frame in catalogue.remove("a") if isinstance(frame, ModelRemoved | CodeRemoved)]
    assert catalogue.still_removed(gone) == gone == [ModelRemoved(model="a/1"), CodeRemoved(code_id="c1")]
    put(catalogue, ["d"], [served("d/1")], [], [])
    assert catalogue.still_removed(gone) == [ModelRemoved(model="a/1")]
    put(catalogue, ["a"], [served("a/1")], [], [])
    assert catalogue.still_removed(gone) == []


# Artefacts that workers report as damaged are verified and rebuilt, once for all reports.


A = served("a/1")
DAMAGED = ArtefactDamaged(what="code", name=A.code.code_id)
FOUND = (Damage("code", A.code.code_id, "other content"),)


class World:
    """Stands for the supervisor: prepares models, and remembers the arguments."""

    def __init__(self) -> None:
        self.catalogue = Catalogue()
        put(self.catalogue, ["a"], [A], [], [])
        self.sent: list[Frame] = []
        self.asked: list[tuple[tuple[str, ...], tuple[SuspectArtefact, ...]]] = []
        self.answers: list[PreparedRepository | Exception] = []
        self.repairs = Repairs(
            self.catalogue, self._prepare, lambda *frames: self.sent.extend(frames),
            lambda prepared: self.repairs.count(prepared.damage),
        )  # fmt: skip

    async def _prepare(
        self, names: tuple[str, ...], suspects: tuple[SuspectArtefact, ...]
    ) -> PreparedRepository:
        self.asked.append((names, suspects))
        await asyncio.sleep(0)
        answer = self.answers.pop(0)
        if isinstance(answer, Exception):
            raise answer
        return answer

    async def done(self) -> None:
        while self.repairs._running is not None:
            await asyncio.sleep(0.001)


async def test_a_code_is_rebuilt_once_and_sent_again() -> None:
    supervisor = World()
    supervisor.answers.append(
        PreparedRepository(names=("a",), served=(A,), profiles=(), problems=(), damage=FOUND)
    )
    for _ in range(3):
        supervisor.repairs.on_damaged(DAMAGED)
    await supervisor.done()
    assert supervisor.asked == [(("a",), (SuspectArtefact("code", A.code.code_id),))]
    counted = DamageCounted(found={"code": 1}, remade=1)
    assert supervisor.sent == [CodeRemade(code_id=A.code.code_id), counted]
    assert supervisor.repairs.counted == counted


async def test_a_model_that_cannot_be_rebuilt_is_served_no_more_and_named() -> None:
    supervisor = World()
    gone = Problem(model="a", field="name", expected="a folder", found="none", advice="see")
    supervisor.answers.append(
        PreparedRepository(names=("a",), served=(), profiles=(), problems=(gone,), damage=FOUND)
    )
    supervisor.repairs.on_damaged(DAMAGED)
    await supervisor.done()
    assert ModelRemoved(model="a/1") in supervisor.sent
    assert CodeRemoved(code_id=A.code.code_id) in supervisor.sent
    assert supervisor.repairs.counted.lost == 1
    (entry,) = supervisor.catalogue.index(["a"])
    assert (entry.state, entry.reason) == ("UNAVAILABLE", str(gone))


async def test_a_model_that_was_unloaded_meanwhile_stays_unloaded() -> None:
    supervisor = World()
    supervisor.answers.append(PreparedRepository(names=("a",), served=(A,), profiles=(), problems=()))
    supervisor.repairs.on_damaged(DAMAGED)
    await asyncio.sleep(0)
    supervisor.catalogue.remove("a")
    await supervisor.done()
    assert supervisor.catalogue.names() == set()


async def test_a_failed_repair_is_retried_after_a_delay_at_the_next_report() -> None:
    supervisor = World()
    supervisor.answers += [
        RepositoryError("the compiler is not there"),
        PreparedRepository(names=("a",), served=(A,), profiles=(), problems=(), damage=FOUND),
    ]
    supervisor.repairs.on_damaged(DAMAGED)
    await supervisor.done()
    assert supervisor.sent == []
    supervisor.repairs.on_damaged(DAMAGED)
    suspect = SuspectArtefact("code", A.code.code_id)
    assert 0 < supervisor.repairs._backoff_s(suspect, supervisor.repairs._repaired_s[suspect][1]) <= 1
    await supervisor.done()
    assert len(supervisor.asked) == 2
    assert supervisor.catalogue.names() == {"a"}

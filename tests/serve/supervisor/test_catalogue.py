"""The catalogue sends the controller what changed, new versions before old ones are removed."""

from __future__ import annotations

from clockwork_serve.messages import (
    CodeAdded,
    CodeRemoved,
    ModelAdded,
    ModelRemoved,
    Profile,
)
from clockwork_serve.serve.supervisor.preparation import Catalogue
from clockwork_serve.store import Problem, ServedVersion
from tests.serve.supervisor.catalogues import profile, served


def problem(name: str, version: str = "") -> Problem:
    return Problem(model=name, version=version, field="file", expected="one", found="none", advice="add it")


def added(each: ServedVersion, *profiles: Profile) -> CodeAdded:
    return CodeAdded(code=each.code, profiles=profiles)


def test_codes_come_before_models_and_each_once() -> None:
    catalogue = Catalogue()
    a, b = served("a/1"), served("b/1")
    frames = catalogue.put(["a", "b"], [a, b], [profile(), profile("other")], [])
    assert frames == [added(a, profile()), ModelAdded(model=a.model), ModelAdded(model=b.model)]
    assert catalogue.frames() == frames
    assert catalogue.put(["a", "b"], [a, b], [profile()], []) == []


def test_a_new_version_is_added_before_the_old_one_is_removed() -> None:
    catalogue = Catalogue()
    old, new = served("a/1"), served("a/2", "c2")
    catalogue.put(["a", "b"], [old, served("b/1", "c3")], [profile()], [])
    assert catalogue.put(["a"], [new], [profile("c2")], []) == [
        added(new, profile("c2")),
        ModelAdded(model=new.model),
        ModelRemoved(model="a/1"),
        CodeRemoved(code_id="c1"),
    ]
    assert [model.key for model in catalogue.models] == ["a/2", "b/1"]


def test_a_model_changed_in_place_is_sent_again() -> None:
    catalogue = Catalogue()
    catalogue.put(["a"], [served("a/1")], [profile()], [])
    changed = served("a/1", priority=3)
    assert catalogue.put(["a"], [changed], [], []) == [ModelAdded(model=changed.model)]


def test_new_profiles_are_sent_and_old_ones_kept_if_there_are_none() -> None:
    catalogue = Catalogue()
    a = served("a/1")
    catalogue.put(["a"], [a], [profile()], [])
    assert catalogue.put(["a"], [a], [], []) == []
    assert catalogue.put(["a"], [a], [profile(infer_ns=9)], []) == [added(a, profile(infer_ns=9))]


def test_a_code_stays_while_any_model_uses_it() -> None:
    catalogue = Catalogue()
    catalogue.put(["a", "b"], [served("a/1"), served("a/2"), served("b/1")], [], [])
    assert catalogue.remove("a") == [ModelRemoved(model="a/1"), ModelRemoved(model="a/2")]
    assert catalogue.remove("a") == []
    assert catalogue.remove("b") == [ModelRemoved(model="b/1"), CodeRemoved(code_id="c1")]
    assert catalogue.frames() == []


def test_the_index_lists_what_is_served_what_is_not_and_why() -> None:
    catalogue = Catalogue()
    catalogue.put(
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
    catalogue.put(["a"], [], [], [problem("a")])
    catalogue.put(["a"], [served("a/1")], [], [])
    catalogue.remove("a")
    catalogue.put(["a"], [served("a/1")], [], [])
    assert [(each.state, each.reason) for each in catalogue.index([])] == [("READY", "")]


def test_codes_are_sent_first_and_removed_if_no_model_uses_them() -> None:
    catalogue = Catalogue()
    old, new = served("a/1"), served("a/2", "c2")
    catalogue.put(["a"], [old], [profile()], [])
    before = catalogue.frames()
    codes = catalogue.codes([new], [profile("c2")])
    assert codes == [added(new, profile("c2"))]
    assert catalogue.frames() == before
    assert catalogue.unused([*codes, added(old, profile())]) == [CodeRemoved(code_id="c2")]


def test_deferred_removals_of_what_was_added_again_are_dropped() -> None:
    catalogue = Catalogue()
    catalogue.put(["a", "b"], [served("a/1"), served("b/1", "c2")], [], [])
    gone = [frame for frame in catalogue.remove("a") if isinstance(frame, ModelRemoved | CodeRemoved)]
    assert catalogue.still_removed(gone) == gone == [ModelRemoved(model="a/1"), CodeRemoved(code_id="c1")]
    catalogue.put(["d"], [served("d/1")], [], [])
    assert catalogue.still_removed(gone) == [ModelRemoved(model="a/1")]
    catalogue.put(["a"], [served("a/1")], [], [])
    assert catalogue.still_removed(gone) == []

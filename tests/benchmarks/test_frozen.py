"""The frozen proof: what is decided otherwise is found, and where."""

from __future__ import annotations

import msgspec
import pytest

from benchmarks.frozen import KEPT, Frozen, conclude, journal_hash, recorded, seed_hash
from harness.report import Outcome


def judged(found: Frozen, wanted: Frozen) -> list[tuple[str, bool]]:
    outcome = Outcome("frozen")
    conclude(found, wanted, outcome)
    return [(one.found, one.good) for one in outcome.verdicts]


def test_a_seed_has_one_hash_and_another_seed_another():
    assert seed_hash(3) == seed_hash(3)
    assert seed_hash(3) != seed_hash(4)


def test_a_block_that_differs_is_named_by_its_seeds():
    wanted = Frozen(blocks=["a", "b", "c"])
    assert judged(Frozen(blocks=["a", "b"]), wanted) == [("all", True)]
    assert judged(Frozen(blocks=["a", "x"]), wanted) == [("not 100..199 (1 blocks)", False)]
    assert judged(Frozen(blocks=["a", "b", "c", "d"]), wanted) == [("all", False)], "nothing is kept of it"


def test_a_journal_must_be_decided_again_and_have_the_effects_that_are_kept():
    kept = Frozen(journals={"one": "h"})
    assert judged(Frozen(journals={"one": "h", "new": "k"}), kept)[1:] == [("agrees", True)] * 2
    assert judged(Frozen(journals={"one": ""}), kept)[1:] == [("differs", False)]
    assert judged(Frozen(journals={"one": "x"}), kept)[1:] == [("has other effects", False)]


@pytest.mark.parametrize("name", ["controller_killed", "worker_killed"])
def test_journals_of_real_servers_are_kept_and_can_be_replayed(name: str):
    paths = {path.stem: path for path in recorded()}
    kept = msgspec.json.decode(KEPT.read_bytes(), type=Frozen)
    assert paths.keys() == kept.journals.keys()
    assert len(journal_hash(paths[name])) == 64


def test_what_is_kept_is_of_this_version():
    kept = msgspec.json.decode(KEPT.read_bytes(), type=Frozen)
    assert seed_hash(0).hex() == kept.first, (
        "explain it, and keep what is found: python -m benchmarks.frozen --keep"
    )

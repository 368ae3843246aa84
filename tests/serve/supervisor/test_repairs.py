"""Artefacts that workers report as damaged are verified and rebuilt, once for all reports."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from typing import Any

from clockwork_serve.errors import RepositoryError
from clockwork_serve.messages import (
    ArtefactDamaged,
    CodeRemade,
    CodeRemoved,
    DamageCounted,
    Frame,
    ModelRemoved,
)
from clockwork_serve.serve.supervisor.preparation import (
    Catalogue,
    PreparedRepository,
    Repairs,
    SuspectArtefact,
)
from clockwork_serve.store import Damage, Problem
from tests.serve.supervisor.catalogues import served

A = served("a/1")
DAMAGED = ArtefactDamaged(what="code", name=A.code.code_id)
FOUND = (Damage("code", A.code.code_id, "other content"),)


class Keeper:
    """Stands for the supervisor: prepares models, and remembers the arguments."""

    def __init__(self) -> None:
        self.catalogue = Catalogue()
        self.catalogue.put(["a"], [A], [], [])
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


def play(story: Coroutine[Any, Any, None]) -> None:
    asyncio.run(asyncio.wait_for(story, 30))


def test_a_code_is_rebuilt_once_and_sent_again() -> None:
    async def story() -> None:
        keeper = Keeper()
        keeper.answers.append(
            PreparedRepository(names=("a",), served=(A,), profiles=(), problems=(), damage=FOUND)
        )
        for _ in range(3):
            keeper.repairs.on_damaged(DAMAGED)
        await keeper.done()
        assert keeper.asked == [(("a",), (SuspectArtefact("code", A.code.code_id),))]
        counted = DamageCounted(found={"code": 1}, remade=1)
        assert keeper.sent == [CodeRemade(code_id=A.code.code_id), counted]
        assert keeper.repairs.counted == counted

    play(story())


def test_a_model_that_cannot_be_rebuilt_is_served_no_more_and_named() -> None:
    async def story() -> None:
        keeper = Keeper()
        gone = Problem(model="a", field="name", expected="a folder", found="none", advice="see")
        keeper.answers.append(
            PreparedRepository(names=("a",), served=(), profiles=(), problems=(gone,), damage=FOUND)
        )
        keeper.repairs.on_damaged(DAMAGED)
        await keeper.done()
        assert ModelRemoved(model="a/1") in keeper.sent
        assert CodeRemoved(code_id=A.code.code_id) in keeper.sent
        assert keeper.repairs.counted.lost == 1
        (entry,) = keeper.catalogue.index(["a"])
        assert (entry.state, entry.reason) == ("UNAVAILABLE", str(gone))

    play(story())


def test_a_model_that_was_unloaded_meanwhile_stays_unloaded() -> None:
    async def story() -> None:
        keeper = Keeper()
        keeper.answers.append(PreparedRepository(names=("a",), served=(A,), profiles=(), problems=()))
        keeper.repairs.on_damaged(DAMAGED)
        await asyncio.sleep(0)
        keeper.catalogue.remove("a")
        await keeper.done()
        assert keeper.catalogue.names() == set()

    play(story())


def test_a_failed_repair_is_retried_after_a_delay_at_the_next_report() -> None:
    async def story() -> None:
        keeper = Keeper()
        keeper.answers += [
            RepositoryError("the compiler is not there"),
            PreparedRepository(names=("a",), served=(A,), profiles=(), problems=(), damage=FOUND),
        ]
        keeper.repairs.on_damaged(DAMAGED)
        await keeper.done()
        assert keeper.sent == []
        keeper.repairs.on_damaged(DAMAGED)
        suspect = SuspectArtefact("code", A.code.code_id)
        assert 0 < keeper.repairs._backoff_s(suspect, keeper.repairs._repaired_s[suspect][1]) <= 1
        await keeper.done()
        assert len(keeper.asked) == 2
        assert keeper.catalogue.names() == {"a"}

    play(story())

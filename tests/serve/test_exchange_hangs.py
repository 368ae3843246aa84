"""The controller's links and workers that hang: beats go out and back, and the keeper hears whom to end."""

from __future__ import annotations

from pathlib import Path

import pytest

from clockwork_serve.messages import Beat, Readiness, WorkerHung
from tests.serve.test_exchange import World, play, until


def test_a_worker_is_sent_beats_and_may_return_them(tmp_path: Path) -> None:
    async def story(world: World) -> None:
        await world.keeper()
        worker = await world.worker("w", "d")
        await until(lambda: Beat() in worker.frames)
        worker.send(Beat())
        await until(lambda: worker.frames.count(Beat()) > 1)
        assert not worker.is_lost

    play(tmp_path, story)


def test_the_keeper_alone_hears_of_a_worker_to_end_and_the_log_of_all(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    end = WorkerHung(worker="w", why="it is late", end=True)

    async def story(world: World) -> None:
        keeper = await world.keeper()
        worker = await world.worker("w", "d")
        for effect in (WorkerHung(worker="w", why="it is late"), end, WorkerHung(worker="w")):
            world.exchange.perform(effect)
        world.exchange.perform(Readiness(ready=True))
        await until(lambda: Readiness(ready=True) in keeper.frames)
        assert [one for one in keeper.frames if isinstance(one, WorkerHung)] == [end]
        assert not [one for one in worker.frames if isinstance(one, WorkerHung)]

    play(tmp_path, story)
    said = [record.message for record in caplog.records if record.message.startswith("w ")]
    assert said == [
        "w hung: it is late; nothing is planned on it",
        "w is ended: it is late",
        "w answers again",
    ]

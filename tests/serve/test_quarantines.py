"""Quarantine: from the controller's brain to workers, gateways and the supervisor."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from clockwork_serve.messages import (
    CodeRemoved,
    Quarantined,
    Readiness,
    ReleaseFromQuarantine,
    Role,
    Unservable,
    WorkerLost,
)
from clockwork_serve.serve.controller.hub import Hub
from clockwork_serve.serve.quarantines import Quarantines
from clockwork_serve.serve.supervisor.catalogue import Catalogue
from clockwork_serve.serve.supervisor.link import SupervisorLink
from tests.serve.controller.exchanges import World, a_world, code, model
from tests.serve.links import FakeController, until
from tests.serve.supervisor.catalogues import put, served

ALONE = Quarantined(model="m/1", why="it kills", since_ns=5)
WITH_CODE = Quarantined(model="m/1", why="it kills", since_ns=5, code_id="c1")
OVER = Quarantined(model="m/1")
UNFIT = Unservable(model="m/1", why="too large")


@pytest.fixture
async def world(tmp_path: Path) -> AsyncIterator[World]:
    async with a_world(tmp_path) as found:
        yield found


def test_a_reason_has_the_wall_clock_time() -> None:
    quarantines = Quarantines(clock=lambda: 60_000_000_005)
    quarantines.update(ALONE)
    since = time.strftime("%Y-%m-%d %H:%M", time.gmtime(time.time() - 60))
    assert quarantines.why("m/1").startswith(since)
    assert quarantines.why("m/1").endswith("Z: it kills")
    assert quarantines.why("m/2") == ""
    assert quarantines.reasons().keys() == {"m/1"}
    quarantines.update(OVER)
    assert (quarantines.reasons(), quarantines.frames()) == ({}, [])


def test_a_model_that_no_device_can_run_has_the_reason_and_no_time() -> None:
    quarantines = Quarantines()
    quarantines.update(UNFIT)
    assert (bool(quarantines), "m/1" in quarantines, quarantines.why("m/1")) == (True, True, "too large")
    assert (quarantines.reasons(), quarantines.frames(), quarantines.codes) == (
        {"m/1": "too large"},
        [UNFIT],
        set(),
    )
    quarantines.update(Unservable(model="m/1"))
    assert (bool(quarantines), quarantines.reasons(), quarantines.frames()) == (False, {}, [])


@pytest.mark.parametrize("held", [ALONE, UNFIT])
async def test_gateways_and_the_supervisor_are_notified_also_if_they_connect_later(
    world: World, held: Quarantined | Unservable
) -> None:
    supervisor = await world.supervisor(code(), model())
    gateway = await world.peer(Role.GATEWAY, "g")
    worker = await world.worker("w", "d")
    await until(lambda: gateway.of(Readiness) and worker.frames)
    world.decide(held)
    await until(lambda: gateway.of(type(held)) and supervisor.of(type(held)))
    late = await world.peer(Role.GATEWAY, "late")
    await until(lambda: late.of(Readiness))
    assert late.frames[:4] == [code(), model(), held, Readiness(ready=False, why="starting")]
    again = await world.peer(Role.SUPERVISOR, "keeper")
    await until(lambda: again.of(type(held)))
    assert worker.frames == [code(), model()], "its code goes on"
    over = type(held)(model="m/1")
    world.decide(over)
    await until(lambda: over in late.frames)


async def test_a_code_in_quarantine_is_removed_from_workers_and_sent_again_after(world: World) -> None:
    supervisor = await world.supervisor(code(), code("c2"), model())
    worker = await world.worker("w", "d")
    await until(lambda: len(worker.frames) == 3)
    world.decide(WITH_CODE)
    await until(lambda: worker.frames[3:] == [CodeRemoved(code_id="c1")])
    late = await world.worker("late", "d2")
    await until(lambda: late.frames == [code("c2"), model()])
    supervisor.send(ReleaseFromQuarantine(model="m"))
    await until(lambda: ReleaseFromQuarantine(model="m") in world.brain.seen)
    world.decide(OVER)
    await until(lambda: worker.frames[4:] == [code()] and late.frames[2:] == [code()])


async def test_the_brain_observes_a_worker_s_crash_report(tmp_path: Path) -> None:
    class Informed(World):
        def __init__(self, path: Path) -> None:
            super().__init__(path)
            self.exchange = Hub(
                self.brain,
                self.recorder,
                read_crash_report=lambda name, pid: WorkerLost(worker=name, running=(pid,)),
            )

    async with a_world(tmp_path, Informed) as world:
        await world.supervisor()
        worker = await world.worker("w", "d")
        await until(lambda: world.brain.seen)
        worker.link.close()
        await until(lambda: WorkerLost(worker="w", running=(worker.link.own.pid,)) in world.brain.seen)


async def test_the_supervisor_is_notified_once_each_and_forgets_it_with_the_controller(
    tmp_path: Path,
) -> None:
    path, told = tmp_path / "c.sock", list[Quarantined]()
    link = SupervisorLink(path, list)
    link.handlers[Quarantined] = told.append
    link.start()
    controller = FakeController()
    listener = await controller.listen(path)
    await asyncio.wait_for(link.connected.wait(), 60)
    controller.links[0].send(ALONE)
    await until(lambda: bool(link.quarantines.reasons()))
    controller.links[0].send(OVER)
    await until(lambda: not link.quarantines.reasons())
    controller.links[0].send(ALONE)
    await until(lambda: bool(link.quarantines.reasons()))
    listener.close()
    await until(lambda: not link.quarantines.reasons())
    assert told == [ALONE, OVER, ALONE]
    link.close()


def test_the_index_says_why() -> None:
    catalogue = Catalogue()
    put(catalogue, ["a", "b"], [served("a/1"), served("b/1")], [], [])
    found = catalogue.index([], {"a/1": "since then: it kills"})
    assert [(entry.name, entry.state, entry.reason) for entry in found] == [
        ("a", "UNAVAILABLE", "since then: it kills"),
        ("b", "READY", ""),
    ]

"""A request without the controller's answer is ended once, after the grace period; others are not."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from types import SimpleNamespace
from typing import Any

import pytest

from clockwork_serve.serve.gateway.controller_link import GRACE_NS
from clockwork_serve.serve.gateway.gateway import OverdueSweep
from clockwork_serve.units import ms


class World:
    """Requests by id, as a gateway keeps them; when they were ended, in ns after their deadlines."""

    def __init__(self) -> None:
        self.open: dict[str, Any] = {}
        self.ended: dict[str, list[int]] = {}
        self.awaiting = False
        self.looks = 0
        self.grace_ns = GRACE_NS
        self.overdue = OverdueSweep(
            time.monotonic_ns, lambda: self.open, self._end, self._sweep_awaiting_failover,
            lambda: self.grace_ns,
        )  # fmt: skip

    def ask(self, name: str, slo_ms: float, *, told: bool = False) -> None:
        due_ns = time.monotonic_ns() + ms(slo_ms)
        self.open[name] = SimpleNamespace(exchange=None if told else object(), deadline_ns=due_ns)
        self.overdue.watch()

    def _end(self, name: str, pending: Any) -> None:
        pending.exchange = None
        self.ended.setdefault(name, []).append(time.monotonic_ns() - pending.deadline_ns)

    def _sweep_awaiting_failover(self) -> bool:
        self.looks += 1
        return self.awaiting


@pytest.fixture
async def world() -> AsyncIterator[World]:
    found = World()
    yield found
    found.overdue.close()


async def test_each_request_is_ended_once_after_its_grace_period(world: World) -> None:
    world.ask("soon", 1)
    world.ask("later", 30)
    world.ask("told", 1, told=True)
    world.ask("far", 60_000)
    while len(world.ended) < 2:
        await asyncio.sleep(0.005)
    await asyncio.sleep(0.05)
    assert {name: len(after) for name, after in world.ended.items()} == {"soon": 1, "later": 1}
    assert all(after[0] >= GRACE_NS for after in world.ended.values())


async def test_answered_requests_are_not_ended(world: World) -> None:
    world.grace_ns = ms(2000)
    world.ask("a", 1)
    await asyncio.sleep(0.02)
    del world.open["a"]
    await asyncio.sleep(2.1)
    assert world.ended == {}


async def test_without_requests_there_is_no_sweep(world: World) -> None:
    world.ask("a", 60_000)
    del world.open["a"]
    await asyncio.sleep(0.1)
    assert world.looks == 1


async def test_requests_that_await_failover_are_swept(world: World) -> None:
    world.awaiting = True
    world.overdue.watch()
    while world.looks < 3:
        await asyncio.sleep(0.005)
    world.awaiting = False
    await asyncio.sleep(0.05)
    world.looks = 0
    await asyncio.sleep(0.1)
    assert world.looks == 0

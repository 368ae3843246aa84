"""Floods of connections that never become a link, from real sockets: machines join meanwhile."""

from __future__ import annotations

import asyncio
import time
from pathlib import Path

import pytest

from clockwork_serve.errors import TransportError
from clockwork_serve.serve.remote import link as machine_link
from tests.serve.flood import HELLO, flooded
from tests.serve.remote.bridges import Far, Middle, middle
from tests.timing import Timing

JOIN_S = 2.0
FLOOD_S = 1.0
"""In which the flood finds all places taken."""


async def joins(there: Middle, timing: Timing) -> None:
    for _ in range(3):
        began_s = time.monotonic()
        far = await there.joined()
        took_s = time.monotonic() - began_s
        with timing.judged():
            assert took_s < JOIN_S
        far.link.close()
        await asyncio.sleep(0.1)


@pytest.mark.parametrize("words", [b"", HELLO], ids=["silent", "half a hello"])
@pytest.mark.parametrize(("addresses", "connections"), [(10, 80), (60, 600)])
async def test_a_machine_joins_while_others_take_all_the_room(
    tmp_path: Path, timing: Timing, addresses: int, connections: int, words: bytes
) -> None:
    async with middle(tmp_path) as there:
        with flooded(there.port, addresses=addresses, connections=connections, words=words):
            await asyncio.sleep(FLOOD_S)
            await joins(there, timing)


async def test_a_machine_that_was_here_before_joins_although_others_come_from_more_networks_than_fit(
    tmp_path: Path, timing: Timing, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(machine_link, "SHAKING_MAX", 32)
    async with middle(tmp_path) as there:
        (await there.joined()).link.close()
        with flooded(there.port, addresses=100, connections=300):
            await asyncio.sleep(FLOOD_S)
            await joins(there, timing)


async def test_a_machine_that_was_not_is_let_in_at_last(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(machine_link, "SHAKING_MAX", 32)

    async def admitted(there: Middle) -> Far:
        while True:
            try:
                return await there.joined()
            except TransportError:  # the place that became free was another's
                await asyncio.sleep(0.005)

    async with middle(tmp_path) as there:
        with flooded(there.port, addresses=48, connections=48):
            await asyncio.sleep(FLOOD_S)
            await admitted(there)

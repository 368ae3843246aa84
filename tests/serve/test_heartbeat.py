"""Beats find a process that is stopped, and no process while the one that counts them is stopped itself."""

from __future__ import annotations

import asyncio
import time
from typing import Any, cast

import uvloop

from clockwork_serve.messages import Beat, Hello, Role, WorkerHeard, WorkerHung, WorkerSilent
from clockwork_serve.serve.flow_control import MISSED, PULSES_MISSED, Heartbeat, Pulse
from clockwork_serve.serve.transport import Link
from tests.serve.links import until

BEAT_S = 0.02


class FakeLink:
    """Keeps what was sent."""

    def __init__(self, name: str) -> None:
        self.peer = Hello(role=Role.WORKER, name=name, pid=1, boot_id="")
        self.sent: list[Any] = []

    def send(self, frame: Any) -> None:
        self.sent.append(frame)


class Listening:
    """A heartbeat, one worker, and what is told of it."""

    def __init__(self) -> None:
        self.told: list[WorkerSilent | WorkerHeard] = []
        self.heartbeat = Heartbeat(self.told.append, BEAT_S)
        self.fake = FakeLink("w0")
        self.link = cast("Link", self.fake)
        self.heartbeat.watch(self.link)


def test_who_returns_beats_is_not_silent() -> None:
    async def main() -> None:
        one = Listening()
        for _ in range(3 * MISSED):
            await asyncio.sleep(BEAT_S)
            if one.fake.sent:
                one.heartbeat.heard(one.link)
        assert len(one.fake.sent) > 1
        assert set(map(type, one.fake.sent)) == {Beat}
        assert one.told == []

    uvloop.run(main())


def test_who_returns_none_is_silent_again_and_again_until_heard() -> None:
    async def main() -> None:
        one = Listening()
        await until(lambda: len(one.told) > 1)
        assert one.fake.sent == [Beat()], "a stopped process is not sent more and more"
        silent = [each for each in one.told if isinstance(each, WorkerSilent)]
        assert silent == one.told
        assert silent[0].for_ns < silent[-1].for_ns
        one.heartbeat.heard(one.link)
        assert one.told[-1] == WorkerHeard(worker="w0")
        one.heartbeat.forget(one.link)
        one.told.clear()
        await asyncio.sleep((MISSED + 6) * BEAT_S)
        assert one.told == []

    uvloop.run(main())


def test_a_controller_that_was_stopped_itself_finds_nobody_silent() -> None:
    async def main() -> None:
        one = Listening()
        await asyncio.sleep(1.5 * BEAT_S)
        time.sleep(3 * MISSED * BEAT_S)  # noqa: ASYNC251 - that is what it is about
        await asyncio.sleep(1.5 * BEAT_S)
        one.heartbeat.heard(one.link)
        assert one.told == []

    uvloop.run(main())


def test_only_a_worker_that_is_to_be_ended_is_told_to_the_keeper() -> None:
    async def main() -> None:
        one, keeper = Listening(), FakeLink("keeper")
        end = WorkerHung(worker="w0", why="late", end=True)
        for hung in (WorkerHung(worker="w0", why="late"), end, WorkerHung(worker="w0")):
            one.heartbeat.told(hung, cast("Link", keeper))
            one.heartbeat.told(hung, None)
        assert keeper.sent == [end]

    uvloop.run(main())


class Pulsing:
    """A pulse, what was sent, and how often it changed."""

    def __init__(self) -> None:
        self.sent: list[Beat] = []
        self.changes: list[bool] = []
        self.pulse = Pulse(self.sent.append, lambda: self.changes.append(self.pulse.silent), BEAT_S)
        self.pulse.begin()


def test_who_returns_pulses_is_not_silent_and_who_does_not_is_until_it_does() -> None:
    async def main() -> None:
        one = Pulsing()
        for _ in range(3 * PULSES_MISSED):
            await asyncio.sleep(BEAT_S)
            one.pulse.heard()
        assert len(one.sent) > 1
        assert one.changes == []
        sent = len(one.sent)
        await until(lambda: one.changes)
        await asyncio.sleep((PULSES_MISSED + 6) * BEAT_S)
        assert len(one.sent) <= sent + 1
        assert one.changes == [True]
        assert one.pulse.silent_s >= PULSES_MISSED * BEAT_S
        one.pulse.heard()
        assert one.changes == [True, False]
        one.pulse.end()

    uvloop.run(main())


def test_nobody_who_is_gone_is_silent() -> None:
    async def main() -> None:
        one = Pulsing()
        await until(lambda: one.changes)
        one.pulse.end()
        assert not one.pulse.silent
        sent = len(one.sent)
        await asyncio.sleep((PULSES_MISSED + 6) * BEAT_S)
        assert len(one.sent) == sent
        assert one.changes == [True]

    uvloop.run(main())


def test_who_was_stopped_itself_finds_nobody_silent() -> None:
    async def main() -> None:
        one = Pulsing()
        for _ in range(5):
            await asyncio.sleep(1.5 * BEAT_S)
            time.sleep(3 * PULSES_MISSED * BEAT_S)  # noqa: ASYNC251 - that is what it is about
            await asyncio.sleep(1.5 * BEAT_S)
            one.pulse.heard()
        assert one.changes == []
        one.pulse.end()

    uvloop.run(main())

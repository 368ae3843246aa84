"""The controller as a gateway elsewhere has it: frames pass, and the server's first word decides."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Coroutine
from pathlib import Path
from typing import Any

import pytest
import uvloop
from msgspec import structs

from clockwork_serve import __version__
from clockwork_serve.config import Settings
from clockwork_serve.errors import ConfigError, TransportError
from clockwork_serve.messages import Answer, Cancel, FarGateway, Frame, Outcome, Readiness, Refused, Role
from clockwork_serve.serve.remote import gateway as far_controller
from clockwork_serve.serve.remote.gateway import RETRY_S_MAX, FarConnector, FarController
from tests.serve.certificates import certificates
from tests.serve.remote.machine_links import theirs

READY = Readiness(ready=True)


def run(test: Coroutine[Any, Any, None]) -> None:
    uvloop.run(asyncio.wait_for(test, 120))


class Wire:
    """Stands for the link to the bridge: keeps what is sent."""

    host = "10.0.0.4"

    def __init__(self) -> None:
        self.frames: list[Frame] = []
        self.is_open = True
        self.lost_because = ""
        self.closed = False
        self.far: FarController | None = None  # who is told that it is lost

    def send(self, frame: Frame) -> None:
        self.frames.append(frame)

    def close(self) -> None:
        self.is_open, self.closed = False, True

    def lose(self, why: str) -> None:
        self.is_open, self.lost_because = False, why
        if self.far is not None:
            self.far.on_link_lost(self)  # type: ignore[arg-type]


class World:
    """What stands for a gateway's controller, and whom that tells."""

    def __init__(self) -> None:
        self.wire = Wire()
        self.told: list[Frame] = []
        self.lost: list[str] = []
        self.far = self.wire.far = FarController(self.told.extend, self.lost.append)

    @classmethod
    async def begun(cls) -> World:
        world = cls()
        world.hear(READY)
        assert await world.far.begin(world.wire) is None  # type: ignore[arg-type]
        assert world.told.pop() == READY
        return world

    def hear(self, *frames: Frame) -> None:
        self.far.on_frames(self.wire, list(frames))  # type: ignore[arg-type]


def answer(name: str = "r") -> Answer:
    return Answer(request_id=name, gateway="a.gateway-0", outcome=Outcome.OK, exec_ns=5)


def test_frames_pass_both_ways() -> None:
    async def test() -> None:
        world = await World.begun()
        world.far.send(Cancel(request_id="r"))
        world.hear(READY, answer())
        assert world.wire.frames == [Cancel(request_id="r")]
        assert world.told == [READY, answer()]

    run(test())


# Ends


@pytest.mark.parametrize("close", [True, False])
def test_a_link_that_is_lost_is_told_once_and_one_that_is_closed_is_not(close: bool) -> None:
    async def test() -> None:
        world = await World.begun()
        assert world.far.is_open
        if close:
            world.far.close()
            assert world.wire.closed
        else:
            world.wire.lose("gone")
        assert world.lost == ([] if close else ["gone"])
        assert not world.far.is_open

    run(test())


def test_before_it_begins_nothing_can_be_sent() -> None:
    async def test() -> None:
        world = World()
        assert not world.far.is_open
        world.far.send(READY)
        world.far.close()
        assert world.wire.frames == []

    run(test())


def test_who_is_refused_is_told_why_and_nobody_hears_of_the_end() -> None:
    async def test() -> None:
        world, refused = World(), Refused(why="another version", final=True)
        beginning = asyncio.ensure_future(world.far.begin(world.wire))  # type: ignore[arg-type]
        await asyncio.sleep(0)
        world.hear(refused)
        assert await beginning == refused
        world.wire.lose("it closed the connection")
        assert (world.told, world.lost) == ([], [])

    run(test())


@pytest.mark.parametrize("when", ["before it begins", "without a word", "while it waits"])
def test_a_link_that_is_lost_before_the_server_said_anything_is_none(when: str) -> None:
    async def test() -> None:
        world = World()
        if when == "before it begins":
            world.wire.lose("gone")
        elif when == "without a word":
            world.wire.is_open, world.wire.lost_because = False, "gone"
        beginning = asyncio.ensure_future(world.far.begin(world.wire))  # type: ignore[arg-type]
        await asyncio.sleep(0)
        if when == "while it waits":
            world.wire.lose("gone")
        with pytest.raises(TransportError, match="gone"):
            await beginning
        assert world.lost == []

    run(test())


# Again and again


class Dice:
    def uniform(self, low: float, high: float) -> float:
        assert (low, high) == (0.5, 1.0)
        return high


class Net:
    """What connects: to nobody, or to a server that says its first word at once. Nobody waits."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.first: Frame | None = None
        self.wires: list[Wire] = []
        self.pauses: list[float] = []
        self.words = "nobody there"
        server = Settings(controller="h:7", silence_s=3.0, **theirs(certificates(folder)).named())
        self.connector = FarConnector("a.gateway-0", server)
        self.connector._dice = Dice()  # type: ignore[assignment]
        monkeypatch.setattr(far_controller, "connect_machine", self.connect)
        monkeypatch.setattr(asyncio, "sleep", self.sleep)

    async def sleep(self, seconds: float) -> None:
        self.pauses.append(seconds)

    async def connect(
        self, address: tuple[str, int], context: Any, own: Any, on_frames: Any, on_lost: Any, silence_s: float
    ) -> Wire:
        assert (address, own.role, own.name, silence_s) == (("h", 7), Role.GATEWAY, "a.gateway-0", 3.0)
        if self.first is None:
            raise TransportError(self.words)
        wire = Wire()
        self.wires.append(wire)
        asyncio.get_running_loop().call_soon(on_frames, wire, [self.first])
        return wire

    async def knock(self) -> FarController | None:
        """What comes of it, if anything."""
        try:
            return await self.connector(lambda frames: None, lambda why: None)
        except TransportError:
            return None


def test_it_comes_again_less_and_less_often_and_says_once_why(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    async def test() -> None:
        net = Net(tmp_path, monkeypatch)
        for _ in range(8):
            assert await net.knock() is None
        assert net.pauses == [0.0, 0.05, 0.1, 0.2, 0.4, 0.8, RETRY_S_MAX, RETRY_S_MAX]
        net.words = "nobody at all"
        await net.knock()

    caplog.set_level(logging.WARNING, far_controller.__name__)
    run(test())
    said = [record.getMessage() for record in caplog.records]
    assert said == ["no controller yet: nobody there", "no controller yet: nobody at all"]


def test_after_a_link_that_lasted_it_comes_at_once_and_else_it_does_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def test() -> None:
        net = Net(tmp_path, monkeypatch)
        net.first = READY
        for _ in range(3):
            found = await net.knock()
            assert found is not None
            assert found.is_open
        assert net.wires[0].frames == [FarGateway(gateway="a.gateway-0", version=__version__)]
        net.connector._linked_s -= 2 * RETRY_S_MAX
        for _ in range(2):
            await net.knock()
        assert net.pauses == [0.0, 0.05, 0.1, 0.0, 0.05]
        assert not any(wire.closed for wire in net.wires)

    run(test())


def test_who_is_refused_for_good_gives_up_and_else_comes_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def test() -> None:
        net = Net(tmp_path, monkeypatch)
        net.first = Refused(why="no controller now", final=False)
        assert await net.knock() is None
        assert not net.connector.refused.done()
        net.first = Refused(why="install that", final=True)
        for _ in range(2):
            with pytest.raises(TransportError, match="does not take this gateway: install that"):
                await net.connector(lambda frames: None, lambda why: None)
        with pytest.raises(ConfigError, match=r"the server does not take a.gateway-0: install that"):
            await net.connector.refused
        assert [wire.closed for wire in net.wires] == [True] * 3

    run(test())


def test_the_address_of_this_machine_is_told_before_the_server_s_first_word(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def test() -> None:
        net, told = Net(tmp_path, monkeypatch), list[str]()
        net.first = READY
        net.connector._on_host = told.append
        found = await net.connector(lambda frames: told.append("frames"), lambda why: None)
        assert (found.is_open, told) == (True, [Wire.host, "frames"])

        def no_port(host: str) -> None:
            raise TransportError("tensor_port: expected a free port")

        net.connector._on_host = no_port
        assert await net.knock() is None
        assert net.wires[-1].closed

    run(test())


def test_who_stops_while_the_server_says_nothing_leaves_no_link(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def test() -> None:
        net = Net(tmp_path, monkeypatch)
        wire = Wire()

        async def silent(*given: Any) -> Wire:
            return wire

        monkeypatch.setattr(far_controller, "connect_machine", silent)
        knocking = asyncio.ensure_future(net.knock())
        asyncio.get_running_loop().call_soon(knocking.cancel)
        with pytest.raises(asyncio.CancelledError):
            await knocking
        assert wire.closed

    run(test())


def test_files_that_will_not_do_are_named_at_once(tmp_path: Path) -> None:
    async def test() -> None:
        files = structs.replace(theirs(certificates(tmp_path)), ca=str(tmp_path / "nothing.pem"))
        with pytest.raises(ConfigError, match="cluster_ca"):
            FarConnector("a.gateway-0", Settings(controller="h:7", **files.named()))

    run(test())

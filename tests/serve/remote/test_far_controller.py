"""The controller as a gateway elsewhere has it: frames pass, and the server's first word decides."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from msgspec import structs

from clockwork_serve import __version__
from clockwork_serve.config import Settings
from clockwork_serve.errors import ConfigError, TransportError
from clockwork_serve.messages import Answer, FarGateway, Frame, Outcome, Readiness, Refused, Role
from clockwork_serve.serve.remote import finding
from clockwork_serve.serve.remote.finding import RETRY_S_MAX, FarConnector
from clockwork_serve.serve.remote.link import MachineLink
from tests.serve.certificates import certificates
from tests.serve.remote.machine_links import theirs

READY = Readiness(ready=True)


class Wire:
    """Stands for the link to the bridge: keeps what is sent."""

    host = "10.0.0.4"

    def __init__(self) -> None:
        self.frames: list[Frame] = []
        self.is_open = True
        self.lost_because = ""
        self.closed = False
        self.reply: Callable[[], None] | None = None  # to what is sent first

    def send(self, frame: Frame) -> None:
        self.frames.append(frame)
        if self.reply is not None:
            asyncio.get_running_loop().call_soon(self.reply)

    def close(self) -> None:
        self.is_open, self.closed = False, True


class World:
    """A connector that reaches a server of ours, and what its gateway is told."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.wire = Wire()
        self.told: list[Frame] = []
        self.lost: list[str] = []
        settings = Settings(controller="127.0.0.1:7", **theirs(certificates(folder)).named())
        self.connector = FarConnector("a.gateway-0", settings)
        monkeypatch.setattr(self.connector._finder, "connect", self._connect)

    async def _connect(self) -> Wire:
        return self.wire

    async def begin(self, *first: Frame) -> None:
        """Connect; the server's first words are these."""
        connecting = asyncio.ensure_future(self.connector(self.told.extend, self.lost.append))
        await asyncio.sleep(0)
        assert self.wire.frames.pop() == FarGateway(gateway="a.gateway-0", version=__version__)
        if first:
            self.hear(*first)
        await connecting

    def hear(self, *frames: Frame) -> None:
        self.connector._on_link_frames(self.wire, list(frames))  # type: ignore[arg-type]

    def lose(self, why: str) -> None:
        self.wire.is_open, self.wire.lost_because = False, why
        self.connector._on_link_lost(self.wire)  # type: ignore[arg-type]


def answer(name: str = "r") -> Answer:
    return Answer(request_id=name, gateway="a.gateway-0", outcome=Outcome.OK, exec_ns=5)


async def test_the_server_s_frames_pass_once_it_has_admitted_the_gateway(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    world = World(tmp_path, monkeypatch)
    await world.begin(READY, answer())
    world.hear(answer("s"))
    assert world.told == [READY, answer(), answer("s")]
    world.lose("gone")
    assert world.lost == ["gone"]


async def test_who_is_refused_is_told_why_and_nobody_hears_of_the_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    world = World(tmp_path, monkeypatch)
    with pytest.raises(TransportError, match="does not take this gateway: another version"):
        await world.begin(Refused(why="another version", final=True))
    assert world.wire.closed
    world.hear(READY)
    world.lose("it closed the connection")
    assert (world.told, world.lost) == ([], [])
    with pytest.raises(ConfigError):
        world.connector.refused.result()


async def test_a_link_that_is_lost_before_the_server_said_anything_is_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    world = World(tmp_path, monkeypatch)
    asyncio.get_running_loop().call_later(0.05, world.lose, "gone")
    with pytest.raises(TransportError, match="gone"):
        await world.begin()
    assert world.lost == []


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
        server = Settings(controller="127.0.0.1:7", silence_s=3.0, **theirs(certificates(folder)).named())
        self.connector = FarConnector("a.gateway-0", server)
        self.connector._finder._dice = Dice()  # type: ignore[assignment]
        monkeypatch.setattr(finding, "connect_machine", self.connect)
        monkeypatch.setattr(asyncio, "sleep", self.sleep)

    async def sleep(self, seconds: float) -> None:
        self.pauses.append(seconds)

    async def connect(
        self, address: tuple[str, int], context: Any, own: Any, *given: Any, **more: Any
    ) -> Wire:
        on_frames, _, silence_s = given
        assert (address, own.role, own.name, silence_s) == (
            ("127.0.0.1", 7), Role.GATEWAY, "a.gateway-0", 3.0,
        )  # fmt: skip
        if self.first is None:
            raise TransportError(self.words)
        wire = Wire()
        self.wires.append(wire)
        wire.reply = partial(on_frames, wire, [self.first])
        return wire

    async def knock(self) -> MachineLink | None:
        """What comes of it, if anything."""
        try:
            return await self.connector(lambda frames: None, lambda why: None)
        except TransportError:
            return None


async def test_it_comes_again_less_and_less_often_and_says_once_why(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.WARNING, finding.__name__)
    net = Net(tmp_path, monkeypatch)
    for _ in range(8):
        assert await net.knock() is None
    assert net.pauses == [0.0, 0.05, 0.1, 0.2, 0.4, 0.8, RETRY_S_MAX, RETRY_S_MAX]
    net.words = "nobody at all"
    await net.knock()
    said = [record.getMessage() for record in caplog.records]
    assert said == ["no controller yet: nobody there", "no controller yet: nobody at all"]


async def test_after_a_link_that_lasted_it_comes_at_once_and_else_it_does_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    net = Net(tmp_path, monkeypatch)
    net.first = READY
    for _ in range(3):
        found = await net.knock()
        assert found is not None
        assert found.is_open
    assert net.wires[0].frames == [FarGateway(gateway="a.gateway-0", version=__version__)]
    net.connector._finder._linked_s -= 2 * RETRY_S_MAX
    for _ in range(2):
        await net.knock()
    assert net.pauses == [0.0, 0.05, 0.1, 0.0, 0.05]
    assert not any(wire.closed for wire in net.wires)


async def test_who_is_refused_for_good_gives_up_and_else_comes_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
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


async def test_the_address_of_this_machine_is_told_before_the_server_s_first_word(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
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


async def test_who_stops_while_the_server_says_nothing_leaves_no_link(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    net = Net(tmp_path, monkeypatch)
    wire = Wire()

    async def silent(*given: Any, **more: Any) -> Wire:
        return wire

    monkeypatch.setattr(finding, "connect_machine", silent)
    knocking = asyncio.ensure_future(net.knock())
    asyncio.get_running_loop().call_later(0.1, knocking.cancel)  # by then it is connected
    with pytest.raises(asyncio.CancelledError):
        await knocking
    assert wire.closed


async def test_files_that_will_not_do_are_named_at_once(tmp_path: Path) -> None:
    files = structs.replace(theirs(certificates(tmp_path)), ca=str(tmp_path / "nothing.pem"))
    with pytest.raises(ConfigError, match="cluster_ca"):
        FarConnector("a.gateway-0", Settings(controller="h:7", **files.named()))

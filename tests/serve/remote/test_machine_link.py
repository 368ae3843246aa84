"""Links over TCP and TLS: who is let in, what is said of who is not, silence, order, other clocks."""

from __future__ import annotations

import asyncio
import logging
import socket
import ssl
from collections.abc import AsyncIterator
from contextlib import ExitStack, asynccontextmanager, suppress
from pathlib import Path

import msgspec
import pytest

from clockwork_serve.errors import TransportError
from clockwork_serve.messages import Extent, Role, Unload, Window
from clockwork_serve.serve.remote import link as machine_link
from clockwork_serve.serve.remote.config import ClusterContext, ClusterFiles, bound, context_of
from clockwork_serve.serve.remote.link import MachineLink, MachineListener
from clockwork_serve.serve.transport import Link, hello
from tests.serve.certificates import certificates, renewed_certificates
from tests.serve.links import Side, cancels, until
from tests.serve.proxy import proxy
from tests.serve.remote.machine_links import SILENCE_S, connect, ours, theirs


class Far:
    """A listener and what it saw."""

    def __init__(self, files: ClusterFiles, silence_s: float) -> None:
        self.side = Side()
        own = hello(Role.CONTROLLER, "bridge")
        side = self.side
        self.listener = MachineListener(
            ClusterContext(files, server=True), own, side.on_link, side.on_frames, side.on_lost, silence_s
        )
        listening = bound("127.0.0.1", 0)
        self.port: int = listening.getsockname()[1]
        self.listener.listen(listening)


@asynccontextmanager
async def far(folder: Path, silence_s: float = SILENCE_S) -> AsyncIterator[Far]:
    made = Far(ours(certificates(folder)), silence_s)
    yield made
    made.listener.close()
    await asyncio.sleep(0.05)


async def test_frames_go_both_ways_and_pings_stay_inside(tmp_path: Path) -> None:
    async with far(tmp_path) as there:
        there.side.reply = lambda link, frame: link.send(frame)
        here = Side()
        link = await connect(here, there.port, theirs(certificates(tmp_path)))
        for frame in cancels(2000):
            link.send(frame)
        await until(lambda: len(here.frames) == 2000)
        await asyncio.sleep(2 * SILENCE_S)
        assert here.frames == there.side.frames == cancels(2000)
        assert not here.lost and not there.side.lost, "it lives although nobody says anything"
        assert link.offset_ns == 0
        link.close()
        await until(lambda: there.side.lost)
        assert not here.lost


async def test_the_cluster_s_name_is_asked_for_and_no_address(tmp_path: Path) -> None:
    async with far(tmp_path) as there:
        here = Side()
        joining = theirs(certificates(tmp_path))
        link = await connect(here, there.port, msgspec.structs.replace(joining, name="localhost"))
        link.close()
        with pytest.raises(TransportError, match=r"not valid for 'clockwork\.internal'"):
            await connect(here, there.port, msgspec.structs.replace(joining, name="clockwork.internal"))


@pytest.fixture
def said(caplog: pytest.LogCaptureFixture) -> pytest.LogCaptureFixture:
    caplog.set_level(logging.WARNING, machine_link.__name__)
    return caplog


def complaints(said: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in said.records if "turned a machine away" in record.getMessage()]


def files_open() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


async def test_who_has_no_certificate_of_the_authority_is_refused_said_once_and_leaves_nothing(
    tmp_path: Path, said: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "other").mkdir()
    async with far(tmp_path) as there:
        strangers = renewed_certificates(tmp_path / "other")
        trusting = msgspec.structs.replace(theirs(strangers), ca=certificates(tmp_path).ca)
        with pytest.raises(TransportError, match="is not accepted: unable to get local issuer certificate"):
            await connect(Side(), there.port, trusting)
        await until(lambda: not there.listener._shaking)
        before = files_open()
        for _ in range(20):
            with pytest.raises(TransportError):
                await connect(Side(), there.port, trusting)
        await asyncio.sleep(0.3)
        assert (list(there.listener._shaking), there.listener._links) == ([], set())
        for _ in range(100):
            if files_open() <= before:
                break
            await asyncio.sleep(0.02)
        assert files_open() <= before
        assert not there.side.links
        assert len(complaints(said)) == 1, complaints(said)
        assert "certificate" in complaints(said)[0]


async def test_who_shows_no_certificate_at_all_or_speaks_no_tls_is_refused(
    tmp_path: Path, said: pytest.LogCaptureFixture
) -> None:
    async with far(tmp_path) as there:
        context = ssl.create_default_context(cafile=certificates(tmp_path).ca)
        with suppress(OSError):
            reader, writer = await asyncio.open_connection("127.0.0.1", there.port, ssl=context)
            assert not await reader.read(), "not one byte of ours"
            writer.close()
        reader, writer = await asyncio.open_connection("127.0.0.1", there.port)
        writer.write(b"GET / HTTP/1.1\r\n\r\n")
        with suppress(OSError):
            assert b"clockwork" not in await reader.read()
        writer.close()
        await until(lambda: not there.listener._shaking and not there.listener._links)
        assert not there.side.links
        assert len(complaints(said)) == 2


async def test_a_server_that_is_none_of_ours_is_told_nothing(tmp_path: Path) -> None:
    (tmp_path / "other").mkdir()
    strange = Far(ours(renewed_certificates(tmp_path / "other")), SILENCE_S)
    with pytest.raises(TransportError, match="its certificate was not accepted"):
        await connect(Side(), strange.port, theirs(certificates(tmp_path)))
    strange.listener.close()


async def test_who_shakes_hands_for_ever_holds_up_nobody_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with far(tmp_path) as there:
        with ExitStack() as stack:
            monkeypatch.setattr(machine_link, "CONNECT_S", 2.0)
            for _ in range(30):
                stack.enter_context(socket.create_connection(("127.0.0.1", there.port)))
            await until(lambda: len(there.listener._shaking) == 30)
            monkeypatch.setattr(machine_link, "CONNECT_S", 30.0)  # time limits that began stay as they are
            link = await connect(Side(), there.port, theirs(certificates(tmp_path)))
            assert link.is_open
            await until(lambda: not len(there.listener._shaking))


async def test_a_host_of_which_nothing_is_heard_is_asked_again_sooner_than_by_its_kernel(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files, loop = theirs(certificates(tmp_path)), asyncio.get_running_loop()
    with socket.create_server(("127.0.0.1", 0), backlog=0) as full, ExitStack() as stack:
        port: int = full.getsockname()[1]
        stack.enter_context(socket.create_connection(("127.0.0.1", port)))  # no other is heard now
        for _ in range(3):
            began_s = loop.time()
            with pytest.raises(TransportError, match=r"nothing within 0\.4 s"):
                await connect(Side(), port, files)
            assert loop.time() - began_s >= 0.4
        monkeypatch.setattr(machine_link, "CONNECT_S", 1.0)
        full.accept()[0].close()
        with pytest.raises(TransportError) as caught:  # it is heard, and shakes no hands
            await connect(Side(), port, files)
        assert "nothing within 1 s" in str(caught.value)


async def test_silence_is_noticed_on_both_sides(tmp_path: Path) -> None:
    async with far(tmp_path) as there:
        with proxy(there.port) as between:
            here = Side()
            await connect(here, between.port, theirs(certificates(tmp_path)))
            await until(lambda: there.side.links)
            between.cut()
            started_s = asyncio.get_running_loop().time()
            await until(lambda: here.lost and there.side.lost)
            assert asyncio.get_running_loop().time() - started_s >= SILENCE_S * 0.7
            assert "silent for" in here.lost[0].lost_because
            assert "silent for" in there.side.lost[0].lost_because


async def test_another_clock_is_met_with_its_error(tmp_path: Path) -> None:
    async with far(tmp_path, silence_s=2) as there:
        with proxy(there.port) as between:
            between.delay(0.02, back=False)
            here = Side()
            link = await connect(here, between.port, theirs(certificates(tmp_path)), 2, boot_id="another")
            await until(lambda: there.side.links)
            # In truth it is the same clock: 20 ms one way only look like 10 of offset, and 10 of error.
            error_ns = link._alignment.error_ns
            assert abs(link.offset_ns) <= error_ns
            assert error_ns >= 9_000_000
            window = Window(10**12, 10**12 + 10**9)
            unload = Unload(
                action_id=1, device="d", model="m/1", extent=Extent(0, 1), version=1, window=window
            )
            there.side.links[0].send(unload)
            await until(lambda: here.frames)
            (got,) = here.frames
            assert isinstance(got, Unload)
            assert got.window.latest_ns <= window.latest_ns, "late by no error"
            assert got.window.earliest_ns >= window.earliest_ns


async def test_a_peer_that_breaks_the_protocol_loses_its_link(tmp_path: Path) -> None:
    async with far(tmp_path) as there:
        context = context_of(theirs(certificates(tmp_path)), server=False)
        _, writer = await asyncio.open_connection("127.0.0.1", there.port, ssl=context)
        writer.write(b"\x05\0\0\0\xc1\xc1\xc1\xc1\xc1")
        await until(lambda: there.listener._links)
        await until(lambda: not there.listener._links)
        assert not there.side.links
        writer.close()


def test_only_the_last_seconds_of_a_clock_count() -> None:
    assert MachineLink.samples < Link.samples

"""Links over real unix sockets: order, batching, handshakes, and peers that misbehave or die."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import socket
import stat
import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import msgspec
import pytest
import uvloop

from clockwork_serve.errors import TransportError
from clockwork_serve.messages import (
    Ask,
    Cancel,
    Extent,
    Result,
    Role,
    Status,
    Unload,
    Window,
)
from clockwork_serve.serve import transport
from clockwork_serve.serve.transport import FRAME_BYTES_MAX, hello
from tests.serve.links import Side, cancels, until


def test_both_sides_learn_who_the_other_is(tmp_path: Path) -> None:
    async def main() -> None:
        server, client = Side(), Side()
        listener = await server.listen(tmp_path / "c.sock")
        link = await client.connect(tmp_path / "c.sock", name="cpu")
        await until(lambda: server.links)
        assert (link.peer.role, link.peer.name, link.peer.pid) == (
            Role.CONTROLLER,
            "controller",
            os.getpid(),
        )
        assert (server.links[0].peer.role, server.links[0].peer.name) == (
            Role.WORKER,
            "cpu",
        )
        assert link.offset_ns == server.links[0].offset_ns == 0
        listener.close()

    uvloop.run(main())


@pytest.mark.parametrize("run", [asyncio.run, uvloop.run])
def test_frames_arrive_in_order_both_ways(tmp_path: Path, run: Callable[..., None]) -> None:
    async def main() -> None:
        server, client = Side(), Side()
        server.reply = lambda link, frame: link.send(frame)
        listener = await server.listen(tmp_path / "c.sock")
        link = await client.connect(tmp_path / "c.sock")
        for frame in cancels(5_000):
            link.send(frame)
        await until(lambda: len(client.frames) == 5_000)
        assert client.frames == server.frames == cancels(5_000)
        listener.close()

    run(main())


def test_frames_of_one_turn_arrive_as_one_read(tmp_path: Path) -> None:
    async def main() -> None:
        server, client = Side(), Side()
        listener = await server.listen(tmp_path / "c.sock")
        link = await client.connect(tmp_path / "c.sock")
        for frame in cancels(100):
            link.send(frame)
        await until(lambda: server.reads)
        assert server.reads == [cancels(100)]
        listener.close()

    uvloop.run(main())


def test_the_socket_is_private_and_a_stale_one_is_replaced(tmp_path: Path) -> None:
    async def main() -> None:
        path = tmp_path / "c.sock"
        stale = socket.socket(socket.AF_UNIX)
        stale.bind(os.fspath(path))
        stale.close()
        listener = await Side().listen(path)
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
        (await Side().connect(path)).close()
        listener.close()
        assert not path.exists()

    uvloop.run(main())


def test_connecting_where_no_process_listens_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(TransportError, match=r"cannot connect to .*nobody\.sock.*is its process up"):
        uvloop.run(Side().connect(tmp_path / "nobody.sock"))


def test_a_path_too_long_for_a_socket_says_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(TransportError, match=r"at most 107.*XDG_RUNTIME_DIR"):
        uvloop.run(Side().listen(tmp_path / ("x" * 120)))


def test_another_protocol_is_refused(tmp_path: Path) -> None:
    async def main() -> None:
        server = Side()
        listener = await server.listen(tmp_path / "c.sock")
        with pytest.raises(TransportError, match="protocol"):
            await Side().connect(tmp_path / "c.sock", protocol=99)
        assert server.links == []
        listener.close()

    uvloop.run(main())


def raw_hello(boot: str | None = None) -> bytes:
    own = hello(Role.GATEWAY, "raw")
    if boot is not None:
        own = msgspec.structs.replace(own, boot_id=boot)
    payload = msgspec.msgpack.encode(own)
    return struct.pack("<I", len(payload)) + payload


@pytest.mark.parametrize(
    ("sent", "accepted"),
    [
        (b"GET / HTTP/1.1\r\n\r\n", False),
        (struct.pack("<I", 5) + b"\xc1" * 5, False),
        (
            struct.pack("<I", 24) + msgspec.msgpack.encode({"type": "cancel", "request_id": "r"})[:24],
            False,
        ),
        (raw_hello() + struct.pack("<I", 2) + b"\xc1\xc1", True),
        (raw_hello() + struct.pack("<I", FRAME_BYTES_MAX + 1), True),
    ],
)
def test_a_peer_that_breaks_the_protocol_loses_its_link_only(
    tmp_path: Path, sent: bytes, accepted: bool
) -> None:
    async def main() -> None:
        server, good = Side(), Side()
        server.reply = lambda link, frame: link.send(frame)
        listener = await server.listen(tmp_path / "c.sock")
        link = await good.connect(tmp_path / "c.sock")
        reader, writer = await asyncio.open_unix_connection(tmp_path / "c.sock")
        writer.write(sent)
        with contextlib.suppress(ConnectionResetError):
            await asyncio.wait_for(reader.read(), 20)  # its Hello, then the end
        writer.close()
        assert len(server.links) == (2 if accepted else 1)
        assert len(server.lost) == (1 if accepted else 0)
        link.send(Cancel(request_id="still here"))
        await until(lambda: good.frames == [Cancel(request_id="still here")])
        listener.close()

    uvloop.run(main())


def test_a_peer_that_does_not_read_is_cut_off(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transport, "UNSENT_BYTES_MAX", 1 << 20)

    async def main() -> None:
        server = Side()
        listener = await server.listen(tmp_path / "c.sock")
        deaf = socket.socket(socket.AF_UNIX)
        deaf.connect(os.fspath(tmp_path / "c.sock"))
        deaf.sendall(raw_hello())
        await until(lambda: server.links)
        for number in range(64):
            server.links[0].send(Ask(ask_id=number, what="index", body=b"x" * 100_000))
            await asyncio.sleep(0)
        await until(lambda: server.lost)
        assert "does not read" in server.links[0].lost_because
        assert not server.links[0].is_open
        server.links[0].send(Cancel(request_id="dropped"))
        deaf.close()
        listener.close()

    uvloop.run(main())


def test_a_frame_too_large_is_refused_at_the_sender_and_the_link_lives(
    tmp_path: Path,
) -> None:
    async def main() -> None:
        server, client = Side(), Side()
        listener = await server.listen(tmp_path / "c.sock")
        link = await client.connect(tmp_path / "c.sock")
        with pytest.raises(TransportError, match="more than"):
            link.send(Ask(ask_id=1, what="index", body=b"x" * (FRAME_BYTES_MAX + 1)))
        link.send(Cancel(request_id="r"))
        await until(lambda: server.frames == [Cancel(request_id="r")])
        listener.close()

    uvloop.run(main())


def test_close_sends_queued_frames_and_notifies_the_peer_only(
    tmp_path: Path,
) -> None:
    async def main() -> None:
        server, client = Side(), Side()
        listener = await server.listen(tmp_path / "c.sock")
        link = await client.connect(tmp_path / "c.sock")
        for frame in cancels(2_000):
            link.send(frame)
        link.close()
        await until(lambda: server.lost)
        assert server.frames == cancels(2_000)
        assert server.lost == server.links
        assert client.lost == []
        listener.close()

    uvloop.run(main())


CHILD = """
import asyncio, sys, uvloop
from pathlib import Path
from clockwork_serve.messages import Cancel, Role
from clockwork_serve.serve.transport import connect, hello

async def main():
    link = await connect(Path(sys.argv[1]), hello(Role.WORKER, "child"), lambda l, f: None, lambda l: None)
    link.send(Cancel(request_id="from the child"))
    await asyncio.sleep(60)

uvloop.run(main())
"""


def spawn(path: Path) -> subprocess.Popen[bytes]:
    return subprocess.Popen([sys.executable, "-c", CHILD, os.fspath(path)])


def test_a_killed_process_is_noticed(tmp_path: Path) -> None:
    async def main() -> None:
        server = Side()
        listener = await server.listen(tmp_path / "c.sock")
        child = spawn(tmp_path / "c.sock")
        try:
            await until(lambda: server.frames)
            assert server.links[0].peer.pid == child.pid
            child.send_signal(signal.SIGKILL)
            await until(lambda: server.lost)
            assert str(child.pid) in server.lost[0].lost_because
        finally:
            child.kill()
            child.wait()
        listener.close()

    uvloop.run(main())


def test_another_boot_id_means_another_clock_and_times_are_converted(
    tmp_path: Path,
) -> None:
    async def main() -> None:
        server, client = Side(), Side()
        listener = await server.listen(tmp_path / "c.sock")
        link = await client.connect(tmp_path / "c.sock", boot_id="another host")
        await until(lambda: server.links)
        # It is the same clock in truth, so what was measured is the error.
        assert abs(link.offset_ns) < 1_000_000_000
        window = Window(10**12, 2 * 10**12)
        server.links[0].send(
            Unload(
                action_id=1,
                device="d",
                model="m/1",
                extent=Extent(0, 1),
                version=1,
                window=window,
            )
        )
        link.send(
            Result(
                action_id=1,
                device="d",
                status=Status.OK,
                started_ns=10**12,
                ended_ns=10**12 + 5,
            )
        )
        await until(lambda: client.frames and server.frames)
        got, result = client.frames[0], server.frames[0]
        assert isinstance(got, Unload) and isinstance(result, Result)
        assert abs(got.window.earliest_ns - window.earliest_ns) < 10**9
        assert got.window.latest_ns - got.window.earliest_ns < 10**12, "narrowed by the error of the offset"
        assert result.ended_ns - result.started_ns == 5
        assert len(client.frames) == len(server.frames) == 1, "pings stay inside the link"
        listener.close()

    uvloop.run(main())

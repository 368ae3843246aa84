"""Links between processes: frames, clocks, and peers that break the protocol."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import os
import signal
import socket
import stat
import struct
import subprocess
import sys
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import msgspec
import pytest
import uvloop
from hypothesis import given
from hypothesis import strategies as st

from clockwork_serve import __version__
from clockwork_serve.errors import TransportError
from clockwork_serve.fence import Fence
from clockwork_serve.messages import (
    AdmissionQuery,
    Ask,
    Cancel,
    DeviceNumbers,
    Extent,
    Frame,
    Hello,
    Ping,
    Quarantined,
    Request,
    Result,
    Role,
    SoonestEnd,
    SoonestEnds,
    Status,
    Unload,
    Window,
)
from clockwork_serve.serve import transport
from clockwork_serve.serve.supervisor.run_dir import RunDir
from clockwork_serve.serve.transport import (
    FRAME_BYTES_MAX,
    PROTOCOL,
    ClockAlignment,
    FrameReader,
    FrameWriter,
    Link,
    SlidingMinimum,
    connect,
    hello,
    to_controller,
    to_local,
    why_strange,
)
from tests.serve.links import Side, bytes_of, cancels, until

# Links over real unix sockets: order, batching, handshakes, and peers that misbehave or die.


async def test_both_sides_learn_who_the_other_is(tmp_path: Path) -> None:
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


async def test_frames_of_one_turn_arrive_as_one_read(tmp_path: Path) -> None:
    server, client = Side(), Side()
    listener = await server.listen(tmp_path / "c.sock")
    link = await client.connect(tmp_path / "c.sock")
    for frame in cancels(100):
        link.send(frame)
    await until(lambda: server.reads)
    assert server.reads == [cancels(100)]
    listener.close()


async def test_the_socket_is_private_and_a_stale_one_is_replaced(tmp_path: Path) -> None:
    path = tmp_path / "c.sock"
    stale = socket.socket(socket.AF_UNIX)
    stale.bind(os.fspath(path))
    stale.close()
    listener = await Side().listen(path)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    (await Side().connect(path)).close()
    listener.close()
    assert not path.exists()


def test_connecting_where_no_process_listens_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(TransportError, match=r"cannot connect to .*nobody\.sock.*is its process up"):
        uvloop.run(Side().connect(tmp_path / "nobody.sock"))


def test_a_path_too_long_for_a_socket_says_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(TransportError, match=r"at most 107.*XDG_RUNTIME_DIR"):
        uvloop.run(Side().listen(tmp_path / ("x" * 120)))


@pytest.mark.parametrize("protocol", [PROTOCOL + 2, 99])
def test_a_protocol_that_is_no_neighbour_is_refused(tmp_path: Path, protocol: int) -> None:
    async def main() -> None:
        server = Side()
        listener = await server.listen(tmp_path / "c.sock")
        told = rf"is of clockwork-serve '{__version__}' and speaks protocol \d+, expected \d+ to \d+, as '"
        with pytest.raises(TransportError, match=told):
            await Side().connect(tmp_path / "c.sock", protocol=protocol)
        assert server.links == []
        listener.close()

    uvloop.run(main())


async def test_neighbouring_protocols_understand_each_other(tmp_path: Path) -> None:
    server, client = Side(), Side()
    server.reply = lambda link, frame: link.send(frame)
    listener = await server.listen(tmp_path / "c.sock")
    link = await client.connect(tmp_path / "c.sock", protocol=PROTOCOL + 1)
    link.send(cancels(1)[0])
    await until(lambda: client.frames == cancels(1))
    listener.close()


@pytest.mark.parametrize(
    ("own", "understood"), [(3, {3, 4}), (4, {3, 4, 5}), (5, {4, 5, 6}), (9, {8, 9, 10})]
)
def test_a_protocol_understands_those_beside_it_since_the_third(own: int, understood: set[int]) -> None:
    ours = msgspec.structs.replace(hello(Role.WORKER, "w"), protocol=own)
    peers = [msgspec.structs.replace(hello(Role.CONTROLLER, "c"), protocol=peer) for peer in range(12)]
    assert {peer.protocol for peer in peers if not why_strange(ours, peer)} == understood


def test_a_hello_of_a_build_with_more_or_fewer_fields_can_be_read() -> None:
    own = hello(Role.CONTROLLER, "c", epoch=7)
    fields = msgspec.msgpack.decode(msgspec.msgpack.encode(own))
    for sent, epoch in (([*fields, "more"], 7), (fields[:-1], 7), (fields[:-2], 0)):
        found = msgspec.msgpack.decode(msgspec.msgpack.encode(sent), type=Hello)
        assert (found.name, found.protocol, found.epoch) == ("c", PROTOCOL, epoch)


# Fences: a process that has joined a controller obeys none of a lower epoch, whatever links are open.


async def test_a_controller_that_was_deposed_is_not_joined(tmp_path: Path) -> None:
    fence, path, own, ours = Fence(), tmp_path / "c.sock", hello(Role.WORKER, "w"), Side()
    for epoch in (1, 3, 3):
        listener = await Side().listen(path, hello(Role.CONTROLLER, "c", epoch))
        await connect(path, own, ours.on_frames, ours.on_lost, fence)
        listener.close()
        assert fence.epoch == epoch
    listener = await Side().listen(path, hello(Role.CONTROLLER, "c", 2))
    with pytest.raises(TransportError, match=r"'c' .* deposed: its epoch is 2, and one of epoch 3 leads"):
        await connect(path, own, ours.on_frames, ours.on_lost, fence)
    assert fence.epoch == 3
    await connect(path, own, ours.on_frames, ours.on_lost)  # a process that has joined no other
    listener.close()


async def test_what_a_deposed_controller_sends_is_dropped_and_its_link_lost(tmp_path: Path) -> None:
    fence, first, second, ours = Fence(), Side(), Side(), Side()
    old = await first.listen(tmp_path / "old.sock", hello(Role.CONTROLLER, "c", 1))
    new = await second.listen(tmp_path / "new.sock", hello(Role.CONTROLLER, "c", 2))
    own = hello(Role.WORKER, "w")
    await connect(tmp_path / "old.sock", own, ours.on_frames, ours.on_lost, fence)
    await until(lambda: first.links)
    first.links[0].send(cancels(1)[0])
    await until(lambda: ours.frames == cancels(1))
    await connect(tmp_path / "new.sock", own, ours.on_frames, ours.on_lost, fence)
    await until(lambda: second.links)
    for frame in cancels(3):
        first.links[0].send(frame)
    await until(lambda: ours.lost)
    assert "it was deposed: its epoch is 1, and one of epoch 2 leads" in ours.lost[0].lost_because
    assert ours.frames == cancels(1)
    second.links[0].send(cancels(2)[1])
    await until(lambda: ours.frames == cancels(2))
    old.close()
    new.close()


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
            struct.pack("<I", 24) + msgspec.msgpack.encode(["cancel", "a longer request"])[:24],
            False,
        ),
        (raw_hello() + struct.pack("<I", 2) + b"\xc1\xc1", True),
        (raw_hello() + struct.pack("<I", FRAME_BYTES_MAX + 1), True),
    ],
    ids=["other words", "no frame", "a shortened frame", "then no frame", "then a huge frame"],
)
async def test_a_peer_that_breaks_the_protocol_loses_its_link_only(
    tmp_path: Path, sent: bytes, accepted: bool
) -> None:
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


def test_a_connection_may_be_given_up_at_any_time(tmp_path: Path) -> None:
    problems: list[object] = []

    async def main() -> None:
        loop = asyncio.get_running_loop()
        loop.set_exception_handler(lambda _, context: problems.append(context))
        listener = await Side().listen(tmp_path / "c.sock")
        for turns in range(12):
            connecting = asyncio.ensure_future(Side().connect(tmp_path / "c.sock"))
            for _ in range(turns):
                await asyncio.sleep(0)
            connecting.cancel()
            await asyncio.sleep(0.01)
        listener.close()

    uvloop.run(main())

    assert problems == []


async def test_a_peer_that_does_not_read_is_cut_off(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transport, "UNSENT_BYTES_MAX", 1 << 20)
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


async def test_a_frame_too_large_is_refused_at_the_sender_and_the_link_lives(
    tmp_path: Path,
) -> None:
    server, client = Side(), Side()
    listener = await server.listen(tmp_path / "c.sock")
    link = await client.connect(tmp_path / "c.sock")
    with pytest.raises(TransportError, match="more than"):
        link.send(Ask(ask_id=1, what="index", body=b"x" * (FRAME_BYTES_MAX + 1)))
    link.send(Cancel(request_id="r"))
    await until(lambda: server.frames == [Cancel(request_id="r")])
    listener.close()


async def test_close_sends_queued_frames_and_notifies_the_peer_only(
    tmp_path: Path,
) -> None:
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


async def test_a_killed_process_is_noticed(tmp_path: Path) -> None:
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


async def test_another_boot_id_means_another_clock_and_times_are_converted(
    tmp_path: Path,
) -> None:
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


# Frames survive any cutting of the byte stream; anything else is a clear error.


def feed(reader: FrameReader, data: bytes, piece: int) -> list[Frame]:
    frames: list[Frame] = []
    done = 0
    while done < len(data):
        room = reader.room()
        count = min(len(room), piece, len(data) - done)
        assert count > 0
        room[:count] = data[done : done + count]
        reader.received(count, frames)
        done += count
    return frames


FRAMES = st.lists(
    st.one_of(
        st.builds(Cancel, request_id=st.text(max_size=20)),
        st.builds(Ping, sent_ns=st.integers(0, 2**63 - 1)),
        st.builds(Ask, ask_id=st.integers(0, 2**32), what=st.just("state"), body=st.binary(max_size=5000)),
    ),
    max_size=20,
)


@given(FRAMES, st.integers(1, 9000))
def test_frames_survive_any_cutting(frames: list[Frame], piece: int) -> None:
    assert feed(FrameReader(), bytes_of(frames), piece) == frames


@pytest.mark.parametrize("piece", [1000, 200_000, 10**9])
def test_large_and_small_frames_mix(piece: int) -> None:
    sizes = [0, 262_130, 262_144, 3_000_000, 10, 600_000, 1]
    frames: list[Frame] = [Ask(ask_id=i, what="index", body=b"x" * size) for i, size in enumerate(sizes * 3)]
    assert feed(FrameReader(), bytes_of(frames), piece) == frames


def test_frames_before_a_malformed_one_are_delivered() -> None:
    frames: list[Frame] = []
    data = bytes_of([Cancel(request_id="a"), Cancel(request_id="b")]) + struct.pack("<I", 3) + b"\xc1\xc1\xc1"
    reader = FrameReader()
    reader.room()[: len(data)] = data
    with pytest.raises(TransportError, match="malformed frame of 3 bytes"):
        reader.received(len(data), frames)
    assert frames == [Cancel(request_id="a"), Cancel(request_id="b")]


@pytest.mark.parametrize(
    "payload",
    [
        msgspec.msgpack.encode(["no_such_frame"]),
        msgspec.msgpack.encode(["cancel"]),
        msgspec.msgpack.encode(["cancel", 5]),
        msgspec.msgpack.encode({"type": "cancel", "request_id": "of an older version"}),
        msgspec.msgpack.encode([1, 2]),
        b"",
        b"\xa4abc",
        b"\x92\xa6cancel",
        b"\x92\xa6cancel\xa1\xff",
    ],
)
def test_malformed_frames_are_refused(payload: bytes) -> None:
    with pytest.raises(TransportError, match="malformed"):
        feed(FrameReader(), struct.pack("<I", len(payload)) + payload, 10**6)


def test_a_huge_length_is_refused_before_its_bytes_arrive() -> None:
    with pytest.raises(TransportError, match=str(FRAME_BYTES_MAX)):
        feed(FrameReader(), struct.pack("<I", FRAME_BYTES_MAX + 1), 4)


def test_a_frame_too_large_to_send_is_refused_and_leaves_the_others_whole() -> None:
    writer = FrameWriter()
    writer.add(Cancel(request_id="a"))
    with pytest.raises(TransportError, match="the Ask to send"):
        writer.add(Ask(ask_id=1, what="index", body=b"x" * (FRAME_BYTES_MAX + 1)))
    writer.add(Cancel(request_id="b"))
    assert feed(FrameReader(), bytes(writer.take()), 10**6) == [
        Cancel(request_id="a"),
        Cancel(request_id="b"),
    ]


def test_memory_of_a_large_frame_is_freed() -> None:
    reader = FrameReader()
    small = len(reader.room())
    feed(reader, bytes_of([Ask(ask_id=1, what="index", body=b"x" * 4_000_000)]), 100_000)
    assert len(reader.room()) == small


def test_decoded_frames_do_not_alias_the_buffer() -> None:
    reader = FrameReader()
    first = Result(action_id=1, device="d", status=Status.OK, started_ns=0, ended_ns=1, outputs=(b"one",))
    second = Result(action_id=2, device="d", status=Status.OK, started_ns=0, ended_ns=1, outputs=(b"two",))
    assert feed(reader, bytes_of([first]), 10**6) + feed(reader, bytes_of([second]), 10**6) == [first, second]


def test_text_that_is_no_unicode_is_escaped_and_other_text_is_not() -> None:
    result = Result(
        action_id=1, device="cpu:0", status=Status.MODEL_RAISED, started_ns=1, ended_ns=2,
        message="unknown op \ud800", outputs=(b"\xff",),
    )  # fmt: skip
    numbers = DeviceNumbers(device="cpu:0", numbers={"\udcff": 3})
    frames: list[Frame] = [Cancel(request_id="r1"), result, numbers, Cancel(request_id="r2")]

    found = feed(FrameReader(), bytes_of(frames), 100)

    assert found == [
        Cancel(request_id="r1"),
        msgspec.structs.replace(result, message=r"unknown op \ud800"),
        DeviceNumbers(device="cpu:0", numbers={r"\udcff": 3}),
        Cancel(request_id="r2"),
    ]


# Sockets between our processes are for one user: others are refused by their mode, and by credentials.


NOBODY = 65_534
only_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root can try as another user")


def as_nobody(path: Path) -> int:
    """A process of another user that connects; it exits with an errno, or 100 plus the bytes received."""
    pid = os.fork()
    if not pid:
        try:
            os.setgroups([])
            os.setgid(NOBODY)
            os.setuid(NOBODY)
            with socket.socket(socket.AF_UNIX) as stranger:
                stranger.settimeout(60)
                stranger.connect(os.fspath(path))
                stranger.send(b"\x05\0\0\0hello")
                told = len(stranger.recv(4096))
            os._exit(100 + told)
        except OSError as error:
            turned_away = error.errno in (errno.ECONNRESET, errno.EPIPE)  # EPIPE: before it had spoken
            os._exit(100 if turned_away else min(error.errno or 99, 99))
        finally:
            os._exit(98)
    return pid


def result(pid: int) -> int:
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def open_folder(tmp_path: Path) -> Path:
    """A folder that every user may enter, on the way to it too."""
    folder = Path("/tmp") / f"clockwork-{os.getpid()}-{tmp_path.name[-8:]}"
    folder.mkdir(mode=0o755)
    return folder


def refused(tmp_path: Path, mode: int) -> tuple[int, list[list[Frame]]]:
    """What another user gets from a socket of that mode in an open folder, and what our side received."""
    folder = open_folder(tmp_path)
    path, side = folder / "c.sock", Side()
    found: list[int] = []

    async def main() -> None:
        listener = await side.listen(path)
        path.chmod(mode)
        pid = as_nobody(path)

        def ended() -> bool:
            done, status = os.waitpid(pid, os.WNOHANG)
            if done:
                found.append(os.waitstatus_to_exitcode(status))
            return bool(done)

        await until(ended)
        listener.close()

    try:
        uvloop.run(main())
    finally:
        for each in folder.iterdir():
            each.unlink()
        folder.rmdir()
    return found[0], side.reads


@only_root
def test_another_user_cannot_connect(tmp_path: Path) -> None:
    assert refused(tmp_path, 0o600) == (13, [])


@only_root
def test_another_user_that_connects_is_refused_unread(tmp_path: Path) -> None:
    """Its mode was changed: the peer's credentials are checked all the same, and nothing is sent to it."""
    assert refused(tmp_path, 0o666) == (100, [])


@only_root
def test_our_processes_refuse_a_socket_of_another_user(tmp_path: Path) -> None:
    folder = open_folder(tmp_path)
    folder.chmod(0o777)
    path = folder / "c.sock"
    ready, told = os.pipe()
    pid = os.fork()
    if not pid:
        os.setgroups([])
        os.setgid(NOBODY)
        os.setuid(NOBODY)
        with socket.socket(socket.AF_UNIX) as stranger:
            stranger.bind(os.fspath(path))
            stranger.listen()
            os.write(told, b"x")
            with stranger.accept()[0] as accepted:
                accepted.settimeout(60)
                os._exit(len(accepted.recv(4096)))
    os.read(ready, 1)

    async def main() -> None:
        def nothing(link: Link, *more: object) -> None:
            raise AssertionError

        with pytest.raises(TransportError, match="user"):
            await connect(path, hello(Role.WORKER, "w"), nothing, nothing)

    try:
        uvloop.run(main())
        assert result(pid) == 0
    finally:
        os.close(ready)
        os.close(told)
        path.unlink()
        folder.rmdir()


@only_root
def test_the_folder_of_sockets_is_closed_to_others(tmp_path: Path) -> None:
    with closing(RunDir(str(tmp_path))) as folder:
        assert stat.S_IMODE(folder.path.stat().st_mode) == 0o700


# Clock alignment finds the offset from delays alone, and windows are narrowed by its error.


def unload(window: Window) -> Unload:
    return Unload(action_id=1, device="d", model="m/1", extent=Extent(0, 1), version=1, window=window)


@given(st.lists(st.integers(-1000, 1000), min_size=1, max_size=60), st.integers(1, 8))
def test_the_sliding_minimum_is_the_least_of_the_last_numbers(numbers: list[int], size: int) -> None:
    sliding = SlidingMinimum(size)
    for index, number in enumerate(numbers):
        sliding.add(number)
        assert sliding.least == min(numbers[max(0, index + 1 - size) : index + 1])


@given(
    st.integers(-(10**15), 10**15),
    st.lists(st.tuples(st.integers(1, 10**7), st.integers(1, 10**7)), min_size=1, max_size=30),
)
def test_the_true_offset_lies_within_the_error(offset_ns: int, delays: list[tuple[int, int]]) -> None:
    ours, theirs = ClockAlignment(same_clock=False), ClockAlignment(same_clock=False)
    now_ns = 10**9
    for there_ns, back_ns in delays:
        theirs.observe(now_ns + offset_ns, now_ns + there_ns, ours.least_delta_ns)
        now_ns += there_ns
        ours.observe(now_ns, now_ns + back_ns + offset_ns, theirs.least_delta_ns)
        now_ns += back_ns
    assert ours.aligned
    assert abs(ours.offset_ns - offset_ns) <= ours.error_ns + 1
    assert ours.error_ns <= (min(d for d, _ in delays) + min(d for _, d in delays) + 1) // 2


def test_it_is_not_aligned_before_both_directions_were_seen() -> None:
    alignment = ClockAlignment(same_clock=False)
    assert not alignment.aligned
    alignment.observe(0, 5_000, None)
    assert (alignment.aligned, alignment.offset_ns, alignment.error_ns) == (False, 0, 0)
    alignment.observe(100, 5_090, -4_950)
    assert (alignment.aligned, alignment.offset_ns, alignment.error_ns) == (True, 4_970, 20)


def test_one_clock_needs_no_samples() -> None:
    alignment = ClockAlignment(same_clock=True)
    assert (alignment.aligned, alignment.offset_ns, alignment.error_ns) == (True, 0, 0)


def test_a_drifting_clock_is_followed_once_old_samples_left() -> None:
    alignment = ClockAlignment(same_clock=False, samples=4)
    for sample in range(8):
        offset_ns = 1_000 if sample < 4 else 3_000
        alignment.observe(0, 50 + offset_ns, 50 - offset_ns)
    assert (alignment.offset_ns, alignment.error_ns) == (3_000, 50)


def test_windows_are_shifted_and_narrowed() -> None:
    assert to_local(unload(Window(1_000, 3_000)), 500, 100) == unload(Window(1_600, 3_400))


def test_a_window_shorter_than_the_error_shrinks_to_its_middle() -> None:
    assert to_local(unload(Window(1_000, 1_100)), 0, 5_000) == unload(Window(1_050, 1_050))


def test_times_for_the_controller_are_shifted_back() -> None:
    result = Result(action_id=1, device="d", status=Status.OK, started_ns=1_500, ended_ns=1_700)
    assert to_controller(result, 500) == Result(
        action_id=1, device="d", status=Status.OK, started_ns=1_000, ended_ns=1_200
    )
    request = Request(request_id="r", gateway="g", model="m/1", arrival_ns=1_500, deadline_ns=2_500)
    assert to_controller(request, 500) == Request(
        request_id="r", gateway="g", model="m/1", arrival_ns=1_000, deadline_ns=2_000
    )
    announced = AdmissionQuery(
        announced_id="a", gateway="g", model="m/1", arrival_ns=1_500, deadline_ns=2_500
    )
    assert to_controller(announced, 500) == AdmissionQuery(
        announced_id="a", gateway="g", model="m/1", arrival_ns=1_000, deadline_ns=2_000
    )


def test_soonest_ends_are_shifted_and_refuse_less_by_the_error() -> None:
    ends = {"m/1": SoonestEnd(due_ns=1_000, end_ns=2_000, each_ns=7, other_end_ns=3_000)}
    assert to_local(SoonestEnds(ends=ends, until_ns=4_000), 500, 100) == SoonestEnds(
        ends={"m/1": SoonestEnd(due_ns=1_600, end_ns=2_400, each_ns=7, other_end_ns=3_400)}, until_ns=4_400
    )


def test_since_when_a_model_is_quarantined_is_shifted_and_not_narrowed() -> None:
    quarantined = Quarantined(model="m/1", why="w", since_ns=1_000)
    assert to_local(quarantined, 500, 100) == Quarantined(model="m/1", why="w", since_ns=1_500)


def test_the_end_of_a_quarantine_has_no_time() -> None:
    ended = Quarantined(model="m/1")
    assert to_local(ended, 500, 100) is ended


def test_other_frames_pass_unchanged() -> None:
    frame = Cancel(request_id="r")
    assert to_local(frame, 5, 5) is frame
    assert to_controller(frame, 5) is frame

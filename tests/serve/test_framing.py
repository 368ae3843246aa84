"""Frames survive any cutting of the byte stream; anything else is a clear error."""

from __future__ import annotations

import struct

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from clockwork_serve.errors import TransportError
from clockwork_serve.messages import Ask, Cancel, DeviceNumbers, Frame, Ping, Result, Status
from clockwork_serve.serve.transport import FRAME_BYTES_MAX, FrameReader, FrameWriter
from tests.serve.frames import bytes_of


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
        msgspec.msgpack.encode({"type": "no_such_frame"}),
        msgspec.msgpack.encode({"type": "cancel"}),
        msgspec.msgpack.encode({"type": "cancel", "request_id": 5}),
        msgspec.msgpack.encode([1, 2]),
        b"",
        b"\xa4abc",
        b"\x81\xa4type\xa6cancel",
        b"\x82\xa4type\xa6cancel\xaarequest_id\xa1\xff",
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

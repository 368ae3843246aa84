"""Arbitrary input, split at arbitrary places: HTTP connections, key files, frames between processes."""

from __future__ import annotations

import tempfile
from itertools import pairwise
from pathlib import Path

from hypothesis import given
from hypothesis import strategies as st

from clockwork_serve.errors import ConfigError, TransportError
from clockwork_serve.messages import Cancel, Frame
from clockwork_serve.serve.gateway.access import KeyRing
from clockwork_serve.serve.http.connection import DIRECT_BYTES
from clockwork_serve.serve.transport import FrameReader
from tests.serve.http.any_bytes import answers
from tests.serve.links import bytes_of

CHUNKED = b"POST /c HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n"
LARGE = bytes(range(256)) * 300
ONE = st.sampled_from(
    [
        b"GET /v2 HTTP/1.1\r\nHost: h\r\n\r\n",
        b"GET /v2 HTTP/1.0\r\nConnection: keep-alive\r\n\r\n",
        b"POST /i HTTP/1.1\r\nInference-Header-Content-Length: 7\r\nContent-Length: 12\r\n\r\nhello world!",
        b"POST /l HTTP/1.1\r\nContent-Length: %d\r\n\r\n%s" % (len(LARGE), LARGE),
        b"POST /s HTTP/1.1\r\nContent-Length: 20000\r\n\r\n" + LARGE[:20_000],
        CHUNKED + b"5\r\nhello\r\n6;a=b\r\n world\r\n0\r\nT: t\r\n\r\n",
        CHUNKED + b"1\r\na\r\n" * 3000 + b"0\r\n\r\n",
        CHUNKED + b"%x\r\n%s\r\n0\r\n\r\n" % (len(LARGE), LARGE),
        b"POST /e HTTP/1.1\r\nExpect: 100-continue\r\nContent-Length: 2\r\n\r\n{}",
        b"GET /u HTTP/1.1\r\nConnection: Upgrade\r\nUpgrade: h2c\r\n\r\n",
        b"CONNECT a:1 HTTP/1.1\r\n\r\n",
        b"POST /u HTTP/1.1\r\nConnection: Upgrade\r\nUpgrade: x\r\nContent-Length: %d\r\n\r\n%s"
        % (len(LARGE), LARGE),
        CHUNKED.replace(b"\r\n\r\n", b"\r\nUpgrade: x\r\nConnection: Upgrade\r\n\r\n")
        + b"2\r\n{}\r\n0\r\n\r\n",
        b"GET /close HTTP/1.1\r\nConnection: close\r\n\r\n",
        b"POST /n HTTP/1.1\r\nContent-Length: " + b"0" * 5000 + b"2\r\n\r\n{}",
        b"POST /t HTTP/1.1\r\nContent-Length: 200001\r\n\r\n",
        b"POST /x HTTP/1.1\r\nContent-Length: 2\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
        b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
        b"nonsense\r\n\r\n",
    ]
)


class Conversation:
    def __init__(self, sent: bytes, cuts: list[int]) -> None:
        self.sent = sent
        self.pieces = [sent[start:end] for start, end in pairwise([0, *cuts, len(sent)])]

    def __repr__(self) -> str:
        return f"{[(len(piece), piece[:100]) for piece in self.pieces]}"


@st.composite
def conversations(draw: st.DrawFn) -> Conversation:
    """A few requests in a row, perhaps with a few bytes changed or lost, and where to split them."""
    sent = bytearray(b"".join(draw(st.lists(ONE, min_size=1, max_size=5))))
    heads = min(len(sent), 4000) - 1
    for _ in range(draw(st.integers(0, 3))):
        at = draw(st.integers(0, heads))
        sent[at : at + draw(st.integers(0, 2))] = draw(st.binary(max_size=2))
    cuts = draw(st.lists(st.integers(0, len(sent)), max_size=30))
    near = draw(st.lists(st.integers(0, min(len(sent), 300)), max_size=30))
    return Conversation(bytes(sent), sorted({*cuts, *near}))


@given(conversations())
def test_responses_do_not_depend_on_how_requests_are_split(conversation: Conversation) -> None:
    assert answers(conversation.pieces) == answers([conversation.sent])


@given(st.lists(ONE, min_size=1, max_size=2), st.integers(2, 4))
def test_a_repeated_request_is_parsed_like_the_first(some: list[bytes], times: int) -> None:
    assert answers(some * times) == answers([b"".join(some * times)])


@given(st.lists(ONE, min_size=1, max_size=4))
def test_an_upgrade_that_a_client_offers_changes_nothing(some: list[bytes]) -> None:
    """As ``curl --http2`` and Java's client do, whose next requests on that connection are HTTP/1.1, too."""
    plain = [one for one in some if b"CONNECT" not in one]
    offer = (
        b" HTTP/1.1\r\nUpgrade: h2c\r\nConnection: Upgrade, HTTP2-Settings\r\nHTTP2-Settings: AAMAAABk\r\n"
    )
    offering = [one.replace(b" HTTP/1.1\r\n", offer, 1) for one in plain]
    assert answers(offering) == answers(plain)
    assert answers([b"".join(offering)]) == answers([b"".join(plain)])


@given(st.lists(st.binary(max_size=2000), max_size=5))
def test_a_connection_survives_arbitrary_bytes(pieces: list[bytes]) -> None:
    answers(pieces)
    answers([b"POST /l HTTP/1.1\r\nContent-Length: %d\r\n\r\n" % (DIRECT_BYTES + 1), *pieces])
    answers([CHUNKED, *pieces])


@given(
    st.one_of(
        st.binary(max_size=300), st.text(max_size=300).map(lambda text: text.encode("utf-8", "replace"))
    )
)
def test_a_key_file_is_valid_or_rejected(content: bytes) -> None:
    good = b'[[keys]]\nname = "a"\nsha256 = "%s"\nmay = ["infer"]\n' % (b"0" * 64)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "keys.toml"
        for text in (content, good + content, good[: len(content)] + content):
            path.write_bytes(text)
            path.chmod(0o600)
            try:
                KeyRing(str(path))
            except ConfigError as error:
                refused = str(error)
                assert refused.startswith("api_keys: expected")


@given(st.binary(max_size=200), st.booleans(), st.integers(1, 50))
def test_arbitrary_bytes_are_frames_or_rejected_however_they_are_split(
    data: bytes, framed: bool, piece: int
) -> None:
    content = bytes_of([Cancel(request_id="a")]) + (len(data).to_bytes(4, "little") if framed else b"") + data

    def read(step: int) -> tuple[list[Frame], str]:
        reader, frames = FrameReader(), list[Frame]()
        try:
            for at in range(0, len(content), step):
                part = content[at : at + step]
                reader.room()[: len(part)] = part
                reader.received(len(part), frames)
        except TransportError as error:
            return frames, str(error)
        return frames, ""

    assert read(piece) == read(len(content))
    assert read(piece)[0][0] == Cancel(request_id="a")

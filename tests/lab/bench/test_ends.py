"""How responses of different servers are named."""

from __future__ import annotations

import pytest

from clockwork_lab.bench.records import REASONS_MAX, End, Ends, Kind


def ended(status: int, body: bytes, head: bytes = b"") -> tuple[End, int | None]:
    told: dict[int, End] = {}
    code, wait_ns = Ends(told.__setitem__).http(status, head, body)
    return told[code], wait_ns


@pytest.mark.parametrize(
    ("status", "body", "kind", "reason"),
    [
        (429, b'{"error":"x","outcome":"rejected","reason":"queue_full"}', Kind.REJECTED, "429 queue_full"),
        (503, b'{"error":"x","outcome":"rejected","reason":"late"}', Kind.REJECTED, "503 late"),
        (503, b'{"outcome":"expired","reason":"late"}', Kind.EXPIRED, "503 late"),  # with Triton's codes
        (503, b'{"error":"Request timeout expired"}', Kind.REJECTED, "503 Request timeout expired"),
        (504, b'{"outcome":"expired","reason":"late"}', Kind.EXPIRED, "504 late"),
        (408, b"", Kind.EXPIRED, "408"),
        (500, b"<html>Oops 17.5</html>", Kind.FAILED, "500 <html>Oops #</html>"),
        (404, b'{"detail":"Not Found"}', Kind.FAILED, "404 Not Found"),
        (400, b"[1,2]", Kind.FAILED, "400 [#,#]"),
        (429, b"\xff\xfe", Kind.REJECTED, "429 \ufffd\ufffd"),
        (302, b"", Kind.FAILED, "302"),
    ],
)
def test_a_response_has_a_kind_and_the_servers_words(
    status: int, body: bytes, kind: Kind, reason: str
) -> None:
    assert ended(status, body)[0] == End(kind, reason)


@pytest.mark.parametrize(
    ("head", "body", "wait_ns"),
    [
        (b"", b'{"retry_after_ms": 12.5}', 12_500_000),
        (b"HTTP/1.1 429 X\r\nRetry-After: 2\r\n\r\n", b"", 2_000_000_000),
        (b"HTTP/1.1 429 X\r\nretry-after:3\r\n\r\n", b'{"retry_after_ms": 7}', 7_000_000),
        (b"HTTP/1.1 429 X\r\nRetry-After: Fri, 31 Dec 1999 23:59:59 GMT\r\n\r\n", b"", None),
        (b"", b'{"retry_after_ms": "soon"}', None),
        (b"", b'{"retry_after_ms": -1}', None),
        (b"", b'{"retry_after_ms": 1e300}', None),
    ],
)
def test_how_long_to_stay_away(head: bytes, body: bytes, wait_ns: int | None) -> None:
    assert ended(429, body, head)[1] == wait_ns


@pytest.mark.parametrize(
    ("trailers", "end"),
    [
        (
            {"grpc-status": "8", "clockwork-reason": "queue_full"},
            End(Kind.REJECTED, "RESOURCE_EXHAUSTED queue_full"),
        ),
        ({"grpc-status": "4"}, End(Kind.EXPIRED, "DEADLINE_EXCEEDED")),
        ({"grpc-status": "14", "clockwork-outcome": "expired"}, End(Kind.EXPIRED, "UNAVAILABLE")),
        ({"grpc-status": "13", "grpc-message": "a%20b"}, End(Kind.FAILED, "INTERNAL a b")),
        ({"grpc-status": "99"}, End(Kind.FAILED, "no grpc-status")),
        ({":status": "404"}, End(Kind.FAILED, "no grpc-status")),
    ],
)
def test_a_call_has_a_kind_and_the_servers_words(trailers: dict[str, str], end: End) -> None:
    told: dict[int, End] = {}
    assert told == {}
    code, _ = Ends(told.__setitem__).grpc(trailers)
    assert told[code] == end


def test_a_server_that_never_says_the_same_twice_is_cut_short() -> None:
    told: dict[int, End] = {}
    ends = Ends(told.__setitem__)
    letters = [f"{a}{b}" for a in "abcdefghijklmnopqrst" for b in "abcdefghijklmnopqrst"]
    codes = {ends.code(Kind.FAILED, word) for word in letters}
    assert len(codes) <= REASONS_MAX
    assert End(Kind.FAILED, "other") in told.values()
    assert ends.code(Kind.FAILED, letters[0]) == ends.code(Kind.FAILED, letters[0])

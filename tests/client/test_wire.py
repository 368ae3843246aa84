"""HTTP/1.1 as bytes: addresses, requests, and responses however they arrive."""

from __future__ import annotations

import pytest

from clockwork_client import Invalid
from clockwork_client.wire import DIRECT_BYTES, JOIN_BYTES, Address, Malformed, ResponseReader


def address(url, api_key=None):
    return Address.of(url, api_key, "tests")


@pytest.mark.parametrize(
    ("url", "host", "port", "tls", "base"),
    [
        ("localhost", "localhost", 8000, False, ""),
        ("127.0.0.1:9", "127.0.0.1", 9, False, ""),
        ("http://h", "h", 80, False, ""),
        ("https://h", "h", 443, True, ""),
        ("https://h:8443/models/", "h", 8443, True, "/models"),
        ("[::1]:9", "::1", 9, False, ""),
    ],
)
def test_an_address_is_read(url, host, port, tls, base):
    found = address(url)

    assert (found.host, found.port, found.tls, found.base) == (host, port, tls, base)


@pytest.mark.parametrize(
    "url",
    ["", "ftp://h", "http://", "http://h:x", "h:99999", "http://h?a=b", "http://me:word@h", "http://h#x"],
)
def test_a_wrong_address_is_refused(url):
    with pytest.raises(Invalid) as caught:
        address(url)

    assert caught.value.field == "parameter 'url'"


@pytest.mark.parametrize("api_key", ["", "a b", "a\r\nX: y", "ä"])
def test_a_key_that_would_break_a_header_is_refused_and_not_shown(api_key):
    with pytest.raises(Invalid, match="api_key") as caught:
        address("h", api_key)

    assert not api_key or api_key not in str(caught.value)


def test_a_request_is_whole():
    (message,) = address("[::1]:9/base", "key").message("POST", "/v2", b"x-slo-ms: 5\r\n", (b"ab", b"cd"))

    assert message == (
        b"POST /base/v2 HTTP/1.1\r\nHost: [::1]:9\r\nUser-Agent: tests\r\nAuthorization: Bearer key\r\n"
        b"Content-Length: 4\r\nx-slo-ms: 5\r\n\r\nabcd"
    )


def test_a_large_request_is_not_copied():
    large = bytes(JOIN_BYTES + 1)
    message = address("h").message("POST", "/", b"", (b"", large))

    assert message[-1] is large


def feed(reader, data, step):
    """All responses in ``data``, which arrives in pieces of ``step`` bytes."""
    found = []
    view = memoryview(data)
    while view:
        buffer = reader.get_buffer()
        size = min(step, len(buffer), len(view))
        buffer[:size] = view[:size]
        view = view[size:]
        response = reader.received(size)
        if response is not None:
            found.append(response)
            reader.expect()
    return found


PLAIN = b"HTTP/1.1 429 Too Many Requests\r\nRetry-After: 1\r\nContent-Length: 5\r\n\r\nhello"


@pytest.mark.parametrize("step", [1, 2, 7, 1000])
@pytest.mark.parametrize(
    ("data", "keep_alive"),
    [
        (PLAIN, True),
        (b"HTTP/1.1 100 Continue\r\nX: y\r\n\r\n" + PLAIN, True),
        (PLAIN.replace(b"Retry", b"Connection: close\r\nRetry"), False),
        (PLAIN.replace(b"HTTP/1.1", b"HTTP/1.0"), False),
        (
            PLAIN.replace(b"Content-Length: 5", b"Transfer-Encoding: chunked").replace(
                b"hello", b"2\r\nhe\r\n3\r\nllo\r\n0\r\n\r\n"
            ),
            True,
        ),
    ],
    ids=["plain", "after an interim one", "the last one", "of an old server", "in chunks"],
)
def test_a_response_is_read_in_whatever_pieces_it_comes(data, keep_alive, step):
    (response,) = feed(ResponseReader(), data, step)

    assert (response.status, response.body, response.keep_alive) == (429, b"hello", keep_alive)
    assert response.headers["retry-after"] == "1"


@pytest.mark.parametrize("step", [1000, 60_000, 10_000_000])
def test_large_and_small_responses_follow_each_other(step):
    large = bytes(range(256)) * (DIRECT_BYTES // 128)
    head = b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % len(large)
    reader = ResponseReader()

    for data, body in ((head + large, large), (PLAIN, b"hello"), (head + large, large)):
        (response,) = feed(reader, data, step)
        assert bytes(response.body) == body
        assert response.keep_alive


def test_a_response_without_a_body_is_whole():
    assert feed(ResponseReader(), b"HTTP/1.1 204 No Content\r\n\r\n", 1000)[0].body == b""


def test_a_connection_on_which_more_came_than_was_asked_for_is_not_used_again():
    other = b"HTTP/1.1 200 OK\r\nRetry-After: 2\r\nContent-Length: 5\r\n\r\nother"
    for more in (other, other[:20], b"\r\n" + other, b"\0", other.replace(b"Length: 5", b"Length: 500000")):
        (response,) = feed(ResponseReader(), PLAIN + more, 1000)

        assert (response.status, response.body, response.keep_alive) == (429, b"hello", False)
        assert response.headers["retry-after"] == "1"


@pytest.mark.parametrize(
    "data", [b"SSH-2.0-x\r\n", b"HTTP/1.1 101 S\r\nUpgrade: x\r\nConnection: upgrade\r\n\r\n", b"\0\0\0\0"]
)
def test_what_is_no_response_is_said_so(data):
    with pytest.raises(Malformed):
        feed(ResponseReader(), data, 1000)

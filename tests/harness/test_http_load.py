"""The load client against a small server that misbehaves on request."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Awaitable, Callable

from harness.http_load import Report, Shot, closed_loop, header_of, http_message, infer_message, open_loop

Serve = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]

OK = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok"


async def reply(
    reader: asyncio.StreamReader, writer: asyncio.StreamWriter, answers: dict[str, bytes]
) -> None:
    """Answer each request by its path; an empty answer closes the connection."""
    try:
        while True:
            head = (await reader.readuntil(b"\r\n\r\n")).decode()
            length = next(
                int(line.split(":")[1]) for line in head.split("\r\n") if line.startswith("Content-Length")
            )
            await reader.readexactly(length)
            answer = answers[head.split()[1]]
            if not answer:
                break
            # In two pieces, as TCP may do.
            writer.write(answer[:10])
            await writer.drain()
            await asyncio.sleep(0.001)
            writer.write(answer[10:])
    except asyncio.IncompleteReadError:
        pass
    writer.close()


async def against(answers: dict[str, bytes], work: Callable[[str], Awaitable[Report]]) -> Report:
    server = await asyncio.start_server(lambda r, w: reply(r, w, answers), "127.0.0.1", 0)
    async with server:
        host, port = server.sockets[0].getsockname()
        return await work(f"http://{host}:{port}")


async def run_open(answers: dict[str, bytes], paths: list[str]) -> Report:
    def work(url: str) -> Awaitable[Report]:
        shots = [
            Shot(index * 2_000_000, http_message(url, "GET", path), path) for index, path in enumerate(paths)
        ]
        return open_loop(url, shots, connections=1)

    return await against(answers, work)


async def test_every_request_gets_a_sample() -> None:
    report = await run_open({"/a": OK}, ["/a"] * 20)
    assert report.ends() == {"200": 20}
    assert report.unexpected_bytes == 0
    assert all(sample.due_ns <= sample.sent_ns <= sample.done_ns for sample in report.samples)
    assert all(sample.body == b"ok" for sample in report.samples)


async def test_a_refusal_is_named_by_its_reason() -> None:
    body = b'{"error":"no","reason":"would_miss_deadline"}'
    answer = b"HTTP/1.1 429 No\r\nClockwork-Request-Id: g-1\r\nContent-Length: %d\r\n\r\n" % len(body) + body
    report = await run_open({"/a": answer}, ["/a"])
    assert report.ends() == {"429 would_miss_deadline": 1}
    assert header_of(report.samples[0], "clockwork-request-id") == "g-1"
    assert header_of(report.samples[0], "retry-after") == ""


async def test_a_connection_that_ends_is_a_request_without_response() -> None:
    report = await run_open({"/a": OK, "/gone": b""}, ["/a", "/gone", "/a"])
    assert report.unanswered == 1
    assert report.ends() == {"200": 2, "0": 1}


async def test_a_second_response_is_noticed() -> None:
    report = await run_open({"/a": OK + OK}, ["/a"])
    assert report.unexpected_bytes == len(OK)


async def test_a_connection_that_is_refused_is_tried_again() -> None:
    """A gateway that is killed under load takes its listening socket with it, for a moment."""
    with socket.socket() as held:
        held.bind(("127.0.0.1", 0))
        port = held.getsockname()[1]
        url = f"http://127.0.0.1:{port}"
        message = http_message(url, "GET", "/a")
        load = asyncio.create_task(closed_loop(url, lambda _: message, requests=20, connections=2))
        await asyncio.sleep(0.1)
        assert not load.done()
    server = await asyncio.start_server(lambda r, w: reply(r, w, {"/a": OK}), "127.0.0.1", port)
    async with server:
        assert (await load).ends() == {"200": 20}


async def test_a_closed_loop_sends_each_number_once() -> None:
    sent: list[int] = []

    def work(url: str) -> Awaitable[Report]:
        def message(index: int) -> bytes:
            sent.append(index)
            return http_message(url, "POST", "/a", b"body")

        return closed_loop(url, message, requests=50, connections=5)

    report = await against({"/a": OK}, work)
    assert sorted(sent) == list(range(50))
    assert report.ends() == {"200": 50}


def test_an_inference_request_says_where_its_tensors_are() -> None:
    message = infer_message("http://127.0.0.1:8000", "m", [("x", "FP32", (1, 2), b"12345678")], slo_ms=50)
    head, _, body = message.partition(b"\r\n\r\n")
    assert b"POST /v2/models/m/infer HTTP/1.1" in head
    assert b"x-slo-ms: 50" in head
    length = int(head.split(b"Inference-Header-Content-Length: ")[1].split(b"\r\n")[0])
    assert body[length:] == b"12345678"
    assert b'"binary_data_size": 8' in body[:length]

"""Our frames of HTTP/2 against grpcio's own server."""

from __future__ import annotations

import contextlib
import socket
import struct
import threading
import time
from pathlib import Path

import pytest

from clockwork_lab.bench.server import Unreachable
from clockwork_serve.errors import ConfigError
from tests.lab.bench.loads import CLOSED, STEADY, ran
from tests.lab.bench.scripted_grpc import scripted_grpc
from tests.timing import Timing

pytestmark = pytest.mark.system  # a run starts processes, and takes seconds

LATE = ("ok", 2.5)
MISS = ("RESOURCE_EXHAUSTED", "it would take 12.5 ms", (("clockwork-reason", "would_miss_deadline"),))
FULL = ("UNAVAILABLE", "Exceeds maximum queue size", ())
TIME = ("DEADLINE_EXCEEDED", "late", (("clockwork-outcome", "expired"),))
BUG = ("INTERNAL", "größer als \\ 100 %", ())
MIXED = ["ok", LATE, MISS, "ok", FULL, TIME, "ok", BUG]


def mixed(number: int) -> object:
    return MIXED[number % len(MIXED)]


@pytest.mark.parametrize("processes", [1, 2])
def test_every_end_is_counted_as_the_server_did_it(tmp_path: Path, processes: int) -> None:
    with scripted_grpc(mixed) as played:
        report = ran(
            tmp_path, played.url, STEADY.replace("100", "80"), protocol="grpc", processes=processes,
            deadline="none",
        ).report  # fmt: skip
    done, total = played.done, report.total
    assert total.offered == 80 == sum(done.values())
    assert total.good == done["ok"]
    assert total.late == done[LATE]
    assert {(one.kind, one.reason): one.count for one in report.reasons} == {
        ("rejected", "RESOURCE_EXHAUSTED would_miss_deadline"): done[MISS],
        ("rejected", "UNAVAILABLE Exceeds maximum queue size"): done[FULL],
        ("expired", "DEADLINE_EXCEEDED late"): done[TIME],
        ("failed", "INTERNAL größer als \\ # %"): done[BUG],
    }


def test_tensors_of_megabytes_pass_in_both_directions(tmp_path: Path) -> None:
    size = 2_500_000
    with scripted_grpc(lambda number: ("large", size), shape=(1, size // 4)) as played:
        text = STEADY.replace("100", "20")
        report = ran(tmp_path, played.url, text, protocol="grpc", deadline="none", drain_s=20.0).report
    assert report.total.answers.count == 20, report.reasons
    assert report.total.bytes_per_s >= 20 * size
    assert {len(one.raw_input_contents[0]) for one in played.requests} == {size}


@pytest.mark.parametrize("deadline", ["grpc", "timeout", "header", "none"])
def test_calls_say_their_deadline_as_told(tmp_path: Path, deadline: str) -> None:
    with scripted_grpc() as played:
        report = ran(
            tmp_path, played.url, STEADY.replace("100", "10"), protocol="grpc", deadline=deadline,
            headers=(("Authorization", "Bearer key"),),
        ).report  # fmt: skip
    assert report.total.good == 10
    parameters = played.requests[0].parameters
    assert played.metadata[0]["authorization"] == "Bearer key"
    assert (played.left_s[0] is not None and 0.2 < played.left_s[0] <= 2.0) == (deadline == "grpc")
    assert (parameters["timeout"].int64_param if "timeout" in parameters else 0) == 2_000_000 * (
        deadline == "timeout"
    )
    assert ("slo_ms" in parameters) == (deadline == "header")


def test_no_more_calls_are_open_than_the_server_takes(tmp_path: Path) -> None:
    with scripted_grpc(lambda number: ("ok", 0.02), options=[("grpc.max_concurrent_streams", 3)]) as played:
        report = ran(tmp_path, played.url, protocol="grpc", connections=1, drain_s=10.0).report
    assert report.total.offered == report.total.answers.count == 100, report.reasons
    assert played.most_at_once <= 3


def _frame(kind: int, flags: int, stream: int, content: bytes = b"") -> bytes:
    return len(content).to_bytes(3, "big") + bytes((kind, flags)) + stream.to_bytes(4, "big") + content


def _passed_on(one: socket.socket, other: socket.socket) -> None:
    with contextlib.suppress(OSError):
        while data := one.recv(65536):
            other.sendall(data)


def _one_at_a_time(listener: socket.socket, metadata_port: int) -> None:
    """A server that allows two concurrent calls and refuses the second; another one serves metadata."""
    with contextlib.ExitStack() as kept:
        for _ in range(2):  # is it there, and what does the model take?
            first, told = listener.accept()[0], socket.create_connection(("127.0.0.1", metadata_port))
            for pair in ((first, told), (told, first)):
                kept.enter_context(pair[0])
                threading.Thread(target=_passed_on, args=pair, daemon=True).start()
        _refuse_the_second(listener.accept()[0])


def _refuse_the_second(client: socket.socket) -> None:
    with client, client.makefile("rb") as received:
        received.read(len(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"))
        client.sendall(_frame(4, 0, 0, struct.pack(">HI", 3, 2)))
        busy, lock = [0], threading.Lock()

        def answer(stream: int) -> None:
            time.sleep(0.02)
            trailers = b"\x88" + b"\0\x0bgrpc-status\x010"  # :status 200, and a literal
            with lock:
                client.sendall(_frame(1, 5, stream, trailers))
                busy[0] -= 1

        while head := received.read(9):
            kind, stream = head[3], int.from_bytes(head[5:], "big")
            received.read(int.from_bytes(head[:3], "big"))
            with lock:
                if kind == 1 and busy[0]:
                    client.sendall(_frame(3, 0, stream, (7).to_bytes(4, "big")))
                elif kind == 1:
                    busy[0] += 1
                    threading.Thread(target=answer, args=(stream,), daemon=True).start()


def test_a_call_that_the_server_refuses_unseen_waits_until_another_ends(tmp_path: Path) -> None:
    with scripted_grpc() as played, socket.create_server(("127.0.0.1", 0)) as listener:
        port = int(played.url.rpartition(":")[2])
        server = threading.Thread(target=_one_at_a_time, args=(listener, port), daemon=True)
        server.start()
        url = f"127.0.0.1:{listener.getsockname()[1]}"
        report = ran(tmp_path, url, protocol="grpc", connections=1, drain_s=10.0).report
        server.join(60)

    assert report.total.offered == report.total.answers.count == 100, report.reasons


def test_abandoned_calls_are_cancelled(tmp_path: Path) -> None:
    with scripted_grpc(lambda number: "never" if number % 2 else "ok") as played:
        report = ran(
            tmp_path, played.url, STEADY.replace("100", "30"), protocol="grpc", deadline="none", abandon=True
        ).report  # fmt: skip
        until = time.monotonic() + 20
        while played.most_at_once and time.monotonic() < until and len(played.requests) < 30:
            time.sleep(0.01)
    assert report.total.abandoned == played.done["never"] == 15
    assert report.total.good == 15


def test_closed_clients_come_back_when_the_server_says(tmp_path: Path, timing: Timing) -> None:
    refusal = ("RESOURCE_EXHAUSTED", "no", (("clockwork-retry-after-ms", "250"),))
    with scripted_grpc(lambda number: refusal) as played:
        total = ran(tmp_path, played.url, CLOSED + 'retry = "retry_after"', protocol="grpc").report.total
    assert total.offered == total.rejected == played.done[refusal] <= 10
    with timing.judged():
        assert total.offered >= 4


def test_a_server_that_leaves_fails_calls_and_not_the_run(tmp_path: Path) -> None:
    def answer(number: int) -> tuple[str, float]:
        if number == 200:
            threading.Thread(
                target=played.server.stop, args=(20,)
            ).start()  # when those that it has are answered
        return "ok", 0.05

    with scripted_grpc(answer) as played:
        report = ran(
            tmp_path, played.url, STEADY.replace("seconds = 1", "seconds = 6"), protocol="grpc"
        ).report
    total = report.total
    assert total.offered == 600
    assert total.good + total.late > 50
    assert total.good + total.late + total.reset + total.broken + total.rejected + total.failed == 600
    assert any("no connection: ECONNREFUSED" in one.reason for one in report.reasons)


def test_who_is_no_grpc_server_or_lacks_the_model_is_named(tmp_path: Path) -> None:
    with scripted_grpc() as played, pytest.raises(ConfigError, match="which does not have other"):
        ran(tmp_path, played.url, protocol="grpc", models=("other",))
    with pytest.raises(Unreachable, match="refused"):
        ran(tmp_path, played.url, protocol="grpc")

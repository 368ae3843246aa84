"""Arrival times of gRPC messages: gaps of the thread that takes them, and the kernel's receipts."""

from __future__ import annotations

import socket
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from typing import cast

import pytest

from clockwork_serve.serve.grpc.arrivals import AFTER_NS, GAP_NS, ArrivalTimes, Receipts
from clockwork_serve.units import NS_PER_MS, ms
from tests.timing import Timing

PEER = "ipv4:192.0.2.1:4321"


class FakeReceipts:
    """Ages to report, by peer."""

    def __init__(self, **ages_ms: int) -> None:
        self.ages_ms = ages_ms

    def age_ns(self, peer: str) -> int:
        return ms(self.ages_ms.get(peer, 0))


def arrivals(*beats_ms: int, begin_ms: int = 0, **ages_ms: int) -> ArrivalTimes:
    found = ArrivalTimes(ms(begin_ms), cast("Receipts", FakeReceipts(**ages_ms)))
    for beat_ms in beats_ms:
        found.beat(ms(beat_ms))
    return found


def arrival_ns(found: ArrivalTimes, now_ns: int, peer: str = PEER, *, awaited: bool = True) -> int:
    return found.arrival_ns(now_ns, lambda: peer, awaited=awaited)


def test_without_a_gap_a_message_arrived_when_it_was_read() -> None:
    assert arrival_ns(arrivals(5, 10, 15), ms(17)) == ms(17)


def test_a_message_after_a_gap_counts_from_its_start() -> None:
    found = arrivals(5, 10, 1010)
    assert arrival_ns(found, ms(1010)) == ms(10)
    found.beat(ms(1015))
    assert arrival_ns(found, ms(1040)) == ms(10), "the core reads what waited in its sockets"
    assert arrival_ns(found, ms(1010) + AFTER_NS[1]) == ms(1010) + AFTER_NS[1]


@pytest.mark.parametrize(("gap_ms", "counts_ms"), [(12, 12), (30, 30), (500, 50)])
def test_a_short_gap_counts_for_a_short_time(gap_ms: int, counts_ms: int) -> None:
    found = arrivals(5, 5 + gap_ms)
    end_ns = ms(5 + gap_ms + counts_ms)
    assert arrival_ns(found, end_ns - 1) == ms(5)
    assert arrival_ns(found, end_ns) == end_ns


def test_an_interval_within_the_limit_is_no_gap() -> None:
    found = arrivals()
    found.beat(GAP_NS)
    assert arrival_ns(found, GAP_NS) == GAP_NS


def test_two_gaps_with_hardly_anything_between_them_are_one() -> None:
    assert arrival_ns(arrivals(5, 205, 210, 400), ms(401)) == ms(5)


def test_a_message_counts_from_when_the_kernel_received_its_last_bytes() -> None:
    found = arrivals(305, begin_ms=300, old=200, new=8)
    assert arrival_ns(found, ms(306), "new") == ms(298)
    assert arrival_ns(found, ms(307), "old") == ms(107)
    assert arrival_ns(found, ms(310)) == ms(107), "others may have waited as long for the core's threads"
    assert arrival_ns(found, ms(307) + AFTER_NS[1]) == ms(307) + AFTER_NS[1]


def test_the_kernel_is_asked_about_one_message_a_millisecond() -> None:
    found = arrivals(305, begin_ms=300, old=8)
    assert arrival_ns(found, ms(306)) == ms(306)
    assert arrival_ns(found, ms(307) - 1, "old") == ms(307) - 1
    assert arrival_ns(found, ms(307), "old") == ms(299)


def test_a_message_that_waited_to_be_asked_for_says_nothing_of_others() -> None:
    found = arrivals(305, begin_ms=300, old=200)
    assert arrival_ns(found, ms(306), "old", awaited=False) == ms(106)
    assert arrival_ns(found, ms(307)) == ms(307)


def test_receipts_within_a_gap_do_not_make_a_message_younger() -> None:
    found = arrivals(5, 1005, new=1)
    assert arrival_ns(found, ms(1006), "new") == ms(5)
    found = arrivals(205, 1205, begin_ms=200, old=1150)
    assert arrival_ns(found, ms(1206), "old") == ms(56)
    assert arrival_ns(found, ms(1207)) == ms(56)


@contextmanager
def connected(listens: str, host: str) -> Iterator[tuple[socket.socket, socket.socket, Receipts, str]]:
    """A client's socket, the accepted one, the receipts of its port, and the client's address."""
    family, kind = (socket.AF_INET6, "ipv6") if ":" in host else (socket.AF_INET, "ipv4")
    try:
        server = socket.create_server((listens, 0), family=family)
    except OSError:
        pytest.skip(f"this machine has no address {listens}")
    receipts = Receipts(listens, server.getsockname()[1])
    with closing(receipts), server, socket.create_connection((host, server.getsockname()[1])) as client:
        accepted, address = server.accept()
        with accepted:
            yield client, accepted, receipts, f"{kind}:{quote(address[0])}:{address[1]}"


def quote(address: str) -> str:
    return f"%5B{address}%5D" if ":" in address else address


@pytest.mark.parametrize(
    ("listens", "host"),
    [("127.0.0.1", "127.0.0.1"), ("0.0.0.0", "127.0.0.1"), ("127.0.0.2", "127.0.0.2"), ("::1", "::1")],
)
def test_the_kernel_reports_when_a_connection_received_bytes(listens: str, host: str, timing: Timing) -> None:
    with connected(listens, host) as (client, accepted, receipts, peer):
        begin_ns = time.monotonic_ns()
        client.send(b"x")
        accepted.recv(1)
        time.sleep(0.1)
        age_ns = receipts.age_ns(peer)
        assert 0 < age_ns <= time.monotonic_ns() - begin_ns, "never older than it is"
        with timing.judged():
            assert age_ns > 80 * NS_PER_MS
        sent_ns = time.monotonic_ns()
        client.send(b"x")
        accepted.recv(1)
        assert receipts.age_ns(peer) <= time.monotonic_ns() - sent_ns


def test_a_tick_of_the_kernel_is_taken_off(monkeypatch: pytest.MonkeyPatch) -> None:
    with connected("127.0.0.1", "127.0.0.1") as (_, _, receipts, peer):
        monkeypatch.setattr(receipts, "_tick_ns", ms(4))
        for quiet_ms, age_ms in ((52, 48), (4, 0), (0, 0)):
            monkeypatch.setattr("clockwork_serve.serve.grpc.arrivals._quiet_ms", lambda *_, at=quiet_ms: at)
            assert receipts.age_ns(peer) == ms(age_ms)


def test_an_answer_of_the_kernel_that_is_lost_is_not_taken_for_the_next() -> None:
    with connected("127.0.0.1", "127.0.0.1") as (client, accepted, receipts, peer):
        client.send(b"x")
        accepted.recv(1)
        time.sleep(0.05)
        kernel = receipts._kernel
        assert kernel is not None
        receipts._kernel = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)  # to send on it fails
        assert receipts.age_ns(peer) == 0
        assert receipts.age_ns(peer) > 0
        kernel.close()


def test_a_connection_that_is_unknown_or_gone_has_age_0() -> None:
    with connected("127.0.0.1", "127.0.0.1") as (client, _, receipts, peer):
        client.send(b"x")
        time.sleep(0.05)
        for other in (
            "ipv4:127.0.0.1:1",
            "ipv4:127.0.0.1",
            "ipv4:nobody:80",
            "unix:/tmp/x",
            "unix:",
            "",
            peer[:-1],
        ):
            assert receipts.age_ns(other) == 0, other
        receipts.close()
        assert receipts.age_ns(peer) == 0


def test_a_system_that_cannot_be_asked_reports_age_0(monkeypatch: pytest.MonkeyPatch) -> None:
    class NoNetlink(socket.socket):
        def __init__(self, *args: int, **kwargs: int) -> None:
            if args and args[0] == socket.AF_NETLINK:
                raise PermissionError("no netlink here")
            super().__init__(*args, **kwargs)

    monkeypatch.setattr(socket, "socket", NoNetlink)
    receipts = Receipts("127.0.0.1", 80)
    assert receipts.age_ns(PEER) == 0
    receipts.close()

"""What gateways are told of how many requests may be on their way."""

from __future__ import annotations

from typing import cast

from clockwork_serve.messages import Cancel, Frame, Request, RequestCredit
from clockwork_serve.serve.flow_control import DELAY_NS, FIRST, LEAST, MOST, CreditIssuer
from clockwork_serve.serve.transport import Link


class Peer:
    """A link that keeps what it is told."""

    def __init__(self) -> None:
        self.told: list[RequestCredit] = []

    def send(self, frame: Frame) -> None:
        assert isinstance(frame, RequestCredit)
        self.told.append(frame)

    @property
    def link(self) -> Link:
        return cast("Link", self)


class World:
    def __init__(self, peers: int = 1) -> None:
        self.now_ns = 0
        self.hearing = CreditIssuer(lambda: self.now_ns)
        self.peers = [Peer() for _ in range(peers)]
        for peer in self.peers:
            self.hearing.welcome(peer.link)

    def hear(self, count: int, gap_ns: int) -> None:
        """So many requests come to every gateway, one by one."""
        request = Request(request_id="r", gateway="g", model="m", arrival_ns=0, deadline_ns=1)
        for _ in range(count):
            self.now_ns += gap_ns
            for peer in self.peers:
                self.hearing.heard(peer.link, [request])


def test_a_newcomer_is_told_a_number_at_once() -> None:
    assert World().peers[0].told == [RequestCredit(heard=0, most=FIRST)]


def test_every_request_heard_is_told_of_once_and_many_at_a_time() -> None:
    world = World()
    world.hear(10_000, gap_ns=20_000)
    told = world.peers[0].told
    assert 10_000 - sum(each.heard for each in told) < told[-1].most / 4
    assert len(told) < 10_000 / 8


def test_as_many_may_come_as_are_heard_within_the_delay() -> None:
    world = World()
    world.hear(20_000, gap_ns=20_000)
    assert abs(world.peers[0].told[-1].most - DELAY_NS // 20_000) <= 4


def test_a_slow_one_still_has_its_least_and_a_fast_one_no_more_than_the_most() -> None:
    slow, fast = World(), World()
    slow.hear(2_000, gap_ns=1_000_000)
    fast.hear(100_000, gap_ns=1)
    assert slow.peers[0].told[-1].most == LEAST
    assert fast.peers[0].told[-1].most == MOST


def test_several_gateways_share_the_least() -> None:
    world = World(peers=2)
    world.hear(2_000, gap_ns=1_000_000)
    assert [peer.told[-1].most for peer in world.peers] == [LEAST // 2] * 2


def test_only_requests_count_and_nobody_who_is_gone() -> None:
    world = World()
    (peer,) = world.peers
    world.hearing.heard(peer.link, [Cancel(request_id="r")] * 1000)
    world.hearing.forget(peer.link)
    world.hear(1000, gap_ns=1000)
    assert len(peer.told) == 1

"""The credit that the controller grants gateways: how many requests may be in transit."""

from __future__ import annotations

from typing import cast

from clockwork_serve.messages import Cancel, Frame, Request, RequestCredit
from clockwork_serve.serve.flow_control import DELAY_NS, FIRST, LEAST, MOST, CreditIssuer
from clockwork_serve.serve.transport import Link


class Peer:
    """A link that keeps the credit granted over it."""

    def __init__(self) -> None:
        self.granted: list[RequestCredit] = []

    def send(self, frame: Frame) -> None:
        assert isinstance(frame, RequestCredit)
        self.granted.append(frame)

    @property
    def link(self) -> Link:
        return cast("Link", self)


class World:
    def __init__(self, peers: int = 1) -> None:
        self.now_ns = 0
        self.issuer = CreditIssuer(lambda: self.now_ns)
        self.peers = [Peer() for _ in range(peers)]
        for peer in self.peers:
            self.issuer.add_gateway(peer.link)

    def receive(self, count: int, gap_ns: int) -> None:
        """Receive ``count`` requests from every gateway, one by one."""
        request = Request(request_id="r", gateway="g", model="m", arrival_ns=0, deadline_ns=1)
        for _ in range(count):
            self.now_ns += gap_ns
            for peer in self.peers:
                self.issuer.received(peer.link, [request])


def test_a_new_gateway_is_granted_credit_at_once() -> None:
    assert World().peers[0].granted == [RequestCredit(heard=0, most=FIRST)]


def test_every_request_is_acknowledged_once_and_many_at_a_time() -> None:
    world = World()
    world.receive(10_000, gap_ns=20_000)
    granted = world.peers[0].granted
    assert 10_000 - sum(each.heard for each in granted) < granted[-1].most / 4
    assert len(granted) < 10_000 / 8


def test_credit_is_what_is_received_within_the_delay() -> None:
    world = World()
    world.receive(20_000, gap_ns=20_000)
    assert abs(world.peers[0].granted[-1].most - DELAY_NS // 20_000) <= 4


def test_credit_has_a_lower_and_an_upper_bound() -> None:
    slow, fast = World(), World()
    slow.receive(2_000, gap_ns=1_000_000)
    fast.receive(100_000, gap_ns=1)
    assert slow.peers[0].granted[-1].most == LEAST
    assert fast.peers[0].granted[-1].most == MOST


def test_gateways_share_the_lower_bound() -> None:
    world = World(peers=2)
    world.receive(2_000, gap_ns=1_000_000)
    assert [peer.granted[-1].most for peer in world.peers] == [LEAST // 2] * 2


def test_only_requests_of_connected_gateways_count() -> None:
    world = World()
    (peer,) = world.peers
    world.issuer.received(peer.link, [Cancel(request_id="r")] * 1000)
    world.issuer.remove_gateway(peer.link)
    world.receive(1000, gap_ns=1000)
    assert len(peer.granted) == 1

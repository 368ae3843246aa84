"""Credit for requests on the gateway's side: which are sent, which wait, which are rejected."""

from __future__ import annotations

from msgspec import structs

from clockwork_serve.messages import CreditBlocked, Frame, Request, RequestCredit
from clockwork_serve.serve.flow_control import CROWDED_NS, SCARCE_NS, SILENT_NS, CreditGate
from clockwork_serve.units import ms


def request(name: str, arrival_ns: int, slo_ms: float) -> Request:
    return Request(
        request_id=name, gateway="g", model="m/1", arrival_ns=arrival_ns,
        deadline_ns=arrival_ns + ms(slo_ms),
    )  # fmt: skip


class Gate:
    """A credit gate, its clock, and the requests that it sent or rejected."""

    def __init__(self, most: int = 2, held: int = 4096) -> None:
        self.now_ns = ms(1000)
        self.sent: list[str] = []
        self.blocked = 0
        self.refused: list[tuple[str, int]] = []
        self.credit_gate = CreditGate(self._send, self._refuse, lambda: self.now_ns)
        self.credit_gate.on_credit(RequestCredit(heard=0, most=most, held=held))

    def _send(self, frame: Frame) -> None:
        if isinstance(frame, CreditBlocked):
            self.blocked += 1
            return
        assert isinstance(frame, Request)
        self.sent.append(frame.request_id)

    def _refuse(self, request: Request, waited_ns: int) -> None:
        self.refused.append((request.request_id, waited_ns))

    def submit(self, *names: str, slo_ms: float = 100) -> None:
        for name in names:
            self.credit_gate.submit(request(name, self.now_ns, slo_ms))

    def grant(self, received: int, most: int = 2) -> None:
        self.credit_gate.on_credit(RequestCredit(heard=received, most=most))


def test_without_a_limit_all_are_sent() -> None:
    gate = Gate(most=0)
    gate.submit(*"abcdef")
    assert gate.sent == list("abcdef")


def test_that_requests_wait_is_said_once_after_each_grant() -> None:
    gate = Gate()
    gate.submit(*"ab")
    assert gate.blocked == 0
    gate.submit(*"cdefg")
    assert gate.blocked == 1
    gate.grant(2)
    assert gate.blocked == 2
    gate.grant(2)
    gate.grant(2)
    assert gate.sent == list("abgfedc")
    assert gate.blocked == 3


def test_credit_is_scarce_for_a_while_after_a_request_was_held_back() -> None:
    gate = Gate()
    gate.submit(*"ab")
    assert not gate.credit_gate.scarce
    gate.submit("c")
    gate.grant(2)
    gate.now_ns += SCARCE_NS - 1
    assert gate.credit_gate.scarce
    gate.now_ns += 1
    assert not gate.credit_gate.scarce
    gate.submit(*"de")
    assert gate.credit_gate.scarce
    gate.credit_gate.reset()
    assert not gate.credit_gate.scarce, "another controller may have time for all"


def test_requests_beyond_the_credit_wait_and_the_newest_is_sent_first() -> None:
    gate = Gate()
    gate.submit(*"abcde")
    assert gate.sent == ["a", "b"]
    gate.grant(1)
    gate.grant(2)
    assert gate.sent == ["a", "b", "e", "d", "c"]
    assert not gate.credit_gate.holds


def test_a_request_that_waited_for_a_quarter_of_its_slo_is_rejected() -> None:
    gate = Gate()
    gate.submit("a", "b", "short", slo_ms=100)
    gate.submit("long", slo_ms=1000)
    gate.now_ns += ms(26)
    gate.credit_gate.sweep()
    assert gate.refused == [("short", ms(26))]
    gate.grant(2)
    assert gate.sent[2:] == ["long"]


def test_waiting_requests_are_limited_and_the_oldest_is_rejected() -> None:
    gate = Gate(held=3)
    gate.submit(*"abcdefg")
    assert [name for name, _ in gate.refused] == ["c", "d"]
    gate.grant(2)
    assert gate.sent[2:] == ["g", "f"]


def test_an_overdue_request_is_not_sent_when_there_is_credit() -> None:
    gate = Gate()
    gate.submit(*"abc")
    gate.now_ns += ms(30)
    gate.grant(2)
    assert (gate.sent, [name for name, _ in gate.refused]) == (["a", "b"], ["c"])


def crowded() -> Gate:
    """Two may be in transit, and one request has waited in vain."""
    gate = Gate()
    gate.submit("a", "b", *[f"burst-{at}" for at in range(9)])
    assert not gate.refused, "a burst may wait"
    gate.now_ns += ms(26)
    gate.credit_gate.sweep()
    assert len(gate.refused) == 9
    gate.grant(0)
    gate.sent.clear()
    gate.refused.clear()
    return gate


def test_after_one_waited_in_vain_twice_as_many_wait_as_may_be_in_transit_and_the_oldest_is_rejected() -> (
    None
):
    gate = crowded()
    gate.submit(*"cdef", slo_ms=2000)
    assert not gate.refused
    gate.submit("g", slo_ms=2000)
    gate.now_ns += CROWDED_NS - 1
    gate.grant(0)
    gate.submit("h", slo_ms=2000)
    assert [name for name, _ in gate.refused] == ["c", "d"], "it goes on while requests are rejected"
    gate.now_ns += CROWDED_NS
    gate.submit(*"ijkl")
    assert [name for name, _ in gate.refused] == ["c", "d"]


def test_where_no_credit_is_granted_any_more_nobody_is_refused_because_others_came() -> None:
    gate = crowded()
    gate.now_ns += SILENT_NS
    gate.submit(*"cdefghij", slo_ms=2000)
    assert not gate.refused, "their controller may be dead, and they may wait for the next one"
    gate.grant(0)
    gate.submit("k", slo_ms=2000)
    assert [name for name, _ in gate.refused] == ["c"]


def test_a_model_that_is_asked_for_too_much_leaves_others_their_share_of_the_queue() -> None:
    gate = crowded()
    gate.submit(*"cdef")
    gate.credit_gate.submit(structs.replace(request("o", gate.now_ns, 100), model="other/1"))
    assert not gate.refused
    gate.submit(*"ghi")
    assert [name for name, _ in gate.refused] == list("cde"), "there are two models, and each may have two"
    gate.grant(2)
    assert gate.sent == ["i", "h"]
    for name in "fgo":
        assert gate.credit_gate.withdraw(name)
    assert not gate.credit_gate.holds
    assert gate.credit_gate._waiting == {}


def test_only_a_waiting_request_can_be_withdrawn() -> None:
    gate = Gate()
    gate.submit(*"abc")
    assert gate.credit_gate.withdraw("c")
    assert not gate.credit_gate.withdraw("a"), "the controller has it"
    gate.grant(2)
    assert gate.sent == ["a", "b"]


def test_a_lost_link_resets_the_queue_and_the_limit() -> None:
    gate = Gate()
    gate.submit(*"abc")
    gate.credit_gate.reset()
    gate.submit(*"def")
    assert gate.sent == ["a", "b", "d", "e", "f"]
    assert not gate.refused

"""How many requests are on their way to the controller: who goes, who waits, who is refused."""

from __future__ import annotations

from clockwork_serve.messages import Frame, Intake, Request
from clockwork_serve.serve.gateway_turnstile import Turnstile
from clockwork_serve.units import ms


class Gate:
    """A turnstile, its clock, and what came of it."""

    def __init__(self, most: int = 2, held: int = 4096) -> None:
        self.now_ns = ms(1000)
        self.sent: list[str] = []
        self.refused: list[tuple[str, int]] = []
        self.turnstile = Turnstile(self._send, self._refuse, lambda: self.now_ns)
        self.turnstile.take(Intake(heard=0, most=most, held=held))

    def _send(self, frame: Frame) -> None:
        assert isinstance(frame, Request)
        self.sent.append(frame.request_id)

    def _refuse(self, request: Request, waited_ns: int) -> None:
        self.refused.append((request.request_id, waited_ns))

    def enter(self, *names: str, slo_ms: float = 100) -> None:
        for name in names:
            self.turnstile.enter(
                Request(
                    request_id=name, gateway="g", model="m/1", arrival_ns=self.now_ns,
                    deadline_ns=self.now_ns + ms(slo_ms),
                )
            )  # fmt: skip

    def heard(self, heard: int, most: int = 2) -> None:
        self.turnstile.take(Intake(heard=heard, most=most))


def test_without_a_rule_all_go() -> None:
    gate = Gate(most=0)
    gate.enter(*"abcdef")
    assert gate.sent == list("abcdef")


def test_who_is_too_many_waits_and_the_newest_goes_first() -> None:
    gate = Gate()
    gate.enter(*"abcde")
    assert gate.sent == ["a", "b"]
    gate.heard(1)
    gate.heard(2)
    assert gate.sent == ["a", "b", "e", "d", "c"]
    assert not gate.turnstile.holds


def test_who_waited_for_a_quarter_of_its_slo_is_refused() -> None:
    gate = Gate()
    gate.enter("a", "b", "short", slo_ms=100)
    gate.enter("long", slo_ms=1000)
    gate.now_ns += ms(26)
    gate.turnstile.sweep()
    assert gate.refused == [("short", ms(26))]
    gate.heard(2)
    assert gate.sent[2:] == ["long"]


def test_no_more_wait_than_may_and_the_oldest_is_refused() -> None:
    gate = Gate(held=3)
    gate.enter(*"abcdefg")
    assert [name for name, _ in gate.refused] == ["c", "d"]
    gate.heard(2)
    assert gate.sent[2:] == ["g", "f"]


def test_who_was_overdue_is_not_sent_when_there_is_room() -> None:
    gate = Gate()
    gate.enter(*"abc")
    gate.now_ns += ms(30)
    gate.heard(2)
    assert (gate.sent, [name for name, _ in gate.refused]) == (["a", "b"], ["c"])


def test_who_is_withdrawn_is_gone_only_if_it_waited_here() -> None:
    gate = Gate()
    gate.enter(*"abc")
    assert gate.turnstile.withdraw("c")
    assert not gate.turnstile.withdraw("a"), "the controller has it"
    gate.heard(2)
    assert gate.sent == ["a", "b"]


def test_a_lost_link_takes_all_along_and_the_rule() -> None:
    gate = Gate()
    gate.enter(*"abc")
    gate.turnstile.reset()
    gate.enter(*"def")
    assert gate.sent == ["a", "b", "d", "e", "f"]
    assert not gate.refused

"""Actions without a result: who takes some away is told which, once."""

from __future__ import annotations

from clockwork_serve.telemetry.in_flight import SentActions
from clockwork_serve.units import ms
from tests.telemetry import stories


def test_what_should_have_ended_is_given_up_once() -> None:
    sent = SentActions[str]()
    old, new = sent.send(stories.unload(1), ms(1), []), sent.send(stories.unload(2), ms(50), [])
    assert sent.due(ms(10)) == [old]
    assert sent.due(ms(10)) == []
    assert len(sent) == 1
    assert sent.end() == [new]
    assert len(sent) == 0

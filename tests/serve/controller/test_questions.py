"""Questions: each gets one reply, from the controller or the supervisor, whichever links are lost."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import msgspec

from clockwork_serve.messages import Ask, Question, Reply
from clockwork_serve.serve.controller.hub import Questions


def link() -> Any:
    """A link that records the frames sent."""
    sent: list[Any] = []
    return SimpleNamespace(sent=sent, send=sent.append)


def answer(ask: Ask) -> bytes:
    """The Hello of the test's process."""
    if ask.body == b"bad":
        raise ValueError("expected something good")
    return b"state"


def index(ask_id: int) -> Ask:
    """A question for the supervisor."""
    return Ask(ask_id=ask_id, what=Question.INDEX, body=b"")


def test_questions_to_the_controller_are_answered_at_once() -> None:
    asker, questions = link(), Questions(answer)
    questions.ask(asker, Ask(ask_id=7, what=Question.STATE, body=b""), None)
    questions.ask(asker, Ask(ask_id=8, what=Question.STATE, body=b"bad"), None)
    good, bad = asker.sent
    assert good == Reply(ask_id=7, ok=True, body=b"state")
    assert (bad.ask_id, bad.ok, bad.code) == (8, False, 400)
    assert msgspec.json.decode(bad.body) == {"error": "state: expected something good"}


def test_two_questions_of_one_id_get_their_own_replies() -> None:
    first, second, supervisor, questions = link(), link(), link(), Questions(answer)
    questions.ask(first, index(5), supervisor)
    questions.ask(second, index(5), supervisor)
    of_first, of_second = supervisor.sent
    questions.reply(Reply(ask_id=of_second.ask_id, ok=True, body=b"2"))
    questions.reply(Reply(ask_id=of_first.ask_id, ok=True, body=b"1"))
    questions.reply(Reply(ask_id=of_first.ask_id, ok=True, body=b"again"))
    assert first.sent == [Reply(ask_id=5, ok=True, body=b"1")]
    assert second.sent == [Reply(ask_id=5, ok=True, body=b"2")]


def test_without_a_supervisor_and_when_its_link_is_lost_the_reply_is_503() -> None:
    asker, questions = link(), Questions(answer)
    questions.ask(asker, index(1), None)
    questions.ask(asker, index(2), link())
    questions.supervisor_lost()
    questions.supervisor_lost()
    assert [(reply.ask_id, reply.code) for reply in asker.sent] == [(1, 503), (2, 503)]


def test_a_lost_link_is_sent_no_reply() -> None:
    gone, stays, supervisor, questions = link(), link(), link(), Questions(answer)
    questions.ask(gone, index(1), supervisor)
    questions.ask(stays, index(2), supervisor)
    questions.requester_lost(gone)
    for passed in supervisor.sent:
        questions.reply(Reply(ask_id=passed.ask_id, ok=True, body=b""))
    assert (gone.sent, len(stays.sent)) == ([], 1)


def test_a_stalled_supervisor_is_reported_at_once_and_its_late_reply_is_dropped() -> None:
    stuck = ""
    asker, supervisor = link(), link()
    questions = Questions(answer, lambda: stuck)
    questions.ask(asker, index(1), supervisor)
    stuck = "the supervisor has not answered for 1.2 s"
    questions.supervisor_stalled(stuck)
    questions.ask(asker, index(2), supervisor)
    questions.reply(Reply(ask_id=supervisor.sent[0].ask_id, ok=True, body=b"late"))
    assert len(supervisor.sent) == 1
    assert [(reply.ask_id, reply.code) for reply in asker.sent] == [(1, 503), (2, 503)]
    assert all(stuck in msgspec.json.decode(reply.body)["error"] for reply in asker.sent)
    stuck = ""
    questions.ask(asker, index(3), supervisor)
    assert len(supervisor.sent) == 2

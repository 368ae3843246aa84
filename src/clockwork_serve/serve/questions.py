"""Questions to the controller's process: answered at once, or passed on to the keeper under an id of ours."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

import msgspec

from clockwork_serve.errors import TransportError
from clockwork_serve.messages import Ask, Question, Reply
from clockwork_serve.serve.transport import Link

_KEEPER_QUESTIONS: Final = frozenset({Question.INDEX, Question.LOAD, Question.UNLOAD})


@dataclass(slots=True, frozen=True)
class _Asked:
    link: Link
    ask_id: int

    def refuse(self, code: int, why: str) -> None:
        body = msgspec.json.encode({"error": why})
        self.link.send(Reply(ask_id=self.ask_id, ok=False, body=body, code=code))


class Questions:
    """Each gets one reply; ``answer`` answers those that are not the keeper's, or raises.

    ``keeper_stuck`` tells why the keeper will not answer; "" if it may.
    """

    def __init__(self, answer: Callable[[Ask], bytes], keeper_stuck: Callable[[], str] = lambda: "") -> None:
        self._answer = answer
        self._keeper_stuck = keeper_stuck
        self._waiting: dict[int, _Asked] = {}  # for the keeper, by our id
        self._count = 0

    def ask(self, link: Link, ask: Ask, keeper: Link | None) -> None:
        """Somebody asks."""
        asked = _Asked(link, ask.ask_id)
        if ask.what in _KEEPER_QUESTIONS:
            if keeper is None:
                asked.refuse(503, "the keeper is not connected; try again")
                return
            if why := self._keeper_stuck():
                asked.refuse(503, why)
                return
            self._count += 1
            self._waiting[self._count] = asked
            keeper.send(msgspec.structs.replace(ask, ask_id=self._count))
            return
        try:
            link.send(Reply(ask_id=ask.ask_id, ok=True, body=self._answer(ask)))
        except (msgspec.MsgspecError, ValueError, RecursionError, TransportError) as error:
            asked.refuse(400, f"{ask.what}: {error}")

    def reply(self, reply: Reply) -> None:
        """The keeper replied."""
        asked = self._waiting.pop(reply.ask_id, None)
        if asked is not None:
            asked.link.send(msgspec.structs.replace(reply, ask_id=asked.ask_id))

    def asker_lost(self, link: Link) -> None:
        """Nobody there waits any more."""
        self._waiting = {ours: asked for ours, asked in self._waiting.items() if asked.link is not link}

    def keeper_lost(self) -> None:
        """What was passed on gets no other reply."""
        self._refuse_waiting("the keeper went away; try again")

    def keeper_silent(self, why: str) -> None:
        """What was passed on gets no reply soon; one that comes later is dropped."""
        self._refuse_waiting(f"{why}; what was asked of it may still be done then")

    def _refuse_waiting(self, why: str) -> None:
        waiting, self._waiting = self._waiting, {}
        for asked in waiting.values():
            asked.refuse(503, why)

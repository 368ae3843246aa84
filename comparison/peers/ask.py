"""Asks a server one request at a time: whether its answers are right, and to warm it; it measures nothing."""

from __future__ import annotations

import http.client
import time
from dataclasses import dataclass
from typing import Any, Final

from comparison.peers.peer import HOST, Answer, Floats, Peer, Setup, differs

WRONG: Final = 1e-3
"""Relative to the largest output: more is another model's answer, or none."""
WAIT_S: Final = 60.0
GOOD: Final = 200
PATIENCE_S: Final = 20.0
"""So long all models together are asked again, if they refuse."""
PAUSE_S: Final = 0.25


class WrongAnswer(RuntimeError):
    """A server does not serve what it should; says which model, and what came."""


class Line:
    """To one server."""

    def __init__(self, asked: Peer, setup: Setup, x: Floats) -> None:
        self._request = asked.request(setup, x)
        self._channel: Any = None
        self._connection = http.client.HTTPConnection(HOST, setup.port, timeout=WAIT_S)
        if asked.protocol == "grpc":
            import grpc

            options = [("grpc.max_receive_message_length", 64 << 20)]
            self._channel = grpc.insecure_channel(f"{HOST}:{setup.port + 1}", options=options)

    def ask(self, model: str) -> Answer:
        """One answer. Status -1: the server hung up."""
        return self._http(model) if self._channel is None else self._grpc(model)

    def _http(self, model: str) -> Answer:
        path = self._request.path.replace("{model}", model)
        try:
            self._connection.request("POST", path, self._request.body, dict(self._request.headers))
            got = self._connection.getresponse()
            headers = {name.lower(): value for name, value in got.getheaders()}
            return Answer(got.status, headers, got.read())
        except (OSError, http.client.HTTPException) as error:
            self._connection.close()
            return Answer(-1, {}, repr(error).encode())

    def _grpc(self, model: str) -> Answer:
        import grpc

        call = self._channel.unary_unary(self._request.path)
        try:
            return Answer(200, {}, call(self._request.messages[model], timeout=WAIT_S))
        except grpc.RpcError as error:
            return Answer(-1, {}, str(error).encode())

    def close(self) -> None:
        """End it."""
        self._connection.close()
        if self._channel is not None:
            self._channel.close()


@dataclass(frozen=True, slots=True)
class Checked:
    """What came of asking all models: the worst error of answers, and who refused to the end."""

    worst: float
    silent: tuple[str, ...]


def check(asked: Peer, setup: Setup, x: Floats, expected: Floats, *, rounds: int = 1) -> Checked:
    """Ask every model in turn. :class:`WrongAnswer` if an answer is wrong, or if there is none at all.

    A model is asked again where it refuses: at first nothing is warm, and some servers' times are up.
    """
    line, worst = Line(asked, setup, x), 0.0
    patience_s = time.monotonic() + PATIENCE_S
    answer = Answer(-1, {}, b"")
    silent = set(setup.names)
    try:
        for _ in range(rounds):
            for row, name in enumerate(setup.names):
                answer = line.ask(name)
                while answer.status != GOOD and time.monotonic() < patience_s:
                    time.sleep(PAUSE_S)
                    answer = line.ask(name)
                if answer.status != GOOD:
                    continue
                silent.discard(name)
                worst = max(worst, differs(asked.output(answer), expected[row]))
                if worst > WRONG:
                    raise WrongAnswer(f"the answer of {name} differs from the right one by {worst:.2g}")
    finally:
        line.close()
    if len(silent) == len(setup.names):
        raise WrongAnswer(f"no model answered; the last said {answer.status}: {answer.body[:300]!r}")
    return Checked(worst, tuple(sorted(silent)))

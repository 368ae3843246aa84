"""The life cycles of requests and weights, as tables of legal steps.

A *request* waits in its model's queue, is sent inside an INFER, and is answered. A result after which it can
be planned again (a window missed, a worker lost) returns it to a queue. If it is answered while a worker
still reads its tensors (deadline passed, client gone), it is *spent* until the result releases them.

    WAITING --send--> SENT --answer--> ANSWERED
       |  <--return--  |
       +--answer-->    +--answer early--> SPENT --release--> ANSWERED

A request that waits, or runs on another worker, while a hung worker still has its tensors becomes spent when
it is answered, too.

*Weights* on a device are loading once the LOAD is sent, ready when its result is good, and gone when a LOAD
failed or an UNLOAD is sent (the load lane keeps the order, so their pages can be reused at once).

    LOADING --loaded--> READY --unload--> GONE
       +--failed--> GONE

States and steps are ints: a step of a request takes 40 ns, with enumerations 160 ns.
"""

from __future__ import annotations

from typing import Final

NEVER: Final = -1
"""The state after an illegal step."""

# States of a request
WAITING: Final = 0
SENT: Final = 1
SPENT: Final = 2
ANSWERED: Final = 3
REQUEST_STATES: Final = ("waiting", "sent", "spent", "answered")

# Steps of a request
SEND: Final = 0
RETURN: Final = 1
ANSWER: Final = 2
ANSWER_EARLY: Final = 3
RELEASE: Final = 4
REQUEST_STEPS: Final = ("send", "return", "answer", "answer early", "release")

REQUEST_LIFE: Final = {
    WAITING: {SEND: SENT, ANSWER: ANSWERED, ANSWER_EARLY: SPENT},
    SENT: {RETURN: WAITING, ANSWER: ANSWERED, ANSWER_EARLY: SPENT},
    SPENT: {RELEASE: ANSWERED},
    ANSWERED: {},
}

# States of weights
LOADING: Final = 0
READY: Final = 1
GONE: Final = 2
WEIGHTS_STATES: Final = ("loading", "ready", "gone")

# Steps of weights
LOADED: Final = 0
FAILED: Final = 1
UNLOAD: Final = 2
WEIGHTS_STEPS: Final = ("loaded", "failed", "unload")

WEIGHTS_LIFE: Final = {LOADING: {LOADED: READY, FAILED: GONE}, READY: {UNLOAD: GONE}, GONE: {}}


def by_index(life: dict[int, dict[int, int]], steps: int) -> tuple[tuple[int, ...], ...]:
    """A life cycle as a matrix: ``rows[state][step]`` is the state after that step, or ``NEVER``."""
    return tuple(tuple([life[state].get(step, NEVER) for step in range(steps)]) for state in range(len(life)))


REQUEST_AFTER: Final = by_index(REQUEST_LIFE, len(REQUEST_STEPS))
WEIGHTS_AFTER: Final = by_index(WEIGHTS_LIFE, len(WEIGHTS_STEPS))

"""Life cycles as tables; whatever is not in a table cannot happen.

A *request* waits in its model's queue, is sent inside an INFER, and is answered. A result that lets it be
planned again (a window missed, a worker lost) puts it back. It may be answered while a worker still reads its
tensors (deadline passed, client gone): then it is *spent* until the result releases them.

    WAITING --send--> SENT --answer--> ANSWERED
       |  <--return--  |
       +--answer-->    +--answer early--> SPENT --release--> ANSWERED

*Weights* on a device are loading once the LOAD is sent, ready when its result is good, and gone when a LOAD
failed or an UNLOAD is sent (the load lane keeps the order, so their pages may be given away at once).

    LOADING --loaded--> READY --unload--> GONE
       +--failed--> GONE
"""

from __future__ import annotations

import enum


class RequestState(enum.Enum):
    """Where a request is."""

    WAITING = "waiting"
    SENT = "sent"
    SPENT = "spent"
    ANSWERED = "answered"


class RequestStep(enum.Enum):
    """What happens to a request."""

    SEND = "send"
    RETURN = "return"
    ANSWER = "answer"
    ANSWER_EARLY = "answer early"
    RELEASE = "release"


REQUEST_LIFE: dict[RequestState, dict[RequestStep, RequestState]] = {
    RequestState.WAITING: {
        RequestStep.SEND: RequestState.SENT,
        RequestStep.ANSWER: RequestState.ANSWERED,
    },
    RequestState.SENT: {
        RequestStep.RETURN: RequestState.WAITING,
        RequestStep.ANSWER: RequestState.ANSWERED,
        RequestStep.ANSWER_EARLY: RequestState.SPENT,
    },
    RequestState.SPENT: {RequestStep.RELEASE: RequestState.ANSWERED},
    RequestState.ANSWERED: {},
}


class WeightsState(enum.Enum):
    """Where a model's weights are on one device."""

    LOADING = "loading"
    READY = "ready"
    GONE = "gone"


class WeightsStep(enum.Enum):
    """What happens to weights on a device."""

    LOADED = "loaded"
    FAILED = "failed"
    UNLOAD = "unload"


WEIGHTS_LIFE: dict[WeightsState, dict[WeightsStep, WeightsState]] = {
    WeightsState.LOADING: {
        WeightsStep.LOADED: WeightsState.READY,
        WeightsStep.FAILED: WeightsState.GONE,
    },
    WeightsState.READY: {WeightsStep.UNLOAD: WeightsState.GONE},
    WeightsState.GONE: {},
}

"""One table of statuses, complete."""

from __future__ import annotations

import grpc
import pytest

from clockwork_serve.errors import InvalidRequest
from clockwork_serve.messages import Outcome, Reason
from clockwork_serve.oip import (
    ClientStatus,
    TooLarge,
    UnknownModel,
    Unsupported,
    grpc_of_http,
    reason_of_error,
    status_of,
    status_of_error,
)


@pytest.mark.parametrize(
    ("outcome", "reason", "expected"),
    [
        (Outcome.OK, Reason.NONE, (200, "OK")),
        (Outcome.REJECTED, Reason.WOULD_MISS_DEADLINE, (429, "RESOURCE_EXHAUSTED")),
        (Outcome.REJECTED, Reason.QUEUE_FULL, (429, "RESOURCE_EXHAUSTED")),
        (Outcome.REJECTED, Reason.TENANT_QUOTA, (429, "RESOURCE_EXHAUSTED")),
        (Outcome.REJECTED, Reason.NOT_SERVING, (503, "UNAVAILABLE")),
        (Outcome.REJECTED, Reason.DRAINING, (503, "UNAVAILABLE")),
        (Outcome.EXPIRED, Reason.LATE, (504, "DEADLINE_EXCEEDED")),
        (Outcome.CANCELLED, Reason.NONE, (499, "CANCELLED")),
        (Outcome.FAILED, Reason.MODEL_RAISED, (500, "INTERNAL")),
        (Outcome.INVALID, Reason.BAD_INPUT, (400, "INVALID_ARGUMENT")),
        (Outcome.INVALID, Reason.UNKNOWN_MODEL, (404, "NOT_FOUND")),
    ],
)
def test_each_end_has_its_status(outcome: Outcome, reason: Reason, expected: tuple[int, str]) -> None:
    assert status_of(outcome, reason) == ClientStatus(*expected)


def test_who_insists_on_triton_s_codes_gets_unavailable_for_refused_and_expired_and_nothing_else() -> None:
    for outcome in Outcome:
        for reason in Reason:
            unavailable = outcome in {Outcome.REJECTED, Outcome.EXPIRED}
            expected = ClientStatus(503, "UNAVAILABLE") if unavailable else status_of(outcome, reason)
            assert status_of(outcome, reason, triton=True) == expected


def test_every_end_has_a_status_that_grpc_knows() -> None:
    for outcome in Outcome:
        for reason in Reason:
            assert hasattr(grpc.StatusCode, status_of(outcome, reason).grpc)
    for code in range(200, 600):
        assert hasattr(grpc.StatusCode, grpc_of_http(code))


def test_each_wrong_request_has_its_status_and_reason() -> None:
    for error, http, reason in (
        (InvalidRequest("x"), 400, Reason.BAD_INPUT),
        (UnknownModel("x"), 404, Reason.UNKNOWN_MODEL),
        (TooLarge("x"), 413, Reason.BAD_INPUT),
        (Unsupported("x"), 501, Reason.BAD_INPUT),
    ):
        assert status_of_error(error).http == http
        assert reason_of_error(error) is reason

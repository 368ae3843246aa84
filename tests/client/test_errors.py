"""One exception class per outcome, and what each of them carries."""

from __future__ import annotations

import json
import pickle

import pytest

from clockwork_client import Expired, Failed, Invalid, NotServing, Rejected, ServingError
from clockwork_client.calls import error_of
from clockwork_client.errors import error_class
from clockwork_client.wire import Response
from clockwork_serve.messages import Outcome, Reason
from clockwork_serve.oip import TooLarge, Unsupported, status_of, status_of_error

CLASSES = {
    (Outcome.REJECTED, Reason.WOULD_MISS_DEADLINE): Rejected,
    (Outcome.REJECTED, Reason.QUEUE_FULL): Rejected,
    (Outcome.REJECTED, Reason.TENANT_QUOTA): Rejected,
    (Outcome.REJECTED, Reason.DRAINING): NotServing,
    (Outcome.REJECTED, Reason.NOT_SERVING): NotServing,
    (Outcome.EXPIRED, Reason.NONE): Expired,
    (Outcome.EXPIRED, Reason.LATE): Expired,
    (Outcome.EXPIRED, Reason.PROMISE_BROKEN): Expired,
    (Outcome.FAILED, Reason.MODEL_RAISED): Failed,
    (Outcome.FAILED, Reason.DEVICE_FAULT): Failed,
    (Outcome.FAILED, Reason.WORKER_LOST): Failed,
    (Outcome.FAILED, Reason.UNSERVABLE): Failed,
    (Outcome.FAILED, Reason.QUARANTINED): Failed,
    (Outcome.INVALID, Reason.UNKNOWN_MODEL): Invalid,
    (Outcome.INVALID, Reason.BAD_INPUT): Invalid,
}


@pytest.mark.parametrize("how", CLASSES)
@pytest.mark.parametrize("triton", [False, True])
def test_an_outcome_has_its_class(how, triton):
    assert error_class(status_of(*how, triton=triton).http, *how) is CLASSES[how]


@pytest.mark.parametrize("how", CLASSES)
def test_without_our_own_words_the_status_counts(how):
    assert error_class(status_of(*how).http) is CLASSES[how]


def test_every_reason_has_a_class():
    assert {reason for _, reason in CLASSES} == set(Reason)


@pytest.mark.parametrize("error", [TooLarge("much"), Unsupported("never")])
def test_what_the_server_does_not_take_is_invalid(error):
    assert error_class(status_of_error(error).http) is Invalid


@pytest.mark.parametrize(
    ("status", "kind"), [(302, Failed), (502, NotServing), (500, Failed), (418, Invalid)]
)
def test_a_status_of_somebody_between_has_a_class_too(status, kind):
    assert error_class(status) is kind


def said(status: int, body: object, **headers: str) -> ServingError:
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    return error_of(Response(status, {k.replace("_", "-"): v for k, v in headers.items()}, content, True))


def test_an_error_carries_all_that_the_server_said():
    error = said(
        429,
        {
            "error": "queue_full: 3 wait", "outcome": "rejected", "reason": "queue_full",
            "retry_after_ms": 12.5, "parameters": {"queue_ms": 1.0}, "more": 1,
        },
        clockwork_request_id="g0-1", retry_after="1",
    )  # fmt: skip

    assert isinstance(error, Rejected)
    assert str(error) == "queue_full: 3 wait"
    assert (error.status, error.reason, error.request_id) == (429, "queue_full", "g0-1")
    assert error.retry_after_s == 0.0125
    assert error.parameters == {"queue_ms": 1.0}


def test_without_the_exact_wait_the_header_counts():
    assert said(503, {"error": "later"}, retry_after="3").retry_after_s == 3
    assert said(503, {"error": "later"}, retry_after="Fri, 31 Dec 1999 23:59:59 GMT").retry_after_s is None


def test_a_body_that_is_no_json_is_shown():
    assert str(said(502, b"<h1>Bad Gateway</h1>\n")) == "HTTP status 502: <h1>Bad Gateway</h1>"
    assert str(said(500, b"")) == "HTTP status 500"
    assert str(said(500, b"\xff\xfe")) == "HTTP status 500: \ufffd\ufffd"


@pytest.mark.parametrize(
    ("text", "field"),
    [
        ("unexpected shape for input 'bits' for model 'mlp'. Expected [-1, 2], got [1, 3]", "input 'bits'"),
        ("inference output 'Y': BOOL has no classes", "output 'Y'"),
        ("header 'x-slo-ms': expected a number", "header 'x-slo-ms'"),
        ("parameter 'slo_ms': expected", "parameter 'slo_ms'"),
        ("Request for unknown model: 'nope' is not found", "model 'nope'"),
        (
            "got 1 inputs for model 'm'. Got input(s) ['A'], but missing required input(s) ['B', 'C'].",
            "input 'B'",
        ),
        ("Not Found", ""),
    ],
)
def test_an_invalid_request_says_which_field(text, field):
    assert Invalid(text).field == field


def test_an_error_survives_a_process_pool():
    error = said(504, {"error": "late", "reason": "late"})
    again = pickle.loads(pickle.dumps(error))

    assert (type(again), str(again), again.reason, again.status) == (Expired, "late", "late", 504)

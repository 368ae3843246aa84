"""Every request to both servers: what differs is what ``differences.toml`` lists, no more and no less."""

from __future__ import annotations

import json
import time
from dataclasses import replace
from pathlib import Path

import pytest

from comparison.triton import running_triton, why_not
from tests.end_to_end.triton.asking import ask, differences
from tests.end_to_end.triton.conftest import Both
from tests.end_to_end.triton.listed import LIST, PAGE, cases, deadly_cases, listed, page
from tests.end_to_end.triton.models import MODELS
from tests.timing import Timing

CASES = cases()
DEADLY = deadly_cases()
LISTED = listed()
SETTLED_S = 10.0

with_triton = pytest.mark.skipif(bool(why_not()), reason=why_not() or "Triton is here")


def check(name: str, found: tuple[str, str]) -> None:
    """That Triton and we differ in what is listed."""
    line = f"{json.dumps(name)} = {json.dumps(found, ensure_ascii=False)}"
    assert LISTED.get(name, ("", "")) == found, f"{LIST.name}: expected what it says, found\n{line}"


@with_triton
@pytest.mark.parametrize("name", [name for name, case in CASES.items() if not case.timed])
def test_both_say_the_same_or_the_difference_is_listed(both: Both, name: str) -> None:
    case = CASES[name]
    found = differences(*both.ask(case))
    end_s = time.monotonic() + SETTLED_S
    while case.settles and found != LISTED.get(name, ("", "")) and time.monotonic() < end_s:
        found = differences(*both.ask(replace(case, first=())))
    check(name, found)


@with_triton
@pytest.mark.parametrize("name", [name for name, case in CASES.items() if case.timed])
def test_both_keep_the_same_limits_of_time_or_the_difference_is_listed(
    both: Both, timing: Timing, name: str
) -> None:
    found = differences(*both.ask(CASES[name]))
    with timing.judged():
        check(name, found)


@with_triton
@pytest.mark.parametrize("name", DEADLY)
def test_a_request_that_ends_triton_leaves_us_alive(both: Both, tmp_path: Path, name: str) -> None:
    few = [model for model in MODELS if model.name in ("ident", "ident_BYTES")]
    with running_triton(tmp_path / "models", *few) as doomed:
        found = ask(DEADLY[name], doomed.http_url, doomed.grpc_url)
    ours = ask(DEADLY[name], both.ours.http_url, both.ours.grpc_url)
    check(name, differences(found, ours))
    assert both.ours.get("/v2/health/live") == {"live": True}


def test_what_is_listed_is_asked() -> None:
    assert set(LISTED) - {*CASES, *DEADLY} == set()


def test_the_page_tells_what_is_listed() -> None:
    assert PAGE.read_text(encoding="utf-8") == page(), (
        f"{PAGE.name} is not made from {LIST.name} as it is: python -m tests.end_to_end.triton.listed"
    )

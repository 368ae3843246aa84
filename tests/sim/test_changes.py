"""Changes in words: what each becomes, from when on, and what is said of one that cannot be."""

from __future__ import annotations

from pathlib import Path

import pytest

from clockwork_serve.errors import ConfigError
from clockwork_serve.messages import Answer, Outcome, Request
from clockwork_serve.sim.changes import asked_change
from clockwork_serve.sim.counterfactual import Change, Traffic, play
from clockwork_serve.sim.explain import cases_of, explain
from clockwork_serve.sim.remedies import LUCKS, RemedyKind, RequestCase
from clockwork_serve.telemetry import read_journal
from clockwork_serve.units import NS_PER_MS, NS_PER_S, plain
from tests.pure import NEEDS_PURE
from tests.sim.overload import journal_of

pytestmark = NEEDS_PURE

DOCS = Path(__file__).parents[2] / "docs" / "use" / "explain.md"


@pytest.fixture(scope="module")
def case(tmp_path_factory: pytest.TempPathFactory) -> RequestCase:
    """A refused request of tenant a, among those of tenant b."""
    path = journal_of(tmp_path_factory.mktemp("changes") / "journal")
    asked: dict[str, Request] = {}
    for step in read_journal(path):
        asked.update({one.request_id: one for one in step.events if isinstance(one, Request)})
        for one in step.effects:
            if isinstance(one, Answer) and one.outcome is Outcome.REJECTED:
                request = asked[one.request_id]
                if request.tenant == "a" and request.arrival_ns > NS_PER_S:
                    (found,) = cases_of(path, {one.request_id})
                    return found
    raise AssertionError("none was refused")


def near(case: RequestCase) -> int:
    return case.near.began_ns


WORDS = {
    "devices=1": (Change(devices=1), "one device more", near),
    "devices=+3": (Change(devices=3), "3 devices more", near),
    "memory=+32MiB": (
        Change(pages_on={"gpu0": 2, "gpu1": 2}), "32 MiB more memory on each device", near
    ),
    "memory:gpu1=0.5 GiB": (Change(pages_on={"gpu1": 32}), "0.5 GiB more memory on gpu1", near),
    "without=b-0001/1": (Change(without=("b-0001/1",)), "b-0001/1 not there", near),
    "policy=paper": (Change(policy="paper"), "policy paper", lambda case: case.early.began_ns),
    "traffic=1.5": (
        Change(traffic=(Traffic(times=1.5),)), "1.5 times the requests", lambda case: case.early.began_ns
    ),
    "tenant:b=0": (
        Change(traffic=(Traffic(times=0.0, tenant="b"),)), "no other requests of tenant b",
        lambda case: case.early.began_ns,
    ),
    "model:a-0000/1=0.5": (
        Change(traffic=(Traffic(times=0.5, model="a-0000/1"),)), "0.5 times the requests for a-0000/1",
        lambda case: case.early.began_ns,
    ),
}  # fmt: skip


@pytest.mark.parametrize("words", WORDS)
def test_words_become_a_change_from_an_instant_on(case: RequestCase, words: str) -> None:
    change, text, began_ns = WORDS[words]

    found = asked_change(case, [words])

    assert (found.change, found.text, found.scene.began_ns) == (change, text, began_ns(case))


def test_what_is_the_request_s_own_begins_with_it_and_all_are_one_change(case: RequestCase) -> None:
    request = case.request
    edits = {"deadline_ns": request.arrival_ns + 120 * NS_PER_MS, "priority": 2}

    own = asked_change(case, ["slo=120", "priority=2"])
    more = asked_change(case, ["slo=120", "memory:gpu0=16MiB", "memory=16MiB", "priority=2"])

    assert own.change == Change(edits={request.request_id: edits})
    assert own.text == "an SLO of 120 ms and priority 2"
    assert own.scene is case.late
    assert more.change == Change(edits={request.request_id: edits}, pages_on={"gpu0": 2, "gpu1": 1})
    assert more.scene is case.near


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("", "if: expected one of slo=MS, priority=1"),
        ("faster", "found 'faster'"),
        ("slo", "if: expected one of"),
        ("slo=", "if: expected one of"),
        ("slo:r1=100", "if: expected one of"),
        ("tenant=0.5", "tenant:NAME=TIMES"),
        ("slo=0", "slo: expected a number from 0.1 to"),
        ("slo=1e3", "found '1e3'"),
        ("priority=0", "priority: expected a whole number from 1 to 15; found '0'"),
        ("priority=1.5", "found '1.5'"),
        ("devices=-1", "devices: expected a whole number from 1 to 64; found '-1'"),
        ("memory=512", "memory: expected how much more, such as 512MiB or 4GiB; found '512'"),
        ("memory=0MiB", "found '0MiB'"),
        ("memory:gpu7=1GiB", "memory: expected a device that was there (gpu0, gpu1); found 'gpu7'"),
        ("without=a-0009/1", "without: expected a model that was served (a-000"),
        ("without=a-0009/1", "and 3 more); found 'a-0009/1'"),
        ("policy=best", "policy: expected one of default, paper"),
        ("traffic=-1", "traffic: expected a number from 0 to 4; found '-1'"),
        ("traffic=5", "found '5'"),
        ("tenant:c=2", "tenant: expected one that sent requests (a, b); found 'c'"),
        ("model:c=2", "model: expected one that was asked for ("),
    ],
)
def test_what_cannot_be_is_said_with_what_could(case: RequestCase, words: str, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        asked_change(case, ["devices=1", words])

    assert message in str(caught.value)


def test_all_of_the_traffic_has_a_limit(case: RequestCase) -> None:
    with pytest.raises(ConfigError, match="tenant: expected at most 4 times the requests in all"):
        asked_change(case, ["traffic=3", "tenant:a=2"])


@pytest.mark.parametrize("words", ["without=b-0001/1", "tenant:b=0", "model:b-0001/1=0"])
def test_a_tenant_learns_no_names_of_others(case: RequestCase, words: str) -> None:
    with pytest.raises(ConfigError) as caught:
        asked_change(case, [words], "a")

    told = str(caught.value).partition("; found")[0]
    assert "b-" not in told
    assert "(a" in told


def test_how_it_would_have_gone_is_told_and_agrees_with_remedies(case: RequestCase) -> None:
    slo = next(one for one in explain(case).remedies if one.kind is RemedyKind.SLO)
    assert slo.slo_ms is not None

    told = explain(case, changes=[f"slo={slo.slo_ms:.6f}"])

    assert told.changed is not None
    assert (told.changed.outcome, told.changed.tries, told.remedies) == ("ok", LUCKS, ())
    assert told.changed.after_ms is not None
    left_ms = told.changed.deadline_ms - told.changed.after_ms
    slo_text = plain(round(slo.slo_ms, 3))
    start = f"With an SLO of {slo_text} ms: met at {told.changed.after_ms:+.1f} ms, {left_ms:.1f} ms before"
    assert told.lines[-1] == told.changed.text
    assert told.changed.text.startswith(start)
    assert "; different from +" in told.changed.text
    assert "; its duration rests on what was " in told.changed.text


def test_a_refusal_is_told_with_its_reason_and_no_difference_too(case: RequestCase) -> None:
    shorter = explain(case, changes=["slo=1"]).changed
    same = explain(case, changes=["policy=default"]).changed

    assert shorter is not None and same is not None
    assert "With an SLO of 1 ms: refused at +" in shorter.text
    assert "(would_miss_deadline): the deadline cannot be met: it takes " in shorter.text
    assert (same.from_ms, same.tries) == (None, 1)
    assert "With policy default: refused at +" in same.text
    assert same.text.endswith("; nothing is different.")


def test_with_no_other_requests_it_is_met(case: RequestCase) -> None:
    told = explain(case, changes=["traffic=0"]).changed

    assert told is not None
    assert told.outcome == "ok"
    assert told.alike == told.tries == LUCKS


def test_another_policy_says_what_that_one_says(case: RequestCase) -> None:
    asked = asked_change(case, ["policy=paper"])
    played = play(asked.scene, asked.change, until=case.request.request_id)

    told = explain(case, changes=["policy=paper"]).changed

    assert told is not None
    assert told.outcome == str(played.answers[case.request.request_id][1].outcome)
    assert played.from_ns is not None
    assert told.from_ms == pytest.approx((played.from_ns - case.request.arrival_ns) / NS_PER_MS)


def test_the_page_has_every_change() -> None:
    page = DOCS.read_text()

    for words in (
        "slo",
        "priority",
        "devices",
        "memory:",
        "without",
        "policy",
        "traffic",
        "tenant:",
        "model:",
    ):
        assert f"| `{words}" in page or f" `{words}" in page, words

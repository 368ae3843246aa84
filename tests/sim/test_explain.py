"""A request is explained from a journal alone: in sentences, with remedies that are true."""

from __future__ import annotations

from pathlib import Path

import pytest
from msgspec.structs import replace

from clockwork_serve.controller import ControllerConfig
from clockwork_serve.errors import ConfigError
from clockwork_serve.messages import Answer, Outcome, Reason, Request
from clockwork_serve.sim import explain as explanations
from clockwork_serve.sim import remedies
from clockwork_serve.sim.counterfactual import Change, PlayedScene, play
from clockwork_serve.sim.explain import case_in, cases_of, explain
from clockwork_serve.sim.history import write_history
from clockwork_serve.sim.remedies import BELOW, LUCKS, STEPS_UP, SURE, RemedyKind, smallest_slo
from clockwork_serve.sim.survey import SurveyCause, Which, nearest_ids, survey
from clockwork_serve.telemetry import Journal, Step, head_of, read_journal
from clockwork_serve.units import NS_PER_MS, NS_PER_S
from tests.pure import NEEDS_PURE
from tests.sim.overload import journal_of

pytestmark = NEEDS_PURE


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return journal_of(tmp_path_factory.mktemp("explain") / "journal")


@pytest.fixture(scope="module")
def ends(path: Path) -> dict[str, tuple[Request, Answer, Step]]:
    """Each request with its answer."""
    asked: dict[str, Request] = {}
    found = {}
    for step in read_journal(path):
        asked.update({one.request_id: one for one in step.events if isinstance(one, Request)})
        found.update(
            {
                one.request_id: (asked[one.request_id], one, step)
                for one in step.effects
                if isinstance(one, Answer)
            }
        )
    return found


def some(ends, outcome: Outcome, tenant: str = "a") -> str:
    """A request that came after a while, and ended so."""
    return next(
        name
        for name, (request, answer, _) in ends.items()
        if answer.outcome is outcome and request.tenant == tenant and request.arrival_ns > NS_PER_S
    )


def case_for(path: Path, name: str):
    (case,) = cases_of(path, {name})
    return case


def test_a_refusal_says_what_was_believed_and_what_would_have_helped(path: Path, ends) -> None:
    name = some(ends, Outcome.REJECTED)
    _, answer, step = ends[name]
    case = case_for(path, name)

    told = explain(case)

    assert told.request_id == name
    assert told.outcome == "rejected"
    assert told.message == answer.message
    assert told.after_ms == pytest.approx((step.now_ns - case.request.arrival_ns) / NS_PER_MS)
    assert told.sentence.startswith(f"Refused {told.after_ms:.1f} ms after it came (would_miss_deadline): ")
    assert {one.device for one in told.devices} == {"gpu0", "gpu1"}
    assert all("the soonest end was" in one.text for one in told.devices)
    assert {one.kind for one in told.remedies} >= {RemedyKind.SLO, RemedyKind.DEVICE, RemedyKind.MEMORY}
    assert all(
        line in "\n".join(told.lines) for line in (told.sentence, *[one.text for one in told.remedies])
    )


def test_an_answer_says_where_it_ran_and_what_was_planned(path: Path, ends) -> None:
    name = some(ends, Outcome.OK)

    told = explain(case_for(path, name))

    assert told.sentence.startswith("Its answer was ready ")
    last = told.attempts[-1]
    assert last.started_ms is not None and last.ended_ms is not None
    assert abs(last.planned_end_ms - last.ended_ms) < 2
    assert last.started_ms < last.ended_ms <= told.after_ms
    assert [one.kind for one in told.remedies] == [RemedyKind.SLO]  # how short it could have been


def test_an_answer_that_was_late_at_its_gateway_is_not_called_answered(path: Path, ends) -> None:
    name = some(ends, Outcome.OK)
    late = Answer(
        request_id=name, gateway="g0", outcome=Outcome.EXPIRED, reason=Reason.LATE,
        message="no answer by the deadline",
    )  # fmt: skip

    told = explain(case_for(path, name), instead=late)

    assert (told.outcome, told.reason) == ("expired", "late")
    assert told.sentence.startswith(
        "Not answered in time (late): no answer by the deadline: its answer was ready "
    )
    assert told.sentence.endswith("and its gateway was late.")
    assert not told.remedies, "no choice of the controller would have changed it"


def test_no_slo_below_its_own_is_a_remedy(path: Path, ends) -> None:
    case = case_for(path, some(ends, Outcome.OK))
    case.good = False  # as if it had missed by luck: played again it is met
    assert smallest_slo(case, 600 * NS_PER_MS, lambda: None) is None


def test_the_smallest_slo_is_enough_and_two_percent_less_is_not(path: Path, ends) -> None:
    for outcome in (Outcome.REJECTED, Outcome.OK):
        case = case_for(path, some(ends, outcome))
        found = smallest_slo(case, 600 * NS_PER_MS, lambda: None)
        assert found is not None

        def met(times: float, slo_ns: int = found.slo_ns, case=case) -> bool:
            request = case.request
            deadline_ns = request.arrival_ns + round(slo_ns * times)
            change = Change(edits={request.request_id: {"deadline_ns": deadline_ns}})
            return play(case.late, change, until=request.request_id).good(request.request_id)

        assert [met(times) for times in (1.0, *STEPS_UP)] == [True] * 4
        assert not met(BELOW)


def test_no_slo_is_named_where_none_up_to_the_limit_is_enough(path: Path, ends) -> None:
    case = case_for(path, some(ends, Outcome.REJECTED))

    assert smallest_slo(case, case.request.slo_ns, lambda: None) is None


def test_a_tenant_sees_no_names_of_others(path: Path, ends) -> None:
    for outcome in (Outcome.REJECTED, Outcome.OK):
        told = explain(case_for(path, some(ends, outcome)), viewer="a")

        text = "\n".join(told.lines)
        assert "/1" not in text.replace("a-000", "").replace(told.model, "") or "b-000" not in text
        assert "b-0" not in text
        theirs = {name for name, (request, _, _) in ends.items() if request.tenant == "b"}
        assert not theirs & set(text.replace(",", " ").replace(":", " ").split())


def test_what_is_asked_now_and_then_may_end_it(path: Path, ends) -> None:
    case = case_for(path, some(ends, Outcome.REJECTED))

    def check() -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        explain(case, check=check)


def test_several_requests_are_found_in_one_reading(path: Path, ends) -> None:
    names = [some(ends, Outcome.REJECTED), some(ends, Outcome.OK), some(ends, Outcome.REJECTED, "b")]

    found = {case.request.request_id: case for case in cases_of(path, names)}

    assert found.keys() == set(names)
    for case in found.values():
        assert play(case.early, until=case.request.request_id).from_ns is None
        assert case.early.began_ns <= case.near.began_ns <= case.late.began_ns
        assert case.request in case.late.steps[0].events


def test_refusals_are_counted_by_cause_and_tried_on_a_sample(path: Path, ends) -> None:
    refused = [one for one in ends.values() if one[1].outcome is Outcome.REJECTED]

    told = survey(path, Which.REFUSED, sample=4)

    assert told.requests == len(ends)
    assert told.chosen == len(refused) == sum(told.causes.values())
    assert told.causes[SurveyCause.MEMORY] > 0
    assert len(told.sample) == 4
    assert {one.kind for one in told.saved} == set(RemedyKind)
    assert all(one.tried == 4 for one in told.saved)
    assert told.lines[0] == f"{len(refused):,} of {len(ends):,} requests were refused."


def test_requests_that_failed_are_counted_apart_from_the_refused(path: Path, tmp_path: Path) -> None:
    failing = Journal(tmp_path / "journal", head_of(ControllerConfig(expected_devices=2)))
    failed = 0
    for step in read_journal(path):
        effects = list(step.effects)
        for at, one in enumerate(effects):
            if isinstance(one, Answer) and one.outcome is Outcome.OK and failed < 3:
                effects[at] = replace(one, outcome=Outcome.FAILED, reason=Reason.MODEL_RAISED)
                failed += 1
        failing.on_step(step.now_ns, step.events, effects)
    failing.close()

    told = survey(tmp_path / "journal", Which.REFUSED, sample=1)

    assert told.lines[0] == f"{told.chosen - 3:,} of {told.requests:,} requests were refused, and 3 failed."


def test_seconds_count_from_the_beginning_of_their_own_run(tmp_path: Path) -> None:
    twice = journal_of(tmp_path / "journal")
    (once,) = [line for line in survey(twice, Which.REFUSED, sample=1).lines if "compute" in line]
    later = Journal(twice, head_of(ControllerConfig()))
    later.on_step(60 * NS_PER_S, (), ())
    later.close()

    assert once.replace("the run", "run 1") in survey(twice, Which.REFUSED, sample=1).lines


def test_of_a_tenant_and_of_the_last_second(path: Path, ends) -> None:
    mine = survey(path, Which.REFUSED, tenant="b", sample=1)
    last = survey(path, Which.REFUSED, since_ns=NS_PER_S // 2, sample=1)
    slow = survey(path, Which.SLOW, sample=1)

    assert mine.requests == sum(one[0].tenant == "b" for one in ends.values())
    assert 0 < last.requests < len(ends)
    assert slow.chosen > 0
    assert slow.saved == ()


def test_ids_like_an_unknown_one_are_found(path: Path) -> None:
    assert "r1234" in nearest_ids(path, "r1234x") or nearest_ids(path, "r1234x")
    assert nearest_ids(path, "something-else-altogether") == []


def test_other_files_are_no_journals(tmp_path: Path) -> None:
    other = tmp_path / "other"
    other.write_bytes(b"\x05\x00\x00\x00hello")

    with pytest.raises(ConfigError, match="expected a journal"):
        list(cases_of(other, {"r1"}))


def test_an_index_and_checkpoints_lead_to_the_same_explanation(path: Path, ends) -> None:
    history = write_history(path)
    for outcome in (Outcome.REJECTED, Outcome.OK):
        name = some(ends, outcome)
        found = case_in(history, name)
        assert found is not None
        first_ns = found.early.steps[0].now_ns
        assert first_ns < found.request.arrival_ns - NS_PER_S // 2, "remedies begin before it"
        told, whole = explain(found), explain(case_for(path, name))
        assert (told.sentence, told.devices, told.attempts) == (whole.sentence, whole.devices, whole.attempts)
    assert case_in(history, "nobody") is None


class Drawn(PlayedScene):
    """How a scene went by a die: met or not."""

    met: bool = False

    def good(self, request_id: str) -> bool:
        return self.met


@pytest.mark.parametrize(
    ("met", "tries", "words"),
    [
        ([True] * SURE, SURE, "Answered, if:"),
        ([False] * SURE, SURE, "Not helped by:"),
        ([True, False] * (LUCKS // 2), LUCKS, "Perhaps, depending on how long things take:"),
        ([False] + [True] * (LUCKS - 1), LUCKS, "Answered, if:"),
    ],
)
def test_what_depends_on_luck_is_tried_again_and_said_to_help_perhaps(
    path: Path, ends, monkeypatch: pytest.MonkeyPatch, met: list[bool], tries: int, words: str
) -> None:
    case = case_for(path, some(ends, Outcome.REJECTED))
    left = iter(met)
    monkeypatch.setattr(remedies, "play", lambda *_, **__: Drawn(met=next(left)))

    device = remedies._tried(case, RemedyKind.DEVICE, Change(devices=1), lambda: None)

    assert device.chance == sum(met) / tries
    assert list(left) == []
    monkeypatch.setattr(explanations, "_remedies", lambda *_: [device])
    (line,) = [one for one in explain(case).lines if "one device more" in one]
    assert line.startswith(words)
    assert ("(50%)" in line) is words.startswith("Perhaps")

"""A journal as a scenario: every request again, what answered them, and what gateways ended by themselves."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from clockwork_serve.apps.simulate import ask, play
from clockwork_serve.apps.traffic import JournalTraffic, transcribe
from clockwork_serve.controller import ControllerConfig
from clockwork_serve.errors import ConfigError
from clockwork_serve.messages import Answer, Outcome, Request
from clockwork_serve.telemetry import Journal, head_of, read_journal, refusals_path
from clockwork_serve.units import NS_PER_S
from clockwork_serve.workload.transcript import TrafficChanges
from tests.apps.scenarios import SURGE, written
from tests.sim.journals import written as seed_journal
from tests.workload.scenarios import run

NOTHING = TrafficChanges()


def journal_of(folder: Path, name: str = "run.journal") -> Path:
    question = ask(written(folder, SURGE), config=ControllerConfig())
    path = folder / name
    journal = Journal(path, head_of(question.config))
    play(question.simulation(watchers=[journal]))
    journal.close()
    return path


def asked_in(path: Path) -> list[tuple[int, str, int]]:
    """The requests of a journal, from the first one on."""
    found = [one for step in read_journal(path) for one in step.events if isinstance(one, Request)]
    first_ns = min(one.arrival_ns for one in found)
    return sorted((one.arrival_ns - first_ns, one.model.partition("/")[0], one.slo_ns) for one in found)


def asked_by(scenario: str) -> list[tuple[int, str, int]]:
    workload = ask(scenario, config=ControllerConfig()).workload
    found = run(workload)
    columns = zip(*(found[name].tolist() for name in ("times_ns", "models", "slos_ns")), strict=True)
    return sorted((at, workload.models[model][0], slo) for at, model, slo in columns)


def test_a_simulation_of_a_journals_scenario_has_the_same_requests_and_answers(tmp_path: Path) -> None:
    path = journal_of(tmp_path)

    made = transcribe(path, tmp_path / "again.toml", NOTHING)
    again = ask(made.scenario, config=ControllerConfig())
    journal = Journal(tmp_path / "again.journal", head_of(again.config))
    play(again.simulation(watchers=[journal]))
    journal.close()

    assert asked_by(made.scenario) == asked_in(path) == asked_in(tmp_path / "again.journal")
    assert made.requests == len(asked_in(path))
    assert again.cluster.devices == 1
    assert again.scenario.cluster.memory_mib == 256
    assert made.unprofiled == []


@pytest.mark.parametrize("seed", range(12))
def test_so_it_is_whatever_was_asked_for_and_whatever_went_wrong(tmp_path: Path, seed: int) -> None:
    path = seed_journal(tmp_path / "journal", seed, requests=150)

    made = transcribe(path, tmp_path / "again.toml", NOTHING)

    once = {
        one.request_id: one for step in read_journal(path) for one in step.events if isinstance(one, Request)
    }
    assert made.requests == len(once)
    assert len(asked_by(made.scenario)) == made.requests


def test_it_brings_profiles_as_they_were_measured(tmp_path: Path) -> None:
    made = transcribe(journal_of(tmp_path), tmp_path / "again.toml", NOTHING)

    (table,) = json.loads((tmp_path / "again.zoo.json").read_text())["tables"].values()
    rows = {row["model"]: row for row in table}
    assert set(rows) == {"s-0000", "l"}  # models of one code and size share a row
    assert rows["s-0000"]["infer_b1_ms"] == pytest.approx(4, abs=0.1)
    assert rows["l"]["load_ms"] == pytest.approx(8, abs=0.3)
    assert str(tmp_path / "again.zoo.json") in made.files


def test_what_gateways_ended_counts_too_once_and_not_if_it_was_invalid(tmp_path: Path) -> None:
    path = journal_of(tmp_path)
    known = next(one for step in read_journal(path) for one in step.events if isinstance(one, Request))
    ended = {
        "x1": (Outcome.REJECTED, NS_PER_S), "x2": (Outcome.INVALID, NS_PER_S),
        known.request_id: (Outcome.REJECTED, known.arrival_ns),
    }  # fmt: skip
    refusals = Journal(refusals_path(path, "g0"))
    for request_id, (outcome, at_ns) in ended.items():
        request = Request(
            request_id=request_id, gateway="g0", model="s-0000/1", arrival_ns=at_ns, deadline_ns=at_ns + 10
        )
        refusals.on_step(at_ns, (request,), (Answer(request_id=request_id, gateway="g0", outcome=outcome),))
    refusals.close()

    made = transcribe(path, tmp_path / "again.toml", NOTHING)

    assert made.requests == len(asked_in(path)) + 1
    assert "1 request left out, for it was invalid" in made.notes


def test_where_a_run_began_at_a_time_of_day_parts_are_chosen_by_it(tmp_path: Path) -> None:
    path = journal_of(tmp_path)

    with pytest.raises(ConfigError, match="does not tell the time of day"):
        transcribe(path, tmp_path / "dated.toml", TrafficChanges(from_ns=NS_PER_S, absolute=True))

    assert not list(tmp_path.glob("dated*"))
    assert not JournalTraffic(path).wall


def test_a_zoo_must_have_every_model(tmp_path: Path) -> None:
    path = journal_of(tmp_path)
    table = tmp_path / "two.csv"

    with pytest.raises(
        ConfigError, match=r"run.journal:\d+: model: expected one that has a profile in .*two.csv"
    ):
        transcribe(path, tmp_path / "mine.toml", NOTHING, zoo=str(table))
    (tmp_path / "sub").mkdir()
    made = transcribe(
        path, tmp_path / "sub" / "mine.toml", TrafficChanges(kinds={"": "small"}), zoo=str(table)
    )

    assert ask(made.scenario, config=ControllerConfig()).zoo.name == "two"


def test_a_log_is_a_scenario_of_named_models(tmp_path: Path) -> None:
    log = tmp_path / "calls.csv"
    log.write_text("time,model,slo_ms\n10.5,resnet50_v2,20\n11,densenet121,30\n")

    made = transcribe(log, tmp_path / "mine.toml", NOTHING)

    assert asked_by(made.scenario) == [
        (0, "resnet50_v2", 20_000_000),
        (NS_PER_S // 2, "densenet121", 30_000_000),
    ]
    assert made.unprofiled == []


def test_an_end_leaves_nothing_behind(tmp_path: Path) -> None:
    path = journal_of(tmp_path)

    def stop(done: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        transcribe(path, tmp_path / "mine.toml", NOTHING, tell=stop)

    assert not list(tmp_path.glob("mine*"))


def test_it_is_built_the_same_twice(tmp_path: Path) -> None:
    path = journal_of(tmp_path)
    first, second = (transcribe(path, tmp_path / f"{name}.toml", TrafficChanges(scale=1.5)) for name in "ab")

    assert asked_by(first.scenario) == asked_by(second.scenario)


def test_of_servegens_weeks_the_chosen_part_alone_is_drawn(tmp_path: Path) -> None:
    place = tmp_path / "m-tiny"
    place.mkdir()
    rows = "0,1e4,1,Gamma,1,1\n600,0.1,1,Gamma,1,1\n1200,0.5,1,Weibull,1,1\n"  # the first alone is 6 million
    for client in range(2):
        (place / f"chunk-{client}-trace.csv").write_text(rows)
    part = TrafficChanges(from_ns=600 * NS_PER_S, to_ns=1500 * NS_PER_S, kinds={"": "resnet50_v2"})

    made = transcribe(place, tmp_path / "part.toml", part)

    assert (made.seconds, made.models, list(made.loads)) == (900, 1, ["requests"])
    assert made.requests + made.left_out == 2 * (60 + 300)
    asked = asked_by(made.scenario)
    assert len(asked) == made.requests
    assert {model for _, model, _ in asked} == {"m-tiny"}
    assert 0 <= asked[0][0] < asked[-1][0] < 900 * NS_PER_S
    assert sum(at < 600 * NS_PER_S for at, _, _ in asked) == 120

    with pytest.raises(ConfigError, match="does not tell the time of day"):
        transcribe(place, tmp_path / "dated.toml", TrafficChanges(from_ns=1, absolute=True))

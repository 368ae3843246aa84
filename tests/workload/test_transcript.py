"""Requests written down as a scenario: what comes out of it again, what is otherwise, and what is said."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from clockwork_serve.errors import ConfigError
from clockwork_serve.units import NS_PER_MS, NS_PER_S
from clockwork_serve.workload.scenario import read_scenario
from clockwork_serve.workload.stream import build
from clockwork_serve.workload.traffic import LoggedRequest, RequestClass
from clockwork_serve.workload.transcript import FOLLOWS_NS, Burst, TrafficChanges, Transcriber, Transcript
from tests.workload.scenarios import run

DAY_NS = 86_400 * NS_PER_S


def written(
    folder: Path, requests: list[LoggedRequest], name: str = "mine.toml", own: dict | None = None, **changes
) -> Transcript:
    transcriber = Transcriber(Path("log"), folder / name, TrafficChanges(**changes))
    for request in requests:
        transcriber.take(request)
    return transcriber.finish(
        [], zoo="v100", kinds=own or {}, known=lambda kind: kind == "resnet50_v2", strict=False
    )


def again(transcript: Transcript) -> list[tuple[int, str, int, str]]:
    """The requests of a scenario: when, model, SLO, and class."""
    workload = build(read_scenario(transcript.scenario), 1)
    found = run(workload)
    columns = zip(*(found[name].tolist() for name in ("times_ns", "models", "slos_ns", "loads")), strict=True)
    return sorted(
        (at, workload.models[model][0], slo, workload.loads[load]) for at, model, slo, load in columns
    )


REQUESTS = [LoggedRequest(at, at * NS_PER_S, "m", 50 * NS_PER_MS) for at in range(1, 11)]


@settings(max_examples=40, deadline=None)
@given(
    st.lists(
        st.tuples(
            st.integers(0, 50 * NS_PER_S), st.sampled_from(["a", "b.c", "d-1"]),
            st.sampled_from([0, 1_000_000, 20_123_457, DAY_NS]), st.sampled_from(["", "web", "w/b"]),
            st.integers(0, 2),
        ),
        min_size=1, max_size=60,
    )
)  # fmt: skip
def test_what_was_asked_for_is_asked_for_again(tmp_path_factory, calls) -> None:
    requests = [
        LoggedRequest(at, 7 * DAY_NS + at_ns, model, slo_ns, RequestClass(tenant, priority))
        for at, (at_ns, model, slo_ns, tenant, priority) in enumerate(calls)
    ]

    made = written(tmp_path_factory.mktemp("again"), requests)

    first_ns = min(one.at_ns for one in requests)
    assert sorted((one.at_ns - first_ns, one.model, one.slo_ns or DAY_NS) for one in requests) == [
        (at_ns, model, slo_ns) for at_ns, model, slo_ns, _ in again(made)
    ]
    classes = {(load.tenant or "", load.priority) for load in read_scenario(made.scenario).loads}
    assert classes == {(one.whose.tenant, one.whose.priority) for one in requests}


def test_one_slo_of_all_is_the_loads_and_can_be_changed_there(tmp_path) -> None:
    made = written(tmp_path, REQUESTS)
    text = Path(made.scenario).read_text()

    assert "slo_ms = 50.0\n" in text
    Path(made.scenario).write_text(text.replace("slo_ms = 50.0", "slo_ms = 10.0"))
    assert {slo for _, _, slo, _ in again(made)} == {10 * NS_PER_MS}


def test_a_part_of_the_time(tmp_path) -> None:
    made = written(tmp_path, REQUESTS, from_ns=2 * NS_PER_S, to_ns=5 * NS_PER_S)

    assert [at for at, *_ in again(made)] == [0, NS_PER_S, 2 * NS_PER_S]
    assert (made.seconds, made.requests, made.left_out) == (3.0, 3, 7)
    assert made.notes[0] == "7 requests outside of the chosen part are left out"
    dated = written(
        tmp_path, REQUESTS, "dated.toml", from_ns=int(2.5 * NS_PER_S), to_ns=5 * NS_PER_S, absolute=True
    )
    assert [at for at, *_ in again(dated)] == [NS_PER_S // 2, 3 * NS_PER_S // 2]


def test_more_and_fewer_requests(tmp_path) -> None:
    many = [LoggedRequest(at, at * 10 * NS_PER_MS, "m") for at in range(2000)]

    half = written(tmp_path, many, "half.toml", scale=0.5)
    more = written(tmp_path, many, "more.toml", scale=2.5)
    burst = written(tmp_path, many, "burst.toml", bursts=(Burst(3.0, 5 * NS_PER_S, 2 * NS_PER_S),))

    assert 900 < half.requests < 1100
    assert {at for at, *_ in again(half)} <= {one.at_ns for one in many}
    assert 4800 < more.requests < 5200
    assert more.seconds <= 20 + FOLLOWS_NS / NS_PER_S
    assert burst.requests == 2000 + 2 * 200
    assert written(tmp_path, many, "again.toml", scale=0.5).requests == half.requests


def test_another_model_comes_besides(tmp_path) -> None:
    made = written(tmp_path, REQUESTS, added=(("new", 20.0),), slo_ms=30.0, own={"m": "resnet50_v2"})

    scenario = read_scenario(made.scenario)
    assert [(load.name, load.arrivals, load.rate_rps, load.slo_ms) for load in scenario.loads] == [
        ("requests", "timestamps", None, 30.0), ("added new", "poisson", 20.0, 30.0),
    ]  # fmt: skip
    assert {one.name: one.kind for one in scenario.models} == {"m": "resnet50_v2", "new": "new"}
    assert made.unprofiled == ["new"]


def test_kinds_are_the_callers_else_the_sources_else_the_names(tmp_path) -> None:
    def kinds(name: str, **changes) -> dict:
        made = written(
            tmp_path,
            [LoggedRequest(1, 0, "m"), LoggedRequest(2, 1, "n")],
            name,
            {"n": "resnet50_v2"},
            **changes,
        )
        return {one.name: one.kind for one in read_scenario(made.scenario).models}

    assert kinds("a.toml") == {"m": "m", "n": "resnet50_v2"}
    assert kinds("b.toml", kinds={"": "other"}) == {"m": "other", "n": "resnet50_v2"}
    assert kinds("c.toml", kinds={"n": "mine"}) == {"m": "m", "n": "mine"}
    with pytest.raises(ConfigError, match="kind: expected a model that is asked for, found 'q'"):
        kinds("d.toml", kinds={"q": "mine"})


def test_a_model_without_a_profile_is_named_by_its_line(tmp_path) -> None:
    transcriber = Transcriber(Path("log"), tmp_path / "mine.toml", TrafficChanges())
    transcriber.take(LoggedRequest(17, 0, "m"))

    with pytest.raises(
        ConfigError, match=r"log:17: model: expected one that has a profile in mine.csv, found 'm'"
    ):
        transcriber.finish([], zoo="mine.csv", kinds={}, known=lambda kind: False, strict=True)


def test_a_clock_that_was_set_back_is_named_by_its_line(tmp_path) -> None:
    requests = [
        LoggedRequest(1, 100 * NS_PER_S, "m"),
        LoggedRequest(2, 41 * NS_PER_S, "m"),
        LoggedRequest(3, 0, "m"),
    ]

    with pytest.raises(
        ConfigError, match=r"log:3: time: expected at most 60 s less than in a row before, found '100 s"
    ):
        written(tmp_path, requests)


def test_gaps_are_told(tmp_path) -> None:
    requests = [LoggedRequest(at, (at + (7200 if at > 500 else 0)) * NS_PER_S, "m") for at in range(1000)]

    (note,) = (one for one in written(tmp_path, requests).notes if "gap" in one)

    assert note == "1 gap of more than 60 s, the longest of 7,201 s before line 501: they are kept"


def test_nothing_is_no_scenario(tmp_path) -> None:
    with pytest.raises(ConfigError, match="log: expected requests, found none but 10 requests outside"):
        written(tmp_path, REQUESTS, from_ns=DAY_NS)


def test_what_is_there_is_not_written_over(tmp_path) -> None:
    written(tmp_path, REQUESTS)

    with pytest.raises(ConfigError, match=r"out: expected a new file NAME.toml in a folder that exists"):
        written(tmp_path, REQUESTS)


def test_what_was_begun_can_be_discarded(tmp_path) -> None:
    transcriber = Transcriber(Path("log"), tmp_path / "mine.toml", TrafficChanges())
    for at in range(10_000):
        transcriber.take(LoggedRequest(at, at * NS_PER_MS, "m"))
    assert list(tmp_path.iterdir())

    transcriber.discard()

    assert not list(tmp_path.iterdir())

"""Traces as requests: how many, when, to which models, and the same whatever the run's length."""

from __future__ import annotations

import gzip

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from clockwork_serve.errors import ConfigError
from clockwork_serve.units import NS_PER_S
from clockwork_serve.workload.scenario import Ramp, read_scenario
from clockwork_serve.workload.stream import build
from tests.workload.scenarios import load, requests, run, scenario

MINUTE = 60 * NS_PER_S
COUNTS = {"a": [600, 0, 1200, 300], "b": [0, 60, 120, 0], "c": [30, 30, 30, 30], "d": [0, 0, 0, 1]}


@pytest.fixture
def base(tmp_path):
    rows = [f"o,a,{name},http," + ",".join(map(str, counts)) for name, counts in COUNTS.items()]
    text = "HashOwner,HashApp,HashFunction,Trigger,1,2,3,4\n" + "\n".join(rows) + "\n"
    (tmp_path / "t.csv.gz").write_bytes(gzip.compress(text.encode()))
    (tmp_path / "calls.csv").write_text(
        "app,func,end_timestamp,duration\n"
        + "".join(f"a,{'fg'[n % 5 == 0]},{n / 10 + 3},3\n" for n in range(1, 601))
    )
    (tmp_path / "times.csv").write_text("seconds\n" + "".join(f"{n / 4}\n" for n in range(400)))
    return tmp_path


def by_minute(made, model: int, minutes: int = 4) -> list[int]:
    return np.bincount(made["times_ns"][made["models"] == model] // MINUTE, minlength=minutes).tolist()


def azure(**fields):
    return load("azure", trace="t.csv.gz", **fields)


@pytest.mark.parametrize("cv", [None, 0.4, 6.0])
def test_exact_counts_are_exact_in_every_minute(base, cv) -> None:
    made = requests(azure(counts="exact", cv=cv), base=base, seconds=300)

    assert [by_minute(made, model) for model in range(4)] == [COUNTS[name] for name in "abcd"]


@pytest.mark.parametrize("cv", [None, 0.5, 2.0])
def test_counts_as_rates_come_out_on_average(base, cv) -> None:
    made = requests(azure(cv=cv, rate_scale=10.0), base=base, seconds=240)

    for model, name in enumerate("abc"):
        for found, count in zip(by_minute(made, model), COUNTS[name], strict=True):
            assert abs(found - 10 * count) <= 6 * (cv or 1) * np.sqrt(10 * count) + (40 if cv else 0) * (
                count > 0
            )


def test_a_scale_by_chance_is_right_on_average(base) -> None:
    made = requests(azure(counts="exact", rate_scale=0.25), base=base, seconds=240)

    assert by_minute(made, 0) == [150, 0, 300, 75]
    assert all(7 <= found <= 8 for found in by_minute(made, 2))


def test_a_rate_is_the_mean_over_the_chosen_minutes(base) -> None:
    workload = build(scenario(azure(rate_rps=100.0, first_minute=2, minutes=2), seconds=120), 1, base)
    found = run(workload)["times_ns"].size

    assert abs(found - 12_000) < 6 * np.sqrt(12_000)
    assert workload.notes[0] == "load: t.csv.gz: minutes 2 to 3, 4 functions, 1,681 calls (14.0/s)"
    assert workload.notes[2] == "load: scaled by 7.139 to a mean of 100.0 requests/s"
    assert workload.notes[3] == "load: inside a minute: Poisson; minute counts are rates"


def test_a_ramp_multiplies_the_trace(base) -> None:
    ramp = Ramp(every_s=30.0, factor=3.0)
    made = requests(azure(rate_scale=4.0, minutes=1, rate_ramp=ramp), base=base, seconds=60)
    halves = np.bincount(made["times_ns"] // (30 * NS_PER_S))

    assert halves == pytest.approx([315 * 4, 315 * 12], rel=0.12)


def test_a_trace_begins_with_its_load_and_ends_with_its_minutes(base) -> None:
    made = requests(azure(counts="exact", start_s=30.0, stop_s=240.0, first_minute=1), base=base, seconds=500)

    assert made["times_ns"][0] >= 30 * NS_PER_S
    assert made["times_ns"][-1] < 210 * NS_PER_S
    assert made["times_ns"].size == 60 + 30 + 1200 + 120 + 30 + 300 + 30 + 1


@settings(max_examples=15, deadline=None)
@given(
    stop=st.floats(1.0, 239.0), counts=st.sampled_from(["rates", "exact"]), cv=st.sampled_from([None, 1.5])
)
def test_a_longer_run_begins_like_a_shorter_one_up_to_its_last_minute(
    tmp_path_factory, stop, counts, cv
) -> None:
    folder = tmp_path_factory.mktemp("t")
    (folder / "t.csv.gz").write_bytes(gzip.compress(
        b"HashOwner,HashApp,HashFunction,Trigger,1,2,3,4\no,a,f,x,50,60,0,200\no,a,g,x,3,0,1,2\n"
    ))  # fmt: skip
    short = requests(azure(counts=counts, cv=cv, stop_s=stop), base=folder, seconds=240)
    long = requests(azure(counts=counts, cv=cv), base=folder, seconds=240)
    whole = int(stop // 60) * MINUTE
    kept = [int(np.searchsorted(made["times_ns"], whole)) for made in (short, long)]

    assert short["times_ns"].size == 0 or short["times_ns"][-1] < stop * NS_PER_S
    assert short["times_ns"][: kept[0]].tolist() == long["times_ns"][: kept[1]].tolist()
    assert short["models"][: kept[0]].tolist() == long["models"][: kept[1]].tolist()


def test_calls_are_even_inside_a_minute(base) -> None:
    made = requests(azure(counts="exact", cv=3.0, rate_scale=50.0), base=base, seconds=240)
    places = made["times_ns"][made["models"] == 0] % MINUTE / MINUTE

    assert np.histogram(places, bins=4, range=(0, 1))[0] == pytest.approx(places.size / 4, rel=0.15)


def test_single_calls_of_2021_come_at_their_times_to_their_models(base) -> None:
    made = requests(load("azure", trace="calls.csv", mapping="stripe"), base=base, copies=2, seconds=100)

    assert made["times_ns"].tolist() == [round(n * 1e8) for n in range(600)]
    assert made["models"].tolist() == [int(n % 5 == 0) for n in range(1, 601)]


def test_single_calls_are_played_faster_and_stop_with_the_load(base) -> None:
    made = requests(
        load("azure", trace="calls.csv", rate_scale=2.0, start_s=1.0, stop_s=6.0), base=base, seconds=100
    )

    assert made["times_ns"].tolist() == [NS_PER_S + round(n * 5e7) for n in range(100)]


def test_a_cap_thins_single_calls(base) -> None:
    made = requests(
        load("azure", trace="calls.csv", cap_share=0.5, mapping="stripe"), base=base, copies=2, seconds=99
    )
    calls = np.bincount(made["models"])

    assert calls[1] == 120
    assert calls[0] == pytest.approx(120, rel=0.3)


def test_timestamps_without_functions_are_spread_by_popularity(base) -> None:
    workload = build(scenario(load("timestamps", trace="times.csv", popularity="zipf", zipf_s=2.0)), 1, base)
    made = run(workload)

    assert made["times_ns"].tolist() == [n * NS_PER_S // 4 for n in range(80)]
    assert np.bincount(made["models"]).argmax() == 0
    assert len(set(made["models"])) > 1
    assert workload.notes == (
        "load: times.csv: 100 s from its minute 0, 1 function, 400 calls (4.0/s)",
        "load: models drawn zipf, as the trace has no functions",
        "load: played 1 times as fast: 4.0 requests/s for 100 s",
    )


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"trace": "times.csv", "drop_top": 1}, "drop_top: expected no value with this trace, found 1"),
        (
            {"trace": "times.csv", "mapping": "stripe"},
            "mapping: expected no value with this trace, found 'stripe'",
        ),
        ({"trace": ("times.csv", "times.csv")}, "trace: expected one file of single calls, found"),
        (
            {"trace": "times.csv", "first_minute": 5},
            "times.csv: first_minute: expected calls after minute 5, found",
        ),
        ({"trace": "nothing.csv"}, "trace: expected a trace file, found none at"),
    ],
)
def test_what_a_trace_cannot_do_is_refused(base, fields, message) -> None:
    with pytest.raises(ConfigError, match=message):
        build(scenario(load("timestamps", **fields)), 1, base)


@pytest.mark.parametrize("field", [{"cv": 2.0}, {"counts": "exact"}, {"rate_ramp": Ramp(every_s=1, add=1)}])
def test_a_trace_of_single_calls_has_its_own_times(base, field) -> None:
    with pytest.raises(
        ConfigError, match=rf"loads\[0\].{next(iter(field))}: expected no value with this trace"
    ):
        build(scenario(load("azure", trace="calls.csv", **field)), 1, base)


def test_a_trace_is_found_beside_its_scenario_too(base, tmp_path_factory) -> None:
    (base / "s.toml").write_text(
        'name = "x"\nseconds = 60\n[[models]]\nname = "m"\nkind = "k"\n[[loads]]\n'
        'name = "l"\nmodels = ["m"]\narrivals = "timestamps"\ntrace = "times.csv"\n'
    )
    elsewhere = tmp_path_factory.mktemp("elsewhere")
    assert run(build(read_scenario(base / "s.toml"), 1, elsewhere))["times_ns"].size == 240


NAMED = "time,model,slo_ms\n0,m-0001,20\n1,m-0000,\n2,m-0001,30\n"


def test_calls_go_to_the_models_that_they_name_with_their_own_slos(tmp_path) -> None:
    (tmp_path / "named.csv").write_text(NAMED)
    fields = {"trace": "named.csv", "mapping": "named"}

    workload = build(scenario(load("timestamps", **fields)), 1, tmp_path)
    made = run(workload)
    one_slo = requests(load("timestamps", slo_ms=5, **fields), base=tmp_path)

    assert made["models"].tolist() == one_slo["models"].tolist() == [1, 0, 1]
    assert made["slos_ns"].tolist() == [20_000_000, 86_400 * NS_PER_S, 30_000_000]
    assert set(one_slo["slos_ns"]) == {5_000_000}
    assert workload.notes[-1] == "load: SLOs as the trace has them"


def test_minutes_go_to_the_models_that_they_name(tmp_path) -> None:
    (tmp_path / "t.csv").write_text(
        "HashOwner,HashApp,HashFunction,Trigger,1\no,a,m-0002,x,9\no,b,m-0001,x,5\n"
    )

    made = requests(load("azure", trace="t.csv", mapping="named", counts="exact"), base=tmp_path, seconds=60)

    assert np.bincount(made["models"]).tolist() == [0, 5, 9]


@pytest.mark.parametrize(
    ("arrivals", "text", "line"),
    [
        ("timestamps", NAMED.replace("m-0000", "m-0009"), 3),
        ("azure", "app,func,end_timestamp,duration\na,m-0001,1,0\nb,m-0009,2,0\n", 3),
        ("azure", "HashOwner,HashApp,HashFunction,Trigger,1\no,a,m-0001,x,1\no,b,m-0009,x,1\n", 3),
    ],
)
def test_a_model_that_is_not_there_is_named_by_its_line(tmp_path, arrivals, text, line) -> None:
    (tmp_path / "t.csv").write_text(text)

    with pytest.raises(ConfigError) as caught:
        build(scenario(load(arrivals, trace="t.csv", mapping="named")), 1, tmp_path)

    assert (
        f"t.csv:{line}: function: expected the name of one of the load's models, found 'm-0009'; add it"
        in str(caught.value)
    )


def test_functions_that_are_drawn_have_no_names() -> None:
    with pytest.raises(ConfigError, match="mapping: expected block, stripe or shuffled, found 'named'"):
        build(scenario(load("generated", functions=5, mapping="named")), 1)

"""What servers log, in each form: the requests that are read, and what is said of what is not told."""

from __future__ import annotations

import gzip
import re
from itertools import pairwise
from pathlib import Path
from statistics import fmean, pstdev

import pytest

from clockwork_serve.errors import ConfigError
from clockwork_serve.units import NS_PER_S
from clockwork_serve.workload.traffic import USUAL_PATHS, open_traffic

NOON = 1_796_079_600  # 2026-11-30T23:00:00Z


def read(tmp_path: Path, text: str, name: str = "source", **asked: str):
    file = tmp_path / name
    file.write_text(text)
    traffic = open_traffic(file, **asked)
    return list(traffic.requests()), traffic


def told(requests) -> list[tuple[int, str]]:
    return [(one.at_ns, one.model) for one in requests]


def test_a_table_with_and_without_a_header(tmp_path) -> None:
    bare, _ = read(tmp_path, "0.5,resnet,100\n1.25,bert,\n")
    named, traffic = read(
        tmp_path,
        "tenant,model,slo,time,priority\nweb,resnet,20,2026-11-30T23:00:00Z,1\n,bert,,2026-11-30 23:00:01,\n",
    )

    assert told(bare) == [(NS_PER_S // 2, "resnet"), (5 * NS_PER_S // 4, "bert")]
    assert [one.slo_ns for one in bare] == [100_000_000, 0]
    assert told(named) == [(NOON * NS_PER_S, "resnet"), ((NOON + 1) * NS_PER_S, "bert")]
    assert [(one.whose.tenant, one.whose.priority) for one in named] == [("web", 1), ("", 0)]
    assert traffic.wall
    assert not any("SLO" in note for note in traffic.notes())


def test_columns_that_are_not_read_are_named(tmp_path) -> None:
    _, traffic = read(tmp_path, "time,model,rate\n2026-11-30T14:00:00,mlp,120\n")

    assert any(note.startswith("a row is one request, whatever rate may say") for note in traffic.notes())


@pytest.mark.parametrize(
    ("number", "at_ns"),
    [
        ("12.25", 12_250_000_000), ("1796079600", NOON * NS_PER_S),
        ("1796079600123", NOON * NS_PER_S + 123_000_000),
        ("1796079600123456", NOON * NS_PER_S + 123_456_000),
    ],
)  # fmt: skip
def test_numbers_are_seconds_or_thousandths_of_them(tmp_path, number, at_ns) -> None:
    requests, _ = read(tmp_path, f"time,model\n{number},m\n")

    assert abs(requests[0].at_ns - at_ns) < 1000


def test_json_lines(tmp_path) -> None:
    requests, traffic = read(
        tmp_path,
        '{"ts": 1.5, "model": "resnet", "slo_ms": 20, "tenant": "web"}\n'
        '{"time": "2026-11-30T23:00:00Z", "request": "POST /v2/models/bert%2Dbase/infer HTTP/1.1"}\n'
        '{"time": "2026-11-30T23:00:00Z", "path": "/metrics"}\n',
    )

    assert told(requests) == [(1_500_000_000, "resnet"), (NOON * NS_PER_S, "bert-base")]
    assert requests[0].slo_ns == 20_000_000
    assert requests[0].whose.tenant == "web"
    assert any("1 line without a model" in note for note in traffic.notes())


def test_json_lines_of_other_paths(tmp_path) -> None:
    requests, _ = read(tmp_path, '{"ts": 1, "path": "/api/resnet/"}\n', paths=r"/api/(\w+)/")

    assert [one.model for one in requests] == ["resnet"]


def test_rows_that_name_no_model_get_the_one_that_is_given(tmp_path) -> None:
    mooncake = '{"timestamp": 1500, "input_length": 8, "output_length": 2, "hash_ids": [0]}\n'

    requests, _ = read(tmp_path, mooncake, model="llm")

    assert told(requests) == [(1_500_000_000, "llm")]
    with pytest.raises(
        ConfigError, match=r":1: model: expected a value, found .*; give one to such rows: --model"
    ):
        read(tmp_path, mooncake)


def test_a_gzipped_one(tmp_path) -> None:
    file = tmp_path / "calls.gz"
    file.write_bytes(gzip.compress(b"1,m\n2,m\n3,m\n"))

    assert len(list(open_traffic(file).requests())) == 3


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("model,slo\nm,1\n", ":1: header: expected a column of times (timestamp, time, seconds, "),
        ("time,model\n1,m\n2\n", ":3: row: expected 2 fields, as the first line has, found 1; is it cut?"),
        (
            "time,model\n1,\n",
            ":2: model: expected a name, without commas, quotes or blanks around it, found ''",
        ),
        ("time,model\nx,m\n", ":2: time: expected seconds, of less than 4000000000, found 'x'"),
        ("time,model\n2026-13-01T00:00:00,m\n", ":2: time: expected a time such as"),
        (
            "time,model,slo_ms\n1,m,soon\n",
            ":2: slo_ms: expected milliseconds, 0.001 to 86400000, found 'soon'",
        ),
        ("time,model,priority\n1,m,16\n", ":2: priority: expected a whole number in 0..15, found '16'"),
        ('{"time": 1, "model": "m"}\n[1]\n', ":2: row: expected an object in JSON, found '[1]'"),
        ('{"model": "m"}\n', ":1: time: expected one of timestamp, time, "),
        ('10.0.0.1 - - [30/Nov/2026:23:59:59 +0100] "GET / HTTP/1.1" 200 5\n', ":1: header: expec"),
        ("", ":1: header: expected a line of column names, found an empty file"),
        (
            "version https://git-lfs.github.com/spec/v1\n",
            ":1: file: expected a trace, found 'a pointer to it",
        ),
    ],
)
def test_what_is_wrong_is_named_by_file_line_and_field(tmp_path, text, said) -> None:
    with pytest.raises(ConfigError) as caught:
        read(tmp_path, text)

    assert f"{tmp_path / 'source'}{said}" in str(caught.value)


@pytest.mark.parametrize(("paths", "said"), [("(", "a regular expression"), ("/x/", "a group (...)")])
def test_a_pattern_that_cannot_be_is_named(tmp_path, paths, said) -> None:
    with pytest.raises(ConfigError, match=re.escape(f"path: expected {said}")):
        read(tmp_path, "1,m\n", paths=paths)


def test_no_file_is_named(tmp_path) -> None:
    with pytest.raises(ConfigError, match="expected a readable trace file, found: No such file"):
        open_traffic(tmp_path / "none")


def test_the_usual_paths_name_models() -> None:
    pattern = re.compile(USUAL_PATHS)
    for path in (
        "/v2/models/m/infer",
        "/v2/models/m/versions/3/infer",
        "/v1/models/m:predict",
        "/predictions/m",
    ):
        match = pattern.search(path)
        assert match is not None
        assert [one for one in match.groups() if one] == ["m"]


# ------------------------------------------------------------
# ServeGen's clients.


def clients(folder: Path, **files: str) -> Path:
    """A model's folder, with a file for each client."""
    place = folder / "m-tiny"
    place.mkdir(exist_ok=True)
    for name, text in files.items():
        (place / f"{name.replace('_', '-')}-trace.csv").write_text(text)
    return place


STEADY = "0,0.5,1.0,Gamma,1.0,2.0\n600,0,0,,0,0\n1200,0.25,0.7,Weibull,1.4,4.4\n"
BURSTY = "0,0.1,3.0,Weibull,0.3,1.1\n600,0.1,9.0,Gamma,0.0001,0.4\n1200,0,0,,0,0\n"


def test_clients_of_servegen_ask_as_often_as_their_rates_say(tmp_path: Path) -> None:
    place = clients(tmp_path, chunk_0=STEADY, chunk_10=BURSTY)
    traffic = open_traffic(place)
    requests = list(traffic.requests())

    assert [sum(one.line == number for one in requests) for number in (1, 2, 3)] == [360, 60, 150]
    assert {one.model for one in requests} == {"m-tiny"}
    times = [one.at_ns for one in requests]
    assert times == sorted(times)
    for one in requests:
        assert (one.line - 1) * 600 <= one.at_ns / NS_PER_S < one.line * 600
    assert not traffic.wall
    assert traffic.done_bytes == len(STEADY) + len(BURSTY)
    assert "2 clients ask one model" in traffic.notes()[-1]


def test_each_client_is_drawn_by_its_own_law_and_always_the_same(tmp_path: Path) -> None:
    place = clients(tmp_path, chunk_0=STEADY.replace("0.5", "5"), chunk_1=BURSTY.replace("0.1", "5"))
    both = list(open_traffic(place).requests())
    alone = [list(open_traffic(place / f"chunk-{at}-trace.csv", model="net").requests()) for at in (0, 1)]

    assert {one.model for one in alone[0]} == {"net"}
    assert sorted(one.at_ns for one in both) == sorted(one.at_ns for part in alone for one in part)

    def variation(requests) -> float:
        times = [one.at_ns for one in requests if one.line == 1]
        gaps = [after - before for before, after in pairwise(times)]
        return pstdev(gaps) / fmean(gaps)

    assert variation(alone[0]) == pytest.approx(1, abs=0.1)
    assert variation(alone[1]) > 3


def test_windows_outside_of_what_is_chosen_are_not_drawn(tmp_path: Path) -> None:
    traffic = open_traffic(clients(tmp_path, chunk_0=STEADY))
    traffic.choose(600 * NS_PER_S, 1500 * NS_PER_S)

    assert {one.line for one in traffic.requests()} == {3}


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("0,1,1,Gamma,1,1\n0,1,1,Gamma,1,1\n", "trace.csv:2: time: expected more than in the row before"),
        ("0,1,1,Gamma,1\n", "trace.csv:1: row: expected time, rate, variation, law, shape and scale"),
        ("0,1,1,Pareto,1,1\n", "trace.csv:1: law: expected Gamma, Weibull or nothing, found 'Pareto'"),
        ("0,-1,1,Gamma,1,1\n", "trace.csv:1: rate: expected a number in 0..20000, found '-1'"),
        ("0,1,1,Gamma,nan,1\n", "trace.csv:1: shape: expected a number in 0..1000000000, found 'nan'"),
        ("", "expected a row for each window, found none"),
        ("5,1,1,Gamma,1,1\n", "chunk-1-trace.csv: time: expected the windows of chunk-0-trace.csv"),
    ],
)
def test_what_is_wrong_with_a_client_is_named(tmp_path: Path, text: str, said: str) -> None:
    place = clients(tmp_path, chunk_0="0,1,1,Gamma,1,1\n", chunk_1=text)

    with pytest.raises(ConfigError) as caught:
        list(open_traffic(place).requests())

    assert said in str(caught.value)


def test_a_folder_of_something_else_is_told(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="expected a folder with ServeGen's"):
        open_traffic(tmp_path)
    with pytest.raises(ConfigError, match="model: expected a name without commas"):
        open_traffic(clients(tmp_path, chunk_0=STEADY), model='a,"b')

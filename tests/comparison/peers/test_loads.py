"""Loads are scenarios, played by ``clockwork bench``, whose record is read."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest

from clockwork_lab.bench.records import Kind
from clockwork_serve.workload.scenario import Scenario, read_scenario
from clockwork_serve.workload.stream import build
from comparison.peers import record, served
from comparison.peers.loads import LOADS, Load
from comparison.peers.measure import turn
from comparison.peers.models import NETWORKS
from comparison.peers.peer import Setup
from comparison.peers.servers import PEERS

X = np.zeros((1, 4), np.float32)


def setup(folder: Path) -> Setup:
    return Setup(served.DEVICE, {"m": 0.0}, (4,), 200.0, folder, 9000)


def read(folder: Path, load: Load) -> Scenario:
    path = folder / f"{load.name}.toml"
    path.write_text(load.text)
    return read_scenario(path)


@pytest.mark.parametrize("name", LOADS)
def test_a_load_is_of_one_kind_of_model_and_begins_with_a_warm_up(name: str, tmp_path: Path) -> None:
    load = LOADS[name]
    scenario = read(tmp_path, load)
    models = build(scenario, 1).models

    assert {kind for _, kind in models} == {load.kind}
    assert [each for each, _ in models] == load.model_names()
    assert load.kind in {served.DEVICE, *NETWORKS}
    assert (scenario.name, min(one.slo_ms or 0 for one in scenario.loads)) == (load.title, load.slo_ms)
    assert scenario.warmup_s > 0


def test_bursts_are_as_their_name_says(tmp_path: Path) -> None:
    scenario = read(tmp_path, LOADS["mobilenet_bursts"])
    times_s = np.concatenate([np.array(part.times_ns) for part in build(scenario, 1).open()]) / 1e9
    counts = np.histogram(times_s, range(int(scenario.seconds) + 1))[0]

    assert counts[::4].mean() == pytest.approx(450, rel=0.1)
    assert np.delete(counts, range(0, len(counts), 4)).mean() == pytest.approx(50, rel=0.2)


def test_without_those_who_come_and_go_the_load_is_the_same(tmp_path: Path) -> None:
    whole = read(tmp_path, LOADS["mobilenet_comers"])
    part = read(tmp_path, LOADS["mobilenet_comers"].without_comers())

    assert [one.name for one in part.loads] == ["hot"]
    assert part.models == whole.models
    hot = next(build(whole, 3).open())
    alone = next(build(part, 3).open())
    assert [at for at, number in zip(hot.times_ns, hot.loads, strict=True) if number == 0] == alone.times_ns


def test_over_http_the_body_is_a_file_and_the_model_is_in_the_path(tmp_path: Path) -> None:
    command = record.command(PEERS["clockwork"], setup(tmp_path), Path("a.toml"), X, seed=3, core=1)

    pairs = dict(pairwise(command))
    assert pairs["--protocol"] == "raw"
    assert "{model}" in pairs["--path"]
    assert Path(pairs["--body"]).read_bytes().endswith(X.tobytes())
    assert "x-slo-ms: 200" in command
    assert (pairs["--seed"], pairs["--cores"]) == ("3", "1")


def test_ends_are_understood_as_the_server_means_them() -> None:
    ends = [(Kind.OPEN, ""), (Kind.ANSWERED, ""), (Kind.REJECTED, "503 Request timeout expired")]

    understood = [record.end_of(kind, words, PEERS["triton"]) for kind, words in [*ends, (Kind.RESET, "")]]
    assert understood == ["none", "ok", "expired", "none"]


def test_models_come_in_turn_and_go_when_there_is_no_more_room() -> None:
    turns = [turn(["a", "b", "c"], 2, number) for number in range(5)]

    assert turns == [("", "a"), ("", "b"), ("a", "c"), ("b", "a"), ("c", "b")]

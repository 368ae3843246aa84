"""Loads are scenarios, played by ``clockwork bench``, whose record is read."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from clockwork_serve.workload.scenario import read_scenario
from clockwork_serve.workload.stream import build
from comparison.peers import load, networks, served
from comparison.peers.measure import turn
from comparison.peers.peer import Setup
from comparison.peers.registry import peer
from comparison.peers.run import LOADS, load_names

X = np.zeros((1, 4), np.float32)
ROW = [("scheduled_ns", "<i8"), ("end", "<i2")]


def setup(folder: Path) -> Setup:
    return Setup(served.DEVICE, {"m": 0.0}, (4,), 200.0, folder, 9000)


def record(path: Path, ends: list[tuple[str, str]], rows: list[tuple[int, int]]) -> None:
    head: dict[str, Any] = {"row": ROW, "rows": len(rows), "ends": ends}
    text = json.dumps(head).encode()
    text += b" " * (-(12 + len(text)) % 64)
    path.write_bytes(
        load.MAGIC + len(text).to_bytes(4, "little") + text + np.array(rows, np.dtype(ROW)).tobytes()
    )


@pytest.mark.parametrize("name", load_names())
def test_a_load_is_of_one_kind_of_model_and_begins_with_a_warm_up(name: str) -> None:
    scenario = read_scenario(LOADS / f"{name}.toml")
    kinds = {kind for _, kind in build(scenario, 1).models}

    assert len(kinds) == 1
    assert kinds <= {served.DEVICE, *networks.NETWORKS}
    assert scenario.warmup_s > 0


def test_bursts_are_as_their_name_says() -> None:
    scenario = read_scenario(LOADS / "mobilenet_bursts.toml")
    times_s = np.concatenate([np.array(part.times_ns) for part in build(scenario, 1).open()]) / 1e9
    counts = np.histogram(times_s, range(int(scenario.seconds) + 1))[0]

    assert counts[::4].mean() == pytest.approx(450, rel=0.1)
    assert np.delete(counts, range(0, len(counts), 4)).mean() == pytest.approx(50, rel=0.2)


def test_without_those_who_come_and_go_the_load_is_the_same(tmp_path: Path) -> None:
    whole = LOADS / "mobilenet_comers.toml"
    (tmp_path / "part.toml").write_text(load.without_comers(whole.read_text()))
    part = read_scenario(tmp_path / "part.toml")

    assert [one.name for one in part.loads] == ["hot"]
    assert part.models == read_scenario(whole).models
    hot = next(build(read_scenario(whole), 3).open())
    alone = next(build(part, 3).open())
    assert [at for at, number in zip(hot.times_ns, hot.loads, strict=True) if number == 0] == alone.times_ns


def test_over_http_the_body_is_a_file_and_the_model_is_in_the_path(tmp_path: Path) -> None:
    command = load.command(peer("clockwork"), setup(tmp_path), Path("a.toml"), X, seed=3, core=1)

    pairs = dict(pairwise(command))
    assert pairs["--protocol"] == "raw"
    assert "{model}" in pairs["--path"]
    assert Path(pairs["--body"]).read_bytes().endswith(X.tobytes())
    assert "x-slo-ms: 200" in command
    assert (pairs["--seed"], pairs["--cores"]) == ("3", "1")


def test_over_grpc_the_inputs_are_a_file(tmp_path: Path) -> None:
    command = load.command(peer("kserve"), setup(tmp_path), Path("a.toml"), X, seed=1, core=1)

    pairs = dict(pairwise(command))
    assert (pairs["--protocol"], pairs["--url"]) == ("grpc", "127.0.0.1:9001")
    assert np.load(pairs["--input-data"]).tolist() == X.tolist()


def test_a_record_is_read_and_its_ends_are_understood(tmp_path: Path) -> None:
    ends = [("open", ""), ("answered", ""), ("rejected", "503 Request timeout expired"), ("reset", "")]
    record(tmp_path / "record", ends, [(7, 1), (9, 2)])
    head, table, understood = load.read(tmp_path / "record", peer("triton"))

    assert head["rows"] == 2
    assert table["scheduled_ns"].tolist() == [7, 9]
    assert understood == ["none", "ok", "expired", "none"]


def test_another_file_is_no_record(tmp_path: Path) -> None:
    (tmp_path / "record").write_bytes(b"something else")

    with pytest.raises(RuntimeError, match="expected a record"):
        load.read(tmp_path / "record", peer("triton"))


def test_models_come_in_turn_and_go_when_there_is_no_more_room() -> None:
    turns = [turn(["a", "b", "c"], 2, number) for number in range(5)]

    assert turns == [("", "a"), ("", "b"), ("a", "c"), ("b", "a"), ("c", "b")]

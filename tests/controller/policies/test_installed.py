"""A policy of another package is found by its entry point; what is none is refused."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from clockwork_serve.controller import POLICIES, Controller, ControllerConfig
from clockwork_serve.controller.policies.base import Scheduler
from clockwork_serve.errors import ConfigError
from tests.controller.policies.other_package import written

SCENARIO = """
name = "short"
seconds = 2
[[models]]
name = "model"
kind = "resnet50_v2"
[[loads]]
name = "load"
models = ["model"]
arrivals = "poisson"
rate_rps = 150
slo_ms = 60
"""


@pytest.fixture
def path(tmp_path: Path) -> str:
    (tmp_path / "short.toml").write_text(SCENARIO)
    return written(tmp_path)


def simulate(folder: Path, path: str, policy: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "clockwork_serve", "simulate", str(folder / "short.toml"), "--json", "-"]
    return subprocess.run(
        [*command, "--checks", "--policy", policy], env=os.environ | {"PYTHONPATH": path}, timeout=100,
        capture_output=True, text=True, check=False,
    )  # fmt: skip


def test_the_simulator_runs_a_policy_of_another_package(tmp_path: Path, path: str) -> None:
    theirs, papers, ours = (
        json.loads(simulate(tmp_path, path, name).stdout) for name in ("counting", "paper", "default")
    )

    assert theirs["setup"]["policy"] == "counting"
    assert theirs["loads"] == papers["loads"]
    assert theirs["loads"] != ours["loads"], "none takes the place of ours"


@pytest.mark.parametrize(
    ("policy", "said"),
    [
        ("countin", f"policy (from --policy): expected one of {', '.join(POLICIES)}, counting,"),
        (
            "lacking",
            "clockwork_serve.controller.policies.base.Scheduler; found none named check, device_changed, ",
        ),
        (
            "gone",
            "expected 'other_policies:Gone' to be there to import; found module 'other_policies' has no",
        ),
    ],
)
def test_what_is_no_policy_is_refused_with_what_is_wrong(
    tmp_path: Path, path: str, policy: str, said: str
) -> None:
    ended = simulate(tmp_path, path, policy)

    assert ended.returncode == 2
    assert said in ended.stderr
    assert ended.stderr.count("\n") == 1


def test_the_laboratory_s_policy_is_refused_without_it_with_the_line_that_installs_it(
    tmp_path: Path, path: str
) -> None:
    without = tmp_path / "clockwork_lab-0.dist-info"  # found first, it hides the one that is installed
    without.mkdir()
    (without / "METADATA").write_text("Metadata-Version: 2.1\nName: clockwork-lab\nVersion: 0\n")

    ended = simulate(tmp_path, path, "released")

    assert ended.returncode == 2
    assert "expected one of default, paper, " in ended.stderr
    assert "pip install './packages/clockwork-lab'" in ended.stderr


def test_our_policies_are_policies() -> None:
    from clockwork_serve.controller.policies import SCHEDULERS

    names = {name for name in vars(Scheduler) if not name.startswith("_")}
    for one in SCHEDULERS.values():
        assert names <= {*dir(one)}


def test_a_name_that_no_package_has_is_refused_with_those_that_there_are() -> None:
    with pytest.raises(
        ConfigError, match=r"^policy: expected one of default, paper.*; found 'fifo'; install "
    ):
        Controller(ControllerConfig(policy="fifo"))

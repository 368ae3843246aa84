"""A server with a policy of another package."""

from __future__ import annotations

from pathlib import Path

import pytest

from harness import repositories
from tests.controller.policies.other_package import written
from tests.end_to_end.commands import command, started
from tests.end_to_end.conftest import call, x_json


def test_a_policy_of_another_package_serves(
    tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = tmp_path / "models"
    repositories.emulated(root, "quick", {1: 5})
    monkeypatch.setenv("PYTHONPATH", written(tmp_path))

    with started(command(root, cache, "--device", "emulated:v100", "--policy", "counting")) as (_, ready):
        found = call(ready["http"], "/v2/models/quick/infer", x_json([0.0] * 4))

    assert found.status == 200

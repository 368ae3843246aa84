"""The number of cores for this process, as reported by the system."""

from __future__ import annotations

import pytest

from clockwork_serve.devices import base as module
from clockwork_serve.devices.base import cores


@pytest.fixture
def machine(monkeypatch, tmp_path):
    """Four cores, and no container."""
    monkeypatch.setattr("os.sched_getaffinity", lambda _: {1, 2, 3, 5})
    monkeypatch.setattr(module, "QUOTA", tmp_path / "cpu.max")
    monkeypatch.setattr(module, "QUOTA_BEFORE", (tmp_path / "quota", tmp_path / "period"))
    return tmp_path


def test_where_nothing_is_limited_it_is_those_that_it_may_run_on(machine):
    assert cores() == 4


@pytest.mark.parametrize(
    ("text", "found"),
    [("100000 100000\n", 1), ("250000 100000\n", 2.5), ("max 100000\n", 4), ("900000 100000\n", 4), ("", 4),
     ("1 0", 4), ("many few", 4)],
)  # fmt: skip
def test_a_containers_quota_may_be_less(machine, text, found):
    (machine / "cpu.max").write_text(text)
    assert cores() == found


@pytest.mark.parametrize(("quota", "found"), [("150000\n", 1.5), ("-1\n", 4), ("none\n", 4)])
def test_so_may_one_of_version_1(machine, quota, found):
    (machine / "quota").write_text(quota)
    (machine / "period").write_text("100000\n")
    assert cores() == found

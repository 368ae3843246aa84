"""Profiles of the property tests: a desk explores, continuous integration repeats."""

from __future__ import annotations

import gc
import os
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

_SLOW_MACHINES = [HealthCheck.too_slow, HealthCheck.data_too_large]

settings.register_profile("desk", deadline=None, suppress_health_check=_SLOW_MACHINES, print_blob=True)
settings.register_profile("ci", settings.get_profile("desk"), derandomize=True)
settings.register_profile("long", settings.get_profile("desk"), max_examples=10_000)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE") or ("ci" if os.environ.get("CI") else "desk"))


@pytest.hookimpl(tryfirst=True)  # before xdist reads the marks
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """In one process those that start server processes, in the others the rest, file by file."""
    for item in items:
        group = "system" if starts_servers(item) else Path(item.location[0]).as_posix()
        item.add_marker(pytest.mark.xdist_group(group))


def starts_servers(item: pytest.Item) -> bool:
    return item.get_closest_marker("system") is not None


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Who starts servers goes first: there time counts. Their group is the largest, so it comes first too."""
    if os.environ.get("PYTEST_XDIST_WORKER") and not starts_servers(item) and not os.nice(0):
        os.nice(10)


def pytest_xdist_auto_num_workers() -> int:
    """One more than there are cores: many tests wait for most of their time."""
    return (os.cpu_count() or 1) + 1


def pytest_collection_finish() -> None:
    """Tests live to the end; who collects garbage need not look at them all each time."""
    gc.collect()
    gc.freeze()

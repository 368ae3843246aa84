"""Profiles of the property tests: a desk explores, continuous integration repeats."""

from __future__ import annotations

import gc
import os
from collections.abc import Generator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, settings

import tests.timing
from clockwork_serve.errors import encodable

ROOT = Path(__file__).parents[1]
FUZZERS = "tests/fuzz/test_fuzz.py"

_SLOW_MACHINES = [HealthCheck.too_slow, HealthCheck.data_too_large]

settings.register_profile("desk", deadline=None, suppress_health_check=_SLOW_MACHINES, print_blob=True)
settings.register_profile("ci", settings.get_profile("desk"), derandomize=True)
settings.register_profile("long", settings.get_profile("desk"), max_examples=10_000)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE") or ("ci" if os.environ.get("CI") else "desk"))


@cache
def starts_servers(path: str) -> bool:
    """Whether a test file has tests marked as ``system``."""
    return path.startswith("tests/end_to_end/") or "mark.system" in (ROOT / path).read_text(encoding="utf-8")


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """With ``--dist loadfile``: files that start server processes in one process, the rest in the others."""
    if config.getvalue("dist") != "loadfile":
        return None
    from xdist.scheduler import LoadScopeScheduling  # it is not everywhere

    class Files(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            path, _, name = nodeid.partition("::")
            if path == FUZZERS:
                return name  # some seconds each: they fill what the others leave
            return "system" if starts_servers(path) else path

    return Files(config, log)


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Who starts servers has priority: there time counts. As the largest scope they come first, too."""
    if os.environ.get("PYTEST_XDIST_WORKER") and not starts_servers(item.location[0]) and not os.nice(0):
        os.nice(10)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport() -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Reports can be sent on: logs of tests that raise what is no text would end the process that tests."""
    report = yield
    report.sections = [(name, encodable(text)) for name, text in report.sections]
    return report


def pytest_configure(config: pytest.Config) -> None:
    """Tests about time that could not be judged are run again."""
    config.pluginmanager.register(tests.timing)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_auto_num_workers() -> int:
    """One more than there are cores: many tests wait for most of their time."""
    return (os.cpu_count() or 1) + 1


def pytest_collection_finish() -> None:
    """Tests live to the end; who collects garbage need not look at them all each time."""
    gc.collect()
    gc.freeze()

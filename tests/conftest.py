"""Profiles of the property tests: a desk explores, continuous integration repeats."""

from __future__ import annotations

import asyncio
import gc
import os
import re
import signal
from collections.abc import Callable, Generator
from enum import IntEnum
from functools import cache
from pathlib import Path
from typing import Any

# For all that tests start. Numpy's threads spin for a while in each process that imports it, and a process
# that may write no bytecode compiles hundreds of files.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
# A shell without job control starts its background jobs with SIGINT ignored, and children inherit that.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)
if signal.getsignal(signal.SIGHUP) is signal.SIG_IGN:  # nohup
    signal.signal(signal.SIGHUP, signal.SIG_DFL)

import pytest
import uvloop
from hypothesis import HealthCheck, settings

import tests.timing
from clockwork_serve.errors import encodable

ROOT = Path(__file__).parents[1]
FUZZERS = "tests/fuzz/test_fuzz.py"
LIMITS_OF_SECONDS = (
    "tests/end_to_end/test_hangs.py",
    "tests/end_to_end/test_stalls.py",
    "tests/end_to_end/test_stuck.py",
)
"""Files whose servers must find in time what has stopped, and nothing else."""
STOCK = "tests/end_to_end/stock/"
"""Files that ask one server, which takes long to start."""

_SLOW_MACHINES = [HealthCheck.too_slow, HealthCheck.data_too_large]

settings.register_profile("desk", deadline=None, suppress_health_check=_SLOW_MACHINES, print_blob=True)
settings.register_profile("ci", settings.get_profile("desk"), derandomize=True)
settings.register_profile("long", settings.get_profile("desk"), max_examples=10_000)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE") or ("ci" if os.environ.get("CI") else "desk"))


class Turn(IntEnum):
    """When a test file has its turn; its niceness, too."""

    TIMED = 0
    """It starts servers and judges how long they take."""
    SERVERS = 5
    """It starts servers, and asks them with deadlines that a busy machine keeps."""
    REST = 10
    FUZZERS = 11


@cache
def turn_of(path: str) -> tuple[Turn, bool]:
    """Of a test file; and whether it has no slow tests, for the long ones of a turn come first."""
    text = (ROOT / path).read_text(encoding="utf-8")
    turn = Turn.FUZZERS if path == FUZZERS else Turn.REST
    if path.startswith("tests/end_to_end/") or "mark.system" in text:
        timed = path in LIMITS_OF_SECONDS or "from tests.timing import" in text
        turn = Turn.TIMED if timed else Turn.SERVERS
    return turn, "mark.slow" not in text


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """Without slow tests, a file that has no others is not imported: each process would import torch."""
    if config.option.markexpr.split(" and ")[0] != "not slow" or collection_path.suffix != ".py":
        return None
    marks = re.search(
        r"^pytestmark = (\[[^]]*\]|.*)", collection_path.read_text(encoding="utf-8"), re.MULTILINE
    )
    return True if marks and "mark.slow" in marks[0] else None


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """In one of several processes, by turns; otherwise in the order by chance that it is."""
    if os.environ.get("PYTEST_XDIST_WORKER"):
        items.sort(key=lambda item: turn_of(item.location[0]))


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """With ``--dist loadfile``: those that judge time one after the other in one process, others by files.

    One process begins with what starts no servers: those wait for half of their time.
    """
    if config.getvalue("dist") != "loadfile":
        return None
    from xdist.scheduler import LoadScopeScheduling  # it is not everywhere

    class Files(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            path, _, name = nodeid.partition("::")
            turn, _ = turn_of(path)
            if turn is Turn.TIMED:
                return turn.name
            if turn is Turn.FUZZERS:
                return name  # some seconds each: they fill what the others leave
            return STOCK if path.startswith(STOCK) else path

        def _assign_work_unit(self, node: Any) -> None:
            if node is self.nodes[-1]:
                rest = (
                    scope
                    for scope, unit in self.workqueue.items()
                    if turn_of(next(iter(unit)).partition("::")[0])[0] >= Turn.REST
                )
                self.workqueue.move_to_end(next(rest, next(iter(self.workqueue))), last=False)
            super()._assign_work_unit(node)

    config.option.loadscopereorder = False  # as the tests are ordered
    return Files(config, log)


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Who judges time has priority, unless ``TESTS_NICE`` is ``no``."""
    if os.environ.get("PYTEST_XDIST_WORKER") and os.environ.get("TESTS_NICE") != "no":
        turn, _ = turn_of(item.location[0])
        os.nice(max(0, turn - os.nice(0)))


@pytest.fixture(scope="session", autouse=True)
def _inductor(tmp_path_factory: pytest.TempPathFactory) -> None:
    """All tests compile torch's headers once, which takes as long as a model."""
    base = tmp_path_factory.getbasetemp()
    root = base.parent if os.environ.get("PYTEST_XDIST_WORKER") else base
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(root / "inductor")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport() -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Reports can be sent on: logs of tests that raise what is no text would end the process that tests."""
    report = yield
    report.sections = [(name, encodable(text)) for name, text in report.sections]
    return report


def pytest_configure(config: pytest.Config) -> None:
    """Tests about time that could not be judged are run again.

    What calls the kernels of torch models is compiled as it is written, the kernels as users get them: two
    seconds less for each batch size. Torch reads this when it is imported.
    """
    config.pluginmanager.register(tests.timing)
    os.environ.setdefault("AOT_INDUCTOR_COMPILE_WRAPPER_OPT_LEVEL", "O0")
    os.environ.setdefault("AOT_INDUCTOR_ENABLE_LINE_TABLES", "0")


def pytest_asyncio_loop_factories() -> dict[str, Callable[[], asyncio.AbstractEventLoop]]:
    """Tests that are coroutines run on the loop that servers have."""
    return {"uvloop": uvloop.new_event_loop}


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_auto_num_workers() -> int:
    """One more than there are cores: many tests wait for most of their time."""
    return (os.cpu_count() or 1) + 1


def pytest_collection_finish() -> None:
    """Tests live to the end; who collects garbage need not look at them all each time."""
    gc.collect()
    gc.freeze()

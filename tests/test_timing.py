"""Tests about time, run as tests: what fails in peace fails, what fails on a busy machine is run again."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.timing import LATE_S, RUNS, CouldNotJudge, Disturbance, Timing, busy_s, own_s

ROOT = Path(__file__).parents[1]
PEACE = Disturbance(seconds=10, late_s=0.002, others_s=1.0)

CASES = '''"""Made up: how often each ran is counted in a file."""

import pathlib

import pytest

from tests.timing import Disturbance

BUSY = Disturbance(seconds=10, late_s=0.3, others_s=15.0)
PEACE = Disturbance(seconds=10, late_s=0.002, others_s=1.0)
FOLDER = pathlib.Path(__file__).parent


@pytest.fixture
def fresh():
    with (FOLDER / "fresh").open("a") as file:
        file.write("x")


def ran(name):
    with (FOLDER / name).open("a") as file:
        file.write("x")
    return len((FOLDER / name).read_text())


def test_third(timing, fresh):
    timing.read = lambda: BUSY
    with timing.judged():
        assert ran("third") == 3


def test_never(timing):
    timing.read = lambda: BUSY
    with timing.judged():
        assert not ran("never")


def test_peace(timing):
    timing.read = lambda: PEACE
    with timing.judged():
        assert not ran("peace")


def test_behaviour(timing):
    timing.read = lambda: BUSY
    assert not ran("behaviour")


@pytest.mark.asyncio
async def test_coroutine(timing, fresh):
    timing.read = lambda: BUSY
    with timing.judged():
        assert ran("coroutine") == 2


@pytest.fixture(scope="module")
def whole():
    ran("whole")


def test_plain(timing):
    assert ran("plain")


def test_last(timing, whole):
    timing.read = lambda: BUSY
    with timing.judged():
        assert ran("last") == 2
'''


@pytest.mark.parametrize("more", [(), ("-n", "2")])
def test_what_could_not_be_judged_is_run_again_and_nothing_else(
    tmp_path: Path, more: tuple[str, ...]
) -> None:
    done = run_tests(tmp_path, CASES, *more, "-rf")
    counts = {
        path.name: len(path.read_text()) for path in tmp_path.iterdir() if path.is_file() and not path.suffix
    }
    assert counts == {
        "third": 3, "fresh": 3 + 2, "never": RUNS, "peace": 1, "behaviour": 1, "plain": 1, "coroutine": 2,
        "last": 2, "whole": 2,
    }  # fmt: skip
    assert done.returncode == 1
    assert f"3 failed, 4 passed, {2 + RUNS - 1 + 1 + 1} run again" in done.stdout, done.stdout
    assert done.stdout.count("::test_third: could not be judged: other processes took 1.50 of a core") == 2
    assert "test_never - tests.timing.CouldNotJudge: could not be judged" in done.stdout


BESIDE = '''"""Made up: when each ran is written to a file of its own."""

import contextlib
import os
import pathlib
import time

import pytest

from tests.timing import Disturbance

FOLDER = pathlib.Path(__file__).parent


@contextlib.contextmanager
def noted(name):
    began = time.monotonic()
    yield
    with (FOLDER / name).open("a") as file:
        print(began, time.monotonic(), file=file)


@pytest.mark.parametrize("number", range(150))
def test_short(number):
    with noted(f"short-{os.environ['PYTEST_XDIST_WORKER']}"):
        time.sleep(0.02)


def test_alone(timing):
    timing.read = lambda: Disturbance(seconds=10, late_s=0.3, others_s=15.0)
    with noted("alone"):
        time.sleep(0.2)
    with timing.judged():
        assert len((FOLDER / "alone").read_text().splitlines()) == 4
'''


def test_who_is_run_again_is_alone(tmp_path: Path) -> None:
    done = run_tests(tmp_path, BESIDE, "-n", "3")
    assert "151 passed, 3 run again" in done.stdout, done.stdout
    first, *again = times(tmp_path / "alone")
    assert len(again) == 3
    short = [each for path in tmp_path.glob("short-*") for each in times(path)]
    assert any(beside(first, each) for each in short), "the first run shares the machine"
    assert any(each > again[0] for each in short), "and others go on afterwards"
    assert not [(run, each) for run in again for each in short if beside(run, each)]


def run_tests(folder: Path, text: str, *options: str) -> subprocess.CompletedProcess[str]:
    """A pytest of its own; ``test_alone`` comes first."""
    (folder / "test_cases.py").write_text(text)
    (folder / "conftest.py").write_text(
        "from tests import timing as about_time\n\n\ndef pytest_configure(config):\n"
        "    about_time.PAUSE_S = 0.0\n    config.pluginmanager.register(about_time)\n\n\n"
        "def pytest_collection_modifyitems(items):\n"
        "    items.sort(key=lambda item: item.name != 'test_alone')\n"
    )
    (folder / "pytest.ini").write_text("[pytest]\n")
    plugins = ["-p", "no:cacheprovider", "-p", "no:randomly", "-p", "no:schemathesis"]
    return subprocess.run(
        [sys.executable, "-m", "pytest", "-q", *plugins, *options, str(folder)],
        cwd=folder, capture_output=True, text=True, timeout=300, check=False,
        env={"PYTHONPATH": str(ROOT), "PATH": "/usr/bin:/bin", "COLUMNS": "300"},
    )  # fmt: skip


def times(path: Path) -> list[tuple[float, float]]:
    """When each began and ended, as a case wrote it."""
    return [(float(began), float(ended)) for began, ended in map(str.split, path.read_text().splitlines())]


def beside(one: tuple[float, float], other: tuple[float, float]) -> bool:
    """Whether both ran at some time."""
    return one[0] < other[1] and other[0] < one[1]


@pytest.mark.parametrize(
    ("found", "words"),
    [
        (PEACE, ""),
        (Disturbance(10, 0.002, 2.5), "other processes took 0.25 of a core"),
        (Disturbance(10, 2 * LATE_S, 0), "a thread woke 50 ms late"),
    ],
)
def test_others_and_lateness_are_reasons(found: Disturbance, words: str) -> None:
    assert words in str(found)
    assert bool(words) == bool(str(found))


def test_only_what_failed_is_doubted() -> None:
    timing = Timing(lambda: Disturbance(10, 1.0, 20))
    with timing.judged():
        assert timing
    with pytest.raises(CouldNotJudge, match="1000 ms late") as caught, timing.judged():
        raise TimeoutError("too late")
    assert isinstance(caught.value.__cause__, TimeoutError)
    timing.close()


def test_a_watch_sees_what_others_use_and_not_what_this_process_uses() -> None:
    before_s, began_s = own_s(), time.monotonic()
    subprocess.run([sys.executable, "-c", "sum(range(10_000_000))"], check=True)
    assert own_s() > before_s, "children that ended are counted"
    assert busy_s() > 0
    timing = Timing()
    found = timing.read()
    timing.close()
    assert 0 <= found.seconds <= time.monotonic() - began_s
    assert found.late_s >= 0
    assert found.others_s >= 0

"""A worker's lanes are read once it is dead, and not before; they name what ran, and nothing else."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from clockwork_serve.messages import WorkerLost
from clockwork_serve.serve.worker.crash_report import (
    FlightRecorder,
    create_recorder,
    no_crash_report,
    read_crash_report,
)

WORKER = """
import sys, time
from pathlib import Path
from clockwork_serve.serve.worker.crash_report import create_recorder

lanes = create_recorder(Path(sys.argv[1]), "w", 4).lanes
{steps}
print("noted", flush=True)
time.sleep(60)
"""


@contextmanager
def worker(run_dir: Path, steps: str) -> Iterator[int]:
    """A process that has noted what it does; its id."""
    command = [sys.executable, "-c", WORKER.format(steps=steps), str(run_dir)]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        process.stdout.readline()
        try:
            yield process.pid
        finally:
            process.kill()


def died(run_dir: Path, steps: str) -> WorkerLost:
    """What is said of one that was killed, by who has not waited for it yet."""
    with worker(run_dir, steps) as pid:
        os.kill(pid, signal.SIGKILL)
        time.sleep(0.2)
        return read_crash_report(run_dir, "w", pid)


def test_a_dead_worker_names_what_each_lane_was_at_and_its_notes_go(tmp_path: Path) -> None:
    found = died(tmp_path, "lanes[0].action(7); lanes[2].action(1 << 40); lanes[3].code('sha-of-code')")
    assert found == WorkerLost(worker="w", running=(7, 1 << 40), preparing=("sha-of-code",))
    assert list(tmp_path.iterdir()) == []


def test_what_is_done_is_no_longer_named_while_something_runs(tmp_path: Path) -> None:
    found = died(tmp_path, "lanes[0].action(7); lanes[0].clear(); lanes[1].action(8)")
    assert found == WorkerLost(worker="w", running=(8,))


def test_if_nothing_runs_it_is_what_was_done_last(tmp_path: Path) -> None:
    found = died(tmp_path, "lanes[0].action(7); lanes[0].clear(); lanes[3].code('c'); lanes[3].clear()")
    assert found == WorkerLost(worker="w", running=(7,), idle=True)


def test_of_a_worker_that_lives_nothing_is_said(tmp_path: Path) -> None:
    with worker(tmp_path, "lanes[0].action(7)") as pid:
        assert read_crash_report(tmp_path, "w", pid) == WorkerLost(worker="w")
        assert len(list(tmp_path.iterdir())) == 1


def test_of_a_worker_without_notes_nothing_is_known(tmp_path: Path) -> None:
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    assert read_crash_report(tmp_path, "w", gone.pid) == WorkerLost(worker="w") == no_crash_report("w", 1)


def test_the_file_is_for_its_owner_alone(tmp_path: Path) -> None:
    create_recorder(tmp_path, "worker-cpu:0", 2)
    (path,) = tmp_path.iterdir()
    assert (path.name, path.stat().st_mode & 0o777) == (f"worker-cpu:0.{os.getpid()}.box", 0o600)


def test_a_name_of_any_length_does_not_reach_the_next_lane() -> None:
    box = FlightRecorder(2)
    box.lanes[1].action(5)
    box.lanes[0].code("x" * 5000)
    assert box.lanes[1]._words[0] == 5

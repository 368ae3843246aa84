"""A worker's crash report is read once it is dead, and not before; it names what ran, and nothing else."""

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
print("recorded", flush=True)
time.sleep(60)
"""


@contextmanager
def worker(run_dir: Path, steps: str) -> Iterator[int]:
    """A process that has recorded these steps; its id."""
    command = [sys.executable, "-c", WORKER.format(steps=steps), str(run_dir)]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        process.stdout.readline()
        try:
            yield process.pid
        finally:
            process.kill()


def died(run_dir: Path, steps: str) -> WorkerLost:
    """The report on a worker that was killed and not yet waited for."""
    with worker(run_dir, steps) as pid:
        os.kill(pid, signal.SIGKILL)
        time.sleep(0.2)
        return read_crash_report(run_dir, "w", pid)


def test_a_report_names_what_each_lane_was_doing_and_the_file_is_removed(tmp_path: Path) -> None:
    found = died(tmp_path, "lanes[0].action(7); lanes[2].action(1 << 40); lanes[3].code('sha-of-code')")
    assert found == WorkerLost(worker="w", running=(7, 1 << 40), preparing=("sha-of-code",))
    assert list(tmp_path.iterdir()) == []


def test_a_finished_action_is_not_named_while_another_runs(tmp_path: Path) -> None:
    found = died(tmp_path, "lanes[0].action(7); lanes[0].clear(); lanes[1].action(8)")
    assert found == WorkerLost(worker="w", running=(8,))


def test_if_nothing_runs_the_last_action_is_named(tmp_path: Path) -> None:
    found = died(tmp_path, "lanes[0].action(7); lanes[0].clear(); lanes[3].code('c'); lanes[3].clear()")
    assert found == WorkerLost(worker="w", running=(7,), idle=True)


def test_a_worker_that_lives_has_no_report_and_keeps_its_file(tmp_path: Path) -> None:
    with worker(tmp_path, "lanes[0].action(7)") as pid:
        assert read_crash_report(tmp_path, "w", pid) == WorkerLost(worker="w")
        assert len(list(tmp_path.iterdir())) == 1


def test_a_worker_that_left_no_file_has_no_report(tmp_path: Path) -> None:
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    assert read_crash_report(tmp_path, "w", gone.pid) == WorkerLost(worker="w") == no_crash_report("w", 1)


def test_only_the_owner_may_read_the_file(tmp_path: Path) -> None:
    create_recorder(tmp_path, "worker-cpu:0", 2)
    (path,) = tmp_path.iterdir()
    assert (path.name, path.stat().st_mode & 0o777) == (f"worker-cpu:0.{os.getpid()}.box", 0o600)


def test_a_long_name_does_not_overwrite_the_next_lane() -> None:
    recorder = FlightRecorder(2)
    recorder.lanes[1].action(5)
    recorder.lanes[0].code("x" * 5000)
    assert recorder.lanes[1]._words[0] == 5

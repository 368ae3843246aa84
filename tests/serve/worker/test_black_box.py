"""A worker's notes are read once it is dead, and not before; they name what ran, and nothing else."""

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
from clockwork_serve.serve.worker.black_box import BlackBox, autopsy, create, no_autopsy

WORKER = """
import sys, time
from pathlib import Path
from clockwork_serve.serve.worker.black_box import create

notes = create(Path(sys.argv[1]), "w", 4).notes
{deeds}
print("noted", flush=True)
time.sleep(60)
"""


@contextmanager
def worker(run_dir: Path, deeds: str) -> Iterator[int]:
    """A process that has noted what it does; its id."""
    command = [sys.executable, "-c", WORKER.format(deeds=deeds), str(run_dir)]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        process.stdout.readline()
        try:
            yield process.pid
        finally:
            process.kill()


def died(run_dir: Path, deeds: str) -> WorkerLost:
    """What is said of one that was killed, by who has not waited for it yet."""
    with worker(run_dir, deeds) as pid:
        os.kill(pid, signal.SIGKILL)
        time.sleep(0.2)
        return autopsy(run_dir, "w", pid)


def test_a_dead_worker_names_what_each_lane_was_at_and_its_notes_go(tmp_path: Path) -> None:
    found = died(tmp_path, "notes[0].action(7); notes[2].action(1 << 40); notes[3].code('sha-of-code')")
    assert found == WorkerLost(worker="w", running=(7, 1 << 40), preparing=("sha-of-code",))
    assert list(tmp_path.iterdir()) == []


def test_what_is_done_is_no_longer_named_while_something_runs(tmp_path: Path) -> None:
    found = died(tmp_path, "notes[0].action(7); notes[0].clear(); notes[1].action(8)")
    assert found == WorkerLost(worker="w", running=(8,))


def test_if_nothing_runs_it_is_what_was_done_last(tmp_path: Path) -> None:
    found = died(tmp_path, "notes[0].action(7); notes[0].clear(); notes[3].code('c'); notes[3].clear()")
    assert found == WorkerLost(worker="w", running=(7,), idle=True)


def test_of_a_worker_that_lives_nothing_is_said(tmp_path: Path) -> None:
    with worker(tmp_path, "notes[0].action(7)") as pid:
        assert autopsy(tmp_path, "w", pid) == WorkerLost(worker="w")
        assert len(list(tmp_path.iterdir())) == 1


def test_of_a_worker_without_notes_nothing_is_known(tmp_path: Path) -> None:
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    assert autopsy(tmp_path, "w", gone.pid) == WorkerLost(worker="w") == no_autopsy("w", 1)


def test_the_file_is_for_its_owner_alone(tmp_path: Path) -> None:
    create(tmp_path, "worker-cpu:0", 2)
    (path,) = tmp_path.iterdir()
    assert (path.name, path.stat().st_mode & 0o777) == (f"worker-cpu:0.{os.getpid()}.box", 0o600)


def test_a_name_of_any_length_does_not_reach_the_next_lane() -> None:
    box = BlackBox(2)
    box.notes[1].action(5)
    box.notes[0].code("x" * 5000)
    assert box.notes[1]._words[0] == 5

"""What a user's class starts, in every way: none of it outlives its worker, nor anything the server."""

from __future__ import annotations

import os
import signal
import subprocess
import uuid
from collections.abc import Callable
from pathlib import Path

import pytest

from harness import machine, repositories
from harness.server import name_of
from harness.serving import until
from tests.end_to_end.commands import START_S, alive, command, started
from tests.end_to_end.conftest import call, x_json

RUNAWAY = '''"""Starts a process as it is loaded, and four if the first number says so, which it answers."""

import multiprocessing
import os
import subprocess
import time

import numpy as np


def apart():
    """In a session, with an environment of its own."""
    return subprocess.Popen(["sleep", "600"], env={}, start_new_session=True, cwd="/").pid


def orphan():
    """Forked twice."""
    told, tell = os.pipe()
    if os.fork() == 0:
        os.setsid()
        pid = os.fork()
        if pid > 0:
            os.write(tell, b"%d" % pid)
            os._exit(0)
        time.sleep(600)
    return int(os.read(told, 10))


def worker():
    process = multiprocessing.get_context("fork").Process(target=time.sleep, args=(600,))
    process.start()
    return process.pid


class Model:
    def load(self, path):
        with open(LOG, "a") as log:
            print(apart(), file=log)

    def infer(self, inputs):
        if inputs["x"][0, 0] != 1.0:
            return {"y": inputs["x"]}
        came_back = os.fork()
        if came_back == 0:
            return {"y": inputs["x"]}
        return {"y": np.array([[came_back, apart(), orphan(), worker()]], np.float32)}

    def unload(self):
        pass
'''
MARK = "CLOCKWORK_TEST_MARK"
PATH = "/v2/models/runaway/infer"


def marked(mark: str) -> list[str]:
    """All processes whose environment has the mark, by what they run."""
    found = []
    for path in Path("/proc").iterdir():
        if path.name.isdecimal() and alive(int(path.name)):
            try:
                if f"{MARK}={mark}".encode() in (path / "environ").read_bytes():
                    found.append((path / "cmdline").read_text())
            except OSError:
                continue
    return found


def stop(process: subprocess.Popen[str]) -> None:
    process.terminate()


def kill_all_from_the_top(process: subprocess.Popen[str]) -> None:
    pids = [process.pid, *machine.children(process.pid)]
    for pid in pids:
        if name_of(pid) or pid == process.pid:
            os.kill(pid, signal.SIGKILL)


def kill_all_to_the_top(process: subprocess.Popen[str]) -> None:
    for pid in reversed([process.pid, *machine.children(process.pid)]):
        if name_of(pid) or pid == process.pid:
            os.kill(pid, signal.SIGKILL)


@pytest.mark.parametrize(
    "end", [stop, kill_all_from_the_top, kill_all_to_the_top], ids=lambda end: end.__name__
)
def test_nothing_outlives_its_worker_nor_the_server(
    tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch, end: Callable[[subprocess.Popen[str]], None]
) -> None:
    log = tmp_path / "log"
    repositories.python_model(tmp_path / "models", "runaway", RUNAWAY.replace("LOG", repr(str(log))))
    monkeypatch.setenv(MARK, mark := uuid.uuid4().hex)

    def ask(url: str, first: float) -> list[int]:
        found = call(url, PATH, x_json([first, 0, 0, 0]))
        assert found.status == 200, found.json
        return [int(number) for number in found.json["outputs"][0]["data"]]

    def left() -> list[int]:
        return [pid for pid in map(int, log.read_text().split()) if alive(pid)]

    with started(command(tmp_path / "models", cache)) as (process, ready):
        pids = ask(ready["http"], 1.0)
        assert not alive(pids[0]), "it came back"
        assert all(map(alive, pids[1:]))
        assert len(left()) == 1, "those of who compiled and profiled have ended"
        worker = next(pid for pid in machine.children(process.pid) if name_of(pid).startswith("worker"))
        os.kill(worker, signal.SIGKILL)
        until("all that it started has ended", lambda: not any(map(alive, pids)))
        until("another worker serves", lambda: call(ready["http"], PATH, x_json([0.0] * 4)).status == 200)
        pids += ask(ready["http"], 1.0)
        end(process)
        process.wait(START_S)
        until("nothing is left", lambda: not any(map(alive, pids)) and not left() and not marked(mark))

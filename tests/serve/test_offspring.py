"""Real processes that run away: what a child started ends with it, and all of it with the supervisor."""

from __future__ import annotations

import asyncio
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

from clockwork_serve.serve import offspring
from clockwork_serve.serve.supervisor.processes import Child, Launch
from harness import machine
from harness.serving import until
from tests.end_to_end.commands import alive

RUNAWAYS = """
import multiprocessing, os, subprocess, sys, time
from clockwork_serve.config import Settings
from clockwork_serve.serve import child

SLEEPER = "import os, time; os.write(2, b'%d\\\\n' % os.getpid()); time.sleep(600)"

def sleep():
    exec(SLEEPER)

def fork(*, twice):
    if os.fork() == 0:
        os.setsid()
        if twice and os.fork() > 0:
            os._exit(0)
        sleep()

child.prepare("runaways", Settings())
command = [sys.executable, "-S", "-c", SLEEPER]
subprocess.Popen(command)
subprocess.Popen(command, env={}, start_new_session=True, cwd="/", stdin=subprocess.DEVNULL)
multiprocessing.get_context("fork").Process(target=sleep).start()
fork(twice=False)
fork(twice=True)
time.sleep(600)
"""
COUNT = 5
SUPERVISOR = """
import asyncio
from clockwork_serve.serve.supervisor.processes import Child, Launch
async def main():
    launch = Launch(name="runaways", module="runaways", config="{}")
    child = Child(launch, lambda line: print(line, flush=True))
    print(child.pid, flush=True)
    await child.ended
    await asyncio.sleep(600)
asyncio.run(main())
"""


@pytest.fixture(autouse=True)
def programs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On the path of children: one that starts processes in every way."""
    (tmp_path / "runaways.py").write_text(RUNAWAYS)
    (tmp_path / "supervisor.py").write_text(SUPERVISOR)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))


def end(pids: list[int]) -> None:
    """What a failed test left."""
    for pid in pids:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


async def test_what_a_child_started_has_ended_with_it() -> None:
    lines: list[str] = []
    child = Child(Launch(name="runaways", module="runaways", config="{}"), lines.append)
    while len(lines) < COUNT:
        await asyncio.sleep(0.01)
    pids = [int(line) for line in lines]
    assert all(map(alive, pids))
    child.signal(signal.SIGKILL)
    assert await child.ended == -signal.SIGKILL
    end(left := [pid for pid in pids if alive(pid)])
    assert not left


@contextmanager
def supervisor(folder: Path) -> Iterator[tuple[subprocess.Popen[str], list[int]]]:
    """One with a child and what that started; their pids, the child's first."""
    process = subprocess.Popen(
        [sys.executable, folder / "supervisor.py"], stdout=subprocess.PIPE, text=True, start_new_session=True
    )
    assert process.stdout is not None
    pids = [int(process.stdout.readline()) for _ in range(1 + COUNT)]
    try:
        yield process, pids
    finally:
        process.kill()
        process.wait()
        process.stdout.close()
        end(pids)


def guard_of(process: subprocess.Popen[str]) -> int | None:
    """The guard of that supervisor, if it has one now."""
    own = str(process.pid).encode()
    found = [
        pid
        for pid in machine.children(process.pid)
        if Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")[3:6:2] == [offspring.__file__.encode(), own]
    ]
    return found[0] if found else None


def kill_supervisor(process: subprocess.Popen[str], pids: list[int]) -> None:
    process.kill()


def kill_group(process: subprocess.Popen[str], pids: list[int]) -> None:
    os.killpg(process.pid, signal.SIGKILL)


def kill_child_first(process: subprocess.Popen[str], pids: list[int]) -> None:
    os.kill(pids[0], signal.SIGKILL)
    process.kill()


def kill_child_last(process: subprocess.Popen[str], pids: list[int]) -> None:
    process.kill()
    os.kill(pids[0], signal.SIGKILL)


def kill_guard_first(process: subprocess.Popen[str], pids: list[int]) -> None:
    """There is another one soon."""
    guard = guard_of(process)
    assert guard is not None
    os.kill(guard, signal.SIGKILL)
    until("there is another guard", lambda: guard_of(process) not in (None, guard))
    process.kill()


def stop_all_first(process: subprocess.Popen[str], pids: list[int]) -> None:
    for pid in machine.children(process.pid):
        os.kill(pid, signal.SIGSTOP)
    process.kill()


def ask_all_first(process: subprocess.Popen[str], pids: list[int]) -> None:
    """As a service manager does that stops a service: the guard goes last."""
    for pid in machine.children(process.pid):
        os.kill(pid, signal.SIGTERM)
    process.kill()


@pytest.mark.parametrize(
    "kill",
    [
        kill_supervisor,
        kill_group,
        kill_child_first,
        kill_child_last,
        kill_guard_first,
        ask_all_first,
        stop_all_first,
    ],
    ids=lambda kill: kill.__name__,
)
def test_nothing_outlives_the_supervisor(
    tmp_path: Path, kill: Callable[[subprocess.Popen[str], list[int]], None]
) -> None:
    with supervisor(tmp_path) as (process, pids):
        assert all(map(alive, pids))
        guard = until("it has a guard", lambda: guard_of(process))
        kill(process, pids)
        process.wait()
        until("all have ended", lambda: not any(map(alive, [*pids, guard])))


def test_a_guard_is_never_ended_by_what_ends_the_others_not_even_while_it_starts(tmp_path: Path) -> None:
    with supervisor(tmp_path) as (process, _):
        guard = until("it has a guard", lambda: guard_of(process))
        status = Path(f"/proc/{guard}/status").read_text()
    blocked = int(re.search(r"^SigBlk:\s*([0-9a-f]+)$", status, re.MULTILINE)[1], 16)  # type: ignore[index]
    assert all(blocked >> number - 1 & 1 for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP))


async def test_no_other_process_is_ended(tmp_path: Path) -> None:
    """Neither what the supervisor itself started, nor another child's."""
    own = await asyncio.create_subprocess_exec(sys.executable, "-c", "input()", stdin=subprocess.PIPE)
    with supervisor(tmp_path) as (_, others):
        await test_what_a_child_started_has_ended_with_it()
        assert own.returncode is None
        assert all(map(alive, [own.pid, *others]))
    await own.communicate(b"\n")


def test_a_limit_that_cannot_be_set_is_said_and_nothing_else() -> None:
    program = (
        "from clockwork_serve.config import Settings\n"
        "from clockwork_serve.serve import child\n"
        "child.prepare('limited', Settings())\n"
    )
    ended = subprocess.run(
        ["prlimit", "--locks=100", sys.executable, "-c", program],
        env={**os.environ, offspring.FAMILY_VARIABLE: str(2**39)}, capture_output=True, text=True,
        check=False, timeout=60,
    )  # fmt: skip
    assert ended.returncode == 0, ended.stderr
    assert "expected no hard limit of file locks (ulimit -Hx), found 100" in ended.stderr

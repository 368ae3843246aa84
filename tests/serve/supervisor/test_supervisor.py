"""Real child processes: restarted when they die, stopped on request, ended with their supervisor."""

from __future__ import annotations

import asyncio
import os
import resource
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import uvloop
from msgspec import structs

from clockwork_serve.serve.child import EXIT_BROKEN, EXIT_CONFIG
from clockwork_serve.serve.supervisor import processes
from clockwork_serve.serve.supervisor.processes import (
    FAST_DEATHS,
    FAST_S,
    LINE_MAX,
    RETRY_S_MAX,
    Backoff,
    Child,
    Launch,
    Supervisor,
    _Kept,
    crashed,
    describe_exit,
    read_thread_state,
)
from tests.timing import Timing

WAITER = """
import sys, time
print("hello from", sys.argv[1], file=sys.stderr, flush=True)
time.sleep(60)
"""
STUBBORN = """
import signal, sys, time
signal.signal(signal.SIGTERM, signal.SIG_IGN)
print("up", file=sys.stderr, flush=True)
time.sleep(60)
"""
DIES = "import sys; print('no luck', file=sys.stderr); print('today', end='', file=sys.stderr); sys.exit(3)"
BROKEN = """
import asyncio, sys
from clockwork_serve.config import Settings
from clockwork_serve.serve import child
child.prepare("broken", Settings())
async def serve(stop):
    asyncio.get_running_loop().call_soon(lambda: 1 / 0)
    await stop.wait()
sys.exit(child.run_until_stopped(serve))
"""
ANSWERS = """
import asyncio, sys, time
from clockwork_serve.config import Settings
from clockwork_serve.serve import child
child.prepare("answers", Settings())
async def serve(stop):
    child.answer_beats()
    print("up", file=sys.stderr, flush=True)
    if sys.argv[1] == "sticks":
        await asyncio.sleep(0.5)
        time.sleep(60)
    await stop.wait()
sys.exit(child.run_until_stopped(serve))
"""
TAME = """
import sys
from clockwork_serve.config import Settings
from clockwork_serve.serve import child
child.prepare("tame", Settings())
async def serve(stop):
    print("up", file=sys.stderr, flush=True)
    await stop.wait()
    print("bye", file=sys.stderr, flush=True)
sys.exit(child.run_until_stopped(serve))
"""

IDLE = """
import os, signal, sys, time
def end(*_):
    print("ends as", os.sched_getscheduler(0), file=sys.stderr, flush=True)
    sys.exit(0)
signal.signal(signal.SIGTERM, end)
os.sched_setscheduler(0, os.SCHED_IDLE, os.sched_param(0))
print("up", file=sys.stderr, flush=True)
time.sleep(60)
"""


@pytest.fixture
def launch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], Launch]:
    """Makes a module of a program, on the path of the children."""
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))

    def make(program: str) -> Launch:
        name = f"program_{len(list(tmp_path.glob('*.py')))}"
        (tmp_path / f"{name}.py").write_text(program)
        return Launch(name=name, module=name, config='{"x": 1}')

    return make


async def until(condition: Callable[[], object]) -> None:
    async with asyncio.timeout(60):
        while not condition():
            await asyncio.sleep(0.005)


def stopped(pid: int) -> bool:
    seen = read_thread_state(pid)
    return seen is not None and seen.stopped


def runs(pid: int | None) -> bool:
    return pid is not None and Path(f"/proc/{pid}").exists()


async def test_a_child_gets_its_config_and_its_output_is_read(launch: Callable[[str], Launch]) -> None:
    lines: list[str] = []
    child = Child(launch(WAITER), lines.append)
    await until(lambda: lines)
    assert lines == list(child.tail) == ['hello from {"x": 1}']
    assert await child.stop(grace_s=20) == -signal.SIGTERM


async def test_a_child_that_does_not_stop_is_killed(launch: Callable[[str], Launch]) -> None:
    lines: list[str] = []
    child = Child(launch(STUBBORN), lines.append)
    await until(lambda: lines)
    assert await child.stop(grace_s=0.05) == -signal.SIGKILL


async def test_who_gave_way_to_all_others_gets_a_core_to_end_on(launch: Callable[[str], Launch]) -> None:
    child = Child(structs.replace(launch(IDLE), optional=True), lambda line: None)
    await until(lambda: child.tail)
    assert os.sched_getscheduler(child.pid) == os.SCHED_IDLE
    may = os.geteuid() == 0 or resource.getrlimit(resource.RLIMIT_NICE)[0] >= 20  # who may not, may not
    assert await child.stop(grace_s=20) == 0
    assert child.tail[-1] == f"ends as {os.SCHED_OTHER if may else os.SCHED_IDLE}"


async def test_the_last_line_is_kept_even_without_a_newline(launch: Callable[[str], Launch]) -> None:
    lines: list[str] = []
    child = Child(launch(DIES), lines.append)
    assert await child.ended == 3
    assert lines == list(child.tail) == ["no luck", "today"]


async def test_an_endless_line_is_delivered_in_pieces(launch: Callable[[str], Launch]) -> None:
    lines: list[str] = []
    child = Child(launch("import sys; sys.stderr.write('x' * 10**6)"), lines.append)
    assert await child.ended == 0
    assert "".join(lines) == "x" * 10**6
    assert max(map(len, lines)) <= 3 * LINE_MAX


async def test_stdout_is_read_separately(launch: Callable[[str], Launch]) -> None:
    lines: list[str] = []
    output: list[str] = []
    program = (
        "import sys; print('out\\nput'); print('err', file=sys.stderr); sys.stdout.buffer.write(b'\\xff')"
    )
    child = Child(launch(program), lines.append, output.append)
    assert await child.ended == 0
    assert (lines, output) == (["err"], ["out", "put", "\\xff"])


async def test_a_child_runs_on_the_cpus_that_it_is_given_and_nobody_else_does(
    launch: Callable[[str], Launch],
) -> None:
    before = os.sched_getaffinity(0)
    child = Child(structs.replace(launch(WAITER), cpus=(max(before),)), lambda line: None)
    assert os.sched_getaffinity(child.pid) == {max(before)}
    assert os.sched_getaffinity(0) == before
    await child.stop(grace_s=20)


async def test_a_killed_child_is_restarted_until_it_is_stopped(launch: Callable[[str], Launch]) -> None:
    lines: list[str] = []
    supervisor = Supervisor(lines.append)
    waiter = launch(WAITER)
    supervisor.start(waiter)
    await until(lambda: len(lines) == 1)
    first = supervisor.pid(waiter.name)
    assert first is not None
    os.kill(first, signal.SIGKILL)
    await until(lambda: len(lines) == 2)
    second = supervisor.pid(waiter.name)
    assert second not in (None, first)
    assert supervisor.why_failing() is None
    await supervisor.stop(waiter.name, grace_s=20)
    assert supervisor.pid(waiter.name) is None
    assert supervisor.names == []
    assert not runs(second)


async def test_a_child_that_is_killed_is_restarted_and_whether_it_was_stopped_is_known(
    launch: Callable[[str], Launch],
) -> None:
    supervisor = Supervisor(lambda line: None)
    assert supervisor.end("nobody") is None
    supervisor.start(launch(WAITER))
    (name,) = supervisor.names
    for stop_it in (False, True):
        pid = supervisor.pid(name)
        assert pid is not None
        if stop_it:
            os.kill(pid, signal.SIGSTOP)
            await until(lambda pid=pid: stopped(pid))
        assert supervisor.end(name) is not stop_it
        await until(lambda pid=pid: supervisor.pid(name) not in {None, pid})
    await supervisor.kill()
    assert not stopped(1 << 22)


async def test_a_child_that_has_exited_has_no_process_id_while_what_it_started_is_ended(
    launch: Callable[[str], Launch], monkeypatch: pytest.MonkeyPatch
) -> None:
    released = threading.Event()
    monkeypatch.setattr(processes, "end_offspring", lambda pid: released.wait(60))
    supervisor = Supervisor(lambda line: None)
    supervisor.start(launch(WAITER))
    (name,) = supervisor.names
    first = supervisor.pid(name)
    assert first is not None
    os.kill(first, signal.SIGKILL)
    await until(lambda: not runs(first))
    seen = supervisor.pid(name), supervisor.end(name)
    released.set()
    assert seen == (None, None)
    await until(lambda: supervisor.pid(name) not in {None, first})
    await supervisor.kill()


async def test_a_child_that_keeps_failing_is_reported_with_its_last_lines(
    launch: Callable[[str], Launch],
) -> None:
    supervisor = Supervisor(lambda line: None)
    supervisor.start(launch(DIES))
    await until(supervisor.why_failing)
    why = supervisor.why_failing()
    assert why is not None
    assert "no luck\ntoday" in why
    await supervisor.kill()


async def test_kill_ends_all_at_once(launch: Callable[[str], Launch]) -> None:
    lines: list[str] = []
    supervisor = Supervisor(lines.append)
    launches = [launch(WAITER), launch(STUBBORN)]
    for each in launches:
        supervisor.start(each)
    await until(lambda: len(lines) == 2)
    pids = [supervisor.pid(each.name) for each in launches]
    await supervisor.kill()
    assert [runs(pid) for pid in pids] == [False, False]


@pytest.mark.parametrize(
    ("does", "optional", "ended"),
    [
        ("serves", False, 0),
        ("sticks", False, 1),
        ("is stopped", False, 1),
        ("unwatched", False, 0),
        ("sticks", True, 0),
        ("is stopped", True, 1),
    ],
)
async def test_an_unresponsive_child_is_killed_and_restarted(
    launch: Callable[[str], Launch], does: str, optional: bool, ended: int
) -> None:
    lines: list[str] = []
    supervisor = Supervisor(lines.append)
    stuck_s = 0.0 if does == "unwatched" else 1.0
    watched = structs.replace(launch(ANSWERS), config=does, stuck_s=stuck_s, optional=optional)
    supervisor.start(watched)
    await until(lambda: lines)
    first = supervisor.pid(watched.name)
    assert first is not None
    if does in {"is stopped", "unwatched"}:
        os.kill(first, signal.SIGSTOP)
    if ended:
        await until(lambda: supervisor.pid(watched.name) not in {None, first})
        await until(lambda: len(lines) == 2)
        assert supervisor.unresponsive[watched.name] >= 1
    else:
        await asyncio.sleep(3)
        assert supervisor.pid(watched.name) == first
        assert not supervisor.unresponsive
    await supervisor.kill()


async def test_a_pause_of_the_whole_machine_kills_no_child(
    launch: Callable[[str], Launch], timing: Timing
) -> None:
    lines: list[str] = []
    supervisor = Supervisor(lines.append)
    watched = structs.replace(launch(ANSWERS), config="serves", stuck_s=1.0)
    supervisor.start(watched)
    await until(lambda: lines)
    first = supervisor.pid(watched.name)
    assert first is not None
    for _ in range(3):
        os.kill(first, signal.SIGSTOP)
        time.sleep(2)  # noqa: ASYNC251 - the supervisor is stopped, too
        await asyncio.sleep(0)
        os.kill(first, signal.SIGCONT)
        await asyncio.sleep(0.3)
    with timing.judged():  # it answers as soon as it goes on
        assert supervisor.pid(watched.name) == first
        assert not supervisor.unresponsive
    await supervisor.kill()


SUPERVISOR = """
import os, signal, subprocess, sys
from clockwork_serve.serve.child import SUPERVISOR_PID_VARIABLE
env = {**os.environ, SUPERVISOR_PID_VARIABLE: str(os.getpid())}
grandchild = subprocess.Popen(
    [sys.executable, sys.argv[1]], env=env, start_new_session=True, stderr=subprocess.PIPE, text=True
)
print(grandchild.pid, grandchild.stderr.readline().strip(), flush=True)
signal.pause()
"""


def test_children_do_not_outlive_their_supervisor(tmp_path: Path) -> None:
    (tmp_path / "tame.py").write_text(TAME)
    (tmp_path / "supervisor.py").write_text(SUPERVISOR)
    supervisor = subprocess.Popen(
        [sys.executable, tmp_path / "supervisor.py", tmp_path / "tame.py"], stdout=subprocess.PIPE, text=True
    )
    assert supervisor.stdout is not None
    try:
        pid, word = supervisor.stdout.readline().split()
        assert word == "up"
        watch = os.pidfd_open(int(pid))
        supervisor.kill()
        supervisor.wait()

        async def gone() -> None:
            ended = asyncio.Event()
            asyncio.get_running_loop().add_reader(watch, ended.set)
            await asyncio.wait_for(ended.wait(), 60)

        uvloop.run(gone())
        os.close(watch)
    finally:
        supervisor.kill()
        supervisor.wait()
        supervisor.stdout.close()


def test_a_child_whose_supervisor_has_died_already_does_not_start(launch: Callable[[str], Launch]) -> None:
    tame = launch(TAME)
    ended = subprocess.run(
        [sys.executable, "-m", tame.module, "{}"],
        env={**os.environ, "CLOCKWORK_SUPERVISOR_PID": "1"},
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    assert (ended.returncode, ended.stderr) == (1, "the supervisor has died\n")


async def test_a_child_stops_cleanly_on_sigterm_and_leaves_ctrl_c_to_the_supervisor(
    launch: Callable[[str], Launch],
) -> None:
    lines: list[str] = []
    child = Child(launch(TAME), lines.append)
    await until(lambda: lines)
    child.signal(signal.SIGINT)
    await asyncio.sleep(0.05)
    assert not child.ended.done()
    assert await child.stop(grace_s=20) == 0
    assert lines == ["up", "bye"]


async def test_an_uncaught_error_ends_the_process(launch: Callable[[str], Launch]) -> None:
    lines: list[str] = []
    assert await Child(launch(BROKEN), lines.append).ended == EXIT_BROKEN
    assert any("ZeroDivisionError" in line for line in lines)


def test_the_first_restart_is_at_once_and_fast_deaths_delay_the_next() -> None:
    backoff = Backoff()
    delays = [backoff.died(0.1) for _ in range(20)]
    assert delays[0] == 0
    assert delays == sorted(delays)
    assert (delays[1], delays[-1]) == (0.1, RETRY_S_MAX)
    assert backoff.died(FAST_S + 1) == 0
    assert backoff.died(0.1) == 0


def test_a_child_with_a_configuration_error_keeps_failing_at_once() -> None:
    backoff = Backoff()
    assert backoff.died(0.1, EXIT_CONFIG) > 0
    assert backoff.keeps_failing


def test_a_child_keeps_failing_after_five_fast_deaths_in_a_row() -> None:
    backoff = Backoff()
    for count in range(1, FAST_DEATHS + 1):
        backoff.died(0.1)
        assert backoff.keeps_failing == (count >= FAST_DEATHS)
    backoff.died(FAST_S + 1)
    assert backoff.keeps_failing is False


@pytest.mark.parametrize(
    ("status", "words"),
    [(0, "exit status 0"), (3, "exit status 3"), (-9, "killed by SIGKILL"), (-200, "killed by signal 200")],
)
def test_exit_statuses_are_described(status: int, words: str) -> None:
    assert describe_exit(status) == words


async def test_deaths_before_a_reset_do_not_count() -> None:
    supervisor = Supervisor(lambda line: None)
    for name in ("worker-a", "gateway"):
        kept = supervisor._kept[name] = _Kept(Launch(name=name, module="", config=""))
        for _ in range(FAST_DEATHS):
            kept.backoff.died(0.1)
    supervisor.reset_backoff("worker")
    assert supervisor.why_failing() is not None, "the gateway is"
    supervisor.reset_backoff("gateway")
    assert supervisor.why_failing() is None


@pytest.mark.parametrize(
    ("status", "is_crash"),
    [
        (-signal.SIGSEGV, True), (-signal.SIGABRT, True), (3, True), (0, True), (-signal.SIGKILL, False),
        (-signal.SIGTERM, False), (EXIT_BROKEN, False), (EXIT_CONFIG, False),
    ],
)  # fmt: skip
def test_a_killed_process_did_not_crash(status: int, *, is_crash: bool) -> None:
    assert crashed(status) is is_crash

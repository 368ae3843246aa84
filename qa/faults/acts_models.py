"""Acts on models: bad ones asked, loaded, replaced; files of repository and cache gone or cut short."""

from __future__ import annotations

import contextlib
import json
import os
import resource
import shutil
import signal
import socket
import threading
import time
import urllib.error
import urllib.request
from pathlib import Path

from clockwork_serve.units import MIB
from harness import repositories
from harness.server import alive
from harness.serving import until
from qa.faults.stage import WELL, WIDE, Stage, made

CALL_S = 30.0


def control(stage: Stage, verb: str, model: str) -> tuple[int, str]:
    """``load`` or ``unload`` over HTTP; status and the server's words."""
    request = urllib.request.Request(  # noqa: S310 - a URL of ours
        f"{stage.server.http_url}/v2/repository/models/{model}/{verb}", data=b"{}", method="POST"
    )
    try:
        with urllib.request.urlopen(request, timeout=CALL_S) as response:  # noqa: S310 - a URL of ours
            return response.status, ""
    except urllib.error.HTTPError as error:
        with contextlib.suppress(ValueError):
            return error.code, str(json.loads(error.read()).get("error", ""))
        return error.code, ""
    except OSError as error:
        return 0, f"no answer: {error}"


def expect(stage: Stage, verb: str, model: str, good: bool) -> None:  # noqa: FBT001
    """Do it, and say what is wrong with the answer."""
    status, said = control(stage, verb, model)
    stage.notes.append(f"{verb} {model}: {status} {said[:60]}".rstrip())
    if (status == 200) is not good or (not good and (status < 400 or not said)):
        stage.wrong.append(f"{verb} {model}: {status} {said[:100]}")


@made
def asked(stage: Stage, mood: int, times: int = 1, *, wait_s: float = 3.0, pause_s: float = 0.0) -> None:
    """The model ``bad`` is asked to do that, on connections of its own; each must hear something."""
    ends: list[str] = []
    for number in range(times):
        stage.sleep(pause_s if number else 0.0)
        stage.mark()
        with socket.create_connection(("127.0.0.1", stage.server.http_port), 5) as client:
            client.settimeout(wait_s)
            client.sendall(stage.infer("bad", mood))
            try:
                ends.append(client.recv(4096)[9:12].decode() or "closed")
            except TimeoutError:
                ends.append("silence")
    stage.notes.append(f"its own clients heard: {', '.join(ends)}")
    if any(not end.isdecimal() for end in ends):
        stage.wrong.append(f"a request of the bad model heard {', '.join(ends)}")


def churn(stage: Stage) -> None:
    """Models are added, loaded, replaced and unloaded, one after the other."""
    for number in range(3 if stage.short else 8):
        name = f"extra{number}"
        stage.mark()
        repositories.layers(stage.root, name, width=WIDE, depth=2, seed=100 + number)
        expect(stage, "load", name, good=True)
        shutil.rmtree(stage.root / name)
        repositories.layers(stage.root, name, width=WIDE, depth=2, seed=200 + number)
        expect(stage, "load", name, good=True)
        expect(stage, "unload", name, good=True)


def bad_models_loaded(stage: Stage) -> None:
    """No graph, a class that raises when it is made, one that kills whoever imports it."""
    (stage.root / "nograph" / "1").mkdir(parents=True)
    (stage.root / "nograph" / "1" / "model.onnx").write_bytes(b"this is no graph")
    repositories.python_model(stage.root, "raises", 'raise RuntimeError("not today")\n')
    repositories.python_model(stage.root, "kills", "import os\nos._exit(9)\n")
    for name in ("nograph", "raises", "kills"):
        stage.mark()
        expect(stage, "load", name, good=False)


def profiler_killed(stage: Stage) -> None:
    """Who measures a new model is killed meanwhile; the call must end, and a second one must be good."""
    repositories.sleeper(stage.root, "slowly", 0.05)
    done = threading.Event()

    def load() -> None:
        status, said = control(stage, "load", "slowly")
        stage.notes.append(f"load while its profiler was killed: {status} {said[:60]}".rstrip())
        if not status:
            stage.wrong.append(f"the load call heard nothing: {said}")
        done.set()

    threading.Thread(target=load, daemon=True).start()
    pid = until("a profiler runs", lambda: stage.server.pids(deep=True).get("profile"), 15, 0.002)
    stage.sleep(0.1)
    stage.mark()
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)
    if not done.wait(CALL_S):
        stage.wrong.append("the load call did not end")
    expect(stage, "load", "slowly", good=True)


@made
def file_of_a_model(stage: Stage, how: str) -> None:
    """The file of a model that is being served: cut short, removed, or another graph in its place."""
    path = stage.root / "m0" / "1" / "model.onnx"
    whole = path.read_bytes()
    stage.mark()
    if how == "truncated":
        path.write_bytes(whole[: len(whole) // 2])
        expect(stage, "load", "m0", good=False)
        path.write_bytes(whole)
    elif how == "removed":
        shutil.rmtree(stage.root / "m0")
        stage.sleep(0.5)
        expect(stage, "load", "m0", good=False)
        path.parent.mkdir(parents=True)
        path.write_bytes(whole)
    else:
        shutil.rmtree(stage.root / "m0")
        repositories.layers(stage.root, "m0", width=WIDE, depth=3, seed=77)
    expect(stage, "load", "m0", good=True)


def cache_removed(stage: Stage) -> None:
    """All compiled files, while weights are loaded from them again and again."""
    stage.mark()
    shutil.rmtree(stage.cache, ignore_errors=True)


@made
def full(stage: Stage, folder: str) -> None:
    """A small file system of the server's own is filled; then a model is loaded, which needs to write."""
    place = Path(f"/proc/{stage.server.process.pid}/root{folder or stage.cache}")
    stage.mark()
    with contextlib.suppress(OSError), (place / "filler").open("wb") as file:
        while True:
            file.write(bytes(MIB))
            file.flush()
    if not folder:
        repositories.layers(stage.root, "newone", width=WIDE, depth=2, seed=300)
        expect(stage, "load", "newone", good=False)
        with contextlib.suppress(FileNotFoundError):
            (place / "filler").unlink()
        expect(stage, "load", "newone", good=True)


def no_large_files(stage: Stage) -> None:
    """RLIMIT_FSIZE on the supervisor, which its children inherit: nothing above 4 KiB can be written."""
    supervisor = stage.server.process.pid
    before = resource.prlimit(supervisor, resource.RLIMIT_FSIZE)
    stage.mark()
    resource.prlimit(supervisor, resource.RLIMIT_FSIZE, (4096, before[1]))
    repositories.layers(stage.root, "newone", width=WIDE, depth=2, seed=301)
    expect(stage, "load", "newone", good=False)
    resource.prlimit(supervisor, resource.RLIMIT_FSIZE, before)
    expect(stage, "load", "newone", good=True)


@made
def stuck_then(stage: Stage, mood: int) -> None:
    """A model never comes back from its lane; what happens to its process is noted, nothing is helped.

    It ran well before: what never ran on a device has longer.
    """
    asked(WELL)(stage)
    before = {name: stage.server.pid(name) for name in stage.workers()}
    start = time.monotonic()
    asked(mood, wait_s=4.0)(stage)
    wait = 2.0 if stage.short else 6.0
    stage.sleep(wait)
    ended = [name for name, pid in before.items() if not alive(pid)]
    took = time.monotonic() - start
    stage.notes.append(f"the stuck worker was {'ended' if ended else 'left alone'} within {took:.1f} s")

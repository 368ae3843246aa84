"""Through how many files, functions and calls one warm request passes, in all processes of a real server.

    python -m benchmarks.request_path [--json FILE]

A server with an emulated device is asked over HTTP, one request after the other. Every Python call of its
gateway, controller and worker is noted by the interpreter's profile hook from the moment that a request is
sent until all is quiet again. Processes also do what belongs to no request (they beat, they poll), so a
function counts as often as it was called in the median of the requests, and what fewer than half of them
called does not count at all. Calls of the standard library and of compiled code are not seen. Nothing is
judged: it is a measure of how far apart the code of one request lies.
"""

from __future__ import annotations

import http.client
import json
import mmap
import os
import pathlib
import statistics
import sys
import tempfile
import time
from collections import Counter, defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any, Final
from urllib.parse import urlsplit

from harness import repositories
from harness.report import Outcome, finish, parser, table
from harness.serving import serve

WARM: Final = 20
REQUESTS: Final = 15
SETTLE_S: Final = 0.06
"""After an answer: who counts and who frees is told within this time."""
ROLES: Final = ("gateway", "controller", "worker")
HOOK: Final = """
import mmap, os, sys, threading
def _note():
    folder = os.environ["CLOCKWORK_REQUEST_PATH"]
    with open(folder + "/switch", "r+b") as file:
        switch = mmap.mmap(file.fileno(), 1)
    out = os.open(f"{folder}/{os.getpid()}.calls", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    role = next((a.rpartition(".")[2] for a in sys.orig_argv if "clockwork_serve.serve" in a), "")
    def hook(frame, event, _):
        if switch[0] and event == "call":
            code = frame.f_code
            if "/clockwork_" in code.co_filename:
                os.write(out, f"{switch[0]}\\t{role}\\t{code.co_filename}\\t{code.co_qualname}\\n".encode())
    threading.setprofile(hook)
    sys.setprofile(hook)
_note()
"""


@dataclass(slots=True)
class RolePath:
    """What a median request does in one process."""

    calls: float = 0
    switches: list[int] = field(default_factory=list)
    """Of each request."""
    functions: dict[str, float] = field(default_factory=dict)

    @property
    def files(self) -> set[str]:
        """In which its functions are."""
        return {name.partition(":")[0] for name in self.functions}


@contextmanager
def recorded(folder: pathlib.Path) -> Iterator[mmap.mmap]:
    """Processes that start within note their calls while the byte given is not 0, each beside that byte."""
    (folder / "sitecustomize.py").write_text(HOOK)
    (folder / "switch").write_bytes(b"\0")
    before = os.environ.get("PYTHONPATH")
    os.environ["PYTHONPATH"] = str(folder) + (f":{before}" if before else "")
    os.environ["CLOCKWORK_REQUEST_PATH"] = str(folder)
    with (folder / "switch").open("r+b") as file, mmap.mmap(file.fileno(), 1) as switch:
        try:
            yield switch
        finally:
            del os.environ["CLOCKWORK_REQUEST_PATH"]
            if before is None:
                del os.environ["PYTHONPATH"]
            else:
                os.environ["PYTHONPATH"] = before


def ask(connection: http.client.HTTPConnection) -> None:
    """One request, to its end, on a connection that stays."""
    body = {"inputs": [{"name": "x", "datatype": "FP32", "shape": [1, 4], "data": [1, 2, 3, 4]}]}
    connection.request("POST", "/v2/models/m0/infer", json.dumps(body), {"x-slo-ms": "20000"})
    response = connection.getresponse()
    if response.status != 200 or not response.read():
        raise RuntimeError(f"the request was answered {response.status}")


def calls_of(folder: pathlib.Path) -> dict[str, dict[int, list[str]]]:
    """By process and request, each call as ``file:function``, in order."""
    found: dict[str, dict[int, list[str]]] = {role: defaultdict(list) for role in ROLES}
    for path in folder.glob("*.calls"):
        for line in path.read_text().splitlines():
            number, role, file, name = line.split("\t")
            if role.partition("_")[0] in found:
                ours, _, inside = file.rpartition("/clockwork_")
                short = inside.removeprefix("serve/") if ours else file
                found[role.partition("_")[0]][int(number)].append(f"{short}:{name}")
    return found


def median_path(requests: dict[int, list[str]]) -> RolePath:
    """Of one process."""
    counts = [Counter(requests[number]) for number in range(1, REQUESTS + 1)]
    found = RolePath()
    for name in {name for count in counts for name in count}:
        if middle := statistics.median(count[name] for count in counts):
            found.functions[name] = middle
            found.calls += middle
    for number in range(1, REQUESTS + 1):
        files = [name.partition(":")[0] for name in requests[number] if name in found.functions]
        found.switches.append(sum(one != other for one, other in pairwise(files)))
    return found


def measure(folder: pathlib.Path) -> dict[str, RolePath]:
    """Ask a server that is warm, and read what its processes noted."""
    repositories.emulated(folder / "models", "m0", {1: 10, 2: 12, 4: 16})
    with recorded(folder) as switch, serve(folder / "models", device="emulated") as serving:
        connection = http.client.HTTPConnection(urlsplit(serving.http_url).netloc, timeout=30)
        for _ in range(WARM):
            ask(connection)
        for number in range(1, REQUESTS + 1):
            time.sleep(SETTLE_S)
            switch[0] = number
            ask(connection)
            time.sleep(SETTLE_S)
            switch[0] = 0
        connection.close()
    return {role: median_path(requests) for role, requests in calls_of(folder).items()}


def main() -> int:
    """Run it; returns the exit status."""
    given = parser(__doc__).parse_args()
    with tempfile.TemporaryDirectory() as name:
        found = measure(pathlib.Path(name))
    everywhere = {name for path in found.values() for name in path.functions}
    files = {name.partition(":")[0] for name in everywhere}
    switches = {role: statistics.median(path.switches) for role, path in found.items()}
    rows: list[tuple[str, ...]] = [
        (role, f"{path.calls:g}", f"{len(path.functions)}", f"{len(path.files)}", f"{switches[role]:g}")
        for role, path in found.items()
    ]
    whole: dict[str, Any] = {
        "calls": sum(path.calls for path in found.values()),
        "functions": len(everywhere), "files": len(files), "switches": sum(switches.values()),
    }  # fmt: skip
    rows.append(("all", *(f"{value:g}" for value in whole.values())))
    print(table(("process", "calls", "functions", "files", "changes of file"), rows))
    outcome = Outcome("benchmarks.request_path")
    outcome.figures = {
        **whole,
        "names": sorted(files),
        "processes": {role: dict(sorted(path.functions.items())) for role, path in found.items()},
    }
    return finish(outcome, given.json)


if __name__ == "__main__":
    sys.exit(main())

"""Sends a load with ``clockwork bench`` and reads its record."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from comparison.peers.peer import HOST, ROOT, Floats, Kind, Peer, Setup

MAGIC: Final = b"CWBENCH1"
DRAIN_S: Final = 10
LATE_MS: Final = 5
NO_ANSWER: Final = "none"
_KINDS: Final[dict[str, Kind]] = {"rejected": "rejected", "expired": "expired"}
"""Other ends with a response are ``failed``; ends without one are ``none``."""
_SILENT: Final = frozenset({"open", "reset", "broken", "abandoned"})
_COMERS: Final = re.compile(r'\n\[\[loads\]\]\nname = "comers"\n.*', re.DOTALL)

Table = npt.NDArray[Any]


def command(asked: Peer, setup: Setup, scenario: Path, x: Floats, *, seed: int, core: int) -> list[str]:
    """The command that plays it; writes the body of the requests into the server's folder."""
    request = asked.request(setup, x)
    found = [
        sys.executable, "-m", "clockwork_serve", "bench", str(scenario), "--seed", str(seed), "--quiet",
        "--cores", str(core), "--drain", str(DRAIN_S), "--max-lateness-ms", str(LATE_MS),
        "--record", str(setup.folder / "record"), "--json", str(setup.folder / "bench.json"),
    ]  # fmt: skip
    if asked.protocol == "grpc":
        inputs = setup.folder / "x.npy"
        np.save(inputs, x)
        found += ["--protocol", "grpc", "--url", f"{HOST}:{setup.port + 1}", "--deadline", "none"]
        return [*found, "--input-data", str(inputs)]
    body = setup.folder / "body"
    body.write_bytes(request.body)
    found += ["--protocol", "raw", "--url", f"http://{HOST}:{setup.port}", "--path", request.path]
    found += ["--body", str(body), "--deadline", "none"]
    for name, value in request.headers:
        found += ["--header", f"{name}: {value}"]
    return found


def play(given: Sequence[str], log: Path) -> None:
    """Run it. RuntimeError with its words if it did not work; late requests are for others to judge."""
    with log.open("wb") as file:
        done = subprocess.run(list(given), stdout=file, stderr=subprocess.STDOUT, cwd=ROOT, check=False)
    if done.returncode not in {0, 1}:
        said = log.read_text(errors="replace")[-2000:]
        raise RuntimeError(f"clockwork bench ended with status {done.returncode}; it said:\n{said}")


def generator(path: Path) -> dict[str, Any]:
    """What the load generator says of itself: how late it was, and how many requests had to wait.

    It opens as many connections as it may; where a server answers on none of them, requests wait for one.
    They count from when they were due, and that is the server's doing.
    """
    told = json.loads(path.read_text())
    sending = told["sending"]
    return {
        "late_p99_ms": told["lateness"]["p99_ms"], "cpu_share": sending["cpu_share"],
        "connections": sending["connections"], "waited_for_connection": sending["waited_for_connection"],
        "version": told["version"],
    }  # fmt: skip


def without_comers(text: str) -> str:
    """A scenario without its last load, which is of requests for models that come and go."""
    return _COMERS.sub("\n", text)


def read(path: Path, asked: Peer) -> tuple[dict[str, Any], Table, list[str]]:
    """The record's head, its rows, and what its ends mean: ``peer.Kind``, ``ok`` or ``none``."""
    content = path.read_bytes()
    if content[: len(MAGIC)] != MAGIC:
        raise RuntimeError(f"{path}: expected a record of clockwork bench, found another file")
    start = len(MAGIC) + 4
    length = int.from_bytes(content[len(MAGIC) : start], "little")
    head: dict[str, Any] = json.loads(content[start : start + length])
    row = np.dtype([(name, form) for name, form in head["row"]])
    table = np.frombuffer(content, row, head["rows"], start + length)
    return head, table, [end_of(kind, words, asked) for kind, words in head["ends"]]


def end_of(kind: str, words: str, asked: Peer) -> str:
    """One end: what the server said, as its adapter understands it."""
    if kind == "answered":
        return "ok"
    if kind in _SILENT:
        return NO_ANSWER
    return asked.understood(_KINDS.get(kind, "failed"), words)

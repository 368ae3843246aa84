"""The command line as a process: started, read, found alive or ended."""

from __future__ import annotations

import json
import os
import selectors
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

START_S = 120.0
SMALL = ("--device-memory", "16MiB")
"""The default takes a virtual machine whose host gives memory slowly five seconds of CPU to touch."""


def command(root: Path, cache: Path, *more: str) -> list[str]:
    options = ["--http-port", "0", "--grpc-port", "0", "--metrics-port", "0", "--slo-ms", "20000"]
    memory = () if "--device" in more else SMALL  # an emulated one has that of its profile
    return [
        sys.executable,
        "-m",
        "clockwork_serve",
        "serve",
        str(root),
        *options,
        "--cache",
        str(cache),
        *memory,
        *more,
    ]


@contextmanager
def started(arguments: list[str]) -> Iterator[tuple[subprocess.Popen[str], dict[str, Any]]]:
    """The process and what it says when it is ready."""
    process = subprocess.Popen(
        [*arguments, "--json"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    try:
        yield process, json.loads(first_line(process))
    finally:
        process.kill()
        process.communicate()


def first_line(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    with selectors.DefaultSelector() as selector:
        selector.register(process.stdout, selectors.EVENT_READ)
        assert selector.select(START_S), "it did not become ready"
    return process.stdout.readline()


def alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (ProcessLookupError, FileNotFoundError):
        return False

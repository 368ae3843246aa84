"""The process that fuzzes: it imports parsers once, instrumented by atheris, and forks a child for each.

A line of stdin is a JSON array: name, seconds, folder, seed. A line of stdout answers it: the child's exit
status. What the child says is in ``log`` of its folder.
"""

from __future__ import annotations

import atexit
import ctypes
import importlib
import io
import json
import os
import shutil
import signal
import sys
import tempfile
import traceback
from contextlib import AbstractContextManager, nullcontext, redirect_stderr
from pathlib import Path
from random import Random
from types import ModuleType
from typing import Any, Final

try:
    import atheris
except ImportError:
    atheris = None

OURS: Final = ("clockwork_client", "clockwork_lab", "clockwork_serve")
_PR_SET_PDEATHSIG: Final = 1


def _instrumenting() -> AbstractContextManager[object]:
    return nullcontext() if atheris is None else atheris.instrument_imports(include=OURS)


# What changes inputs imports some of our code: nothing of it may be there before this.
with redirect_stderr(io.StringIO()), _instrumenting():
    from tests.fuzz import engine


def module_of(name: str) -> ModuleType:
    """The module of a parser; it is imported, and all that it needs."""
    with redirect_stderr(io.StringIO()), _instrumenting():  # atheris has a line for each module
        return importlib.import_module(engine.group_of(name))


def main() -> None:
    """Do what each line asks, one after the other."""
    for line in sys.stdin:
        name, seconds, folder, seed = json.loads(line)
        module = module_of(name)
        child = os.fork()
        if not child:
            status = 1
            try:
                status = _child(module, name, seconds, Path(folder), seed)
            except BaseException:  # noqa: BLE001 - of a fork, nothing may go on where it was called
                traceback.print_exc()
            os._exit(status)
        _, status = os.waitpid(child, 0)
        sys.stdout.write(f"{abs(os.waitstatus_to_exitcode(status))}\n")
        sys.stdout.flush()


def _child(module: ModuleType, name: str, seconds: float, found: Path, seed: int) -> int:
    """Fuzz one parser, which has temporary folders of its own; the exit status.

    A program that is started begins with the peak memory of who started it, which libFuzzer takes for its
    own. A child that is forked begins with what it has.
    """
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    log = os.open(found / "log", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    for stream in (1, 2):
        os.dup2(log, stream)
    tempfile.tempdir = os.environ["TMPDIR"] = str(found / "tmp")
    atexit.unregister(shutil.rmtree)  # folders of the process that it is a copy of
    importlib.reload(module)
    if atheris is None:
        return engine.plain(name, seconds, found, seed)
    _guided(engine.target(name), seconds, found, seed)
    return 0


def _guided(parser: engine.Target, seconds: float, found: Path, seed: int) -> None:
    """By libFuzzer, which keeps what reaches new edges in ``found``; it ends the process."""
    corpus = found / "corpus"
    corpus.mkdir(exist_ok=True)

    def mutate(data: bytes, most: int, number: int) -> bytes:
        dice = Random(number)
        if dice.random() < 0.2:
            return bytes(atheris.Mutate(data, most))
        return engine.changed(parser, data, dice)[:most]

    def one(data: Any) -> None:
        engine.check(parser, bytes(data))

    options = [
        f"-max_total_time={max(1, round(seconds) - 1)}",  # it ends in the second after that
        f"-max_len={parser.input_bytes}", f"-timeout={engine.STUCK_S}",
        "-rss_limit_mb=512", f"-artifact_prefix={found}/", "-print_final_stats=1", f"-seed={seed or 1}",
        "-len_control=0", str(corpus), str(engine.CORPUS / parser.name),
    ]  # fmt: skip
    atheris.Setup([parser.name, *options], one, custom_mutator=mutate)
    atheris.Fuzz()


if __name__ == "__main__":
    main()

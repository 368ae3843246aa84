"""The command line as tests use it: in their own process, or in one that is interrupted."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from typing import Any, NamedTuple

import pytest

from clockwork_serve.cli.entry import run


class Wrote(NamedTuple):
    """What a command wrote."""

    out: str
    err: str

    @property
    def json(self) -> Any:
        return json.loads(self.out)


class Cli:
    """Runs commands, which must end with the code that is expected."""

    def __init__(self, capsys: pytest.CaptureFixture[str]) -> None:
        self._capsys = capsys

    def __call__(self, *words: object, code: int = 0) -> Wrote:
        self._capsys.readouterr()
        assert run([str(word) for word in words]) == code
        return Wrote(*self._capsys.readouterr())

    def refused(self, *words: object, code: int = 2) -> str:
        """The one line that a command says which cannot be understood, or done."""
        out, said = self(*words, code=code)
        assert (out, said[:7], said.count("\n")) == ("", "error: ", 1)
        return said


def interrupted(*words: object) -> tuple[str, Wrote]:
    """The first line that a command says, and what it writes from then on, when Ctrl-C is typed."""
    command = [sys.executable, "-m", "clockwork_serve", *map(str, words)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as child:
        assert child.stderr is not None
        first = child.stderr.readline()
        child.send_signal(signal.SIGINT)
        wrote = Wrote(*child.communicate(timeout=120))
    assert child.returncode == 130
    return first, wrote

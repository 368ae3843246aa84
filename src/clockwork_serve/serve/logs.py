"""Structured logs of one process, to stderr: a line of JSON or of text per record. Nothing else is printed.

Fields beside the message come from ``extra``: ``log.warning("slow", extra={"request_id": "r1"})``.
"""

from __future__ import annotations

import logging
import os
import select
import sys
import time
import traceback
from typing import Any, Final

import msgspec

from clockwork_serve.errors import ConfigError, encodable, printable
from clockwork_serve.units import KIB

LEVELS: Final = ("debug", "info", "warning", "error", "critical")
FORMATS: Final = ("text", "json")
PATIENCE_MS: Final = 10
"""How long a line may wait for its reader, unless lines before it did so in vain."""

LINE_MAX: Final = 64 * KIB
"""Characters of one record, its traceback included: a message of a gigabyte may not stop who logs it."""

_STANDARD: Final = frozenset(logging.makeLogRecord({}).__dict__) | {"message", "asctime", "taskName"}


def configure(
    process: str, level: str = "info", log_format: str = "text", handler: logging.Handler | None = None
) -> None:
    """Send this process's logs to stderr, each with the name of the ``process``. Replaces what was set.

    ``handler`` writes them, if it is given.
    """
    if level not in LEVELS:
        raise ConfigError(f"log_level: expected one of {', '.join(LEVELS)}; found {level!r}")
    if log_format not in FORMATS:
        raise ConfigError(f"log_format: expected one of {', '.join(FORMATS)}; found {log_format!r}")
    handler = handler or logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonFormatter(process) if log_format == "json" else TextFormatter(process))
    logging.basicConfig(level=level.upper(), handlers=[handler], force=True)


class UnblockedHandler(logging.Handler):
    """Writes to a pipe, and never waits for long: while nobody reads it, lines are left out, and counted.

    Whoever reads may be stopped; that must not stop who writes.
    """

    def __init__(self, fd: int) -> None:
        super().__init__()
        self._fd = fd
        self._poll = select.poll()
        self._poll.register(fd, select.POLLOUT)
        self._left_out = 0

    def emit(self, record: logging.LogRecord) -> None:
        """Write one line, or leave it out."""
        try:
            line = self.format(record)
            if self._left_out:
                line += f" (lines left out before: {self._left_out})"
            data = memoryview(f"{line}\n".encode(errors="backslashreplace"))
            while data:
                # A pipe that is ready has room for so much at least.
                if not self._poll.poll(0 if self._left_out else PATIENCE_MS):
                    self._left_out += 1
                    return
                data = data[os.write(self._fd, data[: select.PIPE_BUF]) :]
            self._left_out = 0
        except BaseException:  # noqa: BLE001 - to log may end nobody, whatever is logged and wherever to
            self._left_out += 1


class JsonFormatter(logging.Formatter):
    """``{"time", "level", "process", "logger", "message", ...fields}``, times in UTC."""

    def __init__(self, process: str) -> None:
        super().__init__()
        self._process = process

    def format(self, record: logging.LogRecord) -> str:
        """One line of JSON."""
        seconds = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created))
        line = {
            "time": f"{seconds}.{int(record.msecs):03d}Z",
            "level": record.levelname.lower(),
            "process": self._process,
            "logger": record.name,
            "message": _cut(record.getMessage()),
            **fields_of(record),
        }
        if record.exc_info:
            line["traceback"] = _traceback(record)
        try:
            return msgspec.json.encode(line, enc_hook=str).decode()
        except UnicodeEncodeError:
            texts = {name: encodable(str(value)) for name, value in line.items()}
            return msgspec.json.encode(texts).decode()


class TextFormatter(logging.Formatter):
    """``time level process: message key=value ...``, times local."""

    def __init__(self, process: str) -> None:
        super().__init__()
        self._process = process

    def format(self, record: logging.LogRecord) -> str:
        """One line, and below it, indented, the rest of its message and the traceback, where there are any.

        So who chose a part of a message cannot make it look like another record, or move a cursor.
        """
        clock = f"{time.strftime('%H:%M:%S', time.localtime(record.created))}.{int(record.msecs):03d}"
        line = f"{clock} {record.levelname.lower():7} {self._process}: {_cut(record.getMessage())}"
        for name, value in fields_of(record).items():
            line += f" {name}={value}"
        if record.exc_info:
            line += f"\n{_traceback(record)}"
        return "\n  ".join(printable(part, LINE_MAX) for part in _cut(line).split("\n"))


def fields_of(record: logging.LogRecord) -> dict[str, Any]:
    """What ``extra`` gave."""
    return {name: value for name, value in record.__dict__.items() if name not in _STANDARD}


def _traceback(record: logging.LogRecord) -> str:
    assert record.exc_info
    return _cut("".join(traceback.format_exception(*record.exc_info)).rstrip())


def _cut(text: str) -> str:
    return text if len(text) <= LINE_MAX else text[: LINE_MAX - 3] + "..."

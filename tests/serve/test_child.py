"""One line a record, with the fields that were given."""

from __future__ import annotations

import json
import logging
import os
import time
from collections.abc import Iterator

import pytest

from clockwork_serve.errors import ConfigError, encodable
from clockwork_serve.serve.child import LINE_MAX, NonBlockingHandler, configure, environment_of_child


@pytest.fixture(autouse=True)
def _root() -> Iterator[None]:
    """Logging is global: leave it as it was."""
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    yield
    root.handlers[:] = handlers
    root.setLevel(level)


def test_json_lines_hold_the_fields(capsys: pytest.CaptureFixture[str]) -> None:
    configure("gateway-0", "info", "json")
    logging.getLogger("a.b").warning("slow %s", "one", extra={"request_id": "r1", "took": 3})
    logging.getLogger("a.b").debug("not shown")
    line = json.loads(capsys.readouterr().err)
    assert line.pop("time").endswith("Z")
    assert line == {
        "level": "warning", "process": "gateway-0", "logger": "a.b", "message": "slow one",
        "request_id": "r1", "took": 3,
    }  # fmt: skip


def test_text_lines_hold_the_fields(capsys: pytest.CaptureFixture[str]) -> None:
    configure("controller", "debug", "text")
    logging.getLogger("a").debug("hello", extra={"request_id": "r1"})
    assert capsys.readouterr().err.endswith(" debug   controller: hello request_id=r1\n")


@pytest.mark.parametrize("log_format", ["json", "text"])
def test_tracebacks_are_shown(capsys: pytest.CaptureFixture[str], log_format: str) -> None:
    configure("controller", "info", log_format)
    try:
        int("bad luck")
    except ValueError:
        logging.getLogger("a").exception("it broke")
    said = capsys.readouterr().err
    assert "it broke" in said
    assert "ValueError: invalid literal" in said
    assert (said.count("\n") == 1) == (log_format == "json")


def test_a_time_of_almost_a_second_has_three_digits(capsys: pytest.CaptureFixture[str]) -> None:
    configure("controller", "info", "json")
    record = logging.makeLogRecord({"msg": "m", "levelname": "INFO", "created": 0.9999, "msecs": 999.9})
    logging.getLogger().handlers[0].emit(record)
    assert json.loads(capsys.readouterr().err)["time"] == "1970-01-01T00:00:00.999Z"


@pytest.mark.parametrize(
    ("level", "log_format", "named"), [("loud", "text", "log_level"), ("info", "xml", "log_format")]
)
def test_wrong_settings_are_named(level: str, log_format: str, named: str) -> None:
    with pytest.raises(ConfigError, match=f"{named}: expected one of .*; found"):
        configure("controller", level, log_format)


def test_a_stopped_reader_blocks_no_writer_and_dropped_lines_are_counted() -> None:
    reader, writer = os.pipe()
    try:
        configure("worker", "info", "text", NonBlockingHandler(writer))
        log = logging.getLogger("a")
        began = time.monotonic()
        for number in range(2000):
            log.info("line %d %s", number, "x" * 100)
        assert time.monotonic() - began < 20, "it would wait for ever"
        os.set_blocking(reader, False)
        read = b""
        while True:
            try:
                read += os.read(reader, 1 << 20)
            except BlockingIOError:
                break
        log.info("again")
        lines = read.decode().splitlines()
        whole = [line for line in lines if line.endswith("x" * 100)]
        last = os.read(reader, 1 << 16).decode()
        assert 100 < len(whole) < 2000
        assert f"again (lines left out before: {2000 - len(whole)})" in last
        log.info("and again")
        assert "left out" not in os.read(reader, 1 << 16).decode()
    finally:
        os.close(reader)
        os.close(writer)


def test_a_line_longer_than_the_pipe_arrives_whole() -> None:
    reader, writer = os.pipe()
    try:
        configure("worker", "info", "text", NonBlockingHandler(writer))
        logging.getLogger("a").info("y" * 20_000)
        assert os.read(reader, 1 << 16).count(b"y") == 20_000
    finally:
        os.close(reader)
        os.close(writer)


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("op \ud800", r"op \ud800"),
        ("\x1b[2J\r\x00", r"\x1b[2J\r\x00"),
        ("x\n12:00:00.000 critical controller: broken", "x\n  12:00:00.000 critical controller: broken"),
    ],
)
def test_a_message_can_neither_forge_a_record_nor_move_the_cursor(
    capsys: pytest.CaptureFixture[str], text: str, shown: str
) -> None:
    configure("worker", "info", "text")
    logging.getLogger("a").info("it said: %s", text, extra={"model": text})
    assert capsys.readouterr().err.endswith(f"worker: it said: {shown} model={shown}\n")
    configure("worker", "info", "json")
    logging.getLogger("a").info("it said: %s", text, extra={"model": text})
    (line,) = capsys.readouterr().err.splitlines()
    assert json.loads(line)["model"] == encodable(text)


@pytest.mark.parametrize("log_format", ["json", "text"])
def test_a_record_is_cut(capsys: pytest.CaptureFixture[str], log_format: str) -> None:
    configure("worker", "info", log_format)
    long = "y" * 10**6
    try:
        int(long)
    except ValueError as error:
        error.args = (long,)
        logging.getLogger("a").exception("x" * 10**6)
    assert len(capsys.readouterr().err) < 3 * LINE_MAX


class Mute:
    """Does not say what it is."""

    def __str__(self) -> str:
        raise SystemExit


def test_a_failure_to_log_is_ignored() -> None:
    reader, writer = os.pipe()
    configure("worker", "info", "text", NonBlockingHandler(writer))
    log = logging.getLogger("a")
    log.info("%s", Mute())
    log.info("next")
    assert os.read(reader, 1000).endswith(b"next (lines left out before: 1)\n")
    os.close(reader)
    log.info("nobody reads")
    os.close(writer)
    log.info("nowhere to write")


def test_a_child_computes_in_one_thread_unless_told_otherwise(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("OMP_NUM_THREADS", "3")

    threads = {name: value for name, value in environment_of_child().items() if name.endswith("_NUM_THREADS")}

    assert threads == {"OPENBLAS_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "OMP_NUM_THREADS": "3"}

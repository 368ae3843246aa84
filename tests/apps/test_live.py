"""The live page of a journal that is there, and of one that grows; and the command that shows it."""

from __future__ import annotations

import asyncio
import re
import signal
import subprocess
import sys
import urllib.request
from contextlib import closing
from http.cookiejar import CookieJar
from pathlib import Path

import pytest

from clockwork_serve.apps.live import JournalPlayer, records
from clockwork_serve.cli.entry import run
from clockwork_serve.controller import ControllerConfig
from clockwork_serve.errors import ConfigError
from clockwork_serve.telemetry import Journal, Step, head_of, read_records
from clockwork_serve.telemetry.live import LiveView
from clockwork_serve.units import ms
from tests.sim.journals import written
from tests.telemetry import stories


def steps(journal: Journal, first: int, last: int) -> None:
    for at in range(first, last):
        journal.on_step(ms(at), (stories.request(f"r{at}", at),), ())
    journal.flush()


def test_all_of_a_journal_is_read_and_then_what_is_added(tmp_path: Path) -> None:
    path = tmp_path / "journal"
    journal = Journal(path, head_of(ControllerConfig()))
    steps(journal, 0, 5)
    journal.close()
    with closing(records(path)) as found:
        first = [next(found) for _ in range(7)]
        journal = Journal(path)
        steps(journal, 5, 8)
        journal.close()
        added = [next(found) for _ in range(4)]

    assert [type(one).__name__ for one in first] == ["JournalHead", *["Step"] * 5, "NoneType"]
    assert [one.now_ns for one in added if isinstance(one, Step)] == [ms(5), ms(6), ms(7)]
    assert added[3] is None


def test_a_record_that_is_half_written_is_waited_for(tmp_path: Path) -> None:
    path = tmp_path / "journal"
    journal = Journal(path)
    steps(journal, 0, 1)
    steps(journal, 1, 2)
    journal.close()
    whole = path.read_bytes()
    path.write_bytes(whole[:-3])

    with closing(records(path)) as found:
        assert [type(next(found)).__name__ for _ in range(2)] == ["Step", "NoneType"]
        path.write_bytes(whole)
        assert next(found).now_ns == ms(1)


def test_what_is_no_journal_is_said(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="found nothing at"):
        next(records(tmp_path / "none"))
    (tmp_path / "other").write_bytes(b"\x05\0\0\0hello")
    with pytest.raises(ConfigError, match="expected a journal"):
        list(zip(range(3), records(tmp_path / "other"), strict=False))


def played(path: Path, speed: float | None, seconds: float) -> LiveView:
    view = LiveView()

    async def main() -> None:
        task = asyncio.ensure_future(JournalPlayer(path, view, speed).run())
        await asyncio.sleep(seconds)
        task.cancel()
        await asyncio.wait({task})

    asyncio.run(main())
    return view


def test_it_goes_to_the_end_or_as_it_happened(tmp_path: Path) -> None:
    path = written(tmp_path / "journal", 3)
    last = max(record.now_ns for _, record in read_records(path) if isinstance(record, Step))
    whole, slow = played(path, None, 3), played(path, 0.05, 0.5)

    assert whole.now_ns == last
    # A twentieth of half a second; a busy machine starts late, never early.
    assert slow.now_us < 30_000


def test_the_command_tells_an_address_that_lets_in_who_knows_it(tmp_path: Path) -> None:
    path = written(tmp_path / "journal", 3)
    command = [sys.executable, "-m", "clockwork_serve", "live", str(path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        try:
            found = re.fullmatch(r"open (http://127\.0\.0\.1:\d+/)\?key=\S+\n", process.stdout.readline())
            assert found is not None
            known = urllib.request.build_opener(urllib.request.HTTPCookieProcessor(CookieJar()))
            with known.open(found[0].split()[1], timeout=60) as response:
                assert b"clockwork" in response.read()
            with known.open(f"{found[1]}live/panels", timeout=60) as response:
                assert response.status == 200
            with pytest.raises(urllib.error.HTTPError, match="401"):
                urllib.request.urlopen(f"{found[1]}live/panels", timeout=60)
        finally:
            process.send_signal(signal.SIGINT)
        assert process.wait(60) == 0


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["none"], "journal: expected a file"),
        (["none", "--keep", "0"], "keep, speed: expected"),
        (["none", "--speed", "0"], "keep, speed: expected"),
        (["none", "--port", "70000"], "70000"),
    ],
)
def test_what_will_not_do_is_said(words: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["live", *words]) == 2
    assert message in capsys.readouterr().err

"""``clockwork traces``: what it sends, and what it says where it cannot."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest

from harness.collector import collecting
from tests.cli.commands import Cli
from tests.sim.journals import written


@pytest.fixture
def journal(tmp_path: Path) -> Path:
    return written(tmp_path / "run.journal", requests=200)


def test_a_journal_is_sent_whole(journal: Path, cli: Cli) -> None:
    with collecting() as collector:
        told = cli("traces", journal, "--endpoint", collector.url, "--json").json

    names = Counter(span.name for span in collector.spans)
    assert told["sent"] == len(collector.spans)
    assert told["requests"] == names["clockwork.request"] > 100
    assert (told["failed"], told["dropped"]) == (0, 0)
    assert set(collector.paths) == {"/v1/traces"}


def test_it_says_how_much_that_was(journal: Path, cli: Cli) -> None:
    with collecting() as collector:
        said = cli("traces", journal, "--endpoint", collector.url, "--sample", "0").out

    assert f"sent {len(collector.spans):,} spans; read" in said
    assert all(
        span.status.code == 2 or any(each.key == "clockwork.cause" for each in span.attributes)
        for span in collector.spans
        if span.name == "clockwork.request"
    )


def test_the_environment_names_a_collector(journal: Path, monkeypatch: pytest.MonkeyPatch, cli: Cli) -> None:
    with collecting() as collector:
        monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", collector.url)
        cli("traces", journal)

    assert collector.spans


def test_a_collector_that_takes_nothing_is_told(journal: Path, cli: Cli) -> None:
    with collecting(400) as collector:
        said = cli("traces", journal, "--endpoint", collector.url, code=1).err

    assert "expected a collector that takes spans, found: it answered 400" in said


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["none.journal", "--endpoint", "http://127.0.0.1:1"], "found nothing at none.journal"),
        (["none.journal"], "expected the URL of a collector"),
        (["none.journal", "--endpoint", "127.0.0.1:4318"], "expected http://HOST:PORT"),
    ],
)
def test_what_is_wrong_is_told(
    arguments: list[str], words: str, cli: Cli, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("OTEL_EXPORTER_OTLP_ENDPOINT", raising=False)

    assert words in cli("traces", *arguments, code=2).err


def test_what_is_no_journal_is_told(tmp_path: Path, cli: Cli) -> None:
    path = tmp_path / "text"
    path.write_text("this is no journal, but it is long enough to look like a record of one")
    with collecting() as collector:
        assert "expected a journal" in cli("traces", path, "--endpoint", collector.url, code=2).err

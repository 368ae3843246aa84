"""A journal gives back the steps it was told, whatever happened to its file."""

from __future__ import annotations

import os
from datetime import UTC, datetime
from pathlib import Path

import pytest
from msgspec import structs

from clockwork_serve.controller import ControllerConfig
from clockwork_serve.errors import ConfigError
from clockwork_serve.messages import GatewayLost, WorkerLost
from clockwork_serve.telemetry import Journal, JournalHead, Step, Torn, head_of, read_journal, read_records
from clockwork_serve.telemetry import journal as journal_module
from tests.telemetry import stories


def test_steps_come_back_equal(tmp_path: Path) -> None:
    told = [
        Step(
            1,
            (stories.worker_joined(), stories.model_added(), stories.request("a")),
            (stories.infer(1, "a"),),
        ),
        Step(
            2, (stories.result(1), WorkerLost(worker="w0"), GatewayLost(gateway="g0")), (stories.answer("a"),)
        ),
    ]
    journal = Journal(tmp_path / "j")
    for step in told:
        journal.on_step(step.now_ns, step.events, step.effects)
    journal.close()

    assert list(read_journal(tmp_path / "j")) == told


def test_a_step_without_events_and_effects_is_kept(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "j")
    journal.on_step(3, [], [])
    journal.close()

    assert list(read_journal(tmp_path / "j")) == [Step(3, (), ())]


def test_a_run_begins_with_its_head_which_is_no_step(tmp_path: Path) -> None:
    head = head_of(ControllerConfig(max_batch=5), datetime(2026, 1, 2, tzinfo=UTC))
    for now_ns in (1, 2):
        journal = Journal(tmp_path / "j", head)
        journal.on_step(now_ns, [stories.request("a")], [])
        journal.close()

    records = [record for _, record in read_records(tmp_path / "j")]
    assert [type(record) for record in records] == [JournalHead, Step, JournalHead, Step]
    assert records[0] == head
    assert head.started == "2026-01-02T00:00:00.000+00:00"
    assert head.controller_config() == ControllerConfig(max_batch=5)
    assert [step.now_ns for step in read_journal(tmp_path / "j")] == [1, 2]


def test_a_setting_that_is_gone_is_read_where_it_was_off() -> None:
    head = head_of(ControllerConfig(max_batch=5))
    off, on = [structs.replace(head, config={**head.config, "released": value}) for value in (False, True)]

    assert off.controller_config() == ControllerConfig(max_batch=5)
    with pytest.raises(ConfigError, match=r"found released, of clockwork .*; replay it with that version"):
        on.controller_config()


@pytest.mark.parametrize("cut", [1, 40])
def test_a_torn_chunk_is_cut_off_before_more_is_written(tmp_path: Path, cut: int) -> None:
    sizes = []
    for now_ns in (1, 2):
        journal = Journal(tmp_path / "j")
        journal.on_step(now_ns, [stories.request("a")], [])
        journal.close()
        sizes.append((tmp_path / "j").stat().st_size)
    whole = (tmp_path / "j").read_bytes()
    (tmp_path / "j").write_bytes(whole[: sizes[1] - cut])
    torn = [record for _, record in read_records(tmp_path / "j")][-1]
    assert torn == Torn(tmp_path / "j", cut)

    journal = Journal(tmp_path / "j")
    journal.on_step(3, [stories.request("a")], [])
    journal.close()

    assert [step.now_ns for step in read_journal(tmp_path / "j")] == [1, 3]


def test_nothing_is_appended_to_a_file_that_is_no_journal(tmp_path: Path) -> None:
    (tmp_path / "j").write_bytes(b"this is some other file")
    with pytest.raises(ConfigError, match="expected a journal"):
        Journal(tmp_path / "j")
    assert (tmp_path / "j").read_bytes() == b"this is some other file"


def test_a_torn_chunk_ends_the_file(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "j")
    for now_ns in range(3):
        journal.on_step(now_ns, [stories.request("a")], [])
        if now_ns < 2:
            journal.flush()
    journal.close()
    whole = (tmp_path / "j").read_bytes()
    (tmp_path / "j").write_bytes(whole[:-1])

    assert [step.now_ns for step in read_journal(tmp_path / "j")] == [0, 1]


def test_size_is_bounded_and_the_newest_steps_stay(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "j", file_bytes=4000, files=3)
    for now_ns in range(1000):
        journal.on_step(now_ns, [stories.request(f"request-{now_ns}")], [])
        journal.flush()
    journal.close()

    kept = [step.now_ns for step in read_journal(tmp_path / "j")]
    assert kept == list(range(kept[0], 1000))
    assert kept[0] > 0
    files = list(tmp_path.iterdir())
    assert len(files) == 3
    assert all(file.stat().st_size <= 4000 for file in files)


def test_steps_dropped_for_a_slow_disk_are_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    journal = Journal(tmp_path / "j")
    journal.on_step(1, [stories.request("a")], [])
    monkeypatch.setattr(journal_module, "BACKLOG_BYTES", -1)
    journal.on_step(2, [stories.request("b")], [])
    monkeypatch.undo()
    journal.on_step(3, [stories.request("c")], [])
    journal.close()

    assert [(step.now_ns, step.dropped) for step in read_journal(tmp_path / "j")] == [(1, 0), (3, 1)]
    assert journal.dropped == 1


def test_a_step_that_cannot_be_encoded_is_left_out_and_told(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "j")
    journal.on_step(1, [stories.request("a")], [])
    journal.on_step(2, [stories.request("\ud800")], [])
    journal.on_step(3, [stories.request("b", slo_ms=1e15)], [])
    journal.on_step(4, [stories.request("c")], [])
    journal.close()

    assert [(step.now_ns, step.dropped) for step in read_journal(tmp_path / "j")] == [(1, 0), (4, 2)]
    assert journal.dropped == 2


def test_a_journal_that_cannot_be_written_is_a_setting_error(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="journal: cannot write"):
        Journal(tmp_path / "missing" / "j")


def test_a_full_disk_ends_the_journal_and_nothing_else(caplog: pytest.LogCaptureFixture) -> None:
    journal = Journal(Path("/dev/full"))
    for now_ns in range(3):
        journal.on_step(now_ns, [stories.request("a")], [])
        journal.flush()
    journal.close()

    assert [record.getMessage() for record in caplog.records] == [
        "journal ends: cannot write /dev/full: No space left on device"
    ]


def test_a_file_that_is_no_journal_is_refused(tmp_path: Path) -> None:
    (tmp_path / "j").write_bytes(b"this is some other file")
    with pytest.raises(ConfigError, match="expected a journal"):
        list(read_journal(tmp_path / "j"))


def test_its_files_are_their_owner_s_alone_whatever_the_umask(tmp_path: Path) -> None:
    before = os.umask(0)
    try:
        journal = Journal(tmp_path / "j", file_bytes=10, files=3)
        for now_ns in range(4):
            journal.on_step(now_ns, [stories.request("a")], [])
            journal.flush()
        journal.close()
    finally:
        os.umask(before)
    assert {path.name: path.stat().st_mode & 0o777 for path in tmp_path.iterdir()} == {
        "j": 0o600, "j.1": 0o600, "j.2": 0o600,
    }  # fmt: skip


def test_files_that_were_open_to_others_are_closed(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for name in ("j", "j.1"):
        (tmp_path / name).touch(0o644)
        (tmp_path / name).chmod(0o664)
    Journal(tmp_path / "j").close()
    assert {path.stat().st_mode & 0o777 for path in tmp_path.iterdir()} == {0o600}
    assert f"journal: {tmp_path / 'j'} was open to other users (mode 0664)" in caplog.text


def test_what_is_no_file_keeps_its_mode(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "j", 0o666)
    (tmp_path / "j").chmod(0o666)
    reader = os.open(tmp_path / "j", os.O_RDONLY | os.O_NONBLOCK)
    Journal(tmp_path / "j").close()
    os.close(reader)
    assert (tmp_path / "j").stat().st_mode & 0o777 == 0o666

"""A request of a journal is found, and a controller brought back to it goes on exactly as the first one."""

from __future__ import annotations

import shutil
import time
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis.strategies import integers
from msgspec import structs

from clockwork_serve.controller import Controller, ControllerConfig
from clockwork_serve.errors import ConfigError
from clockwork_serve.messages import Request
from clockwork_serve.sim import history
from clockwork_serve.sim.history import Historian, History, Moment, folder_of, write_history
from clockwork_serve.sim.replay import decided_again, first_difference
from clockwork_serve.telemetry import (
    Journal,
    JournalFollower,
    JournalHead,
    Step,
    head_of,
    numbered,
    read_records,
)
from clockwork_serve.telemetry.following import first_header
from clockwork_serve.telemetry.journal import PYTHON
from harness.seeds import play_seed, random_scenario
from tests.sim.journals import SEED, written
from tests.telemetry import stories

pytestmark = pytest.mark.skipif(
    head_of(ControllerConfig()).build != PYTHON, reason="compiled brains cannot be saved"
)
CHECKPOINT = 150


@pytest.fixture(autouse=True)
def _often(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(history, "CHECKPOINT_WORK", CHECKPOINT)
    monkeypatch.setattr(history, "SEGMENT_REQUESTS", 50)


def small_files(path: Path, files: int, seed: int = SEED, requests: int = 600) -> Path:
    """A journal whose parts are small."""
    journal = Journal(path, head_of(random_scenario(seed, requests).config), file_bytes=12_000, files=files)
    play_seed(seed, requests, (journal, Flushing(journal)))
    journal.close()
    return path


def oldest(path: Path) -> int:
    header = first_header(path)
    assert header is not None
    return header.first


class Flushing:
    """Has a journal written in small chunks."""

    def __init__(self, journal: Journal) -> None:
        self._journal = journal

    def on_step(self, now_ns: int, events: object, effects: object) -> None:
        if self._journal._batch.count >= 20:
            self._journal.flush()


def arrivals(path: Path) -> dict[str, Moment]:
    """Each request's arrival, by reading all records in order."""
    found, run = {}, 0
    for number, (_, record) in enumerate(read_records(path)):
        if isinstance(record, JournalHead):
            run = number
            continue
        assert isinstance(record, Step)
        for event in record.events:
            if isinstance(event, Request):
                found[event.request_id] = Moment(run, number, record.now_ns)
    return found


def from_the_start(path: Path, moment: Moment) -> tuple[Controller, Iterator[Step]]:
    """What a history finds, by deciding everything again."""
    records = (record for _, record in read_records(path))
    head = next(islice(records, moment.run, None))
    assert isinstance(head, JournalHead)
    controller = Controller(head.controller_config())
    for step in islice(records, moment.record - moment.run - 1):
        decided_again(controller, step)
    return controller, records


def check_goes_on(controller: Controller, steps: Iterator[Step]) -> int:
    count = 0
    for step in steps:
        assert first_difference(step.effects, decided_again(controller, step)) is None
        count += 1
    return count


def test_every_request_is_found_with_and_without_an_index(tmp_path: Path) -> None:
    path = written(tmp_path / "journal")
    wanted = arrivals(path)
    assert len(wanted) > 200
    plain = History.open(path)
    for name in list(wanted)[::40]:
        assert plain.find(name) == wanted[name]
    indexed = write_history(path)
    assert len(list(folder_of(path).glob("*.index"))) > 3
    assert {name: indexed.find(name) for name in wanted} == wanted
    assert indexed.find("nobody") is None


@settings(max_examples=8, deadline=None)
@given(integers(0, 1 << 20))
def test_from_any_checkpoint_it_goes_on_as_from_the_start(tmp_path_factory, seed: int) -> None:
    path = written(tmp_path_factory.mktemp("seed") / "journal", seed)
    found = write_history(path)
    wanted = list(arrivals(path).values())
    for moment in wanted[:: max(1, len(wanted) // 8)]:
        controller, steps = found.controller_at(moment)
        other, _ = from_the_start(path, moment)
        assert controller.save() == other.save()
        assert check_goes_on(controller, steps) > 0


def test_a_checkpoint_made_where_the_next_run_begins_is_not_of_that_run(tmp_path: Path, monkeypatch) -> None:
    path = written(tmp_path / "journal", seed=44)  # its controller dies
    wanted = [moment for moment in arrivals(path).values() if moment.run]
    monkeypatch.setattr(history, "CHECKPOINT_WORK", 1)
    found = write_history(path)
    made = {int(one.stem.partition("-")[2], 16): one for one in folder_of(path).glob("*.state")}
    del made[wanted[0].run]
    for one in made.values():
        one.unlink()
    controller, _ = found.controller_at(wanted[0])
    assert controller.save() == from_the_start(path, wanted[0])[0].save()


def test_checkpoints_are_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = written(tmp_path / "journal")
    found, moment = write_history(path), list(arrivals(path).values())[-1]
    again = []
    monkeypatch.setattr(history, "decided_again", lambda controller, step: again.append(step))
    found.controller_at(moment)
    assert len(again) <= CHECKPOINT


def test_a_damaged_checkpoint_that_claims_more_than_there_is_memory_is_passed_over(tmp_path: Path) -> None:
    path = written(tmp_path / "journal")
    found, moment = write_history(path), list(arrivals(path).values())[-1]
    whole = found.controller_at(moment)[0].save()
    checkpoints = list(folder_of(path).glob("*.state"))
    for one in checkpoints:
        magic, size = b"\x28\xb5\x2f\xfd\xe0", (1 << 55).to_bytes(8, "little")
        one.write_bytes(magic + size + b"\x01\x00\x00")
    assert checkpoints
    assert found.controller_at(moment)[0].save() == whole


def test_a_journal_whose_beginning_is_gone_is_read_from_its_first_checkpoint_on(tmp_path: Path) -> None:
    whole = small_files(tmp_path / "whole", 1000)
    part = small_files(tmp_path / "part", 2)
    shutil.copytree(folder_of(write_history(whole).path), folder_of(part))
    wanted = arrivals(whole)
    kept = oldest(part)
    assert kept > 200
    found = History.open(part)
    reached = 0
    for name, moment in wanted.items():
        if moment.record < kept:
            assert found.find(name) is None
            continue
        assert found.find(name) == moment
        try:
            controller, steps = found.controller_at(moment)
        except ConfigError:
            with pytest.raises(ConfigError, match="keep a larger journal"):
                found.controller_at(moment)
            assert not reached, "only what lies before the first checkpoint"
            continue
        reached += 1
        if reached % 20 == 1:
            assert check_goes_on(controller, steps) > 0
    assert reached > 50


def test_an_observer_that_starts_again_goes_on_where_it_was(tmp_path: Path) -> None:
    path = written(tmp_path / "journal")
    wanted = arrivals(path)
    begun, follower = Historian(path), JournalFollower(path)
    for number, record in islice(numbered(follower), 400):
        begun.take(number, record)
    follower.close()  # killed: what is not written is gone
    again = Historian(path)
    assert again.start is not None
    assert 0 < again.start <= 400
    found = write_history(path)
    assert {name: found.find(name) for name in wanted} == wanted
    controller, steps = found.controller_at(list(wanted.values())[-30])
    assert check_goes_on(controller, steps) > 0


def test_what_belongs_to_another_journal_of_that_name_is_forgotten(tmp_path: Path) -> None:
    path = written(tmp_path / "journal")
    write_history(path)
    path.unlink()
    written(path, SEED + 1)
    wanted = arrivals(path)
    assert History.open(path).find(next(iter(wanted))) == next(iter(wanted.values()))
    found = write_history(path)
    assert {name: found.find(name) for name in wanted} == wanted
    assert len({one.name.split("-")[0] for one in folder_of(path).iterdir()}) == 1


def test_what_belongs_to_deleted_parts_is_deleted(tmp_path: Path) -> None:
    path = tmp_path / "journal"
    head = head_of(random_scenario(SEED, 600).config)
    journal = Journal(path, head, file_bytes=12_000, files=2)
    while first_header(path) is None:  # as the observer waits for it
        time.sleep(0.001)
    historian, follower = Historian(path), JournalFollower(path)

    class Observing(Flushing):
        def on_step(self, now_ns: int, events: object, effects: object) -> None:
            super().on_step(now_ns, events, effects)
            while journal._queued_bytes:  # else a busy machine deletes what was not read yet
                time.sleep(0.0005)
            for number, record in numbered(follower):
                historian.take(number, record)

    play_seed(SEED, 600, (journal, Observing(journal)))
    journal.close()
    for number, record in numbered(follower):
        historian.take(number, record)
    follower.close()
    historian.flush(number + 1)
    first = oldest(path)
    assert first > 0
    ends = [int(one.name.split("-")[2], 16) for one in folder_of(path).glob("*.index")]
    records = [int(one.stem.split("-")[1], 16) for one in folder_of(path).glob("*.state")]
    assert ends and records
    assert min(ends) > first
    assert min(records) >= first


def test_checkpoints_that_take_too_much_are_thinned_and_the_older_ones_more(tmp_path: Path) -> None:
    path = written(tmp_path / "journal", requests=2000)
    write_history(path)
    sizes = {int(one.stem.split("-")[1], 16): one.stat().st_size for one in folder_of(path).glob("*.state")}
    shutil.rmtree(folder_of(path))
    found = write_history(path, bytes_max=sum(sizes.values()) // 3)
    kept = sorted(int(one.stem.split("-")[1], 16) for one in folder_of(path).glob("*.state"))
    assert 3 < len(kept) < len(sizes) / 2
    half = (kept[0] + kept[-1]) // 2
    assert sum(record < half for record in kept) < sum(record >= half for record in kept)
    assert max(kept) == max(sizes)
    controller, steps = found.controller_at(list(arrivals(path).values())[-30])
    assert check_goes_on(controller, steps) > 0


def test_after_missing_steps_there_is_no_checkpoint_until_the_next_run(tmp_path: Path) -> None:
    path = tmp_path / "journal"
    journal = Journal(path, head_of(ControllerConfig()))
    for now_ns in range(1, 600):
        journal._unsaid = int(now_ns == 300)
        journal.on_step(now_ns, [stories.request(f"r{now_ns}", slo_ms=0.0001)] if now_ns % 5 else [], [])
    journal.close()
    found = write_history(path)
    moment = found.find("r399")
    assert moment is not None
    with pytest.raises(ConfigError, match="some are missing"):
        found.controller_at(moment)


def test_a_run_of_another_version_ends_with_the_next_run(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "journal"
    head = head_of(ControllerConfig())
    other = structs.replace(head, config={**head.config, "a_setting_of_tomorrow": 1})
    Journal(path, other).close()
    written(path)
    found = write_history(path)
    assert "a_setting_of_tomorrow" in caplog.text
    controller, steps = found.controller_at(list(arrivals(path).values())[-1])
    assert check_goes_on(controller, steps) > 0


def test_its_files_are_their_owner_s_alone(tmp_path: Path) -> None:
    path = written(tmp_path / "journal")
    write_history(path)
    assert folder_of(path).stat().st_mode & 0o777 == 0o700
    assert {one.stat().st_mode & 0o777 for one in folder_of(path).iterdir()} == {0o600}


def test_no_journal_has_no_history(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="found nothing at"):
        History.open(tmp_path / "journal")

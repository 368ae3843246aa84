"""A journal that grows is followed over the renaming of its files, and no record is read twice or missed."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from random import Random

import pytest

from clockwork_serve.controller import ControllerConfig
from clockwork_serve.errors import ConfigError
from clockwork_serve.telemetry import (
    Journal,
    JournalFollower,
    JournalHead,
    Step,
    Torn,
    head_of,
    numbered,
    read_journal,
    read_records,
)
from clockwork_serve.telemetry.journal import HEADER, journal_files
from tests.telemetry import stories

HEAD = head_of(ControllerConfig())
Follow = Callable[..., JournalFollower]


@pytest.fixture
def follow() -> Iterator[Follow]:
    """Makes followers, and closes them."""
    with ExitStack() as stack:

        def make(path: Path, first: int | None = None) -> JournalFollower:
            follower = JournalFollower(path, first)
            stack.callback(follower.close)
            return follower

        yield make


def told(journal: Journal, *instants: int) -> None:
    for now_ns in instants:
        journal.on_step(now_ns, [stories.request(f"request-{now_ns}")], [])
        journal.flush()


def written(journal: Journal) -> None:
    """Wait until all that was flushed is in its file."""
    ended = threading.Event()
    while journal._queued_bytes:
        ended.wait(0.001)


def instants(found: object) -> list[int]:
    return [record.now_ns for _, record in found if isinstance(record, Step)]


def test_what_is_added_is_read_once_and_nothing_is_read_before_it_is_whole(
    tmp_path: Path, follow: Follow
) -> None:
    journal = Journal(tmp_path / "j", HEAD)
    follower = follow(tmp_path / "j")
    found = []
    for now_ns in range(5):
        told(journal, now_ns)
        written(journal)
        found += list(numbered(follower))
    assert list(numbered(follower)) == []
    assert [number for number, _ in found] == list(range(6))
    assert instants(found) == list(range(5))
    journal.close()


def test_files_that_are_renamed_meanwhile_are_read_to_their_ends(tmp_path: Path, follow: Follow) -> None:
    journal = Journal(tmp_path / "j", HEAD, file_bytes=1500, files=100)
    follower = follow(tmp_path / "j")
    dice, found, last = Random(1), [], 0
    while last < 300:
        count = dice.randrange(1, 40)
        told(journal, *range(last, last + count))
        last += count
        written(journal)
        found += list(numbered(follower))
    journal.close()
    assert len(journal_files(tmp_path / "j")) > 10
    assert instants(found) == list(range(last))
    assert follower.lost == 0
    assert sum(isinstance(record, JournalHead) for _, record in found) == 1


def test_a_file_that_is_open_is_read_although_it_was_deleted(tmp_path: Path, follow: Follow) -> None:
    journal = Journal(tmp_path / "j", HEAD, file_bytes=1500, files=1)
    told(journal, 0, 1, 2)
    written(journal)
    reading = numbered(follow(tmp_path / "j"))
    assert isinstance(next(reading)[1], JournalHead)
    told(journal, *range(3, 100))
    journal.close()
    assert [path.name for path in tmp_path.iterdir()] == ["j"]
    assert instants(reading)[:3] == [0, 1, 2]


def test_what_was_deleted_unread_is_lost_and_the_next_step_says_how_many(
    tmp_path: Path, follow: Follow
) -> None:
    journal = Journal(tmp_path / "j", HEAD, file_bytes=1500, files=2)
    follower = follow(tmp_path / "j")
    told(journal, 0)
    written(journal)
    found = list(numbered(follower))
    told(journal, *range(1, 200))
    journal.close()
    more = list(numbered(follower))

    # The file that was open is read to its end; the files between it and those that are left are gone.
    first = next(step for _, step in more if step.dropped)
    read = instants([*found, *more])
    assert read == sorted(set(read))
    assert follower.lost == first.dropped == 200 - len(read)
    assert read[-1] == 199


def test_a_journal_is_read_while_it_is_written_and_its_files_are_renamed(
    tmp_path: Path, follow: Follow
) -> None:
    journal = Journal(tmp_path / "j", HEAD, file_bytes=2000, files=1000)
    writer = threading.Thread(target=lambda: told(journal, *range(3000)))
    writer.start()
    follower, found = follow(tmp_path / "j"), []
    while writer.is_alive():
        found += list(numbered(follower))
    journal.close()
    found += list(numbered(follower))
    assert instants(found) == list(range(3000))
    assert instants(read_records(tmp_path / "j")) == list(range(3000))


def test_nothing_is_lost_where_the_writer_is_stopped_while_it_renames(tmp_path: Path, follow: Follow) -> None:
    path = tmp_path / "j"
    journal = Journal(path, HEAD, file_bytes=1500, files=100)
    told(journal, *range(100))
    journal.close()
    for age in range(len(list(tmp_path.iterdir())) - 1, 1, -1):
        (tmp_path / f"j.{age}").rename(tmp_path / f"j.{age + 1}")
    assert not (tmp_path / "j.2").exists()
    assert instants(numbered(follow(path))) == list(range(100))
    assert instants(read_records(path)) == list(range(100))


def test_a_file_in_the_midst_of_a_run_can_be_read_alone(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "j", HEAD, file_bytes=1500, files=2)
    told(journal, *range(100))
    journal.close()
    records = [record for _, record in read_records(tmp_path / "j")]
    assert records[0] == JournalHead(**{
        **{name: getattr(HEAD, name) for name in HEAD.__struct_fields__}, "continues": True,
    })  # fmt: skip
    assert all(isinstance(record, Step) for record in records[1:])


def test_it_is_read_from_a_record_on(tmp_path: Path, follow: Follow) -> None:
    journal = Journal(tmp_path / "j", HEAD, file_bytes=1500, files=100)
    told(journal, *range(100))
    journal.close()
    for first in (0, 1, 2, 50, 99, 100):
        found = list(numbered(follow(tmp_path / "j", first)))
        assert [number for number, _ in found] == list(range(first, 101))


def test_numbers_go_on_when_a_journal_is_opened_again(tmp_path: Path, follow: Follow) -> None:
    for now_ns in range(3):
        journal = Journal(tmp_path / "j", HEAD)
        told(journal, now_ns)
        journal.close()
    assert [number for number, _ in numbered(follow(tmp_path / "j"))] == list(range(6))


def test_a_chunk_that_is_being_written_is_waited_for(tmp_path: Path, follow: Follow) -> None:
    journal = Journal(tmp_path / "j", HEAD)
    told(journal, 0, 1)
    journal.close()
    whole = (tmp_path / "j").read_bytes()
    (tmp_path / "j").write_bytes(whole[:-5])
    follower = follow(tmp_path / "j")
    assert instants(numbered(follower)) == [0]
    assert follower.torn == Torn(tmp_path / "j", 5)
    with (tmp_path / "j").open("ab") as file:
        file.write(whole[-5:])
    assert instants(numbered(follower)) == [1]
    assert follower.torn is None


def test_damage_is_found(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "j", HEAD)
    told(journal, *range(20))
    journal.close()
    whole, dice = (tmp_path / "j").read_bytes(), Random(1)
    for _ in range(100):
        damaged = bytearray(whole)
        damaged[dice.randrange(HEADER.size, len(damaged))] ^= 1 << dice.randrange(8)
        (tmp_path / "j").write_bytes(damaged)
        try:
            found = list(read_records(tmp_path / "j"))
        except ConfigError:
            continue
        # A length, a count or an instant of a header: what is read is whole, or cut off.
        assert len(found) <= 22


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"\x55\x01\x00\x00\x88\xa6record\xb1clockwork journal" + bytes(300), "found format 1, of another"),
        (b"CWJ\x09" + bytes(60), "found format 9, of another version of clockwork"),
        (b"this is some other file", "expected a journal; found other bytes"),
        (b"this is some other file, which is longer than a header", "expected a journal; found other bytes"),
    ],
)
def test_other_files_and_other_formats_are_named(tmp_path: Path, content: bytes, said: str) -> None:
    (tmp_path / "j").write_bytes(content)
    for use in (lambda: list(read_records(tmp_path / "j")), lambda: Journal(tmp_path / "j")):
        with pytest.raises(ConfigError, match=said):
            use()
    assert (tmp_path / "j").read_bytes() == content


def test_one_journal_is_read_by_several_threads_at_once(tmp_path: Path) -> None:
    """An observer answers in a thread while it goes on reading."""
    dice, path = Random(1), tmp_path / "j"
    journal = Journal(path, HEAD)
    for now_ns in range(4000):
        journal.on_step(now_ns, [stories.request(dice.randbytes(60).hex())], [])
    journal.close()
    found: list[object] = []

    def read() -> None:
        try:
            found.extend([step.now_ns for step in read_journal(path)] for _ in range(8))
        except ConfigError as error:
            found.append(error)

    threads = [threading.Thread(target=read) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == 32 * [list(range(4000))]

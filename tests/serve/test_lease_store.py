"""The lease that hosts share: one epoch each, whoever fails; and, as a rule, one holder at a time."""

from __future__ import annotations

import asyncio
import errno
import heapq
import random
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
import trustme

from clockwork_serve.errors import ConfigError
from clockwork_serve.serve import lease as module
from clockwork_serve.serve.lease import (
    BEATS,
    READS,
    LeaseBeat,
    LeaseSeen,
    LeaseWatch,
    StoreLease,
    Tenure,
    fingerprints,
)
from clockwork_serve.store.shared import FolderFiles, FsspecFiles, StoreFiles, Tick
from tests.serve.links import until
from tests.timing import Timing

LEASE_S = 0.8
PATIENCE_S = 20.0


@pytest.fixture
def tmp_path(tmp_path: Path) -> Iterator[Path]:
    """A folder in memory: a busy disk may need longer for an epoch than leases are here."""
    memory = Path("/dev/shm")
    with TemporaryDirectory(dir=memory if memory.is_dir() else tmp_path) as name:
        yield Path(name)


class Faulty:
    """The files of a folder, unless they fail, or hang until they do not any more."""

    def __init__(self, folder: Path) -> None:
        self.files: StoreFiles = FolderFiles(folder)
        self.disk_s = 0.0  # what it takes to write anything for ever
        self.bad_disk: Exception | None = None
        self.slow_s = 0.0  # what it takes to create the next file
        self.fails: Exception | None = None
        self.tries = 0
        self.goes_on = threading.Event()
        self.goes_on.set()

    def read(self, name: str) -> bytes:
        self._may_fail()
        return self.files.read(name)

    def get(self, name: str, into: Path, tick: Tick) -> None:
        raise AssertionError

    def put(
        self, name: str, source: bytes | Path, tick: Tick, *, new: bool = False, lasts: bool = True
    ) -> None:
        self._may_fail()
        time.sleep(self.disk_s if lasts else 0)
        self.files.put(name, source, tick, new=new, lasts=lasts)
        if new:
            slow_s, self.slow_s = self.slow_s, 0.0
            time.sleep(slow_s)

    def persist(self, name: str) -> None:
        self._may_fail()
        time.sleep(self.disk_s)
        failed, self.bad_disk = self.bad_disk, None
        if failed is not None:
            raise failed
        self.files.persist(name)

    def has(self, name: str) -> bool:
        raise AssertionError

    def names(self, folder: str) -> set[str]:
        self._may_fail()
        return self.files.names(folder)

    def _may_fail(self) -> None:
        self.goes_on.wait(PATIENCE_S)
        if isinstance(self.fails, OSError):
            self.tries += 1
            raise OSError(self.fails.errno, self.fails.strerror, f"temporary-{self.tries}")
        if self.fails is not None:
            raise self.fails


def lease(folder: Path, name: str = "main", address: str = "") -> tuple[StoreLease, Faulty]:
    files = Faulty(folder)
    return StoreLease(files, name, LEASE_S, address), files


def die(held: StoreLease) -> None:
    """As when its process is killed."""
    assert held._keeping is not None
    held._keeping.cancel()


async def test_each_holder_has_the_next_epoch_and_who_releases_it_keeps_nobody_waiting(
    tmp_path: Path,
    timing: Timing,
) -> None:
    for epoch in range(1, 5):
        held, _ = lease(tmp_path)
        began_s = time.monotonic()
        assert await held.acquire() == epoch
        with timing.judged():
            assert time.monotonic() - began_s < LEASE_S, "it was released"
        await asyncio.sleep(0.05)
        held.release()
        held.release()
        with timing.judged():
            assert not held.lost.is_set()


async def test_who_stands_by_waits_while_there_are_heartbeats_and_for_the_lease_s_time_after(
    tmp_path: Path,
    timing: Timing,
) -> None:
    (held, _), (other, _) = lease(tmp_path, address="a:7000"), lease(tmp_path)
    assert await held.acquire() == 1
    waiting = asyncio.ensure_future(other.acquire())
    await asyncio.sleep(3 * LEASE_S)
    with timing.judged():
        assert not waiting.done()
        assert not held.lost.is_set()
    assert other.leader == (1, "a:7000")
    die(held)
    began_s = time.monotonic()
    assert await waiting == 2
    assert time.monotonic() - began_s > LEASE_S / 2
    other.release()


async def test_who_knows_that_the_leader_is_dead_does_not_wait_and_else_it_is_deposed(
    tmp_path: Path, timing: Timing
) -> None:
    (held, _), (other, _) = lease(tmp_path), lease(tmp_path)
    assert await held.acquire() == 1
    waiting = asyncio.ensure_future(other.acquire())
    await until(lambda: other.leader[0] == 1)
    other.leader_died(7)
    await asyncio.sleep(LEASE_S)
    with timing.judged():
        assert not waiting.done(), "somebody else died"
    began_s = time.monotonic()
    other.leader_died(1)
    assert await waiting == 2
    with timing.judged():
        assert time.monotonic() - began_s < LEASE_S
        assert not other.lost.is_set()
        await asyncio.wait_for(held.lost.wait(), LEASE_S)  # it lives, and finds out by its next heartbeat
    held.release()
    files = {"000000001.beat", "000000001.epoch", "000000002.beat", "000000002.epoch"}
    await until(lambda: {path.name for path in (tmp_path / "leases/main").iterdir()} == files)
    other.release()


async def test_of_many_at_once_each_has_an_epoch_of_its_own(tmp_path: Path, timing: Timing) -> None:
    contenders = [lease(tmp_path)[0] for _ in range(8)]
    waiting = {asyncio.ensure_future(one.acquire()): one for one in contenders}
    found = []
    while waiting:
        done, _ = await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
        with timing.judged():
            assert len(done) == 1, "one holds it at a time"
        (had,) = done
        found.append(had.result())
        waiting.pop(had).release()
    assert found == sorted(set(found))
    with timing.judged():
        assert found == list(range(1, 9))


async def test_leases_of_two_names_in_one_store_have_nothing_to_do_with_each_other(
    tmp_path: Path, timing: Timing
) -> None:
    (one, _), (two, _) = lease(tmp_path, "one"), lease(tmp_path, "two")
    assert (await one.acquire(), await two.acquire()) == (1, 1)
    die(two)
    await asyncio.sleep(2 * LEASE_S)
    with timing.judged():
        assert not one.lost.is_set()
    third, _ = lease(tmp_path, "two")
    assert await third.acquire() == 2
    one.release()
    third.release()


@pytest.mark.parametrize("how", ["fails", "hangs"])
async def test_a_holder_whose_store_is_gone_stops_before_another_may_lead(
    tmp_path: Path, how: str, timing: Timing
) -> None:
    held, files = lease(tmp_path)
    await held.acquire()
    await asyncio.sleep(LEASE_S)
    with timing.judged():
        assert not held.lost.is_set()
    if how == "fails":
        files.fails = OSError(5, "Input/output error")
    else:
        files.goes_on.clear()
    began_s = time.monotonic()
    await asyncio.wait_for(held.lost.wait(), PATIENCE_S)
    with timing.judged():
        assert time.monotonic() - began_s < LEASE_S
    files.goes_on.set()
    held.release()


async def test_a_disk_that_is_slower_than_a_lease_costs_time_and_no_lease(
    tmp_path: Path, timing: Timing
) -> None:
    held, files = lease(tmp_path)
    files.disk_s = 2 * LEASE_S
    assert await held.acquire() == 1
    await asyncio.sleep(3 * LEASE_S)
    with timing.judged():
        assert not held.lost.is_set()
    held.release()


async def test_an_epoch_that_took_longer_than_a_tenure_is_left_for_the_next(
    tmp_path: Path, timing: Timing
) -> None:
    held, files = lease(tmp_path)
    files.slow_s = LEASE_S
    with timing.judged():
        assert await held.acquire() == 2
        await asyncio.sleep(LEASE_S)
        assert not held.lost.is_set()
    held.release()


async def test_who_cannot_keep_an_epoch_for_ever_leaves_it_and_takes_the_next(
    tmp_path: Path, timing: Timing
) -> None:
    held, files = lease(tmp_path)
    files.bad_disk = OSError(5, "Input/output error")
    with timing.judged():
        assert await held.acquire() == 2
        await asyncio.sleep(LEASE_S)
        assert not held.lost.is_set()
    held.release()


async def test_a_store_that_does_not_answer_once_is_asked_again(tmp_path: Path, timing: Timing) -> None:
    held, files = lease(tmp_path)
    files.goes_on.clear()
    began_s, waiting = time.monotonic(), asyncio.ensure_future(held.acquire())
    await asyncio.sleep(LEASE_S / 2)
    files.goes_on = threading.Event()  # what was asked before gets no answer
    files.goes_on.set()
    assert await waiting == 1
    with timing.judged():
        assert time.monotonic() - began_s < PATIENCE_S / 2
    held.release()


async def test_a_store_that_fails_for_a_while_loses_nothing_but_time(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, timing: Timing
) -> None:
    (held, files), (other, others) = lease(tmp_path), lease(tmp_path)
    files.fails = others.fails = OSError(5, "Input/output error")
    waiting = asyncio.ensure_future(held.acquire())
    await asyncio.sleep(LEASE_S)
    with timing.judged():
        assert not waiting.done()
    files.fails = None
    assert await waiting == 1
    standing_by = asyncio.ensure_future(other.acquire())
    await asyncio.sleep(2 * LEASE_S)
    others.fails = None
    await asyncio.sleep(2 * LEASE_S)
    with timing.judged():
        assert not standing_by.done(), "what it did not see is no reason to lead"
    files.fails = OSError(5, "Input/output error")
    await asyncio.sleep(LEASE_S / 4)
    files.fails = None
    await asyncio.sleep(2 * LEASE_S)
    with timing.judged():
        assert not held.lost.is_set()
    held.release()
    with timing.judged():
        assert await standing_by == 2
    other.release()
    assert sum("the store fails" in record.getMessage() for record in caplog.records) in (2, 3), "each once"


async def test_where_no_file_is_created_only_if_it_is_absent_there_is_no_lease(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"store: expected one .* created only if it is absent"):
        await StoreLease(FsspecFiles(f"file://{tmp_path}"), "main", LEASE_S).acquire()


@pytest.mark.parametrize("content", [b"", b"\0\0", b"{}", b'{"count": "x"}'])
async def test_a_heartbeat_that_cannot_be_read_is_one_that_does_not_change(
    tmp_path: Path, content: bytes, timing: Timing
) -> None:
    held, _ = lease(tmp_path)
    await held.acquire()
    await asyncio.sleep(0.05)
    die(held)
    await asyncio.sleep(0.05)
    (tmp_path / "leases/main/000000001.beat").write_bytes(content)
    other, _ = lease(tmp_path)
    with timing.judged():
        assert await other.acquire() == 2
    other.release()


# ------------------------------------------------------------
# Workers that are missed, other servers, stores that are not written.


async def test_who_has_no_worker_any_more_leaves_it_to_another_one_and_takes_it_again_if_nobody_does(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, timing: Timing
) -> None:
    monkeypatch.setattr(module, "REIGN_S", 0.1)
    held, _ = lease(tmp_path, address="a:7000")
    assert await held.acquire() == 1
    assert not held.deserted(0), "none is known"
    assert not held.deserted(2)
    await until(lambda: held.deserted(0))
    held.release()
    (again, _), (other, _) = lease(tmp_path, address="a:7000"), lease(tmp_path, address="b:7000")
    waiting = asyncio.ensure_future(again.acquire())
    with timing.judged():
        assert await other.acquire() == 2
    assert not waiting.done()
    other.deserted(0)
    await until(lambda: other.deserted(0))
    assert (other._desertion.workers_known, other._desertion.in_vain) == (True, 0)
    other.release()
    assert await waiting == 3
    assert again._desertion.in_vain == 1
    again.deserted(1)
    await until(lambda: again.deserted(0))
    again.release()
    alone, _ = lease(tmp_path, address="a:7000")
    began_s = time.monotonic()
    assert await alone.acquire() == 4
    assert time.monotonic() - began_s > LEASE_S / 2
    alone.release()


async def test_who_was_told_to_end_leaves_it_to_anybody_at_once(tmp_path: Path, timing: Timing) -> None:
    for epoch in (1, 2):
        held, _ = lease(tmp_path, address="a:7000")
        began_s = time.monotonic()
        assert await held.acquire() == epoch
        with timing.judged():
            assert time.monotonic() - began_s < LEASE_S
        held.deserted(1)
        await asyncio.sleep(0.05)
        held.release()


def of_server(folder: Path, *authorities: str, address: str = "", lease_s: float = LEASE_S) -> StoreLease:
    return StoreLease(FolderFiles(folder), "main", lease_s, address, lambda: frozenset(authorities))


@pytest.mark.parametrize("how", ["at its start", "while it stands by"])
async def test_a_controller_of_another_server_is_refused_by_name_while_one_of_ours_leads(
    tmp_path: Path, how: str
) -> None:
    ours, foreign = of_server(tmp_path, "AA:01", address="a:7000"), of_server(tmp_path, "BB:02")
    await ours.acquire()
    refused = r"fingerprint BB:02; found .* at a:7000 leads by it, .* has AA:01; give .*--lease NAME"
    with pytest.raises(ConfigError, match=refused):
        await asyncio.wait_for(foreign.check() if how == "at its start" else foreign.acquire(), PATIENCE_S)
    ours.release()


async def test_a_lease_that_another_server_held_long_ago_is_had(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    before = of_server(tmp_path, "AA:01")
    await before.acquire()
    await asyncio.sleep(0.05)
    die(before)
    ours = of_server(tmp_path, "BB:02")
    await ours.check()
    assert await ours.acquire() == 2
    assert "of another server" in caplog.text
    ours.release()


async def test_controllers_one_of_which_has_the_next_authority_already_belong_together(
    tmp_path: Path,
) -> None:
    had, long_s = {"AA:01"}, 10 * LEASE_S  # a busy machine may delay a heartbeat
    ours = StoreLease(FolderFiles(tmp_path), "main", long_s, "a:7000", lambda: frozenset(had))
    await ours.acquire()
    had.clear()
    had.add("BB:02")  # its file was replaced
    for authorities in (("AA:01",), ("AA:01", "BB:02"), ("BB:02",), ()):
        other = of_server(tmp_path, *authorities, lease_s=long_s)
        await until(lambda: {"AA:01", "BB:02"} <= ours._authorities)
        await other.check()
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(other.acquire(), LEASE_S / 2)
    ours.release()


async def test_who_stands_by_says_once_who_leads_and_where(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    (held, _), (other, _) = lease(tmp_path, address="a:7000"), lease(tmp_path, address="b:7000")
    await held.acquire()
    waiting = asyncio.ensure_future(other.acquire())
    await until(lambda: "stands by" in caplog.text)
    await asyncio.sleep(LEASE_S)
    assert caplog.text.count("stands by: the controller at a:7000 leads, with epoch 1") == 1
    held.release()
    await waiting
    other.release()


@pytest.mark.parametrize("number", [errno.EROFS, errno.EACCES, errno.EPERM])
async def test_a_store_that_may_not_be_written_is_an_error_at_the_start_whoever_leads(
    tmp_path: Path, number: int
) -> None:
    held, _ = lease(tmp_path)
    await held.acquire()
    made, files = lease(tmp_path)
    files.fails = OSError(number, "no")
    with pytest.raises(ConfigError, match=r"store: expected one that this process may write, .*; give it"):
        await made.check()
    held.release()


async def test_a_store_that_fails_at_the_start_is_tried_again_later(tmp_path: Path) -> None:
    made, files = lease(tmp_path)
    files.fails = OSError(errno.EIO, "Input/output error")
    await made.check()
    files.fails = None
    assert await made.acquire() == 1
    files.fails = OSError(errno.EROFS, "Read-only file system")
    await asyncio.wait_for(made.lost.wait(), PATIENCE_S)
    again, files = lease(tmp_path)
    files.fails = OSError(errno.EROFS, "Read-only file system")
    waiting = asyncio.ensure_future(again.acquire())
    await asyncio.sleep(LEASE_S / 2)
    files.fails = None
    assert await waiting == 2, "it was mended"
    again.release()


def test_fingerprints_are_those_that_openssl_prints(tmp_path: Path) -> None:
    first, second = trustme.CA(), trustme.CA()
    path = tmp_path / "ca.pem"
    path.write_bytes(first.cert_pem.bytes() + b"a comment\n" + second.cert_pem.bytes())
    command = ["openssl", "x509", "-in", str(path), "-noout", "-fingerprint", "-sha256"]
    said = subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()
    found = fingerprints(str(path))
    assert len(found) == 2
    assert any(said.partition("=")[2].startswith(each) for each in found)


# ------------------------------------------------------------
# The rules of both sides on virtual time, against an oracle that sees all of it: hosts that are paused at any
# point for longer than the lease, clocks that differ in all but their rate, a store that is slow or fails.


TIME_S = 1.0
HORIZON_S = 300.0


@dataclass
class World:
    """The true time, the store, and who may lead until when."""

    dice: random.Random
    now_s: float = 0.0
    fails_until_s: float = 0.0
    epochs: dict[int, str] = field(default_factory=dict)
    beats: dict[int, LeaseBeat] = field(default_factory=dict)
    may_lead: dict[int, float] = field(default_factory=dict)
    """By epoch: until which true time its holder may lead."""

    @property
    def newest(self) -> int:
        return max(self.epochs, default=0)

    def seen(self) -> LeaseSeen:
        return LeaseSeen(self.newest, self.beats.get(self.newest))

    def create(self, epoch: int, holder: str) -> bool:
        if epoch in self.epochs:
            return False
        assert epoch == self.newest + 1
        for other, until_s in self.may_lead.items():
            assert until_s <= self.now_s, f"{holder} leads with {epoch}, while {other} may until {until_s}"
        self.epochs[epoch] = holder
        return True

    def delay_s(self) -> float:
        """Of one step: mostly short, sometimes a pause of up to more than the lease."""
        long = self.dice.random() < 0.06
        return self.dice.uniform(0.1, 1.5) * TIME_S if long else self.dice.expovariate(1 / 0.01)

    def fails(self) -> bool:
        if self.dice.random() < 0.005:
            self.fails_until_s = self.now_s + self.dice.uniform(0, 3 * TIME_S)
        return self.now_s < self.fails_until_s


def host(world: World, name: str) -> Iterator[float]:
    """One controller after the other on a host, in steps: yields how long each takes."""
    offset_s, rate = world.dice.uniform(0, 1e6), world.dice.uniform(0.9995, 1.0005)

    def clock_s() -> float:
        return offset_s + rate * world.now_s

    def true_s(clock: float) -> float:
        return (clock - offset_s) / rate

    while True:
        epoch, began_s = 0, 0.0
        watch = LeaseWatch(TIME_S)
        while not epoch:
            began_s = clock_s()
            yield world.delay_s()
            seen = None if world.fails() else world.seen()
            yield world.delay_s()
            if seen is not None and watch.free(seen, began_s, clock_s()):
                began_s = clock_s()
                yield world.delay_s()
                if not world.fails() and world.create(seen.epoch + 1, name):
                    epoch = seen.epoch + 1
                yield world.delay_s()
            yield TIME_S / READS
        yield from reign(world, epoch, Tenure(TIME_S, began_s), clock_s, true_s)
        yield world.delay_s()


def reign(
    world: World, epoch: int, tenure: Tenure, clock_s: Callable[[], float], true_s: Callable[[float], float]
) -> Iterator[float]:
    """As long as it leads."""
    for count in range(1, 1_000_000):
        left_s = tenure.left_s(clock_s())
        world.may_lead[epoch] = true_s(clock_s() + left_s)
        if left_s <= 0 or world.dice.random() < 0.01:  # or it is killed
            world.may_lead.pop(epoch)
            return
        began_s = clock_s()
        yield world.delay_s()
        good = not world.fails()
        if good:
            world.beats[epoch] = LeaseBeat(count=count)
        newest = world.newest
        yield world.delay_s()
        if good and newest > epoch:
            world.may_lead.pop(epoch)
            return
        if good:
            tenure.renewed(began_s, clock_s())
            world.may_lead[epoch] = true_s(clock_s() + tenure.left_s(clock_s()))
        yield min(max(0.0, tenure.left_s(clock_s())), TIME_S / BEATS)


@pytest.mark.parametrize("seed", range(40))
def test_no_two_may_lead_at_any_time_whoever_is_paused_or_fails(seed: int) -> None:
    world = World(random.Random(seed))
    hosts = {name: host(world, name) for name in ("a", "b", "c")}
    steps = [(0.0, name) for name in hosts]
    while steps[0][0] < HORIZON_S:
        world.now_s, name = heapq.heappop(steps)
        heapq.heappush(steps, (world.now_s + next(hosts[name]), name))
    assert sorted(world.epochs) == list(range(1, world.newest + 1))
    assert len({*world.epochs.values()}) == 3, "each led"
    assert world.newest > HORIZON_S / 60, "and it went on"

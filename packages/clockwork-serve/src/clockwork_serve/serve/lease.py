"""Who leads: a lease that one controller holds at a time, and the epoch that it gives its holder.

Leases only make progress: they see to it that somebody leads and, as a rule, nobody else. That no two
controllers are obeyed is due to epochs alone (``fence``). There are two: a lock on a file, for the
controllers of one host, and numbered documents in the shared store, for those of several.
"""

from __future__ import annotations

import asyncio
import fcntl
import hashlib
import itertools
import logging
import os
import re
import ssl
import threading
import time
import uuid
import zlib
from collections.abc import Callable, Iterable
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any, Final, NamedTuple, Protocol, TypeVar

import msgspec
from msgspec import Struct

from clockwork_serve.errors import FORBIDDEN, ConfigError, described

Answer = TypeVar("Answer")
_log = logging.getLogger(__name__)


class Lease(Protocol):
    """One lease, as one of those who want it sees it. All methods are for the running loop's thread."""

    lost: asyncio.Event
    """Set if it was held, not released, and is not held any more: its holder must lead no longer."""

    async def acquire(self) -> int:
        """Wait until it is held; returns the epoch, which is larger than those of all holders before.

        Raises :class:`ConfigError` where it cannot be had at all.
        """

    def release(self) -> None:
        """Let another one have it. To be called by the holder, once it leads no longer."""


async def _in_thread(work: Callable[[], Answer], given_up: Callable[[], object] = lambda: None) -> Answer:
    """What ``work`` returns or raises; ``given_up`` is called if it succeeds when nobody waits any more.

    In a thread of its own, which does not keep the process alive.
    """
    loop = asyncio.get_running_loop()
    ended: asyncio.Future[Answer] = loop.create_future()

    def tell(answer: Any, error: Exception | None) -> None:
        if ended.cancelled():
            if error is None:
                given_up()
        elif error is None:
            ended.set_result(answer)
        else:
            ended.set_exception(error)

    def run() -> None:
        answer, error = None, None
        try:
            answer = work()
        except Exception as raised:  # noqa: BLE001 - raised where it is waited for
            error = raised
        with suppress(RuntimeError):  # the loop is closed, and the process about to end
            loop.call_soon_threadsafe(tell, answer, error)

    threading.Thread(target=run, name="lease", daemon=True).start()
    return await ended


# ------------------------------------------------------------
# A lock on a file, for the controllers of one host: the kernel frees it when its holder ends in any way.
#
# The file holds the last epoch. Its holder adds one before it leads, and waits for no disk: who remembers it
# ends with the host. A file that is gone or damaged is never taken for a new one, for then two controllers
# would have the same epoch; so it is made with the run directory, and by no controller.


LEASE_NAME: Final = "controller.lease"  # the file in the run directory
STANDBY_NAME: Final = "controller.standby"
"""Another one: who leads, where a controller of several hosts stands by. Its gateway says so."""
_FORM: Final = re.compile(rb"epoch (\d{20}) ([0-9a-f]{8})\n")
_READ_BYTES: Final = 256


def create_lease(run_dir: Path) -> None:
    """Make the file of a new run directory, with epoch 0, which no controller has. Raises OSError."""
    fd = os.open(run_dir / LEASE_NAME, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    try:
        os.write(fd, _written(0))
    finally:
        os.close(fd)


class FileLease:
    """The :class:`Lease` of one host's run directory; see :func:`create_lease`."""

    def __init__(self, run_dir: Path) -> None:
        self.lost = asyncio.Event()  # never set: the kernel takes no lock from a process that lives
        self._path = run_dir / LEASE_NAME
        self._fd = -1  # where it is held

    async def acquire(self) -> int:
        """As :meth:`Lease.acquire`."""
        try:
            fd = os.open(self._path, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW)
            if not _locked_at_once(fd):
                await _in_thread(partial(fcntl.flock, fd, fcntl.LOCK_EX), partial(os.close, fd))
            self._fd = fd
            epoch = _last_epoch(fd) + 1
            os.pwrite(fd, _written(epoch), 0)
        except (OSError, ValueError) as error:
            self.release()
            found = error.strerror if isinstance(error, OSError) else error
            raise ConfigError(
                f"lease: expected the epoch of the last controller in {self._path}; found {found}; stop the "
                "server and start it again"
            ) from None
        return epoch

    def release(self) -> None:
        """As :meth:`Lease.release`; has no effect where it is not held."""
        fd, self._fd = self._fd, -1
        if fd >= 0:
            os.close(fd)


def _last_epoch(fd: int) -> int:
    found = os.pread(fd, _READ_BYTES, 0)
    match = _FORM.fullmatch(found)
    if match is None or int(match[2], 16) != zlib.crc32(match[1]):
        raise ValueError(f"{found[:60]!r}")
    return int(match[1])


def _written(epoch: int) -> bytes:
    """The file's whole content; always as long, so that one write replaces it."""
    digits = b"%020d" % epoch
    return b"epoch %s %08x\n" % (digits, zlib.crc32(digits))


def _locked_at_once(fd: int) -> bool:
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


# ------------------------------------------------------------
# Documents in the shared store, for the controllers of several hosts.
#
#     STORE/leases/NAME/000000007.epoch   who has that epoch: created once, so that no two can have it
#                       000000007.beat    the heartbeat of its holder, which rewrites it
#                       writable          written by each controller at its start, to see whether it may
#
# The highest epoch leads. Clocks of hosts are not compared: who stands by waits, by its own clock, until a
# heartbeat has stayed the same for the time of the lease; who leads stops earlier, by its own, if it could
# not write one. That is for progress: whoever takes the next epoch, early or not, is the one to be obeyed.


TENURE: Final = 0.7
"""The share of the lease's time for which a heartbeat lets its holder lead; the rest is for how late it may
notice that this is over."""
BEATS: Final = 4  # how many heartbeats are written within the lease's time
READS: Final = 20  # how often it is read within that time
LAST_WORDS_S: Final = 0.5
"""How long a holder that ends waits until the store has its word that the lease is free."""
CHECK_S: Final = 10.0
"""How long a start waits for the store; one that is slower is tried again by the process that stands by."""
_EPOCH: Final = re.compile(r"(\d{9})\.epoch")
_CERTIFICATE: Final = re.compile(r"-----BEGIN CERTIFICATE-----.*?-----END CERTIFICATE-----", re.DOTALL)
_SHOWN_BYTES: Final = 8


class LeaseBeat(Struct, frozen=True, kw_only=True):
    """A heartbeat: ``count`` is another one each time.

    ``address`` is where other machines join the holder. ``released``: it leads no longer. ``authorities`` are
    fingerprints of those whose certificates its machines have. ``workers``: a worker has joined this holder,
    or one before it. ``deserted``: it gave the lease up because no worker was connected; ``in_vain`` holders
    in a row did so although no worker had joined them at all.
    """

    count: int
    address: str = ""
    released: bool = False
    authorities: tuple[str, ...] = ()
    workers: bool = False
    deserted: bool = False
    in_vain: int = 0


class LeaseSeen(NamedTuple):
    """What was read of a lease: its highest epoch (0: none) and the heartbeat of that, if there is one."""

    epoch: int
    beat: LeaseBeat | None


class LeaseDocuments(Protocol):
    """Where they are; see :class:`~clockwork_serve.store.shared.StoreFiles`, which are such."""

    def read(self, name: str) -> bytes:
        """The content of one. Raises FileNotFoundError."""

    def put(
        self, name: str, source: bytes, tick: Callable[[], None], *, new: bool = False, lasts: bool = True
    ) -> None:
        """Write one; ``new``: raises FileExistsError if it is there, and of several at once one succeeds."""

    def persist(self, name: str) -> None:
        """Have one outlast a loss of power, that was written without ``lasts``."""

    def names(self, folder: str) -> set[str]:
        """The names in a folder, none if it is absent."""


class LeaseWatch:
    """Whether a lease is free, for one who stands by. All instants are of its own monotonic clock, in s."""

    def __init__(self, lease_s: float, address: str = "") -> None:
        """``address``: its own, as in heartbeats."""
        self.alive = False
        """Whether the last heartbeat has been seen to change: its holder leads."""
        self._lease_s = lease_s
        self._address = address
        self._seen: LeaseSeen | None = None
        self._since_s = 0.0  # when that was first known
        self._dead = 0

    def leader_died(self, epoch: int) -> None:
        """Who has this epoch is dead, for sure: its lease is not waited for."""
        self._dead = epoch

    def free(self, seen: LeaseSeen, began_s: float, read_s: float) -> bool:
        """Whether the next epoch may be taken, by a read that began and ended then."""
        beat = seen.beat
        if seen != self._seen:
            self.alive = self._seen is not None and beat is not None and not beat.released
            self._seen, self._since_s = seen, read_s
        if not seen.epoch or seen.epoch == self._dead:
            return True
        # Who gave it up for want of workers leaves it to the others for that time.
        if beat is not None and beat.released and not (beat.deserted and beat.address == self._address):
            return True
        # By when it began: if this process was paused since, another heartbeat may be there by now.
        return began_s - self._since_s >= self._lease_s


class Tenure:
    """How long its holder may lead. All instants are of its own monotonic clock, in s."""

    def __init__(self, lease_s: float, began_s: float) -> None:
        """``began_s``: before the epoch was taken."""
        self._for_s = TENURE * lease_s
        self._began_s = began_s

    def renewed(self, began_s: float, now_s: float) -> None:
        """A heartbeat that began to be written then is in the store; it counts unless it is late."""
        if self.left_s(now_s) > 0:
            self._began_s = began_s

    def left_s(self, now_s: float) -> float:
        """How much longer it may lead without another heartbeat; not above 0 if it may not."""
        return self._began_s + self._for_s - now_s


ALONE_MAX_S: Final = 10.0
"""A leader without any worker gives the lease up after the lease's time, or after this if it is less."""
REIGN_S: Final = 5.0
"""So long a leader keeps it in any case; twice as long after each one in a row that had it in vain."""


class Desertion:
    """When a leader gives the lease up because no worker is connected: another controller may reach them.

    That is so only where workers are known: they have joined it, or one that led before it (``last`` is what
    that one said). All instants are of its own monotonic clock, in s.
    """

    def __init__(self, lease_s: float, began_s: float, last: LeaseBeat | None) -> None:
        self.workers_known = last is not None and last.workers
        self.in_vain = 0 if last is None else last.in_vain
        self._joined = False
        self._alone_s = min(lease_s, ALONE_MAX_S)
        self._began_s = self._since_s = began_s

    def gives_up(self, workers: int, now_s: float) -> bool:
        """Whether to give it up, with so many workers connected."""
        if workers:
            self.workers_known = self._joined = True
            self.in_vain, self._since_s = 0, now_s
        alone_s, led_s = now_s - self._since_s, now_s - self._began_s
        enough = alone_s >= self._alone_s and led_s >= REIGN_S * 2**self.in_vain
        return self.workers_known and enough

    def last_words(self, address: str) -> LeaseBeat:
        """What it says as it gives the lease up."""
        return LeaseBeat(
            count=0, address=address, released=True, workers=True, deserted=True,
            in_vain=0 if self._joined else self.in_vain + 1,
        )  # fmt: skip


def fingerprints(path: str) -> frozenset[str]:
    """Of the certificates in a PEM file: the beginning of each, as ``openssl x509 -fingerprint -sha256``.

    Raises OSError, or ValueError if it cannot be read as such.
    """
    found = _CERTIFICATE.findall(Path(path).read_text(encoding="ascii"))
    digests = [hashlib.sha256(ssl.PEM_cert_to_DER_cert(each)).digest() for each in found]
    return frozenset(each[:_SHOWN_BYTES].hex(":").upper() for each in digests)


class StoreLease:
    """The :class:`Lease` of that name in a shared store, for controllers on hosts that reach it.

    ``address`` is where other machines join this controller, for those that stand by. ``authorities`` has the
    fingerprints of those whose certificates they have: a controller of other ones belongs to another server.
    They may be renewed; it raises OSError or ValueError where they cannot be read now.
    """

    def __init__(
        self, files: LeaseDocuments, name: str, lease_s: float, address: str = "",
        authorities: Callable[[], frozenset[str]] = frozenset,
    ) -> None:  # fmt: skip
        self.lost = asyncio.Event()
        self.lease_s = lease_s
        self.leader = 0, ""  # epoch and address of who leads, as last read by one who stands by
        self._files = files
        self._folder = f"leases/{name}"
        self._address = address
        self._read_authorities = authorities
        self._authorities = frozenset[str]()  # all that it has had: others may have renewed theirs earlier
        self._watch = LeaseWatch(lease_s, address)
        self._look_now = asyncio.Event()
        self._epoch = 0  # where it is held
        self._desertion = Desertion(lease_s, 0.0, None)
        self._deserted = False
        self._writing = threading.Lock()
        self._keeping: asyncio.Task[None] | None = None
        self._said = ""
        self._told = self.leader  # the leader that was logged

    async def check(self) -> None:
        """Raise :class:`ConfigError` if it can never be had: not written, or another server leads by it.

        For a start. A store that does not answer is no reason: it is tried again by :meth:`acquire`.
        """
        try:
            await asyncio.wait_for(_in_thread(self._try_to_write), CHECK_S)
            while True:
                began_s = time.monotonic()
                seen = await asyncio.wait_for(_in_thread(self._read), CHECK_S)
                free = self._watch.free(seen, began_s, time.monotonic())
                self._refuse_foreign(seen)
                if free or not self._is_foreign(seen.beat):
                    return
                await asyncio.sleep(self.lease_s / READS)
        except ConfigError:
            raise
        except Exception as error:  # noqa: BLE001 - libraries of fsspec raise what they like
            if getattr(error, "errno", None) in FORBIDDEN or isinstance(error, PermissionError):
                raise _not_written(error) from None
            self._complain(error)

    async def acquire(self) -> int:
        """As :meth:`Lease.acquire`. While the store fails, it is tried again."""
        while True:
            try:
                began_s = time.monotonic()
                seen = await asyncio.wait_for(_in_thread(self._read), self.lease_s)  # it may never answer
                free = self._watch.free(seen, began_s, time.monotonic())
                self._note_leader(seen)
                self._refuse_foreign(seen)
                if free and await self._take(seen):
                    return seen.epoch + 1
            except ConfigError:
                raise
            except PermissionError as error:
                raise _not_written(error) from None
            except Exception as error:  # noqa: BLE001 - libraries of fsspec raise what they like
                self._complain(error)
            with suppress(TimeoutError):
                await asyncio.wait_for(self._look_now.wait(), self.lease_s / READS)
            self._look_now.clear()

    def leader_died(self, epoch: int) -> None:
        """See :meth:`LeaseWatch.leader_died`."""
        self._watch.leader_died(epoch)
        self._look_now.set()

    def release(self) -> None:
        """As :meth:`Lease.release`; has no effect where it is not held."""
        if self._keeping is not None:
            self._keeping.cancel()
            self._keeping = None
        epoch, self._epoch = self._epoch, 0
        if epoch and not self.lost.is_set():
            work = partial(self._say_released, epoch, self._last_words())
            last = threading.Thread(target=work, name="lease", daemon=True)
            last.start()
            last.join(LAST_WORDS_S)

    def deserted(self, workers: int) -> bool:
        """Whether its holder is to give it up, for want of workers: so many are connected.

        To be called again and again while it is held.
        """
        self._deserted = self._desertion.gives_up(workers, time.monotonic())
        return self._deserted

    def _last_words(self) -> LeaseBeat:
        desertion = self._desertion
        if self._deserted:
            return desertion.last_words(self._address)
        known, in_vain = desertion.workers_known, desertion.in_vain
        return LeaseBeat(count=0, released=True, workers=known, in_vain=in_vain)

    def _note_leader(self, seen: LeaseSeen) -> None:
        """Note who leads, and log it once that has been seen to lead."""
        beat = seen.beat
        self.leader = seen.epoch, "" if beat is None or beat.released else beat.address
        if self._watch.alive and self.leader != self._told and self.leader[1]:
            self._told = self.leader
            _log.info("stands by: the controller at %s leads, with epoch %d", self.leader[1], seen.epoch)

    def _is_foreign(self, beat: LeaseBeat | None) -> bool:
        """Whether that of another server wrote it; an earlier version does not say."""
        if beat is None or not beat.authorities or not self._authorities:
            return False
        return self._authorities.isdisjoint(beat.authorities)

    def _refuse_foreign(self, seen: LeaseSeen) -> None:
        """Raise :class:`ConfigError` if a controller of another server leads."""
        beat = seen.beat
        if beat is not None and self._watch.alive and self._is_foreign(beat):
            raise ConfigError(
                f"lease: expected {self._folder} to be of this server alone, whose cluster_ca has the "
                f"fingerprint {_named(self._authorities)}; found that the controller at "
                f"{beat.address or 'an unknown address'} leads by it, whose cluster_ca has "
                f"{_named(beat.authorities)}; give each server a lease of its own (--lease NAME), and all "
                "controllers of one server the same cluster_ca"
            )

    async def _take(self, seen: LeaseSeen) -> bool:
        """Take the next epoch, unless another one was first."""
        began_s, epoch = time.monotonic(), seen.epoch + 1
        if self._is_foreign(seen.beat):
            _log.warning("the lease was last held by a controller of another server; its time is over")
        place, own = f"{self._folder}/{epoch:09}.epoch", uuid.uuid4().hex.encode()
        try:
            await _in_thread(partial(self._files.put, place, own, lambda: None, new=True, lasts=False))
        except FileExistsError:
            return False
        tenure = Tenure(self.lease_s, began_s)
        self._epoch, self._desertion = epoch, Desertion(self.lease_s, began_s, seen.beat)
        if tenure.left_s(time.monotonic()) <= 0:
            await _in_thread(partial(self._say_released, epoch, self._last_words()))
            return False  # others may have waited in vain for a heartbeat: the next one is tried
        self._keeping = asyncio.create_task(self._keep(epoch, tenure))
        # It has to last, for ids begin by it. Heartbeats go on meanwhile: a busy disk may take its time.
        try:
            await _in_thread(partial(self._files.persist, place))
        except Exception:
            self.release()
            raise
        return True

    async def _keep(self, epoch: int, tenure: Tenure) -> None:
        """Write heartbeats, until the lease is lost."""
        for count in itertools.count(1):
            began_s = time.monotonic()
            renewing = asyncio.ensure_future(_in_thread(partial(self._renew, epoch, count)))
            await asyncio.wait((renewing,), timeout=max(0.0, tenure.left_s(began_s)))
            if not renewing.done():
                renewing.cancel()
            elif (error := renewing.exception()) is not None:
                self._complain(error)
            elif (newest := renewing.result()) > epoch:
                _log.error("another controller has taken the lead, with epoch %d", newest)
                break
            else:
                tenure.renewed(began_s, time.monotonic())
                self._said = ""
            left_s = tenure.left_s(time.monotonic())
            if left_s <= 0:
                _log.error(
                    "the store took no heartbeat for %.1f s: see that it has room and can be written, or set "
                    "a longer lease_s where it is slow", TENURE * self.lease_s,
                )  # fmt: skip
                break
            await asyncio.sleep(min(left_s, self.lease_s / BEATS))
        self.lost.set()

    def _renew(self, epoch: int, count: int) -> int:
        """Write a heartbeat; returns the highest epoch. For any thread, as the others below."""
        self._renew_authorities()
        beat = LeaseBeat(
            count=count, address=self._address, authorities=tuple(sorted(self._authorities)),
            workers=self._desertion.workers_known, in_vain=self._desertion.in_vain,
        )  # fmt: skip
        with self._writing:
            if self._epoch == epoch:  # not released meanwhile
                self._write(epoch, beat)
        return self._newest()

    def _renew_authorities(self) -> None:
        with suppress(OSError, ValueError):  # it is being replaced: the next time will do
            self._authorities |= self._read_authorities()

    def _try_to_write(self) -> None:
        """As an epoch is written, and as a heartbeat is. Raises whatever the store does."""
        place, put = f"{self._folder}/writable", self._files.put
        with suppress(FileExistsError):
            put(place, uuid.uuid4().hex.encode(), lambda: None, new=True, lasts=False)
        put(place, uuid.uuid4().hex.encode(), lambda: None)

    def _say_released(self, epoch: int, beat: LeaseBeat) -> None:
        with self._writing:
            self._write(epoch, beat)

    def _write(self, epoch: int, beat: LeaseBeat) -> None:
        place, content = f"{self._folder}/{epoch:09}.beat", msgspec.json.encode(beat)
        # Not for ever, as an epoch is: where many write, a disk takes longer than a tenure for that.
        self._files.put(place, content, lambda: None, lasts=False)

    def _read(self) -> LeaseSeen:
        self._renew_authorities()
        epoch = self._newest()
        try:
            content = self._files.read(f"{self._folder}/{epoch:09}.beat")
            return LeaseSeen(epoch, msgspec.json.decode(content, type=LeaseBeat))
        except (FileNotFoundError, ValueError, msgspec.MsgspecError):
            return LeaseSeen(epoch, None)  # not written yet, or of no use: it does not change

    def _newest(self) -> int:
        found = [match[1] for name in self._files.names(self._folder) if (match := _EPOCH.fullmatch(name))]
        return max(map(int, found), default=0)

    def _complain(self, error: BaseException) -> None:
        """Log an error, unless it was the last one, too; temporary files have another name each time."""
        kind = f"{error.errno}" if isinstance(error, OSError) and error.errno else described(error)
        if kind != self._said:
            self._said = kind
            _log.warning(
                "lease: the store fails: %s; nobody can lead while it cannot be written: give it room, the "
                "right to write, and the network to it", described(error),
            )  # fmt: skip


def _not_written(error: Exception) -> ConfigError:
    return ConfigError(
        "store: expected one that this process may write, where a file is created only if it is absent (a "
        f"folder, or s3://), for the lease; found {described(error)}; give it the right, or name another one"
    )


def _named(authorities: Iterable[str]) -> str:
    return ", ".join(sorted(authorities))

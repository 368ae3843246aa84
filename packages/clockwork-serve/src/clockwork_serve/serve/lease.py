"""Who leads: a lease that one controller holds at a time, and the epoch that it gives its holder.

Leases only make progress: they see to it that somebody leads and, as a rule, nobody else. That no two
controllers are obeyed is due to epochs alone (``fence``). So a lease may be a lock on one host, as here, or
an entry with a time to live in a store that many hosts see.
"""

from __future__ import annotations

import asyncio
import fcntl
import os
import re
import threading
import zlib
from contextlib import suppress
from pathlib import Path
from typing import Final, Protocol

from clockwork_serve.errors import ConfigError


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


# ------------------------------------------------------------
# A lock on a file, for the controllers of one host: the kernel frees it when its holder ends in any way.
#
# The file holds the last epoch. Its holder adds one, and has that on the disk, before it leads. A file that
# is gone or damaged is never taken for a new one, for then two controllers would have the same epoch; so it
# is made with the run directory, and by no controller.


LEASE_NAME: Final = "controller.lease"
"""The file in the run directory."""
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
                await _locked(fd)
            self._fd = fd
            epoch = _last_epoch(fd) + 1
            os.pwrite(fd, _written(epoch), 0)
            os.fsync(fd)
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


async def _locked(fd: int) -> None:
    """Wait for the lock without a try in between; if it comes when nobody waits any more, it is given up.

    In a thread of its own, which does not keep the process alive.
    """
    loop = asyncio.get_running_loop()
    locked: asyncio.Future[OSError | None] = loop.create_future()

    def tell(error: OSError | None) -> None:
        if locked.cancelled():
            os.close(fd)
        else:
            locked.set_result(error)

    def wait() -> None:
        error = None
        try:
            fcntl.flock(fd, fcntl.LOCK_EX)
        except OSError as raised:
            error = raised
        with suppress(RuntimeError):  # the loop is closed, and the process about to end
            loop.call_soon_threadsafe(tell, error)

    threading.Thread(target=wait, name="lease", daemon=True).start()
    if (error := await locked) is not None:
        raise error

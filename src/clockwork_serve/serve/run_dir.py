"""The private folder of one server's sockets. Those of servers that were killed are found and removed.

A folder's owner holds a lock on a file in it, which the kernel lets go when that process dies.
"""

from __future__ import annotations

import fcntl
import logging
import os
import shutil
import tempfile
from pathlib import Path
from typing import Final

from clockwork_serve.errors import ConfigError, TransportError
from clockwork_serve.serve.transport import SOCKET_NAME, check_path

PREFIX: Final = "clockwork-"
LOCK: Final = "keeper.lock"
_log = logging.getLogger(__name__)


class RunDir:
    """A new folder of mode 0700 in ``parent`` (empty: where such folders belong), until it is closed."""

    def __init__(self, parent: str) -> None:
        """Raises :class:`ConfigError` if it cannot be made."""
        base = Path(parent or os.environ.get("XDG_RUNTIME_DIR") or tempfile.gettempdir())
        remove_orphans(base)
        try:
            self.path = Path(tempfile.mkdtemp(prefix=PREFIX, dir=base))
            self._lock = _locked(self.path)
        except OSError as error:
            raise ConfigError(
                f"run_dir: expected a folder that can be written; found {base} ({error.strerror}); "
                "set XDG_RUNTIME_DIR or TMPDIR to another one"
            ) from None
        try:
            check_path(self.path / SOCKET_NAME)
        except TransportError as error:
            self.close()
            raise ConfigError(f"run_dir: {error}") from None

    def close(self) -> None:
        """Remove it with all that is in it. May be called again."""
        shutil.rmtree(self.path, ignore_errors=True)
        lock, self._lock = self._lock, -1
        if lock >= 0:
            os.close(lock)


def remove_orphans(base: Path) -> None:
    """Remove our folders in ``base`` whose owners are dead."""
    try:
        found = [entry for entry in os.scandir(base) if entry.name.startswith(PREFIX)]
    except OSError:
        return  # whoever makes a folder there will say so
    for entry in found:
        try:
            if entry.is_dir(follow_symlinks=False) and _is_orphan(Path(entry.path)):
                shutil.rmtree(entry.path)
                _log.info("removed what a killed server left: %s", entry.path)
        except OSError as error:
            _log.debug("%s stays: %s", entry.path, error)


def _locked(folder: Path) -> int:
    """A lock on a new folder; it has its name only once it is held, so nobody takes it for an orphan's."""
    path = folder / f"{LOCK}.new"
    lock = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        path.rename(folder / LOCK)
    except OSError:
        os.close(lock)
        raise
    return lock


def _is_orphan(folder: Path) -> bool:
    """Whether a folder is ours and nobody holds its lock."""
    if folder.lstat().st_uid != os.geteuid():
        return False
    try:
        lock = os.open(folder / LOCK, os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC)
    except FileNotFoundError:
        return False
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    finally:
        os.close(lock)
    return True

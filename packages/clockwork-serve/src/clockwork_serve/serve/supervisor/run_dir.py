"""The private folder of one server's sockets, and the TCP ports that are held for its gateways."""

from __future__ import annotations

import errno
import fcntl
import logging
import os
import shutil
import socket
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Final

from clockwork_serve.errors import ConfigError, TransportError, encodable, printable
from clockwork_serve.serve.lease import create_lease
from clockwork_serve.serve.supervisor.processes import reachable
from clockwork_serve.serve.transport import SOCKET_NAME, check_path

# ------------------------------------------------------------
# The private folder of one server's sockets. Folders that killed servers left behind are removed.
#
# A folder's owner holds a lock on a file in it, which the kernel releases when that process dies.


PREFIX: Final = "clockwork-"
LOCK: Final = "supervisor.lock"
_log = logging.getLogger(__name__)


MEMORY: Final = "/dev/shm"  # noqa: S108 - others can write there too, but not enter a folder of ours
"""Where such a folder can be if all file systems are read-only."""


class RunDir:
    """A new folder of mode 0700, until it is closed.

    It is in ``parent``, or, if that is empty, in the first of XDG_RUNTIME_DIR, the temporary folder and
    ``/dev/shm`` that can be written.
    """

    def __init__(self, parent: str) -> None:
        """Raises :class:`ConfigError` if it cannot be made."""
        refused = []
        for base in (parent,) if parent else _usual_parents():
            if encodable(base) != base:  # as a process's argument it could not be told
                refused.append(f"{printable(base)} (no UTF-8)")
                continue
            remove_orphans(Path(base))
            try:
                self.path = Path(tempfile.mkdtemp(prefix=PREFIX, dir=base))
                self._lock = _locked(self.path)
                create_lease(self.path)
                break
            except OSError as error:
                refused.append(f"{base} ({error.strerror})")
        else:
            raise ConfigError(
                f"run_dir: expected a folder that can be written; found {', '.join(refused)}; "
                "set XDG_RUNTIME_DIR or TMPDIR to another one"
            )
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


def _usual_parents() -> list[str]:
    try:
        temporary = [tempfile.gettempdir()]
    except FileNotFoundError:  # it tried several
        temporary = []
    return [*filter(None, [os.environ.get("XDG_RUNTIME_DIR")]), *temporary, MEMORY]


def remove_orphans(base: Path) -> None:
    """Remove our folders in ``base`` whose owners are dead."""
    try:
        found = [entry for entry in os.scandir(base) if entry.name.startswith(PREFIX)]
    except OSError:
        return  # making a folder there will raise the error
    for entry in found:
        try:
            if entry.is_dir(follow_symlinks=False) and _is_orphan(Path(entry.path)):
                shutil.rmtree(entry.path)
                _log.info("removed what a killed server left: %s", entry.path)
        except OSError as error:
            _log.debug("%s stays: %s", entry.path, error)


def _locked(folder: Path) -> int:
    """Lock a new folder. The file is renamed once it is locked, so that the folder never looks orphaned."""
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
    """Whether a folder belongs to this user and no process holds its lock."""
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


# ------------------------------------------------------------
# TCP ports for the gateways: chosen or checked, and held by sockets that are bound but do not listen.


def addresses(host: str, number_by_name: Mapping[str, int], *, tls: bool) -> dict[str, str]:
    """The addresses of ``http``, ``grpc`` and ``metrics`` for clients on this host; empty where one is off.

    Each is ``host:port``, with a scheme where it is HTTP.
    """
    reached = reachable(host)
    reached = f"[{reached}]" if ":" in reached else reached
    at = {name: f"{reached}:{number}" for name, number in number_by_name.items()}
    scheme = "https" if tls else "http"
    metrics = at.get("metrics_port")
    return {
        "http": f"{scheme}://{at['http_port']}" if "http_port" in at else "",
        "grpc": at.get("grpc_port", ""),
        "metrics": f"{scheme}://{metrics}/metrics" if metrics else "",
    }


class Ports:
    """Ports held for our gateways, which bind them as well (all sockets allow that to one user's processes).

    ``wanted`` maps the setting's name to its port: 0 to have one chosen, None for off.
    """

    def __init__(self, host: str, wanted: dict[str, int | None]) -> None:
        """Raises :class:`ConfigError` naming the setting if a port is in use or not allowed."""
        self.host = host
        self.number_by_name: dict[str, int] = {}
        self._held: list[socket.socket] = []
        try:
            for name, port in wanted.items():
                if port is not None:
                    self.number_by_name[name] = self._hold(name, port)
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Release all ports."""
        for held in self._held:
            held.close()
        self._held.clear()

    def _hold(self, name: str, port: int) -> int:
        try:
            # First without SO_REUSEPORT, which fails if another server has the port: else both would share
            # it unnoticed.
            if port:
                self._bind(port, shared=False).close()
            held = self._bind(port, shared=True)
        except OSError as error:
            raise ConfigError(_refusal(name, self.host, port, error)) from None
        self._held.append(held)
        number: int = held.getsockname()[1]
        return number

    def _bind(self, port: int, *, shared: bool) -> socket.socket:
        family, kind, protocol, _, address = socket.getaddrinfo(
            self.host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        bound = socket.socket(family, kind, protocol)
        try:
            # Connections of a server that has just ended may still be in TIME_WAIT.
            bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            if shared:
                bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
            bound.bind(address)
        except OSError:
            bound.close()
            raise
        return bound


def _refusal(name: str, host: str, port: int, error: OSError) -> str:
    flag = "--" + name.replace("_", "-")
    if error.errno == errno.EADDRINUSE:
        return (
            f"{name}: expected a free port; found {port} on {host} taken by another program; "
            f"stop that one, or choose another port with {flag} (0 lets the system choose)"
        )
    if error.errno in (errno.EACCES, errno.EPERM):
        return f"{name}: port {port} needs privileges ({error.strerror}); choose one above 1023 with {flag}"
    return f"{name}: cannot listen on {host}, port {port}: {error.strerror or error}; see --host and {flag}"

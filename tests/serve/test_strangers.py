"""Sockets between our processes are for one user: others are refused by their mode, and by credentials."""

from __future__ import annotations

import errno
import os
import socket
import stat
from contextlib import closing
from pathlib import Path

import pytest
import uvloop

from clockwork_serve.errors import TransportError
from clockwork_serve.messages import Frame, Role
from clockwork_serve.serve.supervisor.run_dir import RunDir
from clockwork_serve.serve.transport import Link, connect, hello
from tests.serve.links import Side, until

NOBODY = 65_534
pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="only root can try as another user")


def as_nobody(path: Path) -> int:
    """A process of another user that connects; it exits with an errno, or 100 plus the bytes received."""
    pid = os.fork()
    if not pid:
        try:
            os.setgroups([])
            os.setgid(NOBODY)
            os.setuid(NOBODY)
            with socket.socket(socket.AF_UNIX) as stranger:
                stranger.settimeout(10)
                stranger.connect(os.fspath(path))
                stranger.send(b"\x05\0\0\0hello")
                told = len(stranger.recv(4096))
            os._exit(100 + told)
        except OSError as error:
            turned_away = error.errno in (errno.ECONNRESET, errno.EPIPE)  # EPIPE: before it had spoken
            os._exit(100 if turned_away else min(error.errno or 99, 99))
        finally:
            os._exit(98)
    return pid


def result(pid: int) -> int:
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def open_folder(tmp_path: Path) -> Path:
    """A folder that every user may enter, on the way to it too."""
    folder = Path("/tmp") / f"clockwork-{os.getpid()}-{tmp_path.name[-8:]}"
    folder.mkdir(mode=0o755)
    return folder


def refused(tmp_path: Path, mode: int) -> tuple[int, list[list[Frame]]]:
    """What another user gets from a socket of that mode in an open folder, and what our side received."""
    folder = open_folder(tmp_path)
    path, side = folder / "c.sock", Side()
    found: list[int] = []

    async def main() -> None:
        listener = await side.listen(path)
        path.chmod(mode)
        pid = as_nobody(path)

        def ended() -> bool:
            done, status = os.waitpid(pid, os.WNOHANG)
            if done:
                found.append(os.waitstatus_to_exitcode(status))
            return bool(done)

        await until(ended)
        listener.close()

    try:
        uvloop.run(main())
    finally:
        for each in folder.iterdir():
            each.unlink()
        folder.rmdir()
    return found[0], side.reads


def test_another_user_cannot_connect(tmp_path: Path) -> None:
    assert refused(tmp_path, 0o600) == (13, [])


def test_another_user_that_connects_is_refused_unread(tmp_path: Path) -> None:
    """Its mode was changed: the peer's credentials are checked all the same, and nothing is sent to it."""
    assert refused(tmp_path, 0o666) == (100, [])


def test_our_processes_refuse_a_socket_of_another_user(tmp_path: Path) -> None:
    folder = open_folder(tmp_path)
    folder.chmod(0o777)
    path = folder / "c.sock"
    ready, told = os.pipe()
    pid = os.fork()
    if not pid:
        os.setgroups([])
        os.setgid(NOBODY)
        os.setuid(NOBODY)
        with socket.socket(socket.AF_UNIX) as stranger:
            stranger.bind(os.fspath(path))
            stranger.listen()
            os.write(told, b"x")
            with stranger.accept()[0] as accepted:
                accepted.settimeout(10)
                os._exit(len(accepted.recv(4096)))
    os.read(ready, 1)

    async def main() -> None:
        def nothing(link: Link, *more: object) -> None:
            raise AssertionError

        with pytest.raises(TransportError, match="user"):
            await connect(path, hello(Role.WORKER, "w"), nothing, nothing)

    try:
        uvloop.run(main())
        assert result(pid) == 0
    finally:
        os.close(ready)
        os.close(told)
        path.unlink()
        folder.rmdir()


def test_the_folder_of_sockets_is_closed_to_others(tmp_path: Path) -> None:
    with closing(RunDir(str(tmp_path))) as folder:
        assert stat.S_IMODE(folder.path.stat().st_mode) == 0o700

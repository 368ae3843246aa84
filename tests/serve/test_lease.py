"""The lease of one host: one holder at a time, each with a larger epoch, whatever ends the one before."""

from __future__ import annotations

import asyncio
import signal
import stat
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from clockwork_serve.errors import ConfigError
from clockwork_serve.serve.lease import LEASE_NAME, FileLease, create_lease

HOLDER = """
import asyncio, sys
from pathlib import Path
from clockwork_serve.serve.lease import FileLease

async def main():
    lease = FileLease(Path(sys.argv[1]))
    print(await lease.acquire(), flush=True)
    await asyncio.sleep(60)

asyncio.run(main())
"""


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    create_lease(tmp_path)
    return tmp_path


@contextmanager
def holding(run_dir: Path) -> Iterator[subprocess.Popen[str]]:
    """Another process that holds the lease."""
    command = [sys.executable, "-c", HOLDER, str(run_dir)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "1\n"
        yield holder


async def test_each_holder_has_the_next_epoch(run_dir: Path) -> None:
    for epoch in range(1, 13):
        lease = FileLease(run_dir)
        assert await lease.acquire() == epoch
        assert not lease.lost.is_set()
        lease.release()
        lease.release()


def test_the_file_is_private_and_made_once(run_dir: Path) -> None:
    path = run_dir / LEASE_NAME
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    before = path.read_bytes()
    with pytest.raises(FileExistsError):
        create_lease(run_dir)
    assert path.read_bytes() == before


async def test_others_wait_until_it_is_released_and_then_one_of_them_has_it(run_dir: Path) -> None:
    first, others = FileLease(run_dir), [FileLease(run_dir) for _ in range(3)]
    assert await first.acquire() == 1
    waiting = {asyncio.ensure_future(other.acquire()): other for other in others}
    for epoch in (2, 3, 4):
        done, _ = await asyncio.wait(waiting, timeout=0.05)
        assert not done
        first.release()
        done, _ = await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
        (had,) = done
        assert had.result() == epoch
        first = waiting.pop(had)
    first.release()


async def test_who_stopped_waiting_does_not_keep_it(run_dir: Path) -> None:
    first, second, third = (FileLease(run_dir) for _ in range(3))
    await first.acquire()
    given_up = asyncio.ensure_future(second.acquire())
    await asyncio.sleep(0.05)
    given_up.cancel()
    await asyncio.wait({given_up})
    first.release()
    assert await third.acquire() == 2
    third.release()


async def test_a_holder_that_is_killed_frees_it_at_once(run_dir: Path) -> None:
    with holding(run_dir) as holder:
        lease = FileLease(run_dir)
        waiting = asyncio.ensure_future(lease.acquire())
        await asyncio.sleep(0.05)
        assert not waiting.done()
        holder.send_signal(signal.SIGSTOP)
        await asyncio.sleep(0.05)
        assert not waiting.done(), "who is stopped may go on"
        holder.kill()
        assert await waiting == 2
        lease.release()


@pytest.mark.parametrize(
    "content",
    [
        b"", b"\0" * 40, b"epoch 0", b"epoch 00000000000000000007 00000000\n", b"7\n",
        b"epoch 00000000000000000000 fffffff\n", b"epoch %s" % (b"9" * 300),
    ],
)  # fmt: skip
async def test_a_damaged_file_is_an_error_and_stays_as_it_is(run_dir: Path, content: bytes) -> None:
    path = run_dir / LEASE_NAME
    path.write_bytes(content)
    lease = FileLease(run_dir)
    for _ in range(2):  # it is not held by who could not read it
        with pytest.raises(ConfigError, match=r"lease: expected the epoch .*; found .*; stop the server"):
            await lease.acquire()
    assert path.read_bytes() == content


async def test_a_file_that_is_gone_or_none_is_an_error(tmp_path: Path) -> None:
    path = tmp_path / LEASE_NAME
    for found, make in (
        ("No such file", lambda: None),
        ("Too many levels of symbolic links", lambda: path.symlink_to(tmp_path / "other")),
        ("Is a directory", lambda: (path.unlink(), path.mkdir())),
    ):
        make()
        with pytest.raises(ConfigError, match=f"lease: .*{LEASE_NAME}; found {found}"):
            await FileLease(tmp_path).acquire()


async def test_an_interrupted_write_leaves_an_epoch_or_an_error(run_dir: Path) -> None:
    """Whatever part of the next content was written: never an epoch that was there before."""
    path = run_dir / LEASE_NAME
    before = path.read_bytes()

    async def epoch() -> int:
        lease = FileLease(run_dir)
        try:
            return await lease.acquire()
        except ConfigError:
            return -1
        finally:
            lease.release()

    assert await epoch() == 1
    after = path.read_bytes()
    assert len(after) == len(before)
    found = set()
    for cut in range(len(after) + 1):
        path.write_bytes(after[:cut] + before[cut:])
        found.add(await epoch())
    assert found == {1, -1, 2}

"""Hosts of a server that runs on several: network namespaces, certificates, and what runs on each."""

from __future__ import annotations

import itertools
import json
import os
import select
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import trustme

from clockwork_serve.config import CLUSTER_NAME
from harness.process_tree import descendants

LOOPBACK: Final = "the loopback"
_MADE: Final = itertools.count()
"""How often networks were made: what the kernel has still to remove keeps its name."""
NOBODY: Final = "02:00:00:00:00:01"  # a network card that is not there
START_S: Final = 120.0
STOP_S: Final = 30.0


@dataclass(frozen=True)
class Host:
    """A machine: its address, what stands before a command that is to run there, and its cable's near end."""

    address: str
    before: tuple[str, ...] = ()
    cable: str = ""

    def pull(self) -> None:
        """Pull its cable, if it has one."""
        if self.cable:
            ip("link", "set", self.cable, "down")

    def put_back(self) -> None:
        """Put the cable back."""
        if self.cable:
            ip("link", "set", self.cable, "up")

    def lose_way_to(self, other: Host) -> None:
        """Have nothing that it sends to the other one arrive; it still hears that one. Needs a cable."""
        entry = (other.address, "lladdr", NOBODY, "dev", "eth0", "nud", "permanent")
        ip("-n", self.before[-1], "neigh", "replace", *entry)

    def find_way_to(self, other: Host) -> None:
        """Undo that."""
        ip("-n", self.before[-1], "neigh", "del", other.address, "dev", "eth0")


def ip(*words: str) -> None:
    """Change networks. CalledProcessError if that is not permitted."""
    subprocess.run([shutil.which("ip") or "ip", *words], check=True, capture_output=True)


@contextmanager
def hosts(count: int) -> Iterator[tuple[Host, list[Host], str]]:
    """This host, ``count`` others on a switch with it, and what they are in truth."""
    with ExitStack() as stack:
        pid, made = os.getpid(), next(_MADE) % 10
        switch, net = f"cwb{pid % 10_000}s{made}", f"10.{178 + pid % 40}.{(pid + made) % 250}"
        try:
            ip("link", "add", switch, "type", "bridge")
            stack.callback(_quietly, "link", "del", switch)
            ip("addr", "add", f"{net}.1/24", "dev", switch)
            ip("link", "set", switch, "up")
            found = []
            for number in range(2, 2 + count):
                name, near = f"{switch}n{number}", f"{switch}v{number}"
                ip("netns", "add", name)
                stack.callback(_quietly, "netns", "del", name)
                ip("link", "add", near, "type", "veth", "peer", "name", "eth0", "netns", name)
                ip("link", "set", near, "master", switch, "up")
                ip("-n", name, "addr", "add", f"{net}.{number}/24", "dev", "eth0")
                ip("-n", name, "link", "set", "eth0", "up")
                ip("-n", name, "link", "set", "lo", "up")
                found.append(Host(f"{net}.{number}", ("ip", "netns", "exec", name), near))
        except (OSError, subprocess.CalledProcessError):
            stack.close()
            yield Host("127.0.0.1"), [Host("127.0.0.1")] * count, LOOPBACK
        else:
            yield Host(f"{net}.1"), found, "network namespaces"


def _quietly(*words: str) -> None:
    with suppress(OSError, subprocess.CalledProcessError):
        ip(*words)


def certificates(folder: Path, count: int) -> list[dict[str, Any]]:
    """Settings of so many certificates of one authority, with the cluster's name."""
    authority, found = trustme.CA(), list[dict[str, Any]]()
    authority.cert_pem.write_to_path(folder / "ca.pem")
    for number in range(count):
        leaf = authority.issue_cert(CLUSTER_NAME)
        leaf.private_key_pem.write_to_path(folder / f"{number}.key")
        (folder / f"{number}.key").chmod(0o600)
        (folder / f"{number}.pem").write_bytes(b"".join(blob.bytes() for blob in leaf.cert_chain_pems))
        names = {"certificate": f"{number}.pem", "key": f"{number}.key", "ca": "ca.pem"}
        found.append({f"cluster_{name}": str(folder / file) for name, file in names.items()})
    return found


def words_of(settings: dict[str, Any]) -> list[str]:
    """Settings as words of a command line."""
    return [word for name, value in settings.items() for word in (f"--{name.replace('_', '-')}", str(value))]


class Machine:
    """A ``clockwork`` command on a host, and all processes that it started; ends with its block."""

    def __init__(self, host: Host, words: Sequence[str], log: Path) -> None:
        self.host, self._log = host, log
        with log.open("ab") as file:
            self.process = subprocess.Popen(
                [*host.before, sys.executable, "-m", "clockwork_serve", *words],
                stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=file, start_new_session=True,
            )  # fmt: skip

    @property
    def said(self) -> str:
        """What it logged."""
        return self._log.read_text(errors="replace")

    def facts(self) -> dict[str, Any]:
        """The line of JSON that it prints once it serves. RuntimeError if it does not."""
        assert self.process.stdout is not None
        if select.select([self.process.stdout], [], [], START_S)[0] and (
            line := self.process.stdout.readline()
        ):
            found: dict[str, Any] = json.loads(line)
            return found
        raise RuntimeError(f"it did not start:\n{self.said[-2000:]}")

    def pids(self) -> list[int]:
        """All its processes."""
        return list(descendants(self.process.pid))

    def signal(self, number: int, pids: Sequence[int] = ()) -> None:
        """Send all its processes a signal; ``pids`` are those, where it is to be done at once."""
        for pid in pids or self.pids():
            with suppress(ProcessLookupError):
                os.kill(pid, number)

    def kill(self, pids: Sequence[int] = ()) -> None:
        """Kill all, as when its host loses power; but its kernel tells those who are connected."""
        self.signal(signal.SIGKILL, pids)
        self.process.wait(STOP_S)

    def close(self) -> None:
        """End it as an operator would, or kill it."""
        if self.process.poll() is None:
            self.signal(signal.SIGCONT)
            self.process.terminate()
            try:
                self.process.wait(STOP_S)
            except subprocess.TimeoutExpired:
                self.kill()
        if self.process.stdout is not None:
            self.process.stdout.close()

"""A real etcd of several members on this machine, whose processes may be killed, paused and started again."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from clockwork_serve.store.etcd import EtcdDocuments
from harness.ports import free_port
from harness.serving import until

ETCD: Final = shutil.which("etcd")
ELECTION_MS: Final = 300
"""After so long without a leader etcd elects another one; by default it takes a second."""


@dataclass(slots=True)
class EtcdMember:
    """One process, its folder and its ports."""

    name: str
    folder: Path
    port: int
    peer_port: int
    process: subprocess.Popen[bytes] | None = None

    def start(self, peers: str, tls: tuple[str, ...] = ()) -> None:
        """Begin, or go on with what its folder holds."""
        assert ETCD is not None
        at = f"{'https' if tls else 'http'}://127.0.0.1:{self.port}"
        with (self.folder.parent / f"{self.name}.log").open("ab") as log:
            self.process = subprocess.Popen(
                [
                    ETCD, "--name", self.name, "--data-dir", str(self.folder), "--initial-cluster", peers,
                    "--listen-client-urls", at, "--advertise-client-urls", at,
                    "--listen-peer-urls", f"http://127.0.0.1:{self.peer_port}",
                    "--initial-advertise-peer-urls", f"http://127.0.0.1:{self.peer_port}",
                    "--heartbeat-interval", str(ELECTION_MS // 10), "--election-timeout", str(ELECTION_MS),
                    "--logger", "zap", "--log-level", "warn", *tls,
                ],
                stdin=subprocess.DEVNULL, stdout=log, stderr=log,
            )  # fmt: skip

    def send(self, number: signal.Signals) -> None:
        """A signal; returns when who is killed has ended, or who is stopped has stopped."""
        assert self.process is not None
        self.process.send_signal(number)
        if number is signal.SIGKILL:
            self.process.wait()
        elif number is signal.SIGSTOP:
            os.waitid(os.P_PID, self.process.pid, os.WSTOPPED | os.WNOWAIT)


@dataclass(slots=True)
class Etcd:
    """Several members, each with a folder below ``folder``; ``tls`` are options of each."""

    folder: Path
    members: list[EtcdMember] = field(default_factory=list)
    tls: tuple[str, ...] = ()

    @property
    def addresses(self) -> list[tuple[str, int]]:
        """Where clients ask."""
        return [("127.0.0.1", member.port) for member in self.members]

    def start(self, member: EtcdMember) -> None:
        """Begin, or begin again."""
        peers = ",".join(f"{each.name}=http://127.0.0.1:{each.peer_port}" for each in self.members)
        member.start(peers, self.tls)

    def documents(self, timeout_s: float = 1.0) -> EtcdDocuments:
        """A client of its own."""
        return EtcdDocuments(self.addresses, timeout_s)


@contextmanager
def etcd(folder: Path, members: int = 3, tls: tuple[str, ...] = ()) -> Iterator[Etcd]:
    """One that answers, until the end of the block."""
    found = Etcd(folder, tls=tls)
    for number in range(members):
        made = EtcdMember(f"etcd-{number}", folder / f"etcd-{number}", free_port(), free_port())
        found.members.append(made)
    try:
        for member in found.members:
            found.start(member)
        until("etcd answers", lambda: _answers(found))
        yield found
    finally:
        for member in found.members:
            if member.process is not None:
                member.process.kill()
                member.process.wait()


def _answers(found: Etcd) -> bool:
    try:
        found.documents().put("asked", b"", lambda: None)
    except OSError:
        return False
    return True

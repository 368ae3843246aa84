"""Who leads by a lease in a real etcd, while its members and those who lead are killed, paused, out of disk.

    python -m qa.etcd [--minutes 10] [--short] [--seed 1] [--json FILE]

Three contenders, each a process, take the lease in turns from an etcd of three members. No epoch may be had
twice, and nobody may believe to lead while another one does, unless it was paused itself: then epochs alone
protect, and who led is deposed once it goes on. While most members of etcd answer, somebody leads soon.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import random
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Final

from clockwork_serve.serve.lease import StoreLease
from clockwork_serve.store.etcd import EtcdDocuments
from clockwork_serve.units import MIB, NS_PER_S
from harness.etcd import ETCD, Etcd, EtcdMember, etcd
from harness.report import Outcome, finish, parser

LEASE_S: Final = 2.0
CONTENDERS: Final = 3
HELD_S: Final = (2.0, 8.0)
CALM_S: Final = 3.0
"""Between one fault's end and the next one's begin."""
SOON_S: Final = 2 * LEASE_S + 1.0
"""Without a leader, while most members of etcd answer: the lease runs out, and a client finds who answers."""
DISK_BYTES: Final = 192 * MIB
"""etcd takes 64 MiB for each file of its log."""
FAULTS: Final = (
    "member killed", "member paused", "two members killed", "two members paused", "disk full",
    "leader killed", "leader paused",
)  # fmt: skip


# ------------------------------------------------------------ a contender


async def contend(members: list[tuple[str, int]], seed: int) -> None:
    """Take the lease, hold it for a while, give it back, and say so; for ever."""
    rng = random.Random(seed)
    while True:
        lease = StoreLease(EtcdDocuments(members, LEASE_S / 5), "qa", LEASE_S)
        epoch = await lease.acquire()
        _say("leads", epoch)
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(lease.lost.wait(), rng.uniform(*HELD_S))
        _say("lost" if lease.lost.is_set() else "gives back", epoch)
        lease.release()
        await asyncio.sleep(rng.uniform(0.0, 0.2))


def _say(what: str, epoch: int) -> None:
    print(f"{time.monotonic_ns()} {epoch} {what}", flush=True)


@dataclass(slots=True)
class Reign:
    """An epoch: from when to when its holder believed to lead, in ns."""

    epoch: int
    pid: int
    begin_ns: int
    end_ns: int = 0
    paused: bool = False


@dataclass(slots=True)
class Contender:
    """A process that contends, and what it said."""

    members: list[tuple[str, int]]
    seed: int
    reigns: list[Reign] = field(default_factory=list)
    process: subprocess.Popen[str] | None = None

    def start(self) -> None:
        """Begin, or begin again."""
        self.seed += 100
        words = [str(port) for _, port in self.members]
        command = [sys.executable, "-m", "qa.etcd", "--contend", str(self.seed), *words]
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        threading.Thread(target=self._listen, args=(self.process,), daemon=True).start()

    def _listen(self, process: subprocess.Popen[str]) -> None:
        assert process.stdout is not None
        for line in process.stdout:
            at_ns, epoch, what = line.split(maxsplit=2)
            if what.strip() == "leads":
                self.reigns.append(Reign(int(epoch), process.pid, int(at_ns)))
            else:
                self.reigns[-1].end_ns = int(at_ns)

    @property
    def leads(self) -> bool:
        """Whether it said that it does."""
        return bool(self.reigns) and not self.reigns[-1].end_ns

    def kill(self) -> None:
        """As when its host loses power."""
        assert self.process is not None
        self.process.kill()
        self.process.wait()
        if self.leads:
            self.reigns[-1].end_ns = time.monotonic_ns()


# ------------------------------------------------------------ faults


@dataclass(slots=True)
class Hunt:
    """What is done to whom; ``down`` are the intervals, in ns, in which most members did not answer."""

    cluster: Etcd
    contenders: list[Contender]
    rng: random.Random
    done: dict[str, int] = field(default_factory=dict)
    down: list[tuple[int, int]] = field(default_factory=list)

    def hit(self, fault: str) -> None:
        """One fault, and its end."""
        self.done[fault] = self.done.get(fault, 0) + 1
        began_ns = time.monotonic_ns()
        some = self.rng.sample(self.cluster.members, 2 if fault.startswith("two") else 1)
        if fault == "disk full":
            self._fill(some[0])
        elif fault.startswith("leader"):
            self._hit_leader(fault)
        else:
            self._hit_members(some, signal.SIGKILL if fault.endswith("killed") else signal.SIGSTOP)
        if len(some) > 1:
            self.down.append((began_ns, time.monotonic_ns()))

    def _hit_members(self, members: list[EtcdMember], number: signal.Signals) -> None:
        for member in members:
            member.send(number)
        time.sleep(self.rng.uniform(0.5, 3 * LEASE_S))
        for member in members:
            if number is signal.SIGSTOP:
                member.send(signal.SIGCONT)
            else:
                self.cluster.start(member)

    def _hit_leader(self, fault: str) -> None:
        leader = next((one for one in self.contenders if one.leads), self.contenders[0])
        assert leader.process is not None
        if fault == "leader killed":
            leader.kill()
            leader.start()
            return
        if leader.leads:
            leader.reigns[-1].paused = True
        leader.process.send_signal(signal.SIGSTOP)
        time.sleep(self.rng.uniform(1.2, 2.0) * LEASE_S)
        leader.process.send_signal(signal.SIGCONT)

    def _fill(self, member: EtcdMember) -> None:
        filler = member.folder / "filler"
        with filler.open("wb") as file, contextlib.suppress(OSError):
            while True:
                file.write(bytes(MIB))
                file.flush()
        time.sleep(self.rng.uniform(1.0, 3 * LEASE_S))
        filler.unlink()
        assert member.process is not None
        with contextlib.suppress(subprocess.TimeoutExpired):
            member.process.wait(1.0)
            self.cluster.start(member)  # it ended by itself


@contextlib.contextmanager
def small_disks(folder: Path) -> Iterator[bool]:
    """A file system of its own for each member; False where this user may not have any."""
    mounted = []
    for number in range(CONTENDERS):
        place = folder / f"etcd-{number}"
        place.mkdir()
        command = ["/usr/bin/mount", "-t", "tmpfs", "-o", f"size={DISK_BYTES}", "tmpfs", str(place)]
        if subprocess.run(command, capture_output=True, check=False).returncode == 0:
            mounted.append(place)
    try:
        yield len(mounted) == CONTENDERS
    finally:
        for place in mounted:
            subprocess.run(["/usr/bin/umount", "--lazy", str(place)], check=False)


# ------------------------------------------------------------ what came of it


def judge(hunt: Hunt, began_ns: int, ended_ns: int) -> Outcome:
    """What was asked of the lease, and what was found."""
    reigns = sorted((reign for one in hunt.contenders for reign in one.reigns), key=lambda one: one.begin_ns)
    for one in reigns:
        one.end_ns = one.end_ns or ended_ns
    counts = Counter(one.epoch for one in reigns)
    together = [
        (one.epoch, other.epoch)
        for one, other in itertools.combinations(reigns, 2)
        if other.begin_ns < one.end_ns and not one.paused
    ]
    outcome = Outcome("qa.etcd")
    outcome.figures = {"faults": hunt.done, "epochs": len(reigns), "reigns": [asdict(one) for one in reigns]}
    said = ", ".join(f"{name} {count}" for name, count in sorted(hunt.done.items()))
    outcome.judge("faults", asked="each kind", found=said, good=len(hunt.done) == len(FAULTS))
    outcome.none("epochs that two had", [epoch for epoch, count in counts.items() if count > 1])
    outcome.none("two who lead, neither paused", together, more=f"of {len(reigns)} epochs")
    idle = max(idle_s(reigns, hunt.down, began_ns, ended_ns), default=0.0)
    outcome.at_most("longest without a leader while most members answer", SOON_S, idle, "s")
    return outcome


def idle_s(reigns: list[Reign], down: list[tuple[int, int]], began_ns: int, ended_ns: int) -> Iterator[float]:
    """Each time without a leader, in s, less what of it most members of etcd did not answer."""
    since_ns = began_ns
    for begin_ns, end_ns in [*((one.begin_ns, one.end_ns) for one in reigns), (ended_ns, 0)]:
        if begin_ns > since_ns:
            excused_ns = sum(
                max(0, min(until_ns, begin_ns) - max(from_ns, since_ns)) for from_ns, until_ns in down
            )
            yield (begin_ns - since_ns - excused_ns) / NS_PER_S
        since_ns = max(since_ns, end_ns)


def play(folder: Path, minutes: float, seed: int) -> Outcome:
    """Faults by turns, for so long."""
    rng = random.Random(seed)
    with small_disks(folder) as small, etcd(folder) as cluster:
        contenders = [Contender(cluster.addresses, 10 * number + seed) for number in range(CONTENDERS)]
        hunt = Hunt(cluster, contenders, rng)
        faults = [fault for fault in FAULTS if small or fault != "disk full"]
        try:
            for one in contenders:
                one.start()
            while not any(one.reigns for one in contenders):
                time.sleep(0.01)
            began_ns = time.monotonic_ns()
            ends_ns = began_ns + round(minutes * 60 * NS_PER_S)
            turn = 0
            while time.monotonic_ns() < ends_ns:
                time.sleep(CALM_S)
                fault = faults[turn] if turn < len(faults) else rng.choice(faults)
                turn += 1
                print(f"{(time.monotonic_ns() - began_ns) / NS_PER_S:5.0f} s  {fault}", flush=True)
                hunt.hit(fault)
            time.sleep(SOON_S)
            return judge(hunt, began_ns, time.monotonic_ns())
        finally:
            for one in contenders:
                if one.process is not None:
                    one.process.send_signal(signal.SIGCONT)
                    one.kill()


def main() -> int:
    """The command; see above."""
    options = parser(__doc__)
    options.add_argument("--minutes", type=float, default=10.0)
    options.add_argument("--short", action="store_true", help="a minute and a half")
    options.add_argument("--contend", nargs="+", type=int, metavar="SEED PORT", help="be a contender")
    given = options.parse_args()
    if given.contend:
        seed, *ports = given.contend
        asyncio.run(contend([("127.0.0.1", port) for port in ports], seed))
        return 0
    if ETCD is None:
        print("etcd is not installed: Debian's package is etcd-server", file=sys.stderr)
        return 2
    with tempfile.TemporaryDirectory() as folder:
        outcome = play(Path(folder), 1.5 if given.short else given.minutes, given.seed)
    return finish(outcome, given.json)


if __name__ == "__main__":
    sys.exit(main())

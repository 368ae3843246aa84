"""The leading controller killed again and again under load, while another one stands by: what clients notice.

Two emulated devices at 60 % of what they can do, with SLOs of 2 s, 200 ms and 50 ms in equal parts. After
each SIGKILL the one that stands by takes over; the next kill waits until there is one again. With
``--controllers 1`` nobody stands by, and the same is shown of a controller that is started again; with
``--hand-over`` it is asked to hand over, and not killed. With ``--hosts`` controllers are on hosts of their
own, with a shared store: all processes of who leads are killed; then its cable is pulled, again and again.
``--undisturbed MINUTES``: on the same hosts nobody is killed, while other programs burn every core: who leads
must lead to the end. ``--hosts --filtered``: see :mod:`benchmarks.filtered`; ``--hosts --one-way``: see
:mod:`benchmarks.failover_one_way`.
"""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Final, Protocol, TypeVar

from clockwork_serve.config import Settings
from clockwork_serve.devices import DeviceConfig
from clockwork_serve.serve.supervisor.config import ServerConfig
from clockwork_serve.store import StoreConfig
from clockwork_serve.units import MIB, NS_PER_MS, NS_PER_S
from harness import repositories
from harness.hosts import START_S, Host, Machine, certificates, hosts, words_of
from harness.http_load import Report, Sample, Shot, infer_message, open_loop, poisson, run
from harness.ports import free_port
from harness.report import Outcome, finish, parser, percent, quantile
from harness.server import LEADER, Server, started
from harness.serving import Metrics, read_metrics, total, until

SLOS_MS: Final = (2000, 200, 50)
KILLS, KILLS_SHORT = 20, 4
MODELS, DEVICES = 4, 2
SERVICE_MS: Final = 10.0
SHARE: Final = 0.6
BACK_S: Final = 0.5
"""Within this time of a kill good answers come again, at p95; who is due later than that can wait."""
LATE_MS: Final = 10
"""What a good answer may be late by: its way, and a client that reads late."""
TOLD_MS: Final = 50
"""By when after its deadline each request that is not answered well is told so."""
AFTER_S: Final = 1.0
"""So long after a kill requests are counted as touched by it."""
IN_TIME: Final = {2000: 1.0, 200: 0.9, 50: 0.8}
"""By SLO: which share of those is answered in time at least."""
LEAD_S: Final = {1: 6.0, 2: 3.0}
"""By controllers: how long one leads at least. One that lived for less than 5 s is started again later."""
LONGEST_S: Final = 7200.0
X: Final = [("x", "FP32", (1, 4), bytes(16))]


@dataclass(slots=True)
class Kill:
    """One kill: when, and what its victim had counted: its epoch, requests that had to wait for a LOAD."""

    at_ns: int
    epoch: int
    cold: int
    gap_ms: float = 0.0
    """Until the first good answer to a request that was due after it."""


@dataclass(slots=True)
class Killer:
    """Kills whoever leads, ``times`` times; ``wrong`` says what it stumbled over."""

    server: Server
    times: int
    controllers: int
    number: int = signal.SIGKILL
    kills: list[Kill] = field(default_factory=list)
    wrong: str = ""
    over: threading.Event = field(default_factory=threading.Event)

    def run(self) -> None:
        """Do it, from a thread of its own."""
        try:
            for _ in range(self.times):
                time.sleep(LEAD_S[self.controllers])
                found = until("another one stands by", self._whole, 30, 0.05)
                epoch = round(total(found, "clockwork_controller_epoch"))
                cold = round(total(found, "clockwork_model_cold_starts_total"))
                pid = self.server.pid(LEADER)
                self.kills.append(Kill(time.monotonic_ns(), epoch, cold))
                os.kill(pid, self.number)
            time.sleep(2 * AFTER_S)
        except (OSError, TimeoutError) as error:
            self.wrong = f"{error}"
        self.over.set()

    def _whole(self) -> Metrics | None:
        """The metrics, if the server is ready and as many stand by as should."""
        try:
            found = read_metrics(self.server.facts["metrics"], 5)
        except OSError:
            return None
        there = total(found, "clockwork_controllers_standing_by") == self.controllers - 1
        return found if there and total(found, "clockwork_ready") else None


def shots(url: str, over: threading.Event, seed: int) -> Iterator[Shot]:
    """Requests, until it is over; each is called by its SLO."""
    dice = random.Random(seed)
    messages = [
        (f"{slo_ms}", infer_message(url, f"m{model}", X, slo_ms=slo_ms))
        for model in range(MODELS)
        for slo_ms in SLOS_MS
    ]
    rate_rps = SHARE * DEVICES * 1000 / SERVICE_MS
    for at_ns in poisson(rate_rps, LONGEST_S, random.Random(seed)):
        if over.is_set():
            return
        name, message = dice.choice(messages)
        yield Shot(at_ns, message, name)


def judged(report: Report, kills: list[Kill], controllers: int) -> Outcome:
    """What was promised of one host, beside what was found."""
    outcome = Outcome("benchmarks.failover")
    outcome.figures["controllers"] = controllers
    judge(outcome, report, kills)
    return outcome


def judge(
    outcome: Outcome, report: Report, kills: list[Kill], what: str = "", back_s: float = BACK_S,
    shares: Mapping[int, float] = IN_TIME,
) -> None:  # fmt: skip
    """Add what was promised, beside what was found."""
    samples = sorted(report.samples, key=lambda one: one.due_ns)
    for kill in kills:
        later = [one.done_ns for one in samples if one.due_ns >= kill.at_ns and in_time(one)]
        kill.gap_ms = (min(later) - kill.at_ns) / NS_PER_MS if later else float("inf")
    gaps = [kill.gap_ms for kill in kills]
    told, p95_ms = f"most {max(gaps):.0f}, median {quantile(gaps, 0.5):.0f}", quantile(gaps, 0.95)
    outcome.at_most(f"{what}good answers again (p95)", back_s * 1000, p95_ms, "ms", digits=0, more=told)
    for slo_ms, share in shares.items():
        touched = [one for one in samples if one.name == f"{slo_ms}" and touched_by(one, kills)]
        good = sum(map(in_time, touched))
        outcome.judge(
            f"{what}SLO {slo_ms} ms: in time, of those around", asked=f">= {share:.0%}",
            found=f"{percent(good, len(touched))} of {len(touched)}",
            good=good >= share * len(touched),
        )  # fmt: skip
    waits = [one for one in samples if not in_time(one) and could_wait(one, kills, back_s)]
    outcome.none(f"{what}could wait, and not answered in time", [one.end for one in waits])
    over = [one for one in samples if one.status not in (0, 200) and took_ms(one) > int(one.name) + TOLD_MS]
    outcome.none(f"{what}not even told by {TOLD_MS} ms after the deadline", [_took(one) for one in over])
    late = [one for one in samples if one.status == 200 and took_ms(one) > int(one.name) + LATE_MS]
    outcome.none(f"{what}good answers that were late", [_took(one) for one in late])
    outcome.none(f"{what}without a response", [one.name for one in samples if one.status == 0])
    outcome.at_most(
        f"{what}answered twice: bytes that nobody asked for", 0, report.unexpected_bytes, digits=0
    )
    cold = [kill.cold for kill in kills[1:] if kill.cold]
    outcome.none(f"{what}take-overs after which requests waited for weights", cold)
    epochs = [kill.epoch for kill in kills]
    outcome.judge(
        f"{what}epochs of those who led", asked="rising by one", found=f"{epochs[0]} to {epochs[-1]}",
        good=epochs == list(range(epochs[0], epochs[0] + len(kills))),
    )  # fmt: skip
    outcome.figures |= {
        f"{what}kills": [asdict(kill) for kill in kills], f"{what}sent": len(samples),
        f"{what}ends": dict(report.ends()), f"{what}client_late_sends": report.late_sends,
    }  # fmt: skip


def in_time(sample: Sample) -> bool:
    """Whether it was answered well by its deadline."""
    return sample.status == 200 and took_ms(sample) <= int(sample.name)


def took_ms(sample: Sample) -> float:
    """From sending to the whole response."""
    return (sample.done_ns - sample.sent_ns) / NS_PER_MS


def _took(sample: Sample) -> str:
    return f"{took_ms(sample):.0f} of {sample.name} ms"


def touched_by(sample: Sample, kills: list[Kill]) -> bool:
    """Whether it was out when a controller was killed, or due soon after."""
    return any(
        sample.due_ns <= kill.at_ns + AFTER_S * NS_PER_S and sample.done_ns >= kill.at_ns for kill in kills
    )


def could_wait(sample: Sample, kills: list[Kill], back_s: float = BACK_S) -> bool:
    """Whether it was touched by a kill, and had time after it until its deadline."""
    deadline_ns = sample.due_ns + int(sample.name) * NS_PER_MS
    return any(
        touched_by(sample, [kill]) and deadline_ns - max(kill.at_ns, sample.due_ns) >= back_s * NS_PER_S
        for kill in kills
    )


def measure(folder: Path, times: int, controllers: int, seed: int, number: int) -> Outcome:
    """A server, its load and its killer."""
    root = folder / "models"
    for model in range(MODELS):
        repositories.emulated(root, f"m{model}", {1: SERVICE_MS}, load_ms=2)
    config = ServerConfig(
        settings=Settings(
            repository=str(root), http_port=0, grpc_port=0, metrics_port=0,
            controllers=controllers, log_level="warning", drain_s=2.0,
        ),
        store=StoreConfig(cache_dir=str(folder / "cache")),
        devices=tuple(
            DeviceConfig(device=f"emulated:{at}", kind="emulated", apart=True, memory_bytes=64 * MIB)
            for at in range(DEVICES)
        ),
        run_dir=str(folder),
    )  # fmt: skip
    with started(config, folder / "log") as server:
        killer = Killer(server, times, controllers, number)
        thread = threading.Thread(target=killer.run, daemon=True)
        thread.start()
        report = run(open_loop(server.http_url, shots(server.http_url, killer.over, seed)))
        thread.join()
    if killer.wrong or not killer.kills:
        return Outcome("benchmarks.failover", invalid=killer.wrong or "nobody was killed")
    return judged(report, killer.kills, controllers)


# ------------------------------------------------------------
# Controllers on hosts of their own, each in a network of its own where this system permits that.


LEASE_S: Final = 1.0
CABLE_BACK_S: Final = 1.5
"""The same of its host being cut off: it may be slow, until its lease is over."""
IN_TIME_OF_HOSTS: Final = {2000: 1.0, 200: 0.9, 50: 0.0}
HOSTS: Final = ("controller-a", "controller-b", "worker", "gateway")


class Hosts:
    """Two controllers with one store, a worker with two devices, and a gateway, on a host each."""

    def __init__(self, folder: Path, home: list[Host], stack: ExitStack, lease_s: float = LEASE_S) -> None:
        self._folder, self._stack, self._lease_s = folder, stack, lease_s
        self.home = dict(zip(HOSTS, home, strict=True))
        self._files = dict(zip(HOSTS, certificates(folder, len(home)), strict=True))
        # In a network of its own, every port is free that is here.
        self._at = {
            name: f"{at.address}:{free_port('127.0.0.1' if at.before else at.address)}"
            for name, at in ((name, self.home[name]) for name in HOSTS[:2])
        }
        self.controllers: dict[str, Machine] = {}
        """All that should run."""
        self._metrics: dict[str, str] = {}
        builder = ["profile", str(folder / "models"), "--device", "emulated:v100"]
        self._end(self._machine("builder", home[2], [*builder, *self._stored("builder")]))
        for name in HOSTS[:2]:
            self.start(name)
        joins = {"controller": ",".join(self._at.values()), "machine_name": "far", "log_level": "warning"}
        devices = ["--device", "emulated:v100"] * DEVICES
        worker = words_of(joins | self._files["worker"])
        self._machine("worker", home[2], ["worker", *worker, *devices, *self._stored("worker")])
        ports = {"host": home[3].address, "http_port": 0, "grpc_port": "off", "metrics_port": "off"}
        gateway = words_of(joins | ports | self._files["gateway"])
        self.http_url = self._machine("gateway", home[3], ["gateway", *gateway, "--json"]).facts()["http"]

    def start(self, name: str) -> None:
        """Start a controller."""
        host = self.home[name]
        settings = {
            "listen_machines": self._at[name], "lease_s": self._lease_s, "host": host.address,
            "metrics_port": 0, "log_level": "warning",
        }  # fmt: skip
        words = ["controller", *words_of(settings | self._files[name]), *self._stored(name), "--json"]
        self.controllers[name] = self._machine(name, host, words)
        self._metrics[name] = self.controllers[name].facts()["metrics"]

    def whole(self, epoch: int = 0) -> tuple[str, Metrics] | None:
        """The name of a later leader and its metrics, if it is ready, and the other one stands by."""
        for name in self.controllers:
            with suppress(OSError):
                found = read_metrics(self._metrics[name], 2)
                later = total(found, "clockwork_controller_epoch") > epoch
                whole = total(found, "clockwork_controllers_standing_by") == 1
                if later and whole and total(found, "clockwork_ready"):
                    return name, found
        return None

    def _stored(self, name: str) -> list[str]:
        return ["--store", str(self._folder / "store"), "--cache", str(self._folder / f"cache-{name}")]

    def _machine(self, name: str, host: Host, words: list[str]) -> Machine:
        made = Machine(host, words, self._folder / f"{name}.log")
        self._stack.callback(made.close)
        return made

    def _end(self, builder: Machine) -> None:
        if builder.process.wait(START_S):
            raise RuntimeError(f"the builder failed:\n{builder.said[-2000:]}")


@dataclass(slots=True)
class HostKiller:
    """Kills all of who leads, ``times`` times, or cuts it off; from its store too, so it is stopped then."""

    hosts: Hosts
    times: int
    cut: bool
    kills: list[Kill] = field(default_factory=list)
    wrong: str = ""
    over: threading.Event = field(default_factory=threading.Event)

    def run(self) -> None:
        """Do it, from a thread of its own."""
        try:
            for _ in range(self.times):
                time.sleep(LEAD_S[2])
                name, found = self._whole()
                epoch = round(total(found, "clockwork_controller_epoch"))
                cold = round(total(found, "clockwork_model_cold_starts_total"))
                victim = self.hosts.controllers[name]
                pids = victim.pids()
                self.kills.append(Kill(time.monotonic_ns(), epoch, cold))
                if not self.cut:
                    victim.kill(pids)
                    self.hosts.start(name)
                    continue
                victim.host.pull()
                victim.signal(signal.SIGSTOP, pids)
                time.sleep(2 * CABLE_BACK_S)
                victim.host.put_back()
                victim.signal(signal.SIGCONT)
            self._whole()
            time.sleep(2 * AFTER_S)
        except (OSError, TimeoutError, RuntimeError) as error:
            self.wrong = f"{error}"
        self.over.set()

    def _whole(self) -> tuple[str, Metrics]:
        last = self.kills[-1].epoch if self.kills else 0
        found: tuple[str, Metrics] = until(
            "one leads, and one stands by", lambda: self.hosts.whole(last), 60, 0.05
        )
        return found


@dataclass(slots=True)
class Watcher:
    """Burns every core for so long, and kills nobody; ``epochs``: of all who led meanwhile."""

    hosts: Hosts
    minutes: float
    epochs: list[int] = field(default_factory=list)
    wrong: str = ""
    over: threading.Event = field(default_factory=threading.Event)

    def run(self) -> None:
        """Do it, from a thread of its own."""
        burning = [
            subprocess.Popen([sys.executable, "-c", "while True: pass"])  # normal priority, as any program's
            for _ in range(os.cpu_count() or 1)
        ]
        try:
            ends_s = time.monotonic() + 60 * self.minutes
            while time.monotonic() < ends_s:
                _, found = until("one leads, and one stands by", self.hosts.whole, 60, 0.05)
                epoch = round(total(found, "clockwork_controller_epoch"))
                if epoch not in self.epochs:
                    self.epochs.append(epoch)
                time.sleep(1)
        except (OSError, TimeoutError) as error:
            self.wrong = f"{error}"
        finally:
            for one in burning:
                one.kill()
                one.wait()
            self.over.set()


class Meddles(Protocol):
    """Whoever meddles with hosts; ``over`` is set at the end, ``wrong`` says what it stumbled over."""

    wrong: str
    over: threading.Event

    def run(self) -> None:
        """Do it, from a thread of its own."""


Meddler = TypeVar("Meddler", bound=Meddles)


def play_hosts(
    folder: Path, seed: int, outcome: Outcome, meddler: Callable[[Hosts], Meddler], lease_s: float = LEASE_S
) -> tuple[Meddler, Report]:
    """Controllers on two hosts, their load, and somebody who meddles with them, from a thread of its own."""
    (folder / "store").mkdir(parents=True)
    for model in range(MODELS):
        repositories.emulated(folder / "models", f"m{model}", {1: SERVICE_MS}, load_ms=2)
    with hosts(len(HOSTS)) as (_, home, truth), ExitStack() as stack:
        outcome.figures["hosts"] = truth
        made = Hosts(folder, home, stack, lease_s)
        who = meddler(made)
        until("it serves", made.whole, 60, 0.05)
        thread = threading.Thread(target=who.run, daemon=True)
        thread.start()
        report = run(open_loop(made.http_url, shots(made.http_url, who.over, seed)))
        thread.join()
    return who, report


def measure_undisturbed(folder: Path, minutes: float, seed: int, outcome: Outcome) -> None:
    """Nobody is killed, and nobody may take over, however busy the machine is."""
    watcher, report = play_hosts(folder, seed, outcome, lambda made: Watcher(made, minutes))
    outcome.invalid = watcher.wrong
    outcome.judge(
        f"take-overs in {minutes:g} minutes, every core burnt by other programs", asked="0",
        found=f"{len(watcher.epochs) - 1}", good=len(watcher.epochs) == 1,
    )  # fmt: skip
    outcome.none("without a response", [one.name for one in report.samples if one.status == 0])
    outcome.at_most("answered twice: bytes that nobody asked for", 0, report.unexpected_bytes, digits=0)
    for slo_ms in SLOS_MS:
        asked = [one for one in report.samples if one.name == f"{slo_ms}"]
        outcome.judge(
            f"SLO {slo_ms} ms: in time", asked="", good=True,
            found=f"{percent(sum(map(in_time, asked)), len(asked))} of {len(asked)}",
        )  # fmt: skip
    outcome.figures |= {"epochs": watcher.epochs, "ends": dict(report.ends())}


def measure_hosts(folder: Path, times: int, seed: int, outcome: Outcome, *, cut: bool) -> None:
    """Controllers on two hosts, their load and their killer."""
    what = "cable pulled: " if cut else "host killed: "
    killer, report = play_hosts(folder, seed, outcome, lambda made: HostKiller(made, times, cut))
    if killer.wrong or not killer.kills:
        outcome.invalid = f"{what}{killer.wrong or 'nobody was killed'}"
    else:
        shown = dict.fromkeys(SLOS_MS, 0.0)
        back_s, shares = (CABLE_BACK_S, shown) if cut else (BACK_S, IN_TIME_OF_HOSTS)
        judge(outcome, report, killer.kills, what, back_s, shares)


def main() -> int:
    """Run it; returns the exit status."""
    options = parser(__doc__)
    options.add_argument("--rounds", type=int, default=KILLS, help="kills, and with --hosts as many cables")
    options.add_argument("--short", action="store_true", help=f"--rounds {KILLS_SHORT}")
    options.add_argument("--controllers", type=int, choices=sorted(LEAD_S), default=2)
    options.add_argument("--hand-over", action="store_true", help="SIGUSR1 in place of SIGKILL")
    options.add_argument("--hosts", action="store_true", help="controllers on several hosts")
    options.add_argument(
        "--undisturbed", type=float, metavar="MINUTES", help="nobody is killed, cores are burnt"
    )
    options.add_argument(
        "--filtered", action="store_true", help="with --hosts: no worker reaches the gateway's tensors"
    )
    options.add_argument("--one-way", action="store_true", help="with --hosts: workers are cut one way")
    given = options.parse_args()
    times = KILLS_SHORT if given.short else given.rounds
    with tempfile.TemporaryDirectory(prefix="cw") as name:
        outcome = Outcome("benchmarks.failover")
        if given.undisturbed:
            measure_undisturbed(Path(name), given.undisturbed, given.seed, outcome)
            return finish(outcome, given.json)
        if given.hosts and given.filtered:
            from benchmarks.filtered import measure_filtered

            measure_filtered(Path(name), outcome)
            return finish(outcome, given.json)
        if given.hosts and given.one_way:
            from benchmarks.failover_one_way import measure_one_way

            measure_one_way(Path(name), times, given.seed, outcome)
            return finish(outcome, given.json)
        if given.hosts:
            for cut in (False, True):
                measure_hosts(Path(name) / f"{cut}", times, given.seed, outcome, cut=cut)
            return finish(outcome, given.json)
        number = signal.SIGUSR1 if given.hand_over else signal.SIGKILL
        outcome = measure(Path(name), times, given.controllers, given.seed, number)
    return finish(outcome, given.json)


if __name__ == "__main__":
    sys.exit(main())

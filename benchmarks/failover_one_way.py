"""Workers cut off from the leader in one direction, again and again, while another controller reaches them.

    python -m benchmarks.failover --hosts --one-way [--rounds 20] [--short]

The hosts and the load are those of ``benchmarks.failover --hosts``. The leader keeps its lease, for it
reaches the store. Half of the cuts take what the worker sends to the leader, half what the leader sends to
the worker; each lasts until the other controller serves. The same follows with the lease's time that is the
default at a URL; the store is a folder there, too. Without networks for hosts it is not run.
"""

from __future__ import annotations

import subprocess
import threading
import time
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Final

from benchmarks.failover import LEASE_S, SLOS_MS, Hosts, Kill, judge, play_hosts
from harness.hosts import LOOPBACK
from harness.report import Outcome
from harness.serving import total, until

REACHED_S: Final = 3.0
"""By when good answers come again, with a lease of 1 s."""
URL_LEASE_S: Final = 10.0
URL_REACHED_S: Final = 13.0
LEAD_S: Final = 7.0
"""How long one leads at least: nobody gives a lease up within the first five seconds."""
HEALED_S: Final = 2.0
FEWER: Final = 10  # with the longer lease, one of so many rounds is run


@dataclass(slots=True)
class WayCutter:
    """Cuts the way between the worker's host and the leader's, in each direction ``times`` times."""

    hosts: Hosts
    times: int
    kills: list[Kill] = field(default_factory=list)
    wrong: str = ""
    over: threading.Event = field(default_factory=threading.Event)

    def run(self) -> None:
        """Do it, from a thread of its own."""
        try:
            for number in range(2 * self.times if self.hosts.home["worker"].cable else 0):
                time.sleep(LEAD_S)
                self._cut(deaf=number % 2 == 0)
        except (OSError, TimeoutError, RuntimeError, subprocess.CalledProcessError) as error:
            self.wrong = f"{error}"
        finally:
            self.over.set()

    def _cut(self, *, deaf: bool) -> None:
        """Until another one leads and serves; ``deaf``: the leader, else the worker."""
        last = self.kills[-1].epoch if self.kills else 0
        name, found = until("one leads, and one stands by", lambda: self.hosts.whole(last), 60, 0.05)
        epoch = round(total(found, "clockwork_controller_epoch"))
        leader, worker = self.hosts.home[name], self.hosts.home["worker"]
        sender, receiver = (worker, leader) if deaf else (leader, worker)
        cold = round(total(found, "clockwork_model_cold_starts_total"))
        sender.lose_way_to(receiver)
        self.kills.append(Kill(time.monotonic_ns(), epoch, cold))
        try:
            until("the other one leads", lambda: self.hosts.whole(epoch), 60, 0.05)
            time.sleep(HEALED_S)
        finally:
            sender.find_way_to(receiver)


def measure_one_way(folder: Path, times: int, seed: int, outcome: Outcome) -> None:
    """Both directions in turns, with a lease of 1 s and with the default of a store at a URL."""
    for lease_s, reached_s, rounds in (
        (LEASE_S, REACHED_S, times), (URL_LEASE_S, URL_REACHED_S, max(1, times // FEWER)),
    ):  # fmt: skip
        what = f"cut one way, lease of {lease_s:g} s: "
        cut = partial(WayCutter, times=rounds)
        cutter, report = play_hosts(folder / f"{lease_s:g}", seed, outcome, cut, lease_s)
        if outcome.figures["hosts"] == LOOPBACK:
            outcome.judge("workers cut one way", asked="", found="not run: no network namespaces", good=True)
            return
        if cutter.wrong or not cutter.kills:
            outcome.invalid = f"{what}{cutter.wrong or 'nothing was cut'}"
            return
        judge(outcome, report, cutter.kills, what, reached_s, dict.fromkeys(SLOS_MS, 0.0))

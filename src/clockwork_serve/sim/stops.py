"""Workers that stop, or whose lanes do, carried out on a simulated world; and what their keeper does then.

hang    the process is stopped, its devices' work goes on (as on a GPU); whatever it would have said is late
stop    the process is stopped and its lanes with it (as by SIGSTOP): what runs takes that much longer
hangs   whenever a model is run, its lane is never done with it; the process goes on

What stops for good is ended when the controller wants it. If it never would, somebody does it after a while.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from heapq import heapify
from typing import TYPE_CHECKING

from msgspec.structs import replace

from clockwork_serve.messages import ControllerEvent, WorkerCrashed, WorkerHeard, WorkerSilent
from clockwork_serve.sim.host import LANE_DONE, Entry, Host
from clockwork_serve.sim.trouble import is_cut
from clockwork_serve.units import NS_PER_MS
from clockwork_serve.worker.events import LaneDone
from clockwork_serve.workload.tables import FaultTable

if TYPE_CHECKING:
    from clockwork_serve.sim.faults import Faults
    from clockwork_serve.sim.simulation import Simulation

Events = Sequence[ControllerEvent]
NOTHING: Events = ()


class Stops:
    """See the module; a part of ``Faults``."""

    def __init__(self, faults: Faults, simulation: Simulation) -> None:
        self._faults = faults
        self._simulation = simulation
        self._world = simulation.world
        self._times = simulation.constants.faults
        self._ends = not simulation.controller.config.hang_ns
        """Nobody will ask for hung workers to be ended."""
        self._halted: dict[Host, tuple[int, int, list[Entry]]] = {}
        """Workers whose lanes are stopped: since when, how its clock was off, and what was to be done."""
        self._silent: set[Host] = set()
        """Stopped workers that were missed."""

    def hang(self, table: FaultTable) -> Events:
        """Stop processes."""
        return self._stop(table, lanes=False)

    def stop(self, table: FaultTable) -> Events:
        """Stop processes and their lanes."""
        return self._stop(table, lanes=True)

    def hangs(self, table: FaultTable, key: str) -> Events:
        """Whoever runs that model is never done with it."""
        self._world.endless[key] = self._stuck
        self._faults.after(table, partial(self._hangs_no_more, key))
        return NOTHING

    def _hangs_no_more(self, key: str) -> Events:
        self._world.endless.pop(key, None)
        return NOTHING

    def _stuck(self, host: Host) -> None:
        self._faults.executed["hangs"] += 1
        if self._ends:
            self._faults.later(self._times.kill_ns, partial(self._end, host))

    def _stop(self, table: FaultTable, *, lanes: bool) -> Events:
        now_ns = self._simulation.now_ns
        for host in self._faults.hit(table):
            if host.stopped is not None:
                continue
            self._faults.executed[table.kind] += 1
            host.stop(now_ns)
            if lanes:
                self._halted[host] = (now_ns, host.skew_ns, self._take_lanes(host))
            self._faults.later(self._times.silent_ns, partial(self._missed, host, now_ns))
            if table.for_s is not None:
                self._faults.after(table, partial(self._goes_on, host))
            else:
                self._faults.later(self._times.kill_ns, partial(self._end_unasked, host))
        return NOTHING

    def _end_unasked(self, host: Host) -> Events:
        """A worker is stopped for good: its keeper ends it where the controller cannot ask for that."""
        if self._ends or not self._linked(host):
            return self._end(host)
        self._faults.later(self._times.kill_ns, partial(self._end_unasked, host))
        return NOTHING

    def _take_lanes(self, host: Host) -> list[Entry]:
        heap = self._world.heap
        found = [entry for entry in heap if entry[2] == LANE_DONE and entry[3] is host]
        heap[:] = [entry for entry in heap if entry[2] != LANE_DONE or entry[3] is not host]
        heapify(heap)
        return found

    def _goes_on(self, host: Host) -> Events:
        if host.gone:
            return NOTHING
        now_ns = self._simulation.now_ns
        since_ns, skew_ns, entries = self._halted.pop(host, (now_ns, host.skew_ns, []))
        lost_ns, jump_ns = now_ns - since_ns, host.skew_ns - skew_ns
        host.stalled(lost_ns)
        for when_ns, _, kind, whom, what in entries:
            late = what
            if isinstance(what, LaneDone):
                late = replace(
                    what, started_ns=what.started_ns + jump_ns, ended_ns=what.ended_ns + jump_ns + lost_ns,
                    run_ns=what.run_ns + lost_ns,
                )  # fmt: skip
            self._world.at(when_ns + lost_ns, kind, whom, late)
        host.go_on(now_ns)
        if host in self._silent:
            self._silent.remove(host)
            self._faults.later(self._world.delay_ns(), partial(self._back, host))
        return NOTHING

    # Beats

    def _missed(self, host: Host, since_ns: int) -> Events:
        """The controller misses the beats of a stopped worker, if it does not believe it lost already."""
        if host.stopped is None or host.stopped_ns != since_ns or host.gone or not self._linked(host):
            return NOTHING
        self._silent.add(host)
        self._faults.later(self._times.silent_ns, partial(self._missed, host, since_ns))
        return (WorkerSilent(worker=host.name, for_ns=self._simulation.now_ns - since_ns),)

    def _back(self, host: Host) -> Events:
        return (WorkerHeard(worker=host.name),) if self._linked(host) and not host.gone else NOTHING

    def _linked(self, host: Host) -> bool:
        return self._simulation.hosts.get(host.name) is host and not is_cut(host)

    # The keeper

    def end(self, worker: str) -> None:
        """The controller wants a worker ended."""
        host = self._simulation.hosts.get(worker)
        if host is not None:
            self._faults.later(self._times.end_ns, partial(self._end, host))

    def _end(self, host: Host) -> Events:
        if host.gone:
            return NOTHING
        by_itself = host.stopped is None
        self._halted.pop(host, None)
        self._silent.discard(host)
        self._faults.crash(host, None)
        if by_itself:
            self._faults.later(NS_PER_MS, lambda: (WorkerCrashed(worker=host.name),))
        return NOTHING

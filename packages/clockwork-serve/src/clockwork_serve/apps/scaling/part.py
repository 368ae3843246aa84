"""The scaling brain beside a server: the observer feeds it with the journal; asked every few seconds.

Its last advice lies in a file of the server's private folder, from where gateways take it for their metrics,
and is told to who asks the observer. It decides in a thread, by copies of what it was fed with.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, Final

import msgspec

from clockwork_serve.apps.learned import LearnedServer
from clockwork_serve.apps.scaling.brain import Advice, ScalingBrain, ScalingRules
from clockwork_serve.apps.scaling.demand import RecentDemand
from clockwork_serve.apps.scaling.future import FutureWorld, judge
from clockwork_serve.controller import ControllerConfig
from clockwork_serve.errors import described
from clockwork_serve.messages import Request
from clockwork_serve.sim.tally import ReadyWeights
from clockwork_serve.telemetry import JournalHead, Step
from clockwork_serve.telemetry.counters import WANTED_FILE
from clockwork_serve.units import NS_PER_S

EVERY_NS: Final = 10 * NS_PER_S

_log = logging.getLogger(__name__)


class ScalingPart:
    """Follows a journal; ``start`` runs what is to go on beside the feeding."""

    def __init__(
        self, rules: ScalingRules, run_dir: Path, start: Callable[[asyncio.Task[None]], None]
    ) -> None:
        self.advice: Advice | None = None
        self.waits_for = "requests and devices"
        """What it lacks to advise; empty: nothing."""
        self._rules, self._file, self._start = rules, run_dir / WANTED_FILE, start
        self._brain = ScalingBrain(rules)
        self._learned = LearnedServer()
        self._weights, self._demand = ReadyWeights(), RecentDemand()
        self._config: ControllerConfig | None = None
        self._asked_ns = 0
        self._decides = self._closed = False

    def take(self, number: int, record: JournalHead | Step) -> None:
        """The next record."""
        self._learned.take(record)
        if isinstance(record, JournalHead):
            self._config, self._weights = record.controller_config(), ReadyWeights()
            return
        for event in record.events:
            if type(event) is Request:
                self._demand.observe(event)
        self._weights.on_step(record.events, record.effects)

    def on_idle(self, now_ns: int) -> None:
        """All is read that was there at that instant of the controller's clock."""
        if self._decides or now_ns - self._asked_ns < EVERY_NS:
            return
        self._asked_ns = now_ns
        load = self._demand.likely(now_ns, round(self._rules.lead_s * NS_PER_S))
        loaded = [key for key, devices in self._weights.devices.items() if devices]
        config = self._config
        world = FutureWorld.of(self._learned, config, loaded) if config else None
        if load is None or world is None:
            self.waits_for = "models and devices" if world is None else "requests of some time"
            return
        self._decides, self.waits_for = True, ""
        devices = len(self._learned.present())
        judged = partial(judge, load, world, stopped=lambda: self._closed)
        decide = partial(self._brain.decide, now_ns, devices, judged)
        self._start(asyncio.get_running_loop().create_task(self._decide(decide)))

    def close(self, number: int) -> None:
        """End what is simulated."""
        self._closed = True

    async def _decide(self, decide: Callable[[], Advice]) -> None:
        try:
            advice = await asyncio.to_thread(decide)
            if not self._closed:
                self._publish(advice)
        except Exception as error:  # noqa: BLE001 - whatever a simulation raises, the observer goes on
            self.waits_for = described(error)
            _log.exception("how many devices are wanted cannot be said")
        finally:
            self._decides = False

    def _publish(self, advice: Advice) -> None:
        before, self.advice = self.advice, advice
        part = self._file.with_suffix(".part")
        part.write_bytes(msgspec.json.encode(advice))
        part.replace(self._file)
        if before is None or before.wanted != advice.wanted:
            _log.info("%d devices are wanted, %d are there: %s", advice.wanted, advice.now, advice.reason)

    def answer(self) -> dict[str, Any]:
        """The last advice for who asks; without one, what it waits for."""
        found = {} if self.advice is None else msgspec.to_builtins(self.advice)
        return {"rules": msgspec.to_builtins(self._rules), "waits_for": self.waits_for, **found}

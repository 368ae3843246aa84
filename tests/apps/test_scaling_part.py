"""The scaling brain as a part of the observer: fed with the steps of a simulated server, it gives advice."""

from __future__ import annotations

import asyncio
import json
import logging
import time
from collections.abc import Sequence
from pathlib import Path

import pytest

from clockwork_serve.apps.scaling import part as module
from clockwork_serve.apps.scaling.brain import Advice, ScalingRules
from clockwork_serve.apps.scaling.future import FutureWorld, Judged
from clockwork_serve.apps.scaling.part import EVERY_NS, ScalingPart
from clockwork_serve.controller import ControllerConfig
from clockwork_serve.messages import ControllerEffect, ControllerEvent
from clockwork_serve.sim import Simulation
from clockwork_serve.telemetry import Step, head_of
from clockwork_serve.telemetry.counters import WANTED_FILE, WANTED_NS, DevicesWanted
from clockwork_serve.units import NS_PER_S
from clockwork_serve.workload.stream import build
from clockwork_serve.workload.zoo import Zoo
from tests.sim import worlds

SECONDS = 30


class Told:
    """A part that is told what a server's journal would tell."""

    def __init__(self, folder: Path, rules: ScalingRules) -> None:
        self.tasks: set[asyncio.Task[None]] = set()
        self.part = ScalingPart(rules, folder, self.tasks.add)
        self.steps = 0
        self.part.take(0, head_of(ControllerConfig()))

    def on_step(
        self, now_ns: int, events: Sequence[ControllerEvent], effects: Sequence[ControllerEffect]
    ) -> None:
        self.steps += 1
        self.part.take(self.steps, Step(now_ns, tuple(events), tuple(effects)))

    def idle(self, now_ns: int) -> Advice | None:
        """What it says at an instant at which all is read."""

        async def main() -> None:
            self.part.on_idle(now_ns)
            await asyncio.gather(*self.tasks)
            self.tasks.clear()

        asyncio.run(main())
        return self.part.advice


def told(folder: Path, rate_rps: float, devices: int, slo_ms: float = 100.0) -> Told:
    """Of a server with a steady load, for half a minute."""
    scenario = worlds.scenario(seconds=SECONDS, rate_rps=rate_rps, devices=devices, slo_ms=slo_ms)
    found = Told(folder, ScalingRules(target=0.99, lead_s=5, most=8))
    Simulation(
        workload=build(scenario, seed=1), zoo=Zoo.read("v100"), seed=1, watchers=[found],
        cluster=worlds.Cluster(devices=devices), config=ControllerConfig(expected_devices=devices),
    ).run()  # fmt: skip
    return found


def test_it_says_how_many_are_wanted_and_writes_it_down(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    server, now_ns = told(tmp_path, 100.0, 2), SECONDS * NS_PER_S
    with caplog.at_level(logging.INFO):
        advice = server.idle(now_ns)
    assert advice is not None
    assert (advice.now, advice.wanted) == (2, 2), "it does not go down at once"
    assert advice.gives[0].devices == 1
    assert "2 devices are wanted, 2 are there: with 1 device 100.00% would be in time" in caplog.text
    found = DevicesWanted.read(tmp_path / WANTED_FILE, now_ns)
    assert found is not None
    assert (found.wanted, found.cause) == (2, "none")
    assert DevicesWanted.read(tmp_path / WANTED_FILE, now_ns + WANTED_NS) is None, "it is too old by then"
    assert server.part.answer()["wanted"] == 2
    assert json.loads((tmp_path / WANTED_FILE).read_text())["reason"] == advice.reason


def test_the_future_has_the_delays_that_the_journal_tells(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    worlds_of: list[FutureWorld] = []
    monkeypatch.setattr(
        module, "judge", lambda load, world, devices, **_: (
            worlds_of.append(world) or Judged(devices=devices, requests=1, missed=0)
        ),
    )  # fmt: skip
    told(tmp_path, 100.0, 2).idle(SECONDS * NS_PER_S)
    constants = worlds_of[0].constants
    assert constants is not None
    assert 0 < constants.network.jitter[-1][1] < 1000
    assert constants.network.jitter_us, "those of a quiet machine were taken"


def test_too_few_devices_are_seen_with_the_model_and_the_cause(tmp_path: Path) -> None:
    advice = told(tmp_path, 450.0, 1, 8.0).idle(SECONDS * NS_PER_S)
    assert advice is not None
    assert advice.wanted > 1
    assert advice.cause == "load"
    assert "most that miss are for m-000" in advice.reason
    assert "too little time on devices" in advice.reason


def test_it_is_asked_every_few_seconds_and_waits_for_what_it_lacks(tmp_path: Path) -> None:
    empty = Told(tmp_path, ScalingRules())
    assert empty.idle(10**15) is None
    assert empty.part.answer()["waits_for"] == "models and devices"
    server, now_ns = told(tmp_path, 20.0, 1), SECONDS * NS_PER_S
    first = server.idle(now_ns)
    assert server.idle(now_ns + EVERY_NS - 1) is first
    assert server.idle(now_ns + EVERY_NS) is not first
    assert server.part.answer()["waits_for"] == ""


def test_what_a_simulation_raises_is_told_and_ends_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    server, now_ns = told(tmp_path, 20.0, 1), SECONDS * NS_PER_S

    def broken(*given: object, **more: object) -> None:
        raise MemoryError("no more")

    with monkeypatch.context() as patched:
        patched.setattr(module, "judge", broken)
        assert server.idle(now_ns) is None
    assert server.part.answer()["waits_for"] == "MemoryError: no more"
    assert server.idle(now_ns + EVERY_NS) is not None


def test_without_an_advice_there_is_no_metric(tmp_path: Path) -> None:
    assert DevicesWanted.read(tmp_path / WANTED_FILE, 0) is None
    (tmp_path / WANTED_FILE).write_text("{")
    assert DevicesWanted.read(tmp_path / WANTED_FILE, 0) is None


def test_it_ends_with_the_observer_whatever_it_simulates(tmp_path: Path) -> None:
    server = told(tmp_path, 100.0, 1)

    async def main() -> float:
        server.part.on_idle(SECONDS * NS_PER_S)
        server.part.close(0)
        began = time.process_time()
        await asyncio.gather(*server.tasks)
        return time.process_time() - began

    assert asyncio.run(main()) < 1, "3,000 requests on several numbers of devices would take longer"
    assert server.part.advice is None

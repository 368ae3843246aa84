"""Servers that give verdicts, for tests: models of 16 + 4n ms, SLO 200 ms."""

from __future__ import annotations

from clockwork_serve.controller import ControllerConfig
from clockwork_serve.messages import Cause, Outcome
from clockwork_serve.units import ms
from tests.controller.honest import World, device, model, profile

SLO = 200.0


def world(*names: str, decide_ms: float | None = 0, devices: int = 1, pages: int = 16) -> World:
    """Models of 16 + 4n ms whose weights are on every device, and a server that decides at the door."""
    made = World(ControllerConfig(decide_ns=-1 if decide_ms is None else ms(decide_ms), max_batch=8))
    made.serve(*[model(name) for name in names], times=profile(b1_ms=20, step_ms=4))
    made.join(*[device(f"d{at}", pages) for at in range(devices)])
    for name in names:
        made.ask(name, slo_ms=5000, until_ms=200)
    made.actions.clear()
    return made


def took_ms(made: World, request_id: str, sent_ns: int) -> float:
    """How long an answer took."""
    return (made.answered_ns[request_id] - sent_ns) / ms(1)


def full_plan(decide_ms: float) -> tuple[World, list[str]]:
    """A device whose plan has no room left for a second, and the requests that it was promised to."""
    made = world("a", "b", decide_ms=decide_ms)
    ids = [made.request("a", slo_ms=1000, decide_ns=0) for _ in range(300)]
    made.run(until_ms=40)
    refused = [answer for answer in made.answers.values() if answer.outcome is Outcome.REJECTED]
    assert 100 < len(refused) < 200
    return made, ids


def broken(made: World, ids: list[str]) -> list[Cause]:
    """The causes of the promises among these requests that were broken."""
    return [made.answers[one].cause for one in ids if made.answers[one].cause is not Cause.NONE]

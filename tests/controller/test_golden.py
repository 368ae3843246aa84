"""Golden transcripts: a scenario, then every effect under each policy. UPDATE_GOLDEN=1 writes them anew."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from clockwork_serve.controller import POLICIES, ControllerConfig
from clockwork_serve.messages import Answer, Cancel, ControllerEffect, Infer, Load, Readiness, Release, Unload
from clockwork_serve.units import to_ms
from tests.controller.honest import World, device, model, profile

GOLDEN = Path(__file__).parent / "golden"
RULE = "----"


class Teller(World):
    """A world that writes down each effect, in ms since the scenario began."""

    def __init__(self, config: ControllerConfig | None = None) -> None:
        self.lines: list[str] = []
        super().__init__(config)
        self.zero_ns = self.now_ns

    def _perform(self, effects: list[ControllerEffect]) -> None:
        self.lines += [
            f"{to_ms(self.now_ns - self.zero_ns):8.2f}  {self._told(effect)}" for effect in effects
        ]
        super()._perform(effects)

    def _told(self, effect: ControllerEffect) -> str:
        match effect:
            case Load():
                return (
                    f"LOAD    {effect.model} -> {effect.device} pages {_pages(effect)} {self._window(effect)}"
                )
            case Unload():
                return f"UNLOAD  {effect.model} -> {effect.device} pages {_pages(effect)}"
            case Infer():
                calls = " ".join(call.request_id for call in effect.calls)
                batch = f"b{effect.batch} [{calls}]"
                return f"INFER   {effect.model} -> {effect.device} {batch} {self._window(effect)}"
            case Answer():
                retry = f" retry in {to_ms(effect.retry_after_ns):.1f} ms" if effect.retry_after_ns else ""
                reason = f" {effect.reason.value}" if effect.reason.value else ""
                return f"ANSWER  {effect.request_id} {effect.outcome.value}{reason}{retry}"
            case Release():
                return f"RELEASE {effect.request_id}"
            case Readiness():
                return f"READY   {effect.ready}" + (f" ({effect.why})" if effect.why else "")

    def _window(self, action: Load | Infer) -> str:
        earliest, latest = (
            to_ms(at - self.zero_ns) for at in (action.window.earliest_ns, action.window.latest_ns)
        )
        return f"within {earliest:.2f} .. {latest:.2f}"


def _pages(action: Load | Unload) -> str:
    return f"{action.extent.first}+{action.extent.count}"


def play(script: list[str], policy: str) -> list[str]:
    """Run a scenario's commands under a policy and return its transcript."""
    world = Teller(ControllerConfig(policy=policy))
    for line in script:
        word, *rest = line.split()
        match word:
            case "models":
                world.serve(*[model(name) for name in rest[1:]], times=profile(b1_ms=float(rest[0])))
            case "worker":
                world.join(device(rest[0], pages=int(rest[1])), worker=f"w-{rest[0]}")
            case "kill":
                world.kill(f"w-{rest[0]}", rest[0])
            case "ask":
                world.request(rest[0], slo_ms=float(rest[1]))
            case "cancel":
                world.tell(Cancel(request_id=rest[0]))
            case "slower":
                world.slower = float(rest[0])
            case "wait":
                world.run(until_ms=float(rest[0]))
            case _:
                raise AssertionError(f"unknown command {line!r}")
    return world.lines


@pytest.mark.parametrize("path", sorted(GOLDEN.glob("*.txt")), ids=lambda path: path.stem)
def test_the_transcripts_are_as_written(path: Path) -> None:
    written = path.read_text()
    scenario = written.partition(RULE)[0]
    script = [line for line in scenario.splitlines() if line and not line.startswith("#")]
    told = scenario + "".join(
        [
            f"{RULE} {policy}\n" + "".join([f"{line}\n" for line in play(script, policy)])
            for policy in POLICIES
        ]
    )
    if os.environ.get("UPDATE_GOLDEN"):
        path.write_text(told)
        return
    assert written == told, f"{path.name}: run with UPDATE_GOLDEN=1 and read the difference"


def test_there_are_transcripts() -> None:
    assert len(list(GOLDEN.glob("*.txt"))) >= 4

"""Stories of a worker as text: the scenario above the line, what it decides below, reviewed by eye.

``UPDATE_GOLDEN=1 pytest tests/worker/test_golden.py`` writes the lower halves anew.

    0       code net                                       added (and "-code net": removed)
    0       prepared gpu:0 net [why not]
    0       load 1 a 0-1 v1 [0..5] [on gpu:1]              id, model, pages, version, window in ms
    0       unload 2 a 0-1 v1
    0       infer 3 a 0-1 v1 batch 4 rows 1,1,2 [0..5]
    2.5     done exec [why not]                            what runs on that lane of gpu:0 ends
    3       lost | found | keep 1 2 | stop | tick          versions of weights to keep
"""

from __future__ import annotations

import os
import re
from pathlib import Path

import pytest
from msgspec import structs

from clockwork_serve.messages import (
    Action,
    CodeAdded,
    CodeReady,
    CodeRemoved,
    Infer,
    Lane,
    Load,
    Result,
    RetainWeights,
    Status,
    Unload,
    WorkerJoined,
)
from clockwork_serve.units import to_ms
from clockwork_serve.worker import (
    ControllerFound,
    ControllerLost,
    Prepare,
    Prepared,
    Retire,
    Retired,
    Start,
    Stop,
    Worker,
    WorkerEffect,
    WorkerEvent,
)
from tests.worker.actions import CODE, GPU, PROFILE, SPEC, Told, done, infer, load, unload

FOLDER = Path(__file__).parent / "golden"
LINE = "-" * 20
ACTION = re.compile(
    r"(?P<kind>load|unload|infer) (?P<id>\d+) (?P<model>\S+) (?P<first>\d+)-(?P<last>\d+) v(?P<version>\d+)"
    r"(?: batch (?P<batch>\d+))?(?: rows (?P<rows>[\d,]+))?(?: \[(?P<from>[\d.]+)\.\.(?P<to>[\d.]+)\])?"
)


class Story:
    """Reads a scenario line by line, and writes what is decided."""

    def __init__(self) -> None:
        self.tell = Told(Worker((structs.replace(SPEC, pages=6),)))
        self.running: dict[Lane, tuple[Start, float]] = {}
        self.told: list[str] = []

    def run(self, scenario: str) -> str:
        instants: dict[float, list[str]] = {}
        for line in scenario.splitlines():
            words = line.split("#")[0].strip()
            if words:
                at, what = words.split(maxsplit=1)
                instants.setdefault(float(at), []).append(what)
        assert list(instants) == sorted(instants), "times go up"
        for at_ms, lines in instants.items():
            self.step(at_ms, lines)
        return "\n".join(self.told) + "\n"

    def step(self, at_ms: float, lines: list[str]) -> None:
        while (wake := self.tell.wake_ms()) is not None and wake < at_ms:
            self.write(wake, self.tell(wake))
        events = [self.read(at_ms, line) for line in lines]
        self.write(at_ms, self.tell(at_ms, *(event for event in events if event is not None)))

    def read(self, at_ms: float, line: str) -> WorkerEvent | None:
        words = line.split()
        match words:
            case ["tick"]:
                return None
            case ["lost"]:
                return ControllerLost()
            case ["found"]:
                return ControllerFound(worker="w")
            case ["keep", *versions]:
                return RetainWeights(device=GPU, versions=tuple([int(version) for version in versions]))
            case ["stop"]:
                return Stop()
            case ["code", name]:
                return CodeAdded(code=structs.replace(CODE, code_id=name), profiles=(PROFILE,))
            case ["-code", name]:
                return CodeRemoved(code_id=name)
            case ["prepared", device, name, *why]:
                return Prepared(device=device, code_id=name, ok=not why, message=" ".join(why))
            case ["retired", device, name]:
                return Retired(device=device, code_id=name)
            case ["done", lane, *why]:
                work, started_ms = self.running.pop(Lane(lane))
                status = Status(why[0]) if why else Status.OK
                event = done(work.action, at_ms, status, started_ms=started_ms)
                return structs.replace(event, message=" ".join(why[1:]))
            case _:
                return self.action(line)

    def action(self, line: str) -> Action:
        found = ACTION.fullmatch(line)
        assert found is not None, f"not understood: {line}"
        part = found.groupdict()
        number, model, version = int(part["id"]), part["model"], int(part["version"])
        first, count = int(part["first"]), int(part["last"]) - int(part["first"]) + 1
        window = (float(part["from"] or 0), float(part["to"] or 1000))
        if part["kind"] == "load":
            return load(number, model, first, count, version, window=window, size=count * 100)
        if part["kind"] == "unload":
            return unload(number, model, first, count, version, window=window)
        rows = tuple(int(word) for word in (part["rows"] or "1").split(","))
        batch = int(part["batch"] or 1)
        return infer(number, model, first, count, version, window=window, batch=batch, rows=rows)

    def write(self, at_ms: float, effects: list[WorkerEffect]) -> None:
        for effect in effects:
            if isinstance(effect, Start):
                self.running[effect.lane] = effect, at_ms
            self.told.append(f"{at_ms:<8g}{words_of(effect)}")


def words_of(effect: WorkerEffect) -> str:
    match effect:
        case Start():
            action = effect.action
            kind = {Load: "LOAD", Unload: "UNLOAD", Infer: "INFER"}[type(action)]
            last = action.extent.first + action.extent.count - 1
            return f"{effect.lane}: {kind} {action.action_id} {action.model} {action.extent.first}-{last}"
        case Prepare():
            return f"load: prepare {effect.code.code_id}"
        case Retire():
            return f"load: retire {effect.code_id}"
        case CodeReady():
            return f"ready {effect.code_id}" if effect.ok else f"not ready {effect.code_id}: {effect.message}"
        case WorkerJoined():
            held = [
                f"{one.model} v{one.version}{'' if one.ready else ' loading'}"
                for s in effect.states
                for one in s.weights
            ]
            runs = [
                f"{one.lane} {one.action_id} {to_ms(one.left_ns):g} ms"
                for s in effect.states
                for one in s.running
            ]
            return f"joined, holds {', '.join(held) or 'nothing'}; runs {', '.join(runs) or 'nothing'}"
        case Result():
            took = f", took {to_ms(effect.lane_ns):g} ms" if effect.status is Status.OK else ""
            message = f": {effect.message}" if effect.message else ""
            return f"result {effect.action_id} {effect.status}{took}{message}"


@pytest.mark.parametrize("path", sorted(FOLDER.glob("*.txt")), ids=lambda path: path.stem)
def test_the_story_is_told_as_before(path: Path) -> None:
    scenario, _, expected = path.read_text().partition(LINE + "\n")
    told = Story().run(scenario)
    if os.environ.get("UPDATE_GOLDEN"):
        path.write_text(f"{scenario}{LINE}\n{told}")
        pytest.skip("written anew; now read the difference")
    assert told == expected, "UPDATE_GOLDEN=1 writes it anew"


def test_there_are_stories() -> None:
    assert len(list(FOLDER.glob("*.txt"))) >= 5
    assert all(path.read_text().startswith("# ") for path in FOLDER.glob("*.txt"))

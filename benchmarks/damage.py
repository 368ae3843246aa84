"""Compiled artefacts damaged at random: whether an answer is ever wrong, and whether all is made again.

First in one process: a file of the cache of a few small models is changed (a bit, a stretch of zeros, its
end cut off, more bytes, the content of another file), then loaded by a device, or read by the compiler; then
what is missing is compiled, and loaded again. Then whole servers: files are damaged while they serve, with
weights that are not resident, or while they are stopped. Every answer is compared with the matrix it comes
from.
"""

from __future__ import annotations

import json
import logging
import os
import random
import signal
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from benchmarks.device_lane_time import output
from clockwork_serve.devices import CallBuffers, Device, DeviceConfig, build
from clockwork_serve.errors import ClockworkError, DamageError
from clockwork_serve.messages import Extent
from clockwork_serve.store import Cache, Repository, ServedVersion, StoreConfig, compile_all
from clockwork_serve.units import MIB
from harness import records, repositories
from harness.report import Outcome, finish, parser
from harness.serving import Serving, serve, total

WIDE, LONG = 256, 64
MODELS = 4
KINDS = ("flip", "zeros", "cut", "more", "swapped")
TIMES, SHORT_TIMES = 10_000, 1_000
SERVER_TIMES, SHORT_SERVER_TIMES = 200, 20
REPAIR_S = 30.0
STORED = ("weights", "codes", "compiled", "seen", "architectures", "profiles")
RECORDS = ("compiled", "seen", "architectures")
DEVICE = DeviceConfig(device="cpu:0", memory_bytes=MIB)

X = np.linspace(-1.0, 1.0, WIDE, dtype=np.float32).reshape(1, WIDE)


@dataclass(slots=True)
class Tally:
    """What came of the damage done."""

    done: Counter[str] = field(default_factory=Counter)
    wrong: list[str] = field(default_factory=list)
    """Answers that were not those of the model."""
    unseen: list[str] = field(default_factory=list)
    """Damage that nobody noticed, though something was read from it."""
    lost: list[str] = field(default_factory=list)
    """What was not made again."""
    harmless: int = 0
    """Changed nothing: zeros over zeros."""


def files_of(root: Path) -> list[Path]:
    """Everything stored in a cache."""
    return sorted(path for name in STORED for path in root.glob(f"v*/{name}/**/*") if path.is_file())


def change(kind: str, path: Path, others: Sequence[Path], dice: random.Random) -> bool:
    """Damage a file in its place; False if that changes nothing."""
    before = path.read_bytes()
    data = bytearray(before)
    at = dice.randrange(len(data)) if data else 0
    match kind:
        case "flip" if data:
            data[at] ^= 1 << dice.randrange(8)
        case "zeros":
            length = min(dice.randrange(1, 4097), len(data) - at)
            data[at : at + length] = bytes(length)
        case "cut":
            del data[at:]
        case "more":
            data += dice.randbytes(dice.randrange(1, 4097))
        case _:
            other = dice.choice(others)
            data = bytearray(other.read_bytes())
            other.write_bytes(before)
    path.write_bytes(data)
    return bytes(data) != before


class OneProcess:
    """A repository, its cache and a device."""

    def __init__(self, folder: Path) -> None:
        self.root, self.cache_dir = folder / "models", folder / "cache"
        for index in range(MODELS - 1):
            repositories.one_matrix(self.root, f"m{index}", repositories.matrix_of(index, WIDE, LONG))
        # Of another architecture, so that codes can be exchanged, too.
        repositories.one_matrix(
            self.root, f"m{MODELS - 1}", repositories.matrix_of(MODELS - 1, WIDE, 2 * LONG)
        )
        self.config = StoreConfig(cache_dir=str(self.cache_dir))
        self.device: Device = build(DEVICE)
        self.prepared: set[str] = set()

    def compiled(self, tally: Tally, read: str = "") -> tuple[list[ServedVersion], int]:
        """All models, and how many files were found damaged by compiling them.

        Records of the kind ``read`` are all read before, for nothing may ask for them otherwise.
        """
        with Cache(self.cache_dir) as cache:
            for path in list((cache.root / read).iterdir()) if read in RECORDS else ():
                cache.read(read, path.name)
            served, problems = compile_all(Repository(self.root, self.config), cache, threads=1)
        tally.lost += [str(problem) for problem in problems]
        return served, len(cache.damage)

    def wrong(self, served: ServedVersion) -> bool:
        """Load and ask a model. Raises :class:`DamageError` where that is noticed."""
        code = served.code
        if code.code_id not in self.prepared:
            self.device.prepare(code)
            self.prepared.add(code.code_id)
        extent = Extent(0, self.device.spec.pages_of(served.model.weights.size))
        self.device.load(records.load(served.model, extent))
        call = CallBuffers(inputs={"x": X}, output=memoryview(bytearray(served.model.output_bytes + 64)))
        self.device.infer(records.infer(served.model, extent), [call])
        return not right(served.model.name, output(call, "y"))

    def retire(self) -> None:
        """Have every code opened anew."""
        for code_id in self.prepared:
            self.device.retire(code_id)
        self.prepared.clear()


def right(name: str, found: object) -> bool:
    """Whether numbers are a model's answer to ``X``."""
    index = int(name[1:])
    wanted = X @ repositories.matrix_of(index, WIDE, LONG if index < MODELS - 1 else 2 * LONG)
    return bool(np.allclose(np.asarray(found).ravel(), wanted.ravel(), rtol=1e-4, atol=1e-5))


def in_one_process(folder: Path, times: int, dice: random.Random) -> Tally:
    """Damage, load, compile, load, so many times."""
    tally, one = Tally(), OneProcess(folder)
    served, _ = one.compiled(tally)
    for each in served:
        assert not one.wrong(each), "wrong before anything was damaged"
    began = time.monotonic()
    for number in range(times):
        files = files_of(one.cache_dir)
        path, kind = dice.choice(files), dice.choice(KINDS)
        place = path.relative_to(one.cache_dir).parts[1]
        alike = [other for other in files if other.relative_to(one.cache_dir).parts[1] == place]
        same = [other for other in alike if other != path]
        if kind == "swapped" and not same:
            kind = "flip"
        case = f"{kind} {path.relative_to(one.cache_dir)}"
        tally.done[f"{kind} {place}"] += 1
        changed = change(kind, path, same, dice)
        if place == "codes":
            one.retire()
        noticed = _load_all(one, served, tally, case)
        again, found = one.compiled(tally, place)
        if not changed:
            tally.harmless += 1
        elif noticed + found == 0:
            tally.unseen.append(case)
        if found and place == "codes":
            one.retire()
        if _load_all(one, again, tally, case) or len(again) != MODELS:
            tally.lost.append(case)
        served = again
        if number % 500 == 499:
            print(f"  {number + 1} of {times}, {time.monotonic() - began:.0f} s", flush=True)
    one.device.close()
    return tally


def _load_all(one: OneProcess, served: Sequence[ServedVersion], tally: Tally, case: str) -> int:
    """Load and ask each model; how often damage was noticed."""
    noticed = 0
    for each in served:
        try:
            if one.wrong(each):
                tally.wrong.append(f"{case}: {each.model.name}")
        except DamageError:
            noticed += 1
        except ClockworkError as error:
            tally.wrong.append(f"{case}: {error}")
    return noticed


class Asked:
    """A server of matrices that holds two at a time, asked over HTTP."""

    def __init__(self, serving: Serving, tally: Tally) -> None:
        self.serving = serving
        self.tally = tally

    def ask(self, index: int, case: str) -> bool:
        """Whether it was answered well; a wrong answer is tallied, and an error must have a reason."""
        tensor = {"name": "x", "shape": [1, WIDE], "datatype": "FP32", "data": X.ravel().tolist()}
        body = json.dumps({"inputs": [tensor], "parameters": {"slo_ms": 20_000}}).encode()
        url = f"{self.serving.http_url}/v2/models/m{index}/infer"
        try:
            request = urllib.request.Request(url, body)  # noqa: S310 (a URL of ours)
            with urllib.request.urlopen(request, timeout=60) as response:  # noqa: S310 (a URL of ours)
                found = json.load(response)["outputs"][0]["data"]
        except urllib.error.HTTPError as error:
            if not json.loads(error.read() or b"{}").get("error"):
                self.tally.wrong.append(f"{case}: {error.code} without a reason")
            return False
        if not right(f"m{index}", found):
            self.tally.wrong.append(f"{case}: m{index}")
        return True

    def all_well(self, case: str) -> bool:
        """Ask all."""
        answers = [self.ask(index, case) for index in range(MODELS - 1)]
        return all(answers)

    def until_well(self, case: str) -> None:
        """Ask all until all answer well, and twice more, so that each was loaded since."""
        end, well = time.monotonic() + REPAIR_S, 0
        while well < 2:
            well = well + 1 if self.all_well(case) else 0
            if time.monotonic() > end:
                self.tally.lost.append(case)
                return


def in_servers(folder: Path, times: int, dice: random.Random) -> tuple[Tally, int]:
    """Damage files of a server that runs or is stopped; also how many files were counted damaged."""
    tally, counted, done = Tally(), 0, 0
    root, cache = folder / "models", folder / "cache"
    for index in range(MODELS - 1):
        repositories.one_matrix(root, f"m{index}", repositories.matrix_of(index, WIDE, LONG))
    case = "start"
    while done < times:
        with serve(root, cache=cache, memory_bytes=MIB // 2, log_level="critical") as serving:
            asked = Asked(serving, tally)
            asked.until_well(case)
            for _ in range(9):
                if done == times:
                    break
                case = _damaged(cache, dice, tally, "serving")
                done += 1
                if "/codes/" in case:
                    os.kill(serving.worker_pid(), signal.SIGKILL)
                asked.until_well(case)
            counted += round(total(serving.metrics(), "clockwork_cache_damaged_total"))
        if done < times:
            case = _damaged(cache, dice, tally, "stopped")
            done += 1
        print(f"  {done} of {times}", flush=True)
    return tally, counted


def _damaged(cache: Path, dice: random.Random, tally: Tally, when: str) -> str:
    files = files_of(cache)
    place = dice.choice(("weights", "weights", "codes", "seen", "compiled", "profiles"))
    some = [path for path in files if path.relative_to(cache).parts[1] == place] or files
    path, kind = dice.choice(some), dice.choice(KINDS)
    others = [other for other in some if other != path]
    kind = "flip" if kind == "swapped" and not others else kind
    change(kind, path, others, dice)
    tally.done[f"{when}: {kind} {place}"] += 1
    return f"{when}: {kind} {path.relative_to(cache)}"


def conclude(outcome: Outcome, name: str, tally: Tally, **judged: list[str]) -> None:
    """Judge what came of it."""
    count = tally.done.total()
    for key, cases in judged.items():
        what = key.replace("_", " ")
        outcome.none(f"{name}: {what}", cases, more=f"of {count}")


def main() -> int:
    """Run it; returns the exit status."""
    options = parser(__doc__)
    options.add_argument("--short", action="store_true", help="a tenth of it: minutes")
    options.add_argument("--times", type=int, help="how often in one process")
    options.add_argument("--server-times", type=int, help="how often in whole servers")
    given = options.parse_args()
    logging.disable(logging.CRITICAL)
    dice = random.Random(given.seed)
    times = (SHORT_TIMES if given.short else TIMES) if given.times is None else given.times
    server_times = SHORT_SERVER_TIMES if given.short else SERVER_TIMES
    server_times = server_times if given.server_times is None else given.server_times
    outcome = Outcome("benchmarks.damage")
    memory = "/dev/shm" if Path("/dev/shm").is_dir() else None  # noqa: S108 - where a sync costs nothing
    with tempfile.TemporaryDirectory(dir=memory) as folder:
        alone = in_one_process(Path(folder), times, dice)
    conclude(
        outcome, "one process", alone, wrong_answers=alone.wrong, damage_unnoticed=alone.unseen,
        not_made_again=alone.lost,
    )  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        whole, counted = in_servers(Path(folder), server_times, dice)
    conclude(
        outcome, "servers", whole, wrong_answers_or_errors_without_reason=whole.wrong,
        not_served_again=whole.lost,
    )  # fmt: skip
    outcome.figures = {
        "one_process": dict(alone.done), "harmless": alone.harmless, "servers": dict(whole.done),
        "counted_by_servers": counted, "wrong": [*alone.wrong, *whole.wrong][:20],
        "unseen": alone.unseen[:20], "lost": [*alone.lost, *whole.lost][:20],
    }  # fmt: skip
    return finish(outcome, given.json)


if __name__ == "__main__":
    sys.exit(main())

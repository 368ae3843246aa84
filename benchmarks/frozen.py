"""Whether the brains decide bit for bit what they decided before: one hash over all that they send.

    python -m benchmarks.frozen                        2,000 seeds and the journals kept beside this file
    python -m benchmarks.frozen --journal FOLDER       and all journals of that folder
    python -m benchmarks.frozen --keep                 note what is found as what must be found from now on
    python -m benchmarks.frozen --record --keep        with journals of servers of today, not those kept

Each seed is a scenario by chance, with faults, played in the simulator. What is hashed of it is every step
of the controller as a journal holds it: the instant, the events (the workers' results among them) and the
effects, in the bytes in which they go between processes. A journal is replayed: each decision that a server
once made must be made again, byte for byte, and its effects are hashed likewise. Names of classes, modules
and attributes are in none of these bytes, so the hash outlives every move of code that changes no decision;
any other change of it is to be explained. Seeds are hashed in blocks of a hundred, so that a difference has
a place. Controllers that are deposed or busy, of which the first hashes had none, are left out.
"""

from __future__ import annotations

import hashlib
import os
import random
import shutil
import signal
import sys
import tempfile
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Final

import msgspec

from clockwork_serve.sim.replay import replay
from clockwork_serve.telemetry import Step, read_records
from clockwork_serve.units import MIB
from harness import repositories
from harness.http_load import Shot, infer_message, open_loop, poisson, run
from harness.report import Outcome, finish, parser
from harness.seeds import Digest, play_seed, process_pool
from harness.serving import serve

SEEDS: Final = 2_000
BLOCK: Final = 100
REQUESTS: Final = 500
KEPT: Final = Path(__file__).with_suffix(".json")
JOURNALS: Final = Path(__file__).parent / "journals"


RECORDED: Final = {
    "overload": (15, 250.0, 64 * MIB, ""),
    "cold_models": (40, 60.0, 16 * MIB, ""),
    "controller_killed": (5, 60.0, 64 * MIB, "controller"),
    "worker_killed": (5, 60.0, 64 * MIB, "{worker}"),
}
"""Journals of real servers: models of 16 + 4n ms, requests a second, memory, and who is killed half way."""
RECORDED_S: Final = 2.0
ASKED: Final = 0.3
"""The share of their requests that say themselves how long the yes or no may take."""


class Frozen(msgspec.Struct, kw_only=True):
    """What must be found: hashes of the first seed, of blocks of seeds, in order, and of journals by name."""

    first: str = ""
    blocks: list[str] = []
    journals: dict[str, str] = {}

    def whole(self) -> str:
        """One hash over all of it."""
        return hashlib.sha256(msgspec.json.encode(self, order="deterministic")).hexdigest()


def seed_hash(seed: int) -> bytes:
    """Of one seed, or of how it failed."""
    digest = Digest()
    try:
        play_seed(seed, REQUESTS, (digest,), frozen=True)
    except AssertionError as error:
        print(f"  seed {seed} fails: {error}", file=sys.stderr)
        return b"failed"
    return bytes.fromhex(digest.hex())


def block_hash(first: int) -> str:
    """Of a hundred seeds from that one on."""
    found = hashlib.sha256()
    for seed in range(first, first + BLOCK):
        found.update(seed_hash(seed))
    return found.hexdigest()


def journal_hash(path: Path) -> str:
    """Of the effects of a journal whose decisions are made again; empty if one of them differs."""
    if not replay(path).agrees:
        return ""
    encoder, found = msgspec.msgpack.Encoder(), hashlib.sha256()
    for _, record in read_records(path):
        if isinstance(record, Step):
            found.update(encoder.encode((record.now_ns, record.effects)))
    return found.hexdigest()


def recorded() -> list[Path]:
    """The journals kept here: two seconds of servers that were overloaded, cold, or lost a process."""
    return sorted(JOURNALS.glob("*.journal"))


def record() -> None:
    """Replace the journals kept here by those of servers of today."""
    for name, (models, rate_rps, memory_bytes, victim) in RECORDED.items():
        with tempfile.TemporaryDirectory() as folder:
            root, path = Path(folder) / "models", Path(folder) / f"{name}.journal"
            for at in range(models):
                repositories.emulated(root, f"m{at}", {size: 16 + 4 * size for size in (1, 2, 4, 8)})
            with serve(root, device="emulated", memory_bytes=memory_bytes, journal=path) as serving:
                rng, x = random.Random(1), [("x", "FP32", (1, 4), bytes(16))]
                shots: list[Shot] = []
                for at_ns in poisson(rate_rps, RECORDED_S, rng):
                    asks = {"decide_ms": rng.choice((0, 50))} if rng.random() < ASKED else None
                    name_of, slo_ms = f"m{rng.randrange(models)}", rng.choice((100, 200, 400))
                    message = infer_message(serving.http_url, name_of, x, slo_ms=slo_ms, parameters=asks)
                    shots.append(Shot(at_ns, message))
                pid = None if not victim else serving.server.pid(victim.format(worker=serving.worker))
                if pid is not None:
                    threading.Timer(RECORDED_S / 2, os.kill, (pid, signal.SIGKILL)).start()
                run(open_loop(serving.http_url, shots))
            shutil.copy(path, JOURNALS)


def blocks(count: int, jobs: int) -> Iterator[str]:
    """In order, played in so many processes."""
    with process_pool(jobs) as pool:
        yield from pool.map(block_hash, range(0, count, BLOCK))


def freeze(count: int, journals: Sequence[Path], jobs: int) -> Frozen:
    """Hash it all; tells on a terminal how far it is."""
    found = Frozen(first=seed_hash(0).hex())
    for block in blocks(count, jobs):
        found.blocks.append(block)
        if sys.stderr.isatty():
            print(f"\r{len(found.blocks) * BLOCK:,} of {count:,} seeds", end="", file=sys.stderr, flush=True)
    if sys.stderr.isatty():
        print(file=sys.stderr)
    for path in journals:
        found.journals[path.stem] = journal_hash(path)
    return found


def conclude(found: Frozen, wanted: Frozen, outcome: Outcome) -> None:
    """Compare what was played now with as much of what is kept."""
    other = [
        f"{number * BLOCK}..{(number + 1) * BLOCK - 1}"
        for number, (block, kept) in enumerate(zip(found.blocks, wanted.blocks, strict=False))
        if block != kept
    ]
    outcome.judge(
        f"seeds 0 to {len(found.blocks) * BLOCK - 1}: steps as they were",
        asked="all", found="all" if not other else f"not {', '.join(other[:5])} ({len(other)} blocks)",
        good=not other and len(found.blocks) <= len(wanted.blocks),
    )  # fmt: skip
    for name, journal in found.journals.items():
        kept = wanted.journals.get(name)
        says = "differs" if not journal else "agrees" if kept in (journal, None) else "has other effects"
        outcome.judge(f"journal {name}", asked="agrees", found=says, good=says == "agrees")
    outcome.figures.update(hash=found.whole(), blocks=found.blocks, journals=found.journals)
    print(
        f"  hash of {len(found.blocks) * BLOCK:,} seeds and {len(found.journals)} journals: {found.whole()}"
    )


def main() -> int:
    """Run it; returns the exit status."""
    options = parser(__doc__)
    options.add_argument("--seeds", type=int, default=SEEDS, help=f"a multiple of {BLOCK} [default: {SEEDS}]")
    options.add_argument("--journal", type=Path, action="append", default=[], metavar="FOLDER")
    options.add_argument("--jobs", type=int, default=2)
    options.add_argument("--keep", action="store_true", help=f"write {KEPT.name} from what is found")
    options.add_argument("--record", action="store_true", help="record the journals kept here anew, before")
    given = options.parse_args()
    if given.record:
        record()
    if given.seeds <= 0 or given.seeds % BLOCK:
        options.error(f"--seeds: expected a multiple of {BLOCK}, found {given.seeds}")
    journals = [path for folder in given.journal for path in sorted(folder.glob("*.journal"))]
    found = freeze(given.seeds, [*recorded(), *journals], given.jobs)
    if given.keep:
        KEPT.write_bytes(msgspec.json.format(msgspec.json.encode(found), indent=1) + b"\n")
    outcome = Outcome("benchmarks.frozen")
    conclude(found, msgspec.json.decode(KEPT.read_bytes(), type=Frozen), outcome)
    return finish(outcome, given.json)


if __name__ == "__main__":
    sys.exit(main())

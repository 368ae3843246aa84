"""The message that holds a gateway's loop longest, searched for by protocol; then what it does to others.

A gateway's front end with a controller that answers at once gets messages made by grammars with knobs. The
score is the longest turn of its loop, in CPU time; the worst are bred. Then ten clients send the worst of all
to a real server, one a second each, beside honest clients.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Final

from benchmarks.heaviest.gateway import MODELS, Measured, measured_gateway
from benchmarks.heaviest.messages import Recipe
from benchmarks.heaviest.search import Search, Sender, keep, kept, search
from clockwork_serve.units import MIB
from harness.http_load import Shot, infer_message, open_loop, run
from harness.machine import anonymous_bytes, children
from harness.report import Outcome, finish, parser, quantile, table
from harness.serving import Serving, serve

LOOP_MS: Final = 5.0
GROWTH_BYTES: Final = 100 * MIB
SETTLE_S: Final = 65.0
"""Within a minute a gateway returns to the system what it does not need any more."""
SECONDS: Final = 1200.0
SHORT_SECONDS: Final = 240.0
SENDERS: Final = 10
PER_S: Final = 50
ALLOWED_MS: Final = 50.0
SHARE: Final = 0.999
_SLO_MS: Final = 5000


def judge(outcome: Outcome, searches: dict[str, Search]) -> None:
    """A row for each protocol."""
    rows = []
    for protocol, one in searches.items():
        for each in one.best[:3]:
            told = {name: value for name, value in each.recipe.items() if value not in ("", 0, 1)}
            rows.append(
                (protocol, f"{each.loop_ms:.2f}", f"{each.lock_ms:.2f}", each.nbytes, each.answer[:60], told)
            )
        worst = one.best[0]
        what = f"{protocol}: the worst of {one.tried} messages, of the loop"
        outcome.at_most(what, LOOP_MS, worst.loop_ms, "ms")
        outcome.figures[protocol] = {
            "tried": one.tried,
            "worst": [
                {"recipe": each.recipe, "loop_ms": each.loop_ms, "lock_ms": each.lock_ms,
                 "bytes": each.nbytes, "answer": each.answer}
                for each in one.best
            ],
        }  # fmt: skip
    print(table(("", "loop ms", "lock ms", "bytes", "answer", "recipe"), rows))


def judge_memory(outcome: Outcome, before_bytes: int, measured: Measured) -> None:
    """What the gateway and its processes kept of all that."""
    growth = measured.memory_bytes - before_bytes
    allowed = GROWTH_BYTES // MIB
    outcome.at_most("memory kept after the search", allowed, growth / MIB, "MiB", digits=0)


# Beside honest clients of a real server


@dataclass(slots=True)
class Window:
    """Honest requests for a while: their latencies, and those without a good answer."""

    latencies_ms: list[float]
    ends: Counter[str]

    @property
    def lost(self) -> int:
        """Requests that got no 200."""
        return sum(self.ends.values()) - self.ends["200"]


def beside(outcome: Outcome, recipes: list[Recipe], seconds: float) -> None:
    """Alone for a while, then beside those who send ``recipes``."""
    with tempfile.TemporaryDirectory(prefix="cw-") as folder:
        repository(Path(folder) / "models")
        with serve(Path(folder) / "models", device="emulated", slo_ms=None, log_level="error") as serving:
            honest(serving, 3)
            alone = honest(serving, seconds / 2)
            attack, growth, sent = attacked(serving, recipes, seconds, Path(folder) / "recipes.json")
    p50 = quantile(alone.latencies_ms, 0.5)
    within = sum(each <= p50 + ALLOWED_MS for each in attack.latencies_ms)
    alone_within = sum(each <= p50 + ALLOWED_MS for each in alone.latencies_ms)
    share = within / max(1, len(attack.latencies_ms))
    outcome.judge(
        f"beside {SENDERS} senders of the worst messages: honest requests within {ALLOWED_MS:g} ms of alone",
        asked=f">= {SHARE:.1%}",
        found=f"{share:.2%} (alone {alone_within / len(alone.latencies_ms):.2%})",
        good=share >= SHARE,
    )
    outcome.at_most("honest requests lost", 0, attack.lost, digits=0)
    in_flight = sum(sent)
    allowed = (GROWTH_BYTES + in_flight) // MIB
    outcome.at_most("memory beside them, more than before", allowed, growth / MIB, "MiB", digits=0)
    outcome.figures["beside"] = {
        name: {
            "p50_ms": quantile(window.latencies_ms, 0.5), "p99_ms": quantile(window.latencies_ms, 0.99),
            "p999_ms": quantile(window.latencies_ms, 0.999), "max_ms": max(window.latencies_ms),
            "ends": dict(window.ends),
        }
        for name, window in (("alone", alone), ("beside", attack))
    }  # fmt: skip


def repository(root: Path) -> None:
    """All models of the search, emulated."""
    for name, (datatype, shape, out, rows_max) in MODELS.items():
        (root / name / "1").mkdir(parents=True)
        batches = {1: 1.0, rows_max: 2.0} if rows_max else {1: 1.0}
        curve = ", ".join(f"{batch} = {duration}" for batch, duration in batches.items())
        (root / name / "clockwork.toml").write_text(
            f'backend = "emulated"\nmax_batch_size = {rows_max}\n'
            f'inputs = [{{name = "x", dims = {[*shape]}, datatype = "{datatype}"}}]\n'
            f'outputs = [{{name = "y", dims = {[*out]}, datatype = "FP32"}}]\n'
            f"[emulated]\ninfer_ms = {{{curve}}}\nload_ms = 1.0\nweights_mb = 1\n"
        )


def honest(serving: Serving, seconds: float) -> Window:
    """Small binary requests to the model that takes two numbers, at a steady rate."""
    message = infer_message(serving.http_url, "two", [("x", "FP32", (1, 2), bytes(8))], slo_ms=_SLO_MS)
    shots = [Shot(int(index * 1e9 / PER_S), message) for index in range(int(seconds * PER_S))]
    report = run(open_loop(serving.http_url, shots, connections=8))
    good = [sample.latency_ns / 1e6 for sample in report.samples if sample.status == 200]
    return Window(good, Counter(sample.end for sample in report.samples))


def attacked(
    serving: Serving, recipes: list[Recipe], seconds: float, file: Path
) -> tuple[Window, int, list[int]]:
    """The same beside those who send; the most that the gateway grew, and the messages' lengths."""
    pid = serving.server.pid("gateway-0") or next(
        pid for name in serving.server.names if "gateway" in name and (pid := serving.server.pid(name))
    )
    file.write_text(json.dumps(recipes))
    http_port, grpc_port = (url.rpartition(":")[2] for url in (serving.http_url, serving.grpc_url))
    command = [sys.executable, "-m", "benchmarks.heaviest", "--send", http_port, grpc_port, str(file)]
    command += ["--seconds", str(seconds)]
    before = most = _memory(pid)
    ends = threading.Event()

    def look() -> None:
        nonlocal most
        while not ends.wait(0.05):
            most = max(most, _memory(pid))

    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    lengths: list[int] = json.loads(process.stdout.readline())
    watcher = threading.Thread(target=look)
    watcher.start()
    try:
        window = honest(serving, seconds)
    finally:
        ends.set()
        watcher.join()
        process.kill()
        process.wait()
    return window, most - before, lengths


def _memory(pid: int) -> int:
    found = 0
    for each in (pid, *children(pid)):
        try:
            found += anonymous_bytes(each)
        except OSError:
            continue  # it ended meanwhile
    return found


def send(http_port: str, grpc_port: str, file: str, seconds: float) -> None:
    """Send each recipe once a second, from as many threads as there are senders."""
    recipes: list[Recipe] = json.loads(Path(file).read_text())
    sender = Sender(int(http_port), int(grpc_port))
    prepared = [sender.prepared(recipe) for recipe in recipes]
    chosen = [prepared[index % len(prepared)] for index in range(SENDERS)]
    print(json.dumps([length for length, _ in chosen]), flush=True)
    end = time.monotonic() + seconds

    def work(index: int) -> None:
        _, send_one = chosen[index]
        due = time.monotonic() + index / SENDERS
        while due < end:
            time.sleep(max(0.0, due - time.monotonic()))
            with suppress(OSError):  # it was cut off
                send_one()
            due = max(due + 1, time.monotonic())

    threads = [threading.Thread(target=work, args=(index,)) for index in range(SENDERS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def main() -> int:
    """Run it; returns the exit status."""
    options = parser(__doc__)
    options.add_argument("--seconds", type=float, help=f"of searching (default {SECONDS:g})")
    options.add_argument("--short", action="store_true", help=f"search for {SHORT_SECONDS:g} s")
    options.add_argument(
        "--keep", type=Path, metavar="FOLDER", help="try what is there first; write the worst there"
    )
    options.add_argument("--alone", action="store_true", help="search only; no real server")
    options.add_argument(
        "--send", nargs=3, metavar=("HTTP", "GRPC", "FILE"), help="only send FILE's recipes to these ports"
    )
    given = options.parse_args()
    if given.send:
        http_port, grpc_port, file = given.send
        send(http_port, grpc_port, file, given.seconds)
        return 0
    seconds = given.seconds or (SHORT_SECONDS if given.short else SECONDS)
    outcome = Outcome("benchmarks.heaviest")
    with measured_gateway() as measured:
        before_bytes = measured.memory_bytes
        searches = search(measured, seconds, Random(given.seed), kept(given.keep))
        time.sleep(SETTLE_S)
        judge_memory(outcome, before_bytes, measured)
    judge(outcome, searches)
    if given.keep is not None:
        keep(given.keep, searches)
    if not given.alone:
        worst = [one.best[0].recipe for one in searches.values() if one.best]
        beside(outcome, worst, min(60.0, max(20.0, seconds / 4)))
    return finish(outcome, given.json)


if __name__ == "__main__":
    sys.exit(main())

"""The worst messages beside honest clients of a real server: latency, losses and memory.

Run as a program, it is the senders of these messages: each sends one a second.
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
from typing import Final
from urllib.parse import urlsplit

from benchmarks.heaviest.gateway import MODELS, ROWS_MAX
from benchmarks.heaviest.messages import Recipe
from benchmarks.heaviest.search import Sender
from clockwork_serve.units import MIB
from harness import http_load as client
from harness.http_load import Shot, infer_message
from harness.machine import anonymous_bytes, children
from harness.report import Outcome, quantile
from harness.serving import Serving, serve

SENDERS: Final = 10
PER_S: Final = 50
ALLOWED_MS: Final = 50.0
SHARE: Final = 0.999
GROWTH_BYTES: Final = 100 * MIB
_SLO_MS: Final = 5000


@dataclass(slots=True)
class Window:
    """Honest requests for a while: their latencies, and those without a good answer."""

    latencies_ms: list[float]
    ends: Counter[str]

    @property
    def lost(self) -> int:
        """Requests that got no 200."""
        return sum(self.ends.values()) - self.ends["200"]


def judge(outcome: Outcome, recipes: list[Recipe], seconds: float) -> None:
    """Alone for a while, then beside those who send ``recipes``."""
    with tempfile.TemporaryDirectory(prefix="cw-") as folder:
        repository(Path(folder) / "models")
        with serve(Path(folder) / "models", device="emulated", slo_ms=None, log_level="error") as serving:
            honest(serving, 3)
            alone = honest(serving, seconds / 2)
            beside, growth, sent = attacked(serving, recipes, seconds, Path(folder) / "recipes.json")
    p50 = quantile(alone.latencies_ms, 0.5)
    within = sum(each <= p50 + ALLOWED_MS for each in beside.latencies_ms)
    alone_within = sum(each <= p50 + ALLOWED_MS for each in alone.latencies_ms)
    share = within / max(1, len(beside.latencies_ms))
    outcome.judge(
        f"beside {SENDERS} senders of the worst messages: honest requests within {ALLOWED_MS:g} ms of alone",
        asked=f">= {SHARE:.1%}",
        found=f"{share:.2%} (alone {alone_within / len(alone.latencies_ms):.2%})",
        good=share >= SHARE,
    )
    outcome.judge("honest requests lost", asked="0", found=str(beside.lost), good=not beside.lost)
    in_flight = sum(sent)
    outcome.judge(
        "memory beside them, MiB more than before",
        asked=f"<= {(GROWTH_BYTES + in_flight) // MIB}", found=f"{growth / MIB:.0f}",
        good=growth <= GROWTH_BYTES + in_flight,
    )  # fmt: skip
    outcome.figures["beside"] = {
        name: {
            "p50_ms": quantile(window.latencies_ms, 0.5), "p99_ms": quantile(window.latencies_ms, 0.99),
            "p999_ms": quantile(window.latencies_ms, 0.999), "max_ms": max(window.latencies_ms),
            "ends": dict(window.ends),
        }
        for name, window in (("alone", alone), ("beside", beside))
    }  # fmt: skip


def repository(root: Path) -> None:
    """All models of the search, emulated."""
    for name, ((datatype, shape), out, batched) in MODELS.items():
        (root / name / "1").mkdir(parents=True)
        batches = {1: 1.0, ROWS_MAX: 2.0} if batched else {1: 1.0}
        curve = ", ".join(f"{batch} = {duration}" for batch, duration in batches.items())
        (root / name / "clockwork.toml").write_text(
            f'backend = "emulated"\nmax_batch_size = {ROWS_MAX if batched else 0}\n'
            f'inputs = [{{name = "x", dims = {[*shape]}, datatype = "{datatype}"}}]\n'
            f'outputs = [{{name = "y", dims = {[*out]}, datatype = "FP32"}}]\n'
            f"[emulated]\ninfer_ms = {{{curve}}}\nload_ms = 1.0\nweights_mb = 1\n"
        )


def honest(serving: Serving, seconds: float) -> Window:
    """Small binary requests to the model that takes two numbers, at a steady rate."""
    message = infer_message(serving.http_url, "two", [("x", "FP32", (1, 2), bytes(8))], slo_ms=_SLO_MS)
    shots = [Shot(int(index * 1e9 / PER_S), message) for index in range(int(seconds * PER_S))]
    report = client.run(client.open_loop(serving.http_url, shots, connections=8))
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
    http, grpc_port = urlsplit(serving.http_url).port, serving.grpc_url.rpartition(":")[2]
    command = [
        sys.executable,
        "-m",
        "benchmarks.heaviest.beside",
        str(http),
        grpc_port,
        str(file),
        str(seconds),
    ]
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


def main(http_port: str, grpc_port: str, file: str, seconds: str) -> None:
    """Send each recipe once a second, from as many threads as there are senders."""
    recipes: list[Recipe] = json.loads(Path(file).read_text())
    sender = Sender(int(http_port), int(grpc_port))
    prepared = [sender.prepared(recipe) for recipe in recipes]
    chosen = [prepared[index % len(prepared)] for index in range(SENDERS)]
    print(json.dumps([length for length, _ in chosen]), flush=True)
    end = time.monotonic() + float(seconds)

    def work(index: int) -> None:
        _, send = chosen[index]
        due = time.monotonic() + index / SENDERS
        while due < end:
            time.sleep(max(0.0, due - time.monotonic()))
            with suppress(OSError):  # it was cut off
                send()
            due = max(due + 1, time.monotonic())

    threads = [threading.Thread(target=work, args=(index,)) for index in range(SENDERS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


if __name__ == "__main__":
    main(*sys.argv[1:])

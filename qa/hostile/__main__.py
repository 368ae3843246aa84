"""Hostile clients: the effect on honest ones, and whether the server's memory grows.

Quiet and hostile windows alternate. In each, honest clients over HTTP and gRPC send at a fixed rate, their
latency counts from the scheduled instant, and every response is checked. Between windows all connections are
closed, and each process's memory, files and threads are counted. The attacker is a process of its own, on the
last core, that runs only when nothing else wants that core (SCHED_IDLE): only the work that it causes in the
server is measured.
"""

from __future__ import annotations

import contextlib
import json
import shutil
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any, Final

import numpy as np
import tritonclient.grpc

from clockwork_serve.units import MIB
from harness import machine, repositories
from harness.http_load import Sample, Shot, infer_message, open_loop, run
from harness.report import Outcome, finish, milliseconds, parser, percent, quantile
from harness.server import Held
from harness.server import held as held_by
from harness.serving import Serving, serve, until
from qa.books import books, gateways_of, tracebacks
from qa.hostile import traffic

ROOT: Final = Path(__file__).parents[2]
WIDE, LONG, INPUTS = 64, 16, 16
HONEST_SLO_MS: Final = 2000
LEAD_S: Final = 2.0
"""Before a window: the attacker's own start, and all its slow connections."""
SETTLE_S: Final = 2.5
"""After a window: longer than the server reads on from who was refused."""
GROWTH_BYTES: Final = 48 * MIB
"""More than any process's memory differs by itself: the C library may keep 32 MiB of what one body took."""
SLOWER: Final = 1.10


@dataclass(frozen=True, slots=True)
class Load:
    """What honest clients and the attacker send."""

    seconds: float = 600
    window_s: float = 15
    http_rate: float = 100
    grpc_rate: float = 20
    attack_rate: float = 20
    attack_grpc_share: float = 0.3
    held: int = 200
    insists: bool = False
    """The attacker takes its share of its core from others; else it waits until they leave it some."""
    seed: int = 1


@dataclass(slots=True)
class Window:
    """What honest clients saw, and what the attacker did, if there was one."""

    hostile: bool
    seconds: float
    http_ns: list[int]
    grpc_ns: list[int]
    wrong: Counter[str]
    server_cpu_s: float
    attacker: dict[str, Any]
    held: dict[str, Held] = field(default_factory=dict)

    def p99_ns(self, protocol: str) -> float:
        """Of one protocol's answers."""
        return quantile(self.http_ns if protocol == "HTTP" else self.grpc_ns, 0.99)


@dataclass(slots=True)
class Findings:
    """All windows, and what is known at their end."""

    windows: list[Window]
    ended: list[str]
    left: dict[str, int]
    tracebacks: list[str]

    @property
    def wrong(self) -> dict[str, int]:
        """What was wrong with honest clients' answers."""
        return dict(sum((one.wrong for one in self.windows), Counter[str]()))


class Honest:
    """Clients that know what the answers must be."""

    def __init__(self, serving: Serving, seed: int) -> None:
        self._serving = serving
        dice = np.random.default_rng(seed)
        self._x = dice.standard_normal((INPUTS, 1, WIDE), dtype=np.float32)
        self._y = self._x @ repositories.matrix_of(0, WIDE, LONG)
        url = serving.http_url
        self._messages = [
            infer_message(url, "m0", [("x", "FP32", x.shape, x.tobytes())], slo_ms=HONEST_SLO_MS)
            for x in self._x
        ]

    def ask(
        self, seconds: float, http_rate: float, grpc_rate: float
    ) -> tuple[list[int], list[int], Counter[str]]:
        """Latencies over both protocols, and what was wrong."""
        wrong: Counter[str] = Counter()
        grpc_ns: list[int] = []
        other = threading.Thread(target=self._ask_grpc, args=(seconds, grpc_rate, grpc_ns, wrong))
        other.start()
        shots = [
            Shot(round(at / http_rate * 1e9), self._messages[at % INPUTS], str(at % INPUTS))
            for at in range(int(seconds * http_rate))
        ]
        report = run(open_loop(self._serving.http_url, shots, connections=4))
        other.join()
        wrong.update(end for sample in report.samples if (end := self._wrong(sample)))
        if lost := len(shots) - len(report.samples):
            wrong["lost"] += lost
        return [sample.latency_ns for sample in report.samples], grpc_ns, wrong

    def _wrong(self, sample: Sample) -> str:
        if sample.status != 200:
            return sample.end
        found = np.frombuffer(sample.body[-4 * LONG :], np.float32)
        return "" if np.allclose(found, self._y[int(sample.name)], rtol=1e-4, atol=1e-4) else "another answer"

    def _ask_grpc(self, seconds: float, rate: float, taken_ns: list[int], wrong: Counter[str]) -> None:
        tensor = tritonclient.grpc.InferInput("x", [1, WIDE], "FP32")
        start_ns = time.monotonic_ns()
        with tritonclient.grpc.InferenceServerClient(self._serving.grpc_url) as client:
            for number in range(int(seconds * rate)):
                due_ns = start_ns + round(number / rate * 1e9)
                time.sleep(max(0.0, (due_ns - time.monotonic_ns()) / 1e9))
                tensor.set_data_from_numpy(self._x[number % INPUTS])
                try:
                    found = client.infer("m0", [tensor], client_timeout=HONEST_SLO_MS / 1000).as_numpy("y")
                except tritonclient.utils.InferenceServerException as error:
                    wrong[f"gRPC {error.status()}"] += 1
                    continue
                taken_ns.append(time.monotonic_ns() - due_ns)
                if not np.allclose(found, self._y[number % INPUTS], rtol=1e-4, atol=1e-4):
                    wrong["another answer over gRPC"] += 1


@contextmanager
def served(**settings: Any) -> Iterator[Serving]:
    """A server with a model for honest clients, one for others, and the example that reads text."""
    with tempfile.TemporaryDirectory() as name:
        root = Path(name) / "models"
        for index in range(2):
            repositories.one_matrix(root, f"m{index}", repositories.matrix_of(index, WIDE, LONG))
        shutil.copytree(ROOT / "examples" / "models" / "words", root / "words")
        with serve(root, **settings) as serving:
            yield serving


def window(serving: Serving, honest: Honest, load: Load, seed: int | None) -> Window:
    """One window; hostile where there is a seed."""
    told: dict[str, Any] = {}
    process = None
    if seed is not None:
        server = serving.server
        process = traffic.start(
            (server.http_port, server.grpc_port, server.metrics_port), seconds=load.window_s + LEAD_S,
            rate=load.attack_rate, held=load.held, seed=seed, grpc_share=load.attack_grpc_share,
            insists=load.insists,
        )  # fmt: skip
        time.sleep(LEAD_S)
    before = sum(machine.cpu_s(pid) for pid in serving.pids())
    http_ns, grpc_ns, wrong = honest.ask(load.window_s, load.http_rate, load.grpc_rate)
    cpu_s = sum(machine.cpu_s(pid) for pid in serving.pids()) - before
    if process is not None:
        out, _ = process.communicate(timeout=60)
        if process.returncode:
            raise RuntimeError(f"the attacker ended with {process.returncode}")
        told = json.loads(out.splitlines()[-1])
    time.sleep(SETTLE_S)
    pids = {name: serving.server.pid(name) for name in serving.server.names}
    held = {name: one for name, pid in pids.items() if pid and (one := held_by(pid)) is not None}
    return Window(seed is not None, load.window_s, http_ns, grpc_ns, wrong, cpu_s, told, held)


def growth(windows: list[Window]) -> dict[str, tuple[int, int, int]]:
    """By process: how much more memory, files and threads in the last quarter than in the third."""
    rest = windows[len(windows) // 2 :]
    early, late = rest[: max(1, len(rest) // 2)], rest[-max(1, len(rest) // 2) :]

    def change(name: str, what: str) -> int:
        before, now = (median([int(getattr(one.held[name], what)) for one in part]) for part in (early, late))
        return round(now - before)

    return {
        name: (change(name, "rss_bytes"), change(name, "files"), change(name, "threads"))
        for name in windows[-1].held
    }


def measure(serving: Serving, load: Load, log: list[str]) -> Findings:
    """Quiet and hostile windows in turn, for that long."""
    honest = Honest(serving, load.seed)
    honest.ask(2, load.http_rate, load.grpc_rate)
    names = list(serving.server.names)
    before = {name: serving.server.pid(name) for name in names}
    windows = []
    for number in range(max(2, 2 * round(load.seconds / load.window_s / 2))):
        windows.append(window(serving, honest, load, load.seed + number if number % 2 else None))
        print(_line(number, windows[-1]), flush=True)
    asked = serving.http_url, gateways_of(names)
    with contextlib.suppress(TimeoutError):  # what is left is judged
        until("nothing is open", lambda: not any(books(*asked).values()), 20, 0.5)
    ended = [name for name in names if serving.server.pid(name) != before[name]]
    return Findings(windows, ended, books(*asked), tracebacks(log))


def conclude(found: Findings) -> Outcome:
    """The promises."""
    outcome = Outcome("qa.hostile")
    windows = found.windows
    hostile = [one for one in windows if one.hostile]
    outcome.judge(
        "processes that ended", asked="none", found=", ".join(found.ended) or "none", good=not found.ended
    )
    outcome.judge(
        "tracebacks in logs", asked="0", found=str(len(found.tracebacks)), good=not found.tracebacks
    )
    asked = sum(len(one.http_ns) + len(one.grpc_ns) for one in windows)
    wrong = found.wrong
    outcome.judge(f"honest answers: {asked}", asked="all right", found=str(wrong or "all"), good=not wrong)
    for name, (rss, files, threads) in growth(windows).items():
        good = rss <= GROWTH_BYTES and files <= 2 and threads <= 2
        grown = f"{rss / MIB:+.1f} MiB, {files:+d} files, {threads:+d} threads"
        outcome.judge(f"{name}: growth", asked=f"<= {GROWTH_BYTES // MIB} MiB, 2, 2", found=grown, good=good)
    for what, count in found.left.items():
        outcome.judge(what, asked="0", found=str(count), good=count == 0)
    for protocol in ("HTTP", "gRPC"):
        quiet_ns, hostile_ns = (
            median(one.p99_ns(protocol) for one in windows if one.hostile is which) for which in (False, True)
        )
        outcome.judge(
            f"p99 of honest {protocol}, median of windows",
            asked=f"<= {SLOWER:.2f} of {milliseconds(quiet_ns)}",
            found=f"{milliseconds(hostile_ns)} ({hostile_ns / quiet_ns:.2f})",
            good=hostile_ns <= SLOWER * quiet_ns,
        )
    outcome.figures = _figures(windows, hostile)
    return outcome


def _figures(windows: list[Window], hostile: list[Window]) -> dict[str, Any]:
    seconds = sum(one.seconds for one in hostile)
    cpu_s = sum(one.attacker["cpu_s"] for one in hostile)
    attacks = sum(one.attacker["attacks"] for one in hostile)
    cores = {
        name: sum(one.server_cpu_s for one in windows if one.hostile is which) / seconds
        for name, which in (("quiet", False), ("hostile", True))
    }
    print(
        f"\n  {attacks} attacks in {seconds:.0f} s; the attacker used {percent(cpu_s, seconds)} of one core, "
        f"the server {cores['quiet']:.2f} cores in quiet windows and {cores['hostile']:.2f} in hostile ones"
    )
    return {
        "attacks": attacks, "attacks_per_s": attacks / seconds, "attacker_cores": cpu_s / seconds,
        "server_cores": cores,
        "sent": dict(sum((Counter(one.attacker["sent"]) for one in hostile), Counter[str]())),
        "ends": dict(sum((Counter(one.attacker["ends"]) for one in hostile), Counter[str]())),
        "p99_ms": {
            protocol: [(one.hostile, one.p99_ns(protocol) / 1e6) for one in windows]
            for protocol in ("HTTP", "gRPC")
        },
        "rss_mib": {name: [one.held[name].rss_bytes / MIB for one in windows] for name in windows[-1].held},
    }  # fmt: skip


def _line(number: int, one: Window) -> str:
    shares = (0.5, 0.99)
    cells = [
        f"{number:3} {'hostile' if one.hostile else 'quiet':8}",
        *(milliseconds(quantile(ns, share)) for ns in (one.http_ns, one.grpc_ns) for share in shares),
        f"{one.server_cpu_s / one.seconds:.2f} cores",
        f"{one.attacker.get('attacks', 0) / one.seconds:.0f}/s",
        *(
            f"{name} {held.rss_bytes / MIB:.1f} {held.files} {held.threads}"
            for name, held in one.held.items()
        ),
        str(dict(one.wrong) or ""),
    ]
    return "  ".join(cells)


def main() -> int:
    """Run it; returns the exit status."""
    options = parser(__doc__.splitlines()[0])
    plain = Load()
    options.add_argument("--seconds", type=float, default=plain.seconds, help="of all windows together")
    options.add_argument("--window", type=float, default=plain.window_s, help="seconds of one window")
    options.add_argument("--rate", type=float, default=plain.attack_rate, help="attacks a second")
    options.add_argument("--held", type=int, default=plain.held, help="slow connections")
    options.add_argument("--grpc-share", type=float, default=plain.attack_grpc_share, help="of the attacks")
    options.add_argument("--http-rate", type=float, default=plain.http_rate, help="honest requests a second")
    options.add_argument("--grpc-rate", type=float, default=plain.grpc_rate, help="honest requests a second")
    options.add_argument("--gateways", type=int, default=1)
    given = options.parse_args()
    load = Load(
        seconds=given.seconds, window_s=given.window, http_rate=given.http_rate, grpc_rate=given.grpc_rate,
        attack_rate=given.rate, held=given.held, attack_grpc_share=given.grpc_share, seed=given.seed,
    )  # fmt: skip
    log: list[str] = []
    with served(on_line=log.append, gateways=given.gateways) as serving:
        found = measure(serving, load, log)
    for line in found.tracebacks[:20]:
        print(f"  {line[:200]}")
    return finish(conclude(found), given.json)


if __name__ == "__main__":
    sys.exit(main())

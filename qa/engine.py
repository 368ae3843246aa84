"""A server on a Ray cluster of three nodes: brought up, asked, hit and ended.

python -m qa.engine --short              up, an answer, one kill of each kind, down: two minutes
python -m qa.engine [--minutes 5]        and nodes lost and drained, and roles killed at random under load

The nodes are three raylets of this machine. Each has two addresses: Ray's, and that of its links.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import numpy as np

from clockwork_serve.units import NS_PER_MS, NS_PER_S
from harness import repositories
from harness.hosts import ip
from harness.http_load import Report, Sample, Shot, infer_message, open_loop, poisson, run
from harness.ports import free_port
from harness.process_tree import descendants
from harness.report import Outcome, finish, parser
from harness.server import alive
from harness.serving import Metrics, read_metrics, total, until

NAME: Final = "qa"
UP_S, BACK_S, ELSEWHERE_S = 60.0, 6.0, 120.0
"""Until the first answer; after the kill of a process or an actor; after the loss of a node, which takes Ray
several missed heartbeats to notice."""
PATIENCE_S: Final = 180.0
KINDS: Final = ("worker", "gateway", "controller")
HUNTED: Final = ("worker", "controller")
"""Those killed under load: what is out at a gateway ends with it."""
RATE_RPS, SLO_MS = 20.0, 5000
CALM_S: Final = 5.0
"""Between what a kill did and the next one."""
MODELS: Final = 3
DEVICE: Final = "emulated:v100"
X: Final = [("x", "FP32", (1, 4), bytes(16))]
ASKED: Final = 20
"""Requests while nothing is hit, one after the other."""
SHM: Final = Path("/dev/shm")  # noqa: S108 - looked at
LOOPBACK, ITS_OWN = "127.0.0", "192.0.2"
"""Networks of the nodes: this machine's loopback, and one that no other machine has."""
_CLONE_NEWNET: Final = 0x40000000


@dataclass(slots=True)
class Hit:
    """What was killed: its role's kind, when, when good answers came again, and when all was whole again."""

    what: str
    kind: str
    at_ns: int
    back_ns: int = 0
    answered_ns: int = 0

    @property
    def back_s(self) -> float:
        """How long it took."""
        return (self.back_ns - self.at_ns) / NS_PER_S


@dataclass(slots=True)
class Stage:
    """The Ray cluster, and what was brought up on it. ``on_loopback``: why nodes are there, if so."""

    folder: Path
    cluster: Any
    http_port: int
    controllers: int
    on_loopback: str
    seen: dict[int, int] = field(default_factory=dict)
    """Every process of ours that was ever seen, with the instant of its start."""

    @property
    def config(self) -> Path:
        """The deployment's file."""
        return self.folder / "qa.toml"

    @property
    def url(self) -> str:
        """Of the gateway, on whatever node."""
        return f"http://127.0.0.1:{self.http_port}"

    def command(self, name: str, *more: str) -> Any:
        """``clockwork ray``; what it says in JSON. RuntimeError with its words if it fails."""
        ended = subprocess.run(
            [sys.executable, "-m", "clockwork_serve", "ray", name, str(self.config), "--json", *more],
            env={**os.environ, "RAY_ADDRESS": self.cluster.address}, capture_output=True, text=True,
            timeout=2 * PATIENCE_S, check=False,
        )  # fmt: skip
        if ended.returncode:
            raise RuntimeError(f"clockwork ray {name} ended with {ended.returncode}: {ended.stderr[-800:]}")
        return json.loads(ended.stdout)

    def reports(self) -> dict[str, Any]:
        """What each role says; those that say nothing are not there."""
        from clockwork_serve.apps.ray import cluster

        found = {name: one for name, one in cluster.reports().items() if not isinstance(one, str)}
        for one in found.values():
            if one.pid is not None:
                self.seen.update(descendants(one.pid))
        return found

    def whole(self, roles: int, but: int = 0) -> dict[str, Any] | None:
        """All reports, if all are ready, none is process ``but``, all have joined, and it answers."""
        found = self.reports()
        if len(found) < roles or any(one.state != "ready" or one.pid == but for one in found.values()):
            return None
        try:
            metrics = self.metrics()
            if total(metrics, "clockwork_controllers_standing_by") < self.controllers - 1:
                return None
            devices = [
                dict(labels)["device"]
                for (name, labels), value in metrics.items()
                if name == "clockwork_device_up" and value
            ]
            joined = sum("." in device for device in devices)
            return found if joined >= self.controllers and answers(self.url) else None
        except OSError:
            return None

    def metrics(self) -> Metrics:
        """Of the server, by its gateway. OSError if nobody answers."""
        return read_metrics(f"{self.url}/metrics", 5)


def deployment(folder: Path, http_port: int, controllers: int) -> str:
    """A gateway, a worker, and a controller that has the repository; or two, with the store's catalogue."""
    cache = f'cache = "{folder}/cache-'
    source = f'repository = "{folder}/models"' if controllers == 1 else ""
    labels = 'labels = {zone = "in(none, a, b, c)"}'  # of which the first is on no node
    return f"""
name = "{NAME}"
{source}
store = "{folder}/store"
[controllers]
count = {controllers}
{labels}
port = 0
settings = {{{cache}controller", log_level = "warning", drain_s = 2}}
[gateways]
settings = {{http_port = {http_port}, grpc_port = 0, metrics_port = 0, slo_ms = {SLO_MS}, drain_s = 2}}
[[workers]]
device = "{DEVICE}"
count = {controllers}
{labels}
settings = {{{cache}worker", drain_s = 2}}
"""


def move_apart() -> str:
    """Move this process, and what it starts, into a network of its own. Returns why it stays, if it does."""
    if shutil.which("ip") is None:
        return "expected the command ip, found none"
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.unshare(_CLONE_NEWNET):
        return f"expected the right to make a network, found {os.strerror(ctypes.get_errno())}"
    ip("link", "set", "lo", "up")
    ip("addr", "add", f"{ITS_OWN}.1/24", "dev", "lo")  # links to any address of it come from this one
    return ""


@contextlib.contextmanager
def staged(controllers: int, on_loopback: str) -> Iterator[Stage]:
    """A Ray cluster of three nodes, and a repository; whatever happens, nothing is left of them."""
    import ray
    from ray.cluster_utils import Cluster

    os.environ |= {"RAY_worker_niceness": "0", "RAY_USAGE_STATS_ENABLED": "0"}
    with tempfile.TemporaryDirectory(prefix="cwr") as name:
        folder = Path(name)
        for index in range(MODELS):
            repositories.emulated(folder / "models", f"m{index}", {1: 5.0, 8: 10.0})
        (folder / "store").mkdir()
        if controllers > 1:
            fill(folder)
        node = {"num_cpus": 4, "object_store_memory": 80 << 20}
        net = LOOPBACK if on_loopback else ITS_OWN
        head, *others = [  # from 2 on, for Ray looks 127.0.0.1 up
            {**node, "node_ip_address": f"{net}.{number}", "labels": {"zone": zone}}
            for number, zone in enumerate("abc", 2)
        ]
        head["include_dashboard"] = False
        cluster = patiently(lambda: Cluster(initialize_head=True, head_node_args=head))
        try:
            for other in others:
                patiently(functools.partial(cluster.add_node, **other))
            stage = Stage(folder, cluster, free_port(), controllers, on_loopback)
            stage.config.write_text(deployment(folder, stage.http_port, controllers))
            ray.init(
                address=cluster.address, namespace=f"clockwork-{NAME}", log_to_driver=False,
                logging_level="ERROR",
            )  # fmt: skip
            yield stage
        finally:
            with contextlib.suppress(Exception):
                stage.command("down")
            ray.shutdown()
            cluster.shutdown()


def fill(folder: Path) -> None:
    """Have a builder put into the store what two controllers serve."""
    command = [sys.executable, "-m", "clockwork_serve", "profile", str(folder / "models")]
    options = [f"--store={folder}/store", f"--cache={folder}/cache-builder", f"--device={DEVICE}"]
    subprocess.run([*command, *options], check=True, capture_output=True, timeout=PATIENCE_S)


def patiently(start: Callable[[], Any]) -> Any:
    """Start a node of Ray, which gives up after 30 s on a busy machine: three times."""
    for _ in range(2):
        with contextlib.suppress(Exception):
            return start()
    return start()


def answers(url: str) -> bool:
    """Whether Triton's client gets the right answer."""
    import tritonclient.http as triton

    x = np.arange(4, dtype=np.float32).reshape(1, 4)
    with contextlib.closing(triton.InferenceServerClient(url.removeprefix("http://"))) as client:
        given = triton.InferInput("x", [1, 4], "FP32")
        given.set_data_from_numpy(x)
        try:
            found = client.infer("m0", [given], headers={"x-slo-ms": f"{SLO_MS}"}).as_numpy("y")
        except (triton.InferenceServerException, OSError):
            return False
    return found is not None and found.shape == x.shape


# ------------------------------------------------------------
# What is done to it.


def kill(stage: Stage, kind: str, what: str) -> Hit:
    """SIGKILL for a role's process or its actor, and wait until all is whole again."""
    reports = stage.reports()
    found = [one for one in reports.values() if one.role.kind == kind]
    role = max(found, key=lambda one: one.leads)
    victim = role.pid if what == "process" else parent_of(role.pid)
    hit = Hit(what, kind, time.monotonic_ns())
    os.kill(victim, signal.SIGKILL)
    until(f"an answer comes after a {kind}'s kill", lambda: answers(stage.url), PATIENCE_S, 0.02)
    hit.answered_ns = time.monotonic_ns()
    until(f"{kind} is back", lambda: stage.whole(len(reports), role.pid), PATIENCE_S, 0.05)
    hit.back_ns = time.monotonic_ns()
    return hit


def parent_of(pid: int) -> int:
    """The actor of a role's process."""
    return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])


def lose_node(stage: Stage) -> Hit:
    """Kill a node that has a role, and is not the head, with all that Ray runs there."""
    reports = stage.reports()
    nodes = {node.node_id: node for node in stage.cluster.worker_nodes}
    name, role = next((name, one) for name, one in reports.items() if one.node in nodes)
    hit = Hit("node", name.partition("-")[0], time.monotonic_ns())
    stage.cluster.remove_node(nodes[role.node], allow_graceful=False)

    def elsewhere() -> bool:
        found = stage.whole(len(reports))
        return found is not None and all(one.node != role.node for one in found.values())

    until("its roles are elsewhere", elsewhere, PATIENCE_S, 0.2)
    hit.back_ns = time.monotonic_ns()
    return hit


def under_load(stage: Stage, seconds: float, seed: int) -> tuple[Report, list[Hit]]:
    """Requests at a steady rate, while roles are killed at random."""
    over = threading.Event()
    hits: list[Hit] = []
    wrong: list[str] = []

    def hunt() -> None:
        dice = random.Random(seed)
        end_s = time.monotonic() + seconds
        while time.monotonic() < end_s:
            time.sleep(CALM_S)
            hits.append(kill(stage, dice.choice(HUNTED), dice.choice(("process", "actor"))))
        time.sleep(CALM_S)

    def hunted() -> None:
        try:
            hunt()
        except (OSError, TimeoutError, StopIteration) as error:
            wrong.append(f"{error!r}")
        over.set()

    def shots() -> Iterator[Shot]:
        messages = [infer_message(stage.url, f"m{index}", X, slo_ms=SLO_MS) for index in range(MODELS)]
        dice = random.Random(seed)
        for at_ns in poisson(RATE_RPS, 3600, dice):
            if over.is_set():
                return
            yield Shot(at_ns, dice.choice(messages))

    thread = threading.Thread(target=hunted, daemon=True)
    thread.start()
    report = run(open_loop(stage.url, shots(), connections=4))
    thread.join()
    if wrong:
        raise RuntimeError(f"a kill went wrong: {wrong[0]}")
    return report, hits


# ------------------------------------------------------------
# What is judged.


def judge_addresses(outcome: Outcome, stage: Stage) -> None:
    """Whether all is answered where links of a node come from another address than Ray's."""
    question = f"two addresses a node: not answered, of {ASKED} requests"
    if stage.on_loopback:
        outcome.judge(question, asked="0", found=f"not run: {stage.on_loopback}", good=True)
        return
    outcome.none(question, [number for number in range(ASKED) if not answers(stage.url)])


def judge_load(outcome: Outcome, report: Report, hits: list[Hit], controllers: int = 1) -> None:
    """What became of requests, beside the kills."""
    kinds = ", ".join(f"{hit.kind}'s {hit.what} {hit.back_s:.1f} s" for hit in hits)
    slowest = max((hit.back_s for hit in hits), default=0.0)
    outcome.at_most("random kills under load: all is back", 2 * BACK_S, slowest, "s", digits=1, more=kinds)
    calm = [one for one in report.samples if not any(touched(one, hit, HUNTED) for hit in hits)]
    outcome.none("requests that no kill touched, and not answered well", ends(calm))
    excused = HUNTED[1:] if controllers == 1 else ()
    waited = [one for one in report.samples if not any(touched(one, hit, excused) for hit in hits)]
    outcome.none("those that could wait for another one, and not answered well", ends(waited))
    outcome.none("without a response", [one.due_ns for one in report.samples if one.status == 0])
    outcome.at_most("answered twice: bytes that nobody asked for", 0, report.unexpected_bytes, digits=0)
    outcome.figures["load"] = {"sent": len(report.samples), "ends": dict(report.ends()), "kills": len(hits)}


def ends(samples: list[Sample]) -> list[str]:
    """How those ended that were not answered well."""
    return [one.end for one in samples if one.status != 200]


def touched(sample: Sample, hit: Hit, kinds: tuple[str, ...]) -> bool:
    """Whether a request was out while one of such a role was being replaced."""
    grace_ns = 500 * NS_PER_MS
    out = sample.due_ns <= hit.back_ns + grace_ns and sample.done_ns >= hit.at_ns - grace_ns
    return hit.kind in kinds and out


def judge_end(outcome: Outcome, stage: Stage, before: set[str]) -> None:
    """End it; nothing may be left."""
    stage.reports()
    stage.command("down")
    left = [pid for pid, born in stage.seen.items() if alive(pid) and descendants(pid).get(pid) == born]
    outcome.none(f"processes left after down, of {len(stage.seen)}", left)
    more = {path.name for path in SHM.glob("clockwork*")} - before
    outcome.none("shared memory left after down", sorted(more))


def play(stage: Stage, outcome: Outcome, *, short: bool, seconds: float, seed: int) -> None:
    """All of it, in order."""
    before = {path.name for path in SHM.glob("clockwork*")}
    start_s = time.monotonic()
    stage.command("up")
    outcome.at_most("up: until the command returns", UP_S, time.monotonic() - start_s, "s", digits=1)
    reports = until(
        "one is answered by a device elsewhere", lambda: stage.whole(1 + 2 * stage.controllers), UP_S, 0.1
    )
    took_s = time.monotonic() - start_s
    outcome.at_most(
        "up: until Triton's client is answered, and the worker there", UP_S, took_s, "s", digits=1
    )
    judge_addresses(outcome, stage)
    stage.command("up")
    changed = [name for name, one in stage.reports().items() if one.pid != reports[name].pid]
    outcome.none("processes that a second up changed", changed)
    for what in ("process", "actor"):
        for kind in KINDS:
            hit = kill(stage, kind, what)
            answered_s = (hit.answered_ns - hit.at_ns) / NS_PER_S
            whole = f"a good answer after {answered_s:.1f} s"
            outcome.at_most(
                f"{kind}'s {what} killed: all is back", BACK_S, hit.back_s, "s", digits=1, more=whole
            )
    if not short:
        hit = lose_node(stage)
        outcome.at_most(f"node of {hit.kind} lost: all is back", ELSEWHERE_S, hit.back_s, "s", digits=1)
        judge_load(outcome, *under_load(stage, seconds, seed), stage.controllers)
    judge_end(outcome, stage, before)


def main() -> int:
    """Run it; returns the exit status."""
    options = parser(__doc__)
    options.add_argument("--short", action="store_true", help="no node is lost, nothing is killed at random")
    options.add_argument("--minutes", type=float, default=5.0, help="of random kills")
    options.add_argument("--controllers", type=int, choices=(1, 2), default=1, help="2: one stands by")
    given = options.parse_args()
    outcome = Outcome("qa.engine")
    try:
        with staged(given.controllers, move_apart()) as stage:
            play(stage, outcome, short=given.short, seconds=60 * given.minutes, seed=given.seed)
    except (ImportError, RuntimeError, TimeoutError, subprocess.CalledProcessError) as error:
        outcome.invalid = f"{error}"
    return finish(outcome, given.json)


if __name__ == "__main__":
    sys.exit(main())

"""A worker that refuses actions for random reasons, under load: afterwards every model answers.

    python -m benchmarks.wedge --seed 1

Models that do not all fit a device are asked by several clients. The only worker that has room for them
refuses LOADs, UNLOADs and INFERs with any status, by chance, until it refused so many. What fails meanwhile
is counted. One second after the last refusal every model is asked again, several times: a request that fails
then fails for what happened to another.
"""

from __future__ import annotations

import json
import random
import subprocess
import sys
import tempfile
import threading
import urllib.error
import urllib.request
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import msgspec

from clockwork_serve.config import Settings
from clockwork_serve.config.table import IN_MEMORY
from clockwork_serve.devices import DeviceConfig
from clockwork_serve.serve.supervisor.server import RunningServer, ServerConfig, running_server
from clockwork_serve.serve.worker.host import WorkerConfig
from clockwork_serve.store import StoreConfig
from clockwork_serve.units import KIB
from harness import repositories
from harness.refusing import RefusalPlan
from harness.report import Outcome, finish, parser, table
from harness.serving import until

MODELS, FIT = 12, 4
"""How many models there are, and how many of them fit the device at once."""
WIDTH = 64
PAGE = 64 * KIB
CLIENTS = 6
SLO_MS = 2000
AGAIN = 20
"""How often each model is asked when no action is refused any more."""
CALM_S = 1.0


@contextmanager
def refusing_worker(plan: RefusalPlan) -> Iterator[None]:
    """Its process, for the time of a block."""
    process = subprocess.Popen([sys.executable, "-m", "harness.refusing", msgspec.json.encode(plan).decode()])
    try:
        yield
    finally:
        process.terminate()
        process.wait(30)


def device(number: int, pages: int) -> DeviceConfig:
    """A CPU device of so many pages."""
    return DeviceConfig(device=f"cpu:{number}", kind="cpu", memory_bytes=pages * PAGE, page_bytes=PAGE)


def ask(url: str, model: str) -> str:
    """One request: "answered", or why not."""
    tensor = {"name": "x", "shape": [1, WIDTH], "datatype": "FP32", "data": [1.0] * WIDTH}
    request = urllib.request.Request(  # noqa: S310 (a URL of ours)
        f"{url}/v2/models/{model}/infer", json.dumps({"inputs": [tensor]}).encode(), {"x-slo-ms": f"{SLO_MS}"}
    )
    try:
        with urllib.request.urlopen(request, timeout=30) as response:  # noqa: S310
            response.read()
    except urllib.error.HTTPError as error:
        return f"{error.code} {json.load(error).get('reason', '')}"
    return "answered"


def load(url: str, names: list[str], seed: int, over: threading.Event) -> Counter[str]:
    """Ask models by chance from several threads until it is ``over``; how the requests ended."""
    ends: Counter[str] = Counter()

    def client(number: int) -> None:
        rng = random.Random(f"{seed} {number}")
        mine: Counter[str] = Counter()
        while not over.is_set():
            mine[ask(url, rng.choice(names))] += 1
        ends.update(mine)

    threads = [threading.Thread(target=client, args=(number,)) for number in range(CLIENTS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return ends


def measure(server: RunningServer, names: list[str], plan: RefusalPlan) -> tuple[Counter[str], Counter[str]]:
    """How requests ended while actions were refused, and when none was any more."""
    over = threading.Event()

    def refused() -> int:
        try:
            return sum(json.loads(Path(plan.counts).read_bytes() or b"{}").values())
        except (OSError, ValueError):  # none yet, or it is being written
            return 0

    def stop() -> None:
        try:
            until("all are refused", lambda: refused() >= plan.refusals, timeout_s=300, every_s=0.05)
        finally:
            over.set()

    watcher = threading.Thread(target=stop)
    watcher.start()
    during = load(server.http_url, names, plan.seed, over)
    watcher.join()
    threading.Event().wait(CALM_S)
    after = Counter(ask(server.http_url, name) for _ in range(AGAIN) for name in names)
    return during, after


def main() -> int:
    """Run it; returns the exit status."""
    options = parser(__doc__)
    options.add_argument("--refusals", type=int, default=1000)
    options.add_argument("--chance", type=float, default=0.3, help="that an action is refused")
    given = options.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        root, runs, counts = Path(folder) / "models", Path(folder) / "run", Path(folder) / "refused.json"
        runs.mkdir(mode=0o700)
        names = [f"m{index}" for index in range(MODELS)]
        for index, name in enumerate(names):
            repositories.layers(root, name, width=WIDTH, depth=2, seed=index)
        repositories.layers(root, "fits", width=4, depth=2)  # a server that can run no model does not start
        settings = Settings(
            repository=str(root), journal=IN_MEMORY, http_port=0, grpc_port=0, metrics_port=0,
            log_level="error",
        )  # fmt: skip
        # The server's own worker has no room for any of them: it is there so that they are profiled.
        config = ServerConfig(
            settings=settings, store=StoreConfig(cache_dir=str(Path(folder) / "cache")),
            devices=(msgspec.structs.replace(device(0, 1), memory_bytes=4 * KIB, page_bytes=4 * KIB),),
            run_dir=str(runs),
        )  # fmt: skip
        with running_server(config) as server:
            (run_dir,) = runs.iterdir()
            worker = WorkerConfig(
                run_dir=str(run_dir), name="refusing", devices=(device(1, FIT),), settings=settings
            )
            plan = RefusalPlan(
                worker=worker, seed=given.seed, refusals=given.refusals, chance=given.chance,
                counts=str(counts),
            )  # fmt: skip
            with refusing_worker(plan):
                until("the refusing worker serves", lambda: ask(server.http_url, names[0]) == "answered")
                during, after = measure(server, names, plan)
        refused: Counter[str] = Counter(json.loads(counts.read_bytes()))
    return finish(conclude(refused, during, after, given.refusals), given.json)


def conclude(refused: Counter[str], during: Counter[str], after: Counter[str], asked: int) -> Outcome:
    """The tables and the promise."""
    print(table(("refused", "times"), [(what, f"{count}") for what, count in sorted(refused.items())]))
    print(
        table(
            ("while actions were refused", "requests"), [(end, f"{n}") for end, n in sorted(during.items())]
        )
    )
    outcome = Outcome("benchmarks.wedge")
    outcome.at_least("actions refused", asked, refused.total(), digits=0)
    outcome.none(
        "requests that fail a second after the last refusal",
        [end for end in after.elements() if end != "answered"], more=f" of {after.total()}",
    )  # fmt: skip
    outcome.figures = {"refused": dict(refused), "during": dict(during), "after": dict(after)}
    return outcome


if __name__ == "__main__":
    sys.exit(main())

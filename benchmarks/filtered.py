"""A gateway whose tensors no worker reaches: it accepts nothing and says why, and serves once it is reached.

The hosts of :mod:`benchmarks.failover`, each a network of its own. What the gateway's host sends to the
worker's is dropped before the servers start; then it is not, and then it is again. Run it by ``python -m
benchmarks.failover --hosts --filtered``.
"""

from __future__ import annotations

import json
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Final

from benchmarks.failover import HOSTS, MODELS, SERVICE_MS, Hosts, X
from clockwork_serve.units import NS_PER_MS, NS_PER_S
from harness import repositories
from harness.hosts import LOOPBACK, Host, hosts, ip
from harness.http_load import Report, Sample, Shot, infer_message, open_loop, reason_of, run
from harness.report import Outcome
from harness.serving import until

SLO_MS: Final = 1000
EVERY_MS: Final = 20
AT_ONCE_MS: Final = 100
"""Within this time a request is refused that cannot be answered."""
KNOWN_S: Final = 3.0
"""By when a gateway knows that it is not reached any more: connections end after 0.75 s without a word, and
are tried for as long."""
BACK_S: Final = 3.0
"""By when it serves once it is reached: it is tried once a second."""
REASON: Final = "no worker gets tensors from this gateway"


@contextmanager
def dropped(here: Host, there: Host) -> Iterator[None]:
    """All that one host sends to another one is dropped, as a filter would, and no one is told."""
    name = here.before[-1]
    ip("-n", name, "route", "add", "blackhole", there.address)
    try:
        yield
    finally:
        ip("-n", name, "route", "del", "blackhole", there.address)


def readiness(url: str) -> str:
    """Why a gateway is not ready; "" if it is."""
    try:
        with urllib.request.urlopen(f"{url}/v2/health/ready", timeout=5):  # noqa: S310 (ours)
            return ""
    except urllib.error.HTTPError as error:
        return str(json.load(error)["error"])
    except urllib.error.URLError as error:  # it has no port yet
        return str(error)


def load(url: str, seconds: float) -> Report:
    """Requests at even distances."""
    message = infer_message(url, "m0", X, slo_ms=SLO_MS)
    count = round(seconds * 1000 / EVERY_MS)
    return run(open_loop(url, (Shot(at * EVERY_MS * NS_PER_MS, message) for at in range(count))))


def refused_at_once(sample: Sample) -> bool:
    """Whether it was told that nobody serves here, and why, at once."""
    took_ms = (sample.done_ns - sample.sent_ns) / NS_PER_MS
    return sample.status == 503 and reason_of(sample) == "not_serving" and took_ms <= AT_ONCE_MS


def measure_filtered(folder: Path, outcome: Outcome) -> None:
    """A gateway that is not reached from its start on, is reached, and is not any more."""
    (folder / "store").mkdir(parents=True)
    for model in range(MODELS):
        repositories.emulated(folder / "models", f"m{model}", {1: SERVICE_MS}, load_ms=2)
    with hosts(len(HOSTS)) as (_, home, truth), ExitStack() as stack:
        outcome.figures["hosts"] = truth
        if truth == LOOPBACK:
            found = "not run: network namespaces are not permitted here"
            outcome.judge("filtered gateway", asked="", found=found, good=True)
            return
        worker, gateway = home[HOSTS.index("worker")], home[HOSTS.index("gateway")]
        with dropped(gateway, worker):
            made = Hosts(folder, home, stack)
            until("one leads, and is ready", made.whole, 60, 0.05)
            _judge_filtered(outcome, made.http_url)
        since_s = time.monotonic()
        until("the gateway is ready", lambda: not readiness(made.http_url), 60, 0.02)
        outcome.at_most("filter removed: ready by itself", BACK_S, time.monotonic() - since_s, "s")
        bad = [one.end for one in load(made.http_url, 2).samples if one.status != 200]
        outcome.none("filter removed: not answered well", bad)
        with dropped(gateway, worker):
            _judge_filtered_again(outcome, made.http_url)


def _judge_filtered(outcome: Outcome, url: str) -> None:
    found = until("the gateway says why", lambda: REASON in (why := readiness(url)) and why, 60, 0.05)
    outcome.judge("filtered: the gateway is not ready", asked=REASON, found=found, good=True)
    samples = load(url, 2).samples
    odd = [one.end for one in samples if not refused_at_once(one)]
    outcome.none(f"filtered: not refused within {AT_ONCE_MS} ms", odd, more=f"of {len(samples)}")


def _judge_filtered_again(outcome: Outcome, url: str) -> None:
    """What is under way when the filter comes is lost; soon nothing is accepted that cannot be answered."""
    since_ns = time.monotonic_ns()
    samples = load(url, 2 * KNOWN_S).samples
    odd = [one for one in samples if not refused_at_once(one)]
    known_s = max(((one.due_ns - since_ns) / NS_PER_S for one in odd), default=0.0)
    more = f"{len(odd)} of {len(samples)} were accepted until then"
    outcome.at_most("filtered while it serves: noticed within", KNOWN_S, known_s, "s", more=more)

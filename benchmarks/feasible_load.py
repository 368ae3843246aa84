"""A load that the device can carry: whether all requests are answered in time, for minutes.

Poisson arrivals at 60 % of the device, each with an SLO of ten times the batch-1 time. A run counts only if
the machine was quiet, which is measured in the same run: switches away from the lane's thread that it did
not ask for, time stolen by a hypervisor, and CPU that other processes used.
"""

from __future__ import annotations

import os
import random
import sys
import tempfile
from pathlib import Path

from harness import repositories
from harness.http_load import Report, Shot, infer_message, open_loop, poisson, run
from harness.machine import Disturbance, Watch
from harness.report import Outcome, finish, milliseconds, parser, percent, quantile
from harness.serving import Serving, serve, total

MODEL, WIDTH, DEPTH = "layers", 1024, 12
WARM_UP = 50

INVOLUNTARY_MAX = 3.0
"""Switches away from the lane's thread, for each request: on two cores the server's own processes and the
client, which wake for each request, cause about 2."""
WAITED_MAX = 0.03
"""Share of the time in which the lane's thread could have run and had no core: 1.8 % if all is quiet."""
STOLEN_MAX = 0.002
OTHERS_MAX = 0.02
"""Shares of one core."""
TAIL = (0.5, 0.99, 0.999, 1.0)


def batch_1_ns(serving: Serving, message: bytes) -> int:
    """The lane time of batch 1, from the server's own statistics of requests sent one by one."""
    report = run(open_loop(serving.http_url, [Shot(index * 50_000_000, message) for index in range(WARM_UP)]))
    assert set(report.ends()) == {"200"}, report.ends()
    (record,) = serving.get(f"/v2/models/{MODEL}/stats")["model_stats"]
    stats = record["inference_stats"]
    phases = [stats[f"compute_{phase}"] for phase in ("input", "infer", "output")]
    return round(float(sum(phase["ns"] for phase in phases)) / int(phases[1]["count"]))


def why_invalid(disturbed: Disturbance, requests: int) -> str:
    """What disturbed the run too much; empty if nothing did."""
    reasons = []
    if disturbed.involuntary > INVOLUNTARY_MAX * requests:
        reasons.append(f"{disturbed.involuntary / requests:.1f} involuntary switches of the lane a request")
    if disturbed.waited_s > WAITED_MAX * disturbed.seconds:
        reasons.append(
            f"the lane waited {percent(disturbed.waited_s, disturbed.seconds)} of the time for a core"
        )
    reasons += disturbed.too_much(others=OTHERS_MAX, stolen=STOLEN_MAX)
    return ", ".join(reasons)


def conclude(
    report: Report, service_ns: int, slo_ns: int, disturbed: Disturbance, reasons: dict[str, float]
) -> Outcome:
    """The promises."""
    outcome = Outcome("benchmarks.feasible_load", invalid=why_invalid(disturbed, len(report.samples)))
    sent = len(report.samples)
    good = [sample for sample in report.samples if sample.status == 200]
    in_time = sum(1 for sample in good if sample.done_ns - sample.sent_ns <= slo_ns)
    outcome.at_least("in time", 99.9, 100 * in_time / sent, "%")
    latencies = [sample.done_ns - sample.sent_ns for sample in good]
    outcome.figures = {
        "sent": sent, "in_time": in_time, "answered_late": len(good) - in_time, "ends": dict(report.ends()),
        "counted_by_server": reasons, "batch_1_ms": service_ns / 1e6, "slo_ms": slo_ns / 1e6,
        "latency_ms": {str(share): quantile(latencies, share) / 1e6 for share in TAIL},
        "client_late_sends": report.late_sends,
        "involuntary_per_request": disturbed.involuntary / sent,
        "lane_waited_share": disturbed.waited_s / disturbed.seconds,
        "stolen_share": disturbed.stolen_s / disturbed.seconds,
        "others_share": disturbed.others_s / disturbed.seconds, "seconds": disturbed.seconds,
    }  # fmt: skip
    tail = ", ".join(f"p{100 * share:g} {milliseconds(quantile(latencies, share))}" for share in TAIL)
    seconds = disturbed.seconds
    print(f"  batch 1 {milliseconds(service_ns)}, SLO {milliseconds(slo_ns)}, {sent} requests")
    print(f"  ends {dict(report.ends())}, answered late {len(good) - in_time}; the server counted {reasons}")
    print(f"  latency {tail}")
    print(f"  lane: {disturbed.involuntary / sent:.2f} switches a request, limit {INVOLUNTARY_MAX:g}")
    print(f"  lane: waited for a core {percent(disturbed.waited_s, seconds)}, limit {WAITED_MAX:.0%}")
    print(f"  stolen: {percent(disturbed.stolen_s, seconds)} of a core, limit {STOLEN_MAX:.1%}")
    print(f"  used by others: {percent(disturbed.others_s, seconds)} of a core, limit {OTHERS_MAX:.0%}")
    return outcome


def measure(serving: Serving, share: float, seconds: float, seed: int) -> Outcome:
    """Warm up, load, judge."""
    x = [("x", "FP32", (1, WIDTH), bytes(4 * WIDTH))]
    service_ns = batch_1_ns(serving, infer_message(serving.http_url, MODEL, x, slo_ms=5000))
    slo_ns = 10 * service_ns
    message = infer_message(serving.http_url, MODEL, x, slo_ms=slo_ns / 1e6)
    arrivals = poisson(share * 1e9 / service_ns, seconds, random.Random(seed))
    schedule = [Shot(at_ns, message) for at_ns in arrivals]
    lane = (serving.worker_pid(), serving.exec_thread())
    before = serving.metrics()
    watch = Watch([os.getpid(), *serving.pids()], lane)
    report = run(open_loop(serving.http_url, schedule))
    disturbed = watch.read()
    after = serving.metrics()
    counted = {}
    for key in (key for key in after if key[0] == "clockwork_requests_total"):
        labels = dict(key[1])
        counted[f"{labels['outcome']} {labels['reason']}".strip()] = after[key] - before.get(key, 0)
    late = "clockwork_requests_late_total"
    counted["late"] = total(after, late) - total(before, late)
    return conclude(report, service_ns, slo_ns, disturbed, counted)


def main() -> int:
    """Run it; returns the exit status."""
    options = parser(__doc__)
    options.add_argument("--seconds", type=float, default=300)
    options.add_argument("--share", type=float, default=0.6, help="of the device")
    options.add_argument(
        "--isolate", default="off", help="the server's setting: off, cores, realtime or both"
    )
    given = options.parse_args()
    with tempfile.TemporaryDirectory() as name:
        root = Path(name) / "models"
        repositories.layers(root, MODEL, width=WIDTH, depth=DEPTH)
        with serve(root, isolate=given.isolate) as serving:
            outcome = measure(serving, given.share, given.seconds, given.seed)
    return finish(outcome, given.json)


if __name__ == "__main__":
    sys.exit(main())

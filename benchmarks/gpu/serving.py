"""Real servers on the device: goodput against SLOs as in the paper's Fig 5, and a thousand copies at 100 ms.

A controller and a worker, a process each, are asked by a gateway's own link: HTTP and gRPC are left out, for
it is the device that is measured. The limit is what the profile allows with no delay at all.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable
from typing import Any, Final

import uvloop
from msgspec import structs

from benchmarks.gpu.clients import Clients, Told
from benchmarks.gpu.copies import ERROR, FIXED, Copies, Writer, changes, pool_bytes
from benchmarks.gpu.rig import Floats, Rig, error_of, grown
from benchmarks.past_saturation.processes import Processes, started
from clockwork_lab.oracle.bound import closed_loop_limit_rps
from clockwork_serve.controller import ControllerConfig
from clockwork_serve.devices import DeviceConfig
from clockwork_serve.messages import CodeAdded, Frame, ModelAdded
from clockwork_serve.sim.constants import Network
from clockwork_serve.units import GIB, MIB, ms
from harness import machine
from harness.report import Outcome, percent, quantile

PAPER_RPS: Final = {10.0: 140.0, 25.0: 742.0, 50.0: 801.0, 100.0: 801.0}
"""Fig 5 on a V100, for comparison of shapes: another GPU has other figures."""
LIMIT_SHARE: Final = 0.9
"""Of the limit, from the SLO on that leaves room for two of the most efficient batches."""
WARM_SLO_MS: Final = 2000.0
THOUSAND_SLO_MS: Final = 100.0
THOUSAND_CLIENTS: Final = 64
LATE_SHARE: Final = 0.001
RSS_GROWS: Final = 16 * MIB
NUMBERS_S: Final = 5.5
"""A worker tells what its device counts every 5 s."""
NO_DELAY: Final = Network(gateway_ns=0, worker_ns=0, jitter_ns=0)


def goodput(rig: Rig, outcome: Outcome, writer: Writer, seconds: float) -> None:
    """15 copies of ResNet50 with 16 clients each, one SLO after the other, on one server."""
    rig.profile()
    copies = writer.copies(rig.sizes.served, seconds)
    rig.give_back()
    infer_ns = rig.profile().infer_ns
    efficient_ns = min(infer_ns.items(), key=lambda each: each[1] / each[0])[1]
    rows: list[dict[str, Any]] = []
    outcome.figures["goodput"] = {
        "models": rig.sizes.served, "clients_each": rig.sizes.clients, "front_end": "none: a gateway's link",
        "profile_ms": {size: duration / 1e6 for size, duration in infer_ns.items()}, "slos": rows,
    }  # fmt: skip

    def judge(slo_ms: float, told: Told) -> None:
        limit = closed_loop_limit_rps(infer_ns, ms(slo_ms), rig.sizes.largest, network=NO_DELAY)
        share = told.good_rps / limit if limit else 0.0
        judged = limit > 0 and ms(slo_ms) >= 2 * efficient_ns
        outcome.judge(
            f"goodput at {slo_ms:g} ms, share of the limit by the profile",
            asked=f">= {LIMIT_SHARE:.0%}" if judged else "",
            found=f"{share:.1%} ({told.good_rps:,.0f} of {limit:,.0f} r/s)",
            good=share >= LIMIT_SHARE or not judged,
        )  # fmt: skip
        rows.append(
            _told(told) | {"slo_ms": slo_ms, "limit_rps": limit, "paper_v100_rps": PAPER_RPS.get(slo_ms)}
        )

    found = uvloop.run(_goodput(rig, copies, seconds / (len(rig.sizes.slos_ms) + 1), judge))
    _judge_late(outcome, "late answers, all SLOs", found)


async def _goodput(
    rig: Rig, copies: Copies, seconds: float, heard: Callable[[float, Told], None]
) -> list[Told]:
    names = [f"copy_{number}/1" for number in range(copies.count)]
    each = rig.sizes.clients
    nbytes = rig.main.model.weights.size
    found = []
    config = _config(rig, copies.count, host_bytes=2 * copies.count * nbytes)
    async with started(ControllerConfig(), [config], frames(rig, copies), 1) as real:
        clients = Clients(real.socket, copies.count * each, rig.main, copies.rows)
        try:
            await clients.ready()
            rig.tell("every model is asked at leisure first")
            await clients.ask(lambda number: names[number // each], WARM_SLO_MS, min(2.0, seconds))
            for slo_ms in rig.sizes.slos_ms:
                rig.tell(f"goodput at {slo_ms:g} ms")
                told = await clients.ask(
                    lambda number: names[number // each], slo_ms, 0.75 * seconds, warm_s=0.25 * seconds
                )
                heard(slo_ms, told)
                found.append(told)
        finally:
            await clients.close()
    return found


def thousand(rig: Rig, outcome: Outcome, writer: Writer, seconds: float) -> None:
    """More models than the device holds, each asked at random, none of them more than others."""
    rig.profile()
    copies = writer.copies(rig.sizes.thousand, seconds / 3)
    rig.give_back()
    told, places, more = uvloop.run(_thousand(rig, copies, seconds / 3))
    right = sum(error <= ERROR for error in told.errors)
    said = f", {len(copies.files):,} different files, for {copies.why_fewer}" if copies.why_fewer else ""
    outcome.judge(
        f"{copies.count:,} models served from {places} places, SLO {THOUSAND_SLO_MS:g} ms: answers compared",
        asked=f"all right, error <= {ERROR:g}",
        found=f"{right:,} of {len(told.errors):,}{said}", good=right == len(told.errors) > 0,
    )  # fmt: skip
    resident = more.pop("worker_rss")
    outcome.judge(
        "allocations after start, by the worker's allocator and by the GPU's free memory",
        asked="none" if rig.target.gpu else "",
        found=changes(more), good=not any(more.values()),
    )  # fmt: skip
    outcome.judge(
        "resident memory of the worker after start", asked=f"<= +{RSS_GROWS >> 20} MiB",
        found=f"{resident / MIB:+.1f} MiB", good=resident <= RSS_GROWS,
    )  # fmt: skip
    _judge_late(outcome, "late answers", [told])
    outcome.judge(
        "goodput; refused at once of those asked", asked="", good=True,
        found=f"{told.good_rps:,.0f} r/s; {percent(told.accounting.rejected, told.accounting.offered)}",
    )  # fmt: skip
    outcome.figures["thousand"] = _told(told) | {
        "models": copies.count, "places": places, "files": len(copies.files), "grown": more,
        "worker_rss_grew": resident,
        "why_fewer": copies.why_fewer, "compared": len(told.errors),
    }  # fmt: skip


async def _thousand(rig: Rig, copies: Copies, seconds: float) -> tuple[Told, int, dict[str, int]]:
    names = [f"copy_{number}/1" for number in range(copies.count)]
    numbers = {name: number for number, name in enumerate(names)}
    dice = random.Random(rig.seed)
    places = copies.count // 4 if rig.sizes.short else _places(rig, copies.count)
    config = _config(rig, places, host_bytes=pool_bytes(rig))

    def check(name: str, found: Floats) -> float:
        return error_of(found, copies.wanted(numbers[name]))

    async with started(ControllerConfig(), [config], frames(rig, copies), 1) as real:
        count = 4 if rig.sizes.short else THOUSAND_CLIENTS
        clients = Clients(real.socket, count, rig.main, copies.rows)
        try:
            await clients.ready()
            rig.tell(f"{copies.count:,} models from {places} places, the first requests")
            await clients.ask(lambda _: dice.choice(names), WARM_SLO_MS, seconds / 3)
            before = await _memory(rig, real, clients)
            rig.tell(f"{copies.count:,} models from {places} places")
            told = await clients.ask(lambda _: dice.choice(names), THOUSAND_SLO_MS, seconds, check=check)
            after = await _memory(rig, real, clients)
        finally:
            await clients.close()
    return told, places, grown(before, after, ["worker_rss", "gpu_bytes", *FIXED])


def frames(rig: Rig, copies: Copies) -> list[Frame]:
    """What a controller is told: the one code with its profile, and a model for each copy."""
    served = rig.main
    told: list[Frame] = [CodeAdded(code=served.code, profiles=(rig.profile(),))]
    for number in range(copies.count):
        model = structs.replace(
            served.model, key=f"copy_{number}/1", name=f"copy_{number}", weights=copies.weights(number)
        )
        told.append(ModelAdded(model=model))
    return told


def _config(rig: Rig, places: int, *, host_bytes: int) -> DeviceConfig:
    """A device with so many places; with graphs where they are few enough for all to be kept."""
    kept = places * len(rig.main.code.batch_sizes)
    base = rig.config()
    nbytes = -(-rig.main.model.weights.size // base.page_bytes) * base.page_bytes
    return rig.config(
        memory_bytes=places * nbytes, host_bytes=host_bytes, graphs=kept if kept <= base.graphs else 0
    )


def _places(rig: Rig, count: int) -> int:
    """As many as the GPU has memory for, but not all of them."""
    page = rig.config().page_bytes
    nbytes = -(-rig.main.model.weights.size // page) * page
    free = rig.free_bytes() or 2 * GIB
    return int(max(2, min(count // 2, 0.7 * free // nbytes)))


async def _memory(rig: Rig, real: Processes, clients: Clients) -> dict[str, int]:
    """Of the worker, by what its device counts, and of the GPU: all processes, so that nothing is missed."""
    found = {"worker_rss": machine.rss_bytes(real.workers[0])}
    if rig.target.gpu:
        found["gpu_bytes"] = -rig.free_bytes()
        await asyncio.sleep(NUMBERS_S)
    return found | await clients.numbers(rig.target.name)


def _judge_late(outcome: Outcome, question: str, found: list[Told]) -> None:
    late = sum(told.accounting.late for told in found)
    good = sum(told.accounting.good for told in found)
    wrong = sum(told.accounting.unanswered + told.accounting.twice + told.accounting.failed for told in found)
    outcome.judge(
        f"{question}; failed, unanswered or answered twice", asked=f"<= {LATE_SHARE:.1%}; 0",
        found=f"{percent(late, late + good)}; {wrong}", good=late <= LATE_SHARE * (late + good) and not wrong,
    )  # fmt: skip


def _told(told: Told) -> dict[str, Any]:
    accounting = told.accounting
    return {
        "good_rps": told.good_rps, "offered": accounting.offered, "good": accounting.good,
        "late": accounting.late,
        "rejected": accounting.rejected, "failed": accounting.failed, "unanswered": accounting.unanswered,
        "twice": accounting.twice, "seconds": told.seconds,
        "latency_ms": {
            f"p{100 * share:g}": quantile(told.latencies_ns, share) / 1e6 for share in (0.5, 0.99, 0.9999)
        },
    }  # fmt: skip

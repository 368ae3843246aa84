"""Several gateways on one port: how evenly connections and requests fall, and what it does to the slowest.

First connections alone are opened, again and again, over HTTP and gRPC. Then a load is offered whose cost is
in the gateways (tensors as JSON), each connection a client of its own: on connections as they fall, on ones
that the client picked so that each gateway has as many, and on ones picked as the kernel's hash would have
spread them, in turns.
"""

from __future__ import annotations

import functools
import json
import os
import random
import statistics
import sys
import tempfile
import time
from collections import Counter
from contextlib import closing
from operator import itemgetter, truediv
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import grpc
import msgspec
import numpy as np

from clockwork_serve.oip.protobuf import message
from harness import repositories
from harness.http_load import http_message
from harness.lean_load import Found, Generator, Plan, connected, undisturbed
from harness.machine import cpu_s, used_s
from harness.report import Outcome, finish, milliseconds, parser, percent, quantile, table
from harness.serving import Serving, serve

MODEL, WIDTH = "wide", 8000
LIMIT = 1.10
"""p99 as connections fall, over that of an even split."""
ARMS = ("even", "as they fall", "as hashed")
_Request, _Response = message("inference.ModelInferRequest"), message("inference.ModelInferResponse")


def grpc_connections(url: str, count: int) -> Counter[str]:
    """How so many new gRPC connections fall on gateways."""
    request = _Request(model_name=MODEL)
    tensor = request.inputs.add()
    tensor.name, tensor.datatype = "x", "FP32"
    tensor.shape.extend((1, WIDTH))
    request.raw_input_contents.append(bytes(4 * WIDTH))
    have: Counter[str] = Counter()
    # All at once, as HTTP's are.
    channels = [grpc.insecure_channel(url, [("grpc.use_local_subchannel_pool", 1)]) for _ in range(count)]
    for channel in channels:
        infer = channel.unary_unary(
            "/inference.GRPCInferenceService/ModelInfer", _Request.SerializeToString, _Response.FromString
        )
        _, call = infer.with_call(request, timeout=10)
        trailers = dict(call.trailing_metadata())
        have["-".join(trailers["clockwork-request-id"].split("-")[:2])] += 1
    for channel in channels:
        channel.close()
    return have


def http_connections(plan: Plan) -> Counter[str]:
    """How a plan's connections fall on gateways."""
    connections = connected(plan, Path(plan.message).read_bytes())
    for connection in connections:
        connection.socket.close()
    return Counter(connection.gateway for connection in connections)


def excess(have: Counter[str], gateways: int) -> float:
    """What the gateway with most has, over an even share."""
    return max(have.values()) * gateways / have.total()


def json_request(url: str) -> bytes:
    """A request that takes a gateway a while to read."""
    x = np.random.default_rng(0).standard_normal(WIDTH, dtype=np.float32)
    tensor = {"name": "x", "datatype": "FP32", "shape": [1, WIDTH], "data": [float(value) for value in x]}
    body = json.dumps({"inputs": [tensor], "parameters": {"slo_ms": 5000}}).encode()
    return http_message(url, "POST", f"/v2/models/{MODEL}/infer", body)


def loaded(serving: Serving, plan: Plan) -> tuple[Found, Counter[str], str]:
    """Run the load: what was found, where connections were, why it proves nothing (if it does not)."""
    with closing(Generator(plan)) as generator:
        own = [*serving.pids(), generator.pid, os.getpid()]
        used, ours, began_s = used_s(), sum(map(cpu_s, own)), time.monotonic()
        found = generator.result()
        others = used_s() - used - (sum(map(cpu_s, own)) - ours)
    others /= time.monotonic() - began_s
    return found, Counter(generator.started.connections), found.why_invalid(others)


def placements(outcome: Outcome, serving: Serving, plan: Plan, gateways: int, given: Any) -> None:
    """Where connections alone fall."""
    rows = []
    for protocol in ("HTTP", "gRPC"):
        for count in given.connections:
            found = []
            for _ in range(given.trials):
                if protocol == "HTTP":
                    have = http_connections(_with(plan, connections=count))
                else:
                    have = grpc_connections(serving.grpc_url, count)
                found.append(excess(have, gateways))
            shares = (0.5, 0.9, 1.0)
            rows.append((gateways, protocol, count, *(f"{quantile(found, share):.2f}" for share in shares)))
            outcome.figures[f"{gateways} gateways, {protocol}, {count} connections: most over even"] = found
            if protocol == "HTTP":
                most = max(found)
                good = most <= max(LIMIT, (1 + count // gateways) / (count / gateways))
                outcome.judge(
                    f"{gateways} gateways, {count} HTTP connections: most of one, over even",
                    asked="one more at most", found=f"{most:.2f}", good=good,
                )  # fmt: skip
    head = ("gateways", "", "connections", "most of one, over even: median", "p90", "worst")
    print("\n" + table(head, rows))


def split_of(arm: str, gateways: int, count: int, seed: int) -> tuple[int, ...]:
    """How many connections each gateway shall have; nothing where that is the server's doing."""
    if arm == "even":
        return tuple((count + other) // gateways for other in range(gateways))
    if arm == "as hashed":
        dice = random.Random(f"{gateways} {count} {seed}")
        fell = Counter(dice.randrange(gateways) for _ in range(count))
        return tuple(fell[number] for number in range(gateways))
    return ()


def tails(outcome: Outcome, serving: Serving, plan: Plan, gateways: int, given: Any) -> None:
    """What it does to the slowest."""
    rows = []
    for count in given.connections:
        p99_ns: dict[str, list[float]] = {arm: [] for arm in ARMS}
        for turn in range(given.turns):
            for arm in ARMS:
                split = split_of(arm, gateways, count, given.seed + turn)
                this = _with(plan, connections=count, split=split, seed=given.seed + turn)
                found, have, invalid = undisturbed(
                    functools.partial(loaded, serving, this), itemgetter(2),
                    retries=given.retries, patience_s=given.patience,
                )  # fmt: skip
                p99_ns[arm].append(found.latency_ns[2])
                outcome.invalid = outcome.invalid or invalid
                connections = "/".join(str(have[f"gateway-{number}"]) for number in range(gateways))
                busiest = percent(max(found.by_gateway.values()), found.asked)
                latencies = [milliseconds(found.latency_ns[index]) for index in (0, 2, 3)]
                rows.append((gateways, arm, connections, busiest, *latencies, invalid))
        over = {
            arm: statistics.median(map(truediv, p99_ns[arm], p99_ns["even"])) for arm in ARMS if arm != "even"
        }
        outcome.figures[f"{gateways} gateways, {count} connections: p99 ns"] = p99_ns
        what = (
            f"{gateways} gateways, {count} connections: p99 as they fall over even, median of {given.turns}"
        )
        beside = f"(as hashed: {over['as hashed']:.2f})"
        outcome.at_most(what, LIMIT, over["as they fall"], more=beside)
    head = ("gateways", "", "connections", "of requests, most", "p50", "p99", "p99.9", "")
    print("\n" + table(head, rows))


def _with(plan: Plan, **fields: Any) -> Plan:
    return msgspec.structs.replace(plan, **fields)


def main() -> int:
    """Run it; returns the exit status."""
    options = parser(__doc__)
    options.add_argument("--gateways", type=int, nargs="+", default=[2, 4])
    options.add_argument("--connections", type=int, nargs="+", default=[8, 16, 32, 100])
    options.add_argument("--trials", type=int, default=20, help="times that connections alone are opened")
    options.add_argument("--turns", type=int, default=5, help="loads on connections as they fall, and even")
    options.add_argument("--seconds", type=float, default=5, help="of each load")
    options.add_argument("--rate", type=float, default=600, help="requests a second")
    options.add_argument("--retries", type=int, default=3, help="times that a disturbed load is run again")
    options.add_argument("--patience", type=float, default=20, help="seconds to wait for a quiet machine")
    given = options.parse_args()
    outcome = Outcome("benchmarks.gateway_balance")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        repositories.emulated(folder / "models", MODEL, {1: 2.0, 16: 2.0}, width=WIDTH)
        for gateways in given.gateways:
            with serve(folder / "models", device="emulated", gateways=gateways) as serving:
                parts = urlsplit(serving.http_url)
                file = folder / "request.http"
                file.write_bytes(json_request(serving.http_url))
                plan = Plan(
                    host=parts.hostname or "", port=parts.port or 80, message=str(file), rate=given.rate,
                    seconds=given.seconds, connections=0, own_streams=True,
                )  # fmt: skip
                if given.trials:
                    placements(outcome, serving, plan, gateways, given)
                if given.turns:
                    tails(outcome, serving, plan, gateways, given)
    return finish(outcome, given.json)


if __name__ == "__main__":
    sys.exit(main())

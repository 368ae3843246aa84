"""Clients that disconnect: whether the device still runs their requests."""

from __future__ import annotations

import asyncio
import random
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Final

from clockwork_serve.oip.protobuf import ModelInferRequest
from comparison.peers import v2
from comparison.peers.peer import HOST
from comparison.promises import hang_up
from comparison.promises.executions import NUMBERED, executions, log_of, numbered, started
from comparison.promises.hang_up import Ask, End
from comparison.promises.loads import EMULATED, NS_PER_MS, names
from comparison.promises.question import Figures, Question, Row, Runs, at_most, column
from comparison.promises.rejections import message
from comparison.promises.rig import Rig, Serving
from harness.http_load import poisson

MODELS: Final = 15
SLO_MS: Final = 1000
"""Long, so that many requests wait when half of it is over."""
RATE: Final = 200
"""About twice what the device can do."""
SECONDS: Final = 20
SLACK_NS: Final = 20_000_000


def measure(rig: Rig, variant: str, repeat: int) -> Figures:
    """``http``: sockets are closed; ``grpc``: calls are reset."""
    with rig.serving(EMULATED, names(MODELS), asked=NUMBERED) as serving:
        asks = _asks(serving, variant, repeat)
        log = log_of(serving.setup)
        log.write_text("")
        patience_s = SLO_MS / 2e3
        with serving.apart():
            if variant == "http":
                send = hang_up.over_http(HOST, serving.setup.port)
                ends = asyncio.run(hang_up.all_of(asks, patience_s, send))
            else:
                ends = asyncio.run(hang_up.grpc_all(serving.grpc, v2.METHOD, asks, patience_s))
        ran = executions(log.read_text().splitlines())
    return {**serving.slot, "rate_rps": RATE, **told(ends, started(ran))}


def _asks(serving: Serving, variant: str, repeat: int) -> list[Ask]:
    rng, setup = random.Random(repeat), serving.setup
    found = []
    for number, at_ns in enumerate(poisson(RATE, SECONDS, rng)):
        model = setup.names[rng.randrange(MODELS)]
        if variant == "http":
            sent = message(serving, model, number, SLO_MS)
        else:
            x = numbered(serving.x, number)
            made = ModelInferRequest(model_name=model, raw_input_contents=[x.tobytes()])
            made.inputs.add(name="x", datatype="FP32", shape=[1, *x.shape[1:]])
            made.parameters["slo_ms"].int64_param = SLO_MS
            sent = made.SerializeToString()
        found.append(Ask(number, at_ns, sent))
    return found


def told(ends: Sequence[End], began_ns: Mapping[int, int]) -> Figures:
    """Of those who hung up: whose execution began afterwards, and how long afterwards."""
    hung = [end for end in ends if end.hung_ns]
    after_ns = [began_ns[end.number] - end.hung_ns for end in hung if end.number in began_ns]
    return {
        "asked": len(ends), "hung_up": len(hung), "ends": Counter(end.status for end in ends),
        "answered_and_ran": sum(not end.hung_ns and end.number in began_ns for end in ends),
        "began_before": sum(one <= 0 for one in after_ns),
        "began_soon_after": sum(0 < one <= SLACK_NS for one in after_ns),
        "began_long_after": sum(one > SLACK_NS for one in after_ns),
        "latest_ms": max((one for one in after_ns if one > 0), default=0) / NS_PER_MS,
        "hung_late_ms": max((end.hung_ns - end.sent_ns for end in hung), default=0) / NS_PER_MS - SLO_MS / 2,
    }  # fmt: skip


def rows(runs: Runs) -> list[Row]:
    """None should be begun so late."""
    found = []
    for variant, title in (("http", "HTTP, socket closed"), ("grpc", "gRPC, call reset")):
        found += [
            Row(f"{title}: executions begun more than 20 ms after the client hung up",
                column(runs, variant, "began_long_after"), "{:.0f}", at_most(0, every=True)),
            Row(f"{title}: begun within 20 ms after", column(runs, variant, "began_soon_after"), "{:.0f}"),
            Row(f"{title}: the latest, after", column(runs, variant, "latest_ms"), "{:.1f} ms"),
            Row(f"{title}: the client was late, at most", column(runs, variant, "hung_late_ms"), "{:.1f} ms"),
            Row(f"{title}: clients that hung up", column(runs, variant, "hung_up"), "{:.0f}"),
        ]  # fmt: skip
    return found


QUESTION: Final = Question(
    "abandoned", "Clients that hang up at half of the SLO", ("http", "grpc"), measure, rows
)

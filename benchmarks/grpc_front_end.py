"""The gRPC front end alone, against bare echoes of the same messages: CPU a request, requests a second.

The server has one core, the client and the controller's stand-in another. All servers are up all the time
and are asked in turns, so that they see the same machine. As ``python -m benchmarks.grpc_front_end --bare
sync|aio`` it is one of the echoes.
"""

from __future__ import annotations

import asyncio
import functools
import os
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent import futures
from contextlib import ExitStack
from typing import Any, Final

import grpc
import grpc.aio
import uvloop

from clockwork_serve.oip.protobuf import INFERENCE_SERVICE, ModelInferRequest, ModelInferResponse
from clockwork_serve.units import MIB
from harness.grpc_load import ROOM_BYTES, Load
from harness.machine import cpu_s
from harness.ports import free_port
from harness.report import Outcome, finish, in_turns, parser, table
from harness.stand_in import FLOAT_BYTES, MODEL, gateway, module

NAME: Final = "benchmarks.grpc_front_end"
METHOD: Final = f"/{INFERENCE_SERVICE}/ModelInfer"
SHARE: Final = 0.75
OURS: Final = "ours"
BARE: Final = {"sync": "bare grpc.server, 8 threads", "aio": "bare grpc.aio"}
NAMES: Final = {**BARE, OURS: "our gateway"}
THREADS: Final = 8
CONNECTIONS: Final = 4
WARM_UP_S: Final = 0.3


def request(tensor_bytes: int) -> bytes:
    """A ``ModelInferRequest``."""
    found = ModelInferRequest(model_name=MODEL, raw_input_contents=[bytes(tensor_bytes)])
    found.inputs.add(name="x", datatype="FP32", shape=[1, tensor_bytes // FLOAT_BYTES])
    encoded: bytes = found.SerializeToString()
    return encoded


def answered(asked: Any) -> Any:
    """The least that parses and answers the same messages."""
    tensor = asked.inputs[0]
    found = ModelInferResponse(
        model_name=asked.model_name, model_version="1", id=asked.id,
        raw_output_contents=[asked.raw_input_contents[0]],
    )  # fmt: skip
    found.outputs.add(name="y", datatype=tensor.datatype, shape=tensor.shape)
    return found


def _handlers(answer: Callable[..., Any]) -> Any:
    handler = grpc.unary_unary_rpc_method_handler(
        answer, request_deserializer=ModelInferRequest.FromString,
        response_serializer=ModelInferResponse.SerializeToString,
    )  # fmt: skip
    return (grpc.method_handlers_generic_handler(INFERENCE_SERVICE, {"ModelInfer": handler}),)


def bare_sync() -> None:
    """The server of grpcio with a pool of threads."""
    server = grpc.server(futures.ThreadPoolExecutor(THREADS))
    server.add_generic_rpc_handlers(_handlers(lambda asked, context: answered(asked)))
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    print(port, flush=True)
    signal.pause()


async def bare_aio() -> None:
    """The server of grpcio on an event loop."""

    async def answer(asked: Any, context: Any) -> Any:
        return answered(asked)

    server = grpc.aio.server()
    server.add_generic_rpc_handlers(_handlers(answer))
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    print(port, flush=True)
    await asyncio.Event().wait()


def shot(pid: int, port: int, message: bytes, in_flight: int, seconds: float) -> dict[str, float]:
    """What a server does for a while."""
    load = Load(port, METHOD, message, [in_flight // CONNECTIONS] * CONNECTIONS)
    load.run(WARM_UP_S)
    done, used_s, started = load.done, cpu_s(pid), time.monotonic()
    load.run(seconds)
    requests = load.done - done
    taken_s, used_s = time.monotonic() - started, cpu_s(pid) - used_s
    load.close()
    return {"us": used_s / requests * 1e6, "per_s": requests / taken_s, "failed": load.failed}


def measure(given: Any) -> tuple[Any, Any]:
    """Every server in turns: what each did, and the medians of it."""
    cores = os.sched_getaffinity(0)
    server_core, client_core = sorted(cores)[:2]
    floats = given.bytes // FLOAT_BYTES
    message = request(given.bytes)
    settings = {"slo_ms": 60_000, "gateway_memory": max(256 * MIB, 256 * given.bytes)}
    with ExitStack() as stack:
        stack.callback(os.sched_setaffinity, 0, cores)
        os.sched_setaffinity(0, {client_core})
        folder = stack.enter_context(tempfile.TemporaryDirectory())
        stack.enter_context(module(client_core, "harness.stand_in", folder, floats, floats))
        up: dict[str, tuple[int, int]] = {}
        for name in BARE:
            pid, port = stack.enter_context(module(server_core, NAME, "--bare", name))
            up[name] = pid, int(port)
        grpc_port = free_port()
        pid, _ = stack.enter_context(gateway(server_core, folder, OURS, grpc_port=grpc_port, **settings))
        up[OURS] = pid, grpc_port
        sides = {
            name: functools.partial(shot, *at, message, given.in_flight, given.seconds)
            for name, at in up.items()
        }
        return in_turns(sides, given.rounds)


def judge(found: Any, middle: Any) -> Outcome:
    """Compare medians."""
    outcome = Outcome(NAME)
    rows = [
        (NAMES[name], f"{each['us']:.1f}", f"{1e6 / each['us']:,.0f}", f"{each['per_s']:,.0f}")
        for name, each in middle.items()
    ]
    print(table(("", "us of CPU a request", "requests/s a core could do", "requests/s done"), rows))
    ours = middle[OURS]
    fastest = min(BARE, key=lambda name: middle[name]["us"])
    most = max(BARE, key=lambda name: middle[name]["per_s"])
    could = "requests a core can do, against"
    outcome.at_least(f"{could} the {BARE[fastest]}", SHARE, middle[fastest]["us"] / ours["us"], "x")
    done = ours["per_s"] / middle[most]["per_s"]
    outcome.at_least(f"requests done, against the {BARE[most]}", SHARE, done, "x")
    failed = sum(shot["failed"] for shots in found.values() for shot in shots)
    outcome.at_most("requests that failed", 0, failed, digits=0)
    outcome.figures = {"median": middle, "shots": found}
    return outcome


def main() -> int:
    """Run it; returns the exit status."""
    options = parser(__doc__)
    options.add_argument("--rounds", type=int, default=9)
    options.add_argument("--seconds", type=float, default=2.0, help="of each server in each round")
    options.add_argument("--in-flight", type=int, default=32, help="calls open at any time")
    options.add_argument("--bytes", type=int, default=1024, help="of a request's tensor and of its answer's")
    options.add_argument("--bare", choices=BARE, help="be this echo, and nothing else")
    given = options.parse_args()
    if given.bare == "sync":
        bare_sync()
    elif given.bare:
        uvloop.run(bare_aio())
    if given.bytes * given.in_flight > ROOM_BYTES * CONNECTIONS:
        options.error(
            f"bytes x in-flight: expected at most {ROOM_BYTES * CONNECTIONS}; ask for less of either"
        )
    if len(os.sched_getaffinity(0)) < 2:
        return finish(Outcome(NAME, invalid="it needs two cores"), given.json)
    return finish(judge(*measure(given)), given.json)


if __name__ == "__main__":
    sys.exit(main())

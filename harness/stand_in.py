"""A controller that answers every request at once, so that a gateway can be measured alone.

Run as a program (RUN_DIR FLOATS OUTPUT_FLOATS) it is that controller.
"""

from __future__ import annotations

import asyncio
import math
import subprocess
import sys
import urllib.request
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final, NamedTuple

import msgspec
import uvloop

from clockwork_serve.config import Settings
from clockwork_serve.messages import (
    Answer,
    Beat,
    CodeAdded,
    Frame,
    ModelAdded,
    Outcome,
    Readiness,
    Request,
    Role,
    TensorRef,
    Tensors,
    TensorSpec,
)
from clockwork_serve.serve.gateway.settings import GatewayConfig
from clockwork_serve.serve.transport import SOCKET_NAME, Link, hello, listen
from clockwork_serve.units import ms
from harness import records
from harness.ports import free_port
from harness.serving import until

MODEL: Final = "m"
FLOAT_BYTES: Final = 4


class Served(NamedTuple):
    """A model: datatype and shape of its input ``x``, shape of its output ``y`` (FP32), its largest batch.

    ``rows_max`` is 0 where there is no batch axis.
    """

    datatype: str
    shape: tuple[int, ...]
    output: tuple[int, ...]
    rows_max: int = 0


class StandIn:
    """Serves models whose outputs are never written."""

    def __init__(self, models: Mapping[str, Served]) -> None:
        self._models = {f"{name}/1": one for name, one in models.items()}
        self._row_bytes = {key: FLOAT_BYTES * math.prod(one.output) for key, one in self._models.items()}
        self._decode = msgspec.msgpack.Decoder(Tensors).decode
        self._encode = msgspec.msgpack.Encoder().encode

    async def listen(self, run_dir: str) -> None:
        """Be the controller of the gateways of that folder."""
        own = hello(Role.CONTROLLER, "controller")
        await listen(Path(run_dir) / SOCKET_NAME, own, self._greet, self._answer_all, lambda _: None)

    def _greet(self, link: Link) -> None:
        for key, (datatype, shape, output, rows_max) in self._models.items():
            name = key.partition("/")[0]
            sizes = tuple(size for size in records.SIZES if size <= max(1, rows_max))
            code = records.code(
                name, sizes, backend="onnx", batched=bool(rows_max),
                inputs=(TensorSpec(name="x", datatype=datatype, shape=shape),),
                outputs=(TensorSpec(name="y", datatype="FP32", shape=output),),
            )  # fmt: skip
            profile = records.profile(name, {1: ms(1)}, device_kind="cpu")
            model = records.model(
                name, name, sizes=sizes, size=1, platform="none", max_batch_size=rows_max, config=b"{}",
                output_bytes=self._row_bytes[key],
            )  # fmt: skip
            link.send(CodeAdded(code=code, profiles=(profile,)))
            link.send(ModelAdded(model=model))
        link.send(Readiness(ready=True))

    def _answer_all(self, link: Link, frames: list[Frame]) -> None:
        for frame in frames:
            if isinstance(frame, Request):
                link.send(self._answer(frame))
            elif isinstance(frame, Beat):
                link.send(frame)

    def _answer(self, asked: Request) -> Answer:
        tensors = self._decode(asked.tensors)
        one, rows, nbytes = self._models[asked.model], asked.rows, self._row_bytes[asked.model]
        shape = (rows, *one.output) if one.rows_max else one.output
        ref = TensorRef(
            name="y", datatype="FP32", shape=shape, offset=tensors.output_offset,
            nbytes=nbytes * rows if one.rows_max else nbytes,
        )  # fmt: skip
        return Answer(
            request_id=asked.request_id, gateway=asked.gateway, outcome=Outcome.OK, batch=1,
            outputs=self._encode(msgspec.structs.replace(tensors, refs=(ref,))),
            exec_ns=ms(1), queue_ns=ms(1), expected_ns=ms(1),
        )  # fmt: skip


@contextmanager
def module(core: int, name: str, *arguments: object, says: bool = True) -> Iterator[tuple[int, str]]:
    """``python -m NAME`` on one core until the end of the block: its process, and what it ``says`` first."""
    command = ["taskset", "-c", str(core), sys.executable, "-m", name, *map(str, arguments)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE)
    assert process.stdout is not None
    try:
        yield process.pid, process.stdout.readline().decode().strip() if says else ""
    finally:
        process.kill()
        process.wait()
        process.stdout.close()


@contextmanager
def gateway(core: int, run_dir: str, name: str = "g0", **settings: Any) -> Iterator[tuple[int, int]]:
    """A gateway on one core, whose controller is in that folder: its process and HTTP port. TimeoutError."""
    port = free_port()
    config = GatewayConfig(
        settings=Settings(http_port=port, metrics_port=None, log_level="warning", **settings),
        run_dir=run_dir,
        name=name,
    )
    process = module(
        core, "clockwork_serve.serve.processes.gateway", msgspec.json.encode(config).decode(), says=False
    )
    with process as (pid, _):
        until("the gateway is ready", lambda: _ready(port), every_s=0.1)
        yield pid, port


def _ready(port: int) -> bool:
    try:
        urllib.request.urlopen(f"http://127.0.0.1:{port}/v2/health/ready", timeout=5).close()
    except OSError:
        return False
    return True


async def _serve(run_dir: str, floats: str, output_floats: str) -> None:
    await StandIn({MODEL: Served("FP32", (int(floats),), (int(output_floats),), 1)}).listen(run_dir)
    print("up", flush=True)
    await asyncio.Event().wait()


if __name__ == "__main__":
    uvloop.run(_serve(*sys.argv[1:]))

"""A real controller and real workers of emulated devices, each in a process of its own.

This process is their supervisor, and its caller is their gateway, over the usual links: everything except
HTTP and gRPC is as in the server.
"""

from __future__ import annotations

import asyncio
import logging
import tempfile
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Final

from msgspec import Struct, structs

from clockwork_serve.config import Settings
from clockwork_serve.controller import ControllerConfig
from clockwork_serve.devices.base import DeviceConfig
from clockwork_serve.devices.emulated import emulated_config, emulated_profile
from clockwork_serve.errors import ClockworkError
from clockwork_serve.messages import Code, CodeAdded, Frame, Model, ModelAdded, TensorSpec, Weights
from clockwork_serve.serve.lease import create_lease
from clockwork_serve.serve.processes.controller import ControllerProcessConfig
from clockwork_serve.serve.supervisor.link import SupervisorLink
from clockwork_serve.serve.supervisor.processes import Child, Launch, describe_exit
from clockwork_serve.serve.transport import SOCKET_NAME
from clockwork_serve.serve.worker.host import WorkerConfig
from clockwork_serve.units import MIB

PROFILE: Final = "v100"
WEIGHTS_BYTES: Final = 98 * MIB  # weights of ResNet50, whose durations the profile has
ROW: Final = 4
"""Numbers in an input, and in an output: tensors do not pass through the controller, so they need no size."""
READY_S, GRACE_S, POLL_S = 60.0, 10.0, 0.02
_CPU_CLOCK: Final = 2  # linux's clock of the CPU time of a process, beside its pid in the number of a clock


class Processes(Struct, frozen=True):
    """The running processes: the controller's socket, the keys of the served models, and process ids."""

    socket: Path
    models: tuple[str, ...]
    controller: int
    workers: tuple[int, ...]

    def cpu_s(self) -> tuple[float, float, float]:
        """Seconds of CPU that the controller, all workers and this process have used."""
        return _process_s(self.controller), sum(map(_process_s, self.workers)), time.process_time()


@asynccontextmanager
async def processes(
    config: ControllerConfig, *, devices: int, models: int, workers: int
) -> AsyncIterator[Processes]:
    """A ready controller, with emulated devices distributed over worker processes.

    All are ended with the block. Raises :class:`ClockworkError` if one of them ends before.
    """
    configs = [emulated_config(f"emulated:{number}", PROFILE) for number in range(devices)]
    frames = catalogue(configs[0], config.max_batch, models)
    async with started(config, configs, frames, workers) as real:
        yield real


@asynccontextmanager
async def started(
    config: ControllerConfig, configs: list[DeviceConfig], frames: list[Frame], workers: int
) -> AsyncIterator[Processes]:
    """The same with any devices and models, which ``frames`` announce to the controller."""
    children: list[Child] = []
    link: SupervisorLink | None = None
    with tempfile.TemporaryDirectory(prefix="clockwork-") as folder:
        try:
            create_lease(Path(folder))
            launches = _launches(Path(folder), config, configs, workers)
            children.extend(Child(launch, logging.getLogger(__name__).debug) for launch in launches)
            link = SupervisorLink(Path(folder) / SOCKET_NAME, lambda: frames)
            link.start()
            await _until_ready(link, children)
            yield Processes(
                Path(folder) / SOCKET_NAME,
                tuple(frame.model.key for frame in frames if isinstance(frame, ModelAdded)),
                children[0].pid,
                tuple(child.pid for child in children[1:]),
            )
            for child in children:
                if child.exited:
                    await child.ended
            _check(children)
        finally:
            if link is not None:
                link.close()
            # Workers first: without a controller they would try to reconnect forever.
            for child in reversed(children):
                await child.stop(GRACE_S)


def _launches(
    folder: Path, config: ControllerConfig, devices: list[DeviceConfig], workers: int
) -> list[Launch]:
    settings = Settings(log_level="warning")
    controller = ControllerProcessConfig(
        run_dir=str(folder),
        settings=settings,
        controller=structs.replace(config, expected_devices=len(devices)),
    )
    launches = [Launch.of("controller", "controller", controller)]
    for number in range(min(workers, len(devices))):
        name, own = f"worker-{number}", tuple(devices[number::workers])
        worker = WorkerConfig(run_dir=str(folder), name=name, devices=own, settings=settings)
        launches.append(Launch.of(name, "worker", worker))
    return launches


def catalogue(device: DeviceConfig, max_batch: int, models: int) -> list[Frame]:
    """Models with individual weights and one code, which takes the durations of the profile."""
    sizes = tuple(size for size in (1, 2, 4, 8, 16) if size <= max_batch)
    code = Code(
        code_id="emulated", backend="onnx", path="",
        inputs=(TensorSpec(name="x", datatype="FP32", shape=(ROW,)),),
        outputs=(TensorSpec(name="y", datatype="FP32", shape=(ROW,)),),
        batched=True, batch_sizes=sizes, lifted=True,
    )  # fmt: skip
    frames: list[Frame] = [CodeAdded(code=code, profiles=(emulated_profile(device, code),))]
    for number in range(models):
        name = f"resnet50_{number:03d}"
        weights = Weights(weights_id=name, path="", size=WEIGHTS_BYTES)
        frames.append(
            ModelAdded(
                model=Model(
                    key=f"{name}/1", name=name, version="1", code_id=code.code_id, weights=weights,
                    platform="emulated", max_batch_size=max_batch, batch_sizes=sizes, output_bytes=64,
                )
            )
        )  # fmt: skip
    return frames


def _process_s(pid: int) -> float:
    # As clock_getcpuclockid(3), which Python lacks: in ns. What /proc says is rounded down to hundredths of a
    # second, and a worker may use less than one.
    return time.clock_gettime(~pid << 3 | _CPU_CLOCK)


async def _until_ready(link: SupervisorLink, children: list[Child]) -> None:
    deadline_s = time.monotonic() + READY_S
    while not link.readiness.ready:
        _check(children)
        if time.monotonic() > deadline_s:
            raise ClockworkError(f"the controller is not ready within {READY_S:g} s: {link.readiness.why}")
        await asyncio.sleep(POLL_S)


def _check(children: list[Child]) -> None:
    for child in children:
        if child.ended.done():
            output, how = "\n".join(child.tail), describe_exit(child.ended.result())
            raise ClockworkError(f"{child.launch.name} ended before its time, {how}; it printed:\n{output}")

"""A worker process: its devices, a thread per lane that computes, and one thread for the link."""

from __future__ import annotations

import asyncio
import gc
import logging
import sys
from collections.abc import Sequence
from typing import Final

import msgspec

from clockwork_serve.devices import build
from clockwork_serve.devices.base import Device
from clockwork_serve.errors import ClockworkError, ConfigError
from clockwork_serve.serve import child
from clockwork_serve.serve.driver import use_batch_policy, use_short_slices
from clockwork_serve.serve.worker.host import WorkerConfig, WorkerHost
from clockwork_serve.serve.worker.lanes import FIFO_PRIORITY, set_realtime

SWITCH_INTERVAL_S: Final = 1e-4
"""The interpreter's switch interval: lanes often return from native code, and wait for the lock then."""

_log = logging.getLogger(__name__)


def main(argv: Sequence[str]) -> int:
    """Run the process whose configuration is the JSON in ``argv[1]``; returns its exit status."""
    config = msgspec.json.decode(argv[1], type=WorkerConfig)
    child.prepare(config.name, config.settings)
    try:
        _set_priorities(config)
        devices = {each.device: build(each) for each in config.devices}
    except ClockworkError as error:
        _log.critical("%s", error)
        return child.EXIT_CONFIG
    gc.set_threshold(50_000, 50, 1000)
    gc.freeze()
    try:
        return child.run_until_stopped(lambda stop: _serve(config, devices, stop))
    finally:
        for device in devices.values():
            device.close()


async def _serve(config: WorkerConfig, devices: dict[str, Device], stop: asyncio.Event) -> None:
    host = _host(config, devices)
    if host.executors.on_loop:
        use_short_slices()
    else:
        # Called once the lanes' threads exist, so that they do not inherit it: only this thread may wait.
        asyncio.get_running_loop().call_soon(use_batch_policy)
    child.answer_beats()
    await host.run(stop)


def _host(config: WorkerConfig, devices: dict[str, Device]) -> WorkerHost:
    if not (config.elsewhere or config.settings.listen_machines):
        return WorkerHost(config, devices, child.freeze_live_objects)
    from clockwork_serve.serve.remote.worker import MachineHost, tensors_of

    if config.elsewhere:
        return MachineHost(config, devices, child.freeze_live_objects)
    host = WorkerHost(config, devices, child.freeze_live_objects)
    host.tensors = tensors_of(host, config.settings)  # of gateways elsewhere
    return host


def _set_priorities(config: WorkerConfig) -> None:
    sys.setswitchinterval(SWITCH_INTERVAL_S)
    if config.settings.is_realtime:
        try:
            # Above the lanes' priority: this thread runs briefly, a lane's computation does not.
            set_realtime(FIFO_PRIORITY + 1)
        except OSError as error:
            raise ConfigError(
                f"isolate of {config.name}: real-time priority was refused ({error.strerror}); give the "
                "process CAP_SYS_NICE, or an rtprio limit of 11 or more (ulimit -r), or turn it off"
            ) from None


if __name__ == "__main__":
    sys.exit(main(sys.argv))

"""The controller process: one brain, one socket, one loop; or a standby, until the lease is free."""

from __future__ import annotations

import asyncio
import gc
import logging
import os
import signal
import sys
import time
from collections.abc import Sequence
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Final

import msgspec
from msgspec import Struct, structs

from clockwork_serve.config import Settings
from clockwork_serve.controller import Controller, ControllerConfig
from clockwork_serve.devices.kinds import machine_name
from clockwork_serve.messages import Role
from clockwork_serve.serve import child
from clockwork_serve.serve.controller.hub import Brain, Hub
from clockwork_serve.serve.driver import UrgentTimer, use_short_slices
from clockwork_serve.serve.lease import FileLease, Lease
from clockwork_serve.serve.transport import SOCKET_NAME, hello, listen
from clockwork_serve.serve.worker.crash_report import read_crash_report
from clockwork_serve.telemetry import Journal, Recorder, head_of
from clockwork_serve.telemetry.journal import FILES

JOURNAL_FLUSH_S: Final = 0.25
"""What the journal holds is at most so much older than the present, whoever looks at it."""
_FREEZE_AFTER_S: Final = 5.0
HAND_OVER_S: Final = 0.02
"""So long a controller that gives the lead up goes on with the requests that it has; gateways ask the next
one for those that are left."""
HEARD_S: Final = 0.002
"""By then gateways have heard of it, and what they sent before is here."""
_THRESHOLDS: Final = (10_000, 1000, 1000)
"""Of garbage collection, which takes 0.4 us for each young object. The brain creates no reference cycles."""

_log = logging.getLogger(__name__)


class ControllerProcessConfig(Struct, frozen=True, kw_only=True):
    """The process's configuration. Ids of actions begin when it takes the lead, not as in ``controller``."""

    run_dir: str
    name: str = "controller"
    controller: ControllerConfig = ControllerConfig()
    settings: Settings = Settings()


async def lead_once(config: ControllerProcessConfig, lease: Lease, stop: asyncio.Event) -> None:
    """Wait for the lease, with everything ready, and lead until ``stop``, or until the lease is lost.

    Raises :class:`ConfigError` where the lease cannot be had. By SIGUSR1 who leads hands over, and returns.
    """
    Controller(config.controller)  # imports its policy
    child.freeze_live_objects(*_THRESHOLDS)
    child.answer_beats()
    epoch = await _acquired(lease, stop)
    if epoch:
        _log.info("leads, with epoch %d", epoch, extra={"pid": os.getpid()})
        lost = asyncio.create_task(_stop_if_lost(lease, stop))
        # Less than one id is used per ns, so all ids of an earlier controller are smaller.
        brain = structs.replace(config.controller, first_id=time.time_ns())
        leave = asyncio.Event()
        asyncio.get_running_loop().add_signal_handler(signal.SIGUSR1, leave.set)
        config = structs.replace(config, controller=brain)
        await serve(config, Controller(brain), stop, epoch=epoch, leave=leave)
        lost.cancel()
    lease.release()


async def _acquired(lease: Lease, stop: asyncio.Event) -> int:
    """The epoch with which the lease was had; 0 if ``stop`` came first."""
    acquiring, stopped = asyncio.create_task(lease.acquire()), asyncio.create_task(stop.wait())
    await asyncio.wait((acquiring, stopped), return_when=asyncio.FIRST_COMPLETED)
    stopped.cancel()
    if not stop.is_set():
        return acquiring.result()
    acquiring.cancel()
    return 0


async def _stop_if_lost(lease: Lease, stop: asyncio.Event) -> None:
    await lease.lost.wait()
    _log.error("the lease is lost: leads no longer")
    stop.set()


async def serve(
    config: ControllerProcessConfig, brain: Brain, stop: asyncio.Event, *, epoch: int, leave: asyncio.Event
) -> None:
    """Run ``brain`` on RUN_DIR/controller.sock until ``stop``, which it sets itself soon after ``leave``."""
    settings, journal = config.settings, None
    if (path := settings.journal_path(config.run_dir)) is not None:
        head = structs.replace(
            head_of(config.controller, datetime.now(UTC), time.monotonic_ns()), machine=machine_name()
        )

        journal = Journal(path, head, file_bytes=settings.journal_bytes // FILES)
        _log.info("journal: %s", path)
    recorder = Recorder(config.settings.trace_sample if config.settings.otlp_endpoint else None)
    recorder.counters.epoch = epoch
    hub = Hub(
        brain,
        recorder,
        journal,
        read_crash_report=partial(read_crash_report, Path(config.run_dir)),
        timer=UrgentTimer,
    )
    listener = await listen(
        Path(config.run_dir) / SOCKET_NAME,
        hello(Role.CONTROLLER, config.name, epoch),
        hub.on_link,
        hub.on_frames,
        hub.on_lost,
    )
    hub.driver.wake()
    # What came since is frozen without a pass over it, which would stop the serving controller.
    asyncio.get_running_loop().call_later(_FREEZE_AFTER_S, gc.freeze)
    handing_over = asyncio.create_task(_hand_over(hub, leave, stop))
    try:
        await _flush_until(stop, journal)
    finally:
        handing_over.cancel()
        listener.close()
        hub.driver.close()
        if journal is not None:
            journal.close()


async def _hand_over(hub: Hub, leave: asyncio.Event, stop: asyncio.Event) -> None:
    """Once asked to leave, finish what is soon finished, and stop."""
    await leave.wait()
    _log.info("hands over")
    hub.hand_over()
    end_s = time.monotonic() + HAND_OVER_S
    await asyncio.sleep(HEARD_S)
    while hub.open_requests and time.monotonic() < end_s:  # noqa: ASYNC110 - nobody tells of the last one
        await asyncio.sleep(HEARD_S)
    stop.set()


async def _flush_until(stop: asyncio.Event, journal: Journal | None) -> None:
    while not stop.is_set():
        try:
            await asyncio.wait_for(stop.wait(), None if journal is None else JOURNAL_FLUSH_S)
        except TimeoutError:
            assert journal is not None
            journal.flush()


def main(argv: Sequence[str]) -> int:
    """Run the process whose configuration is the JSON in ``argv[1]``; returns its exit status."""
    config = msgspec.json.decode(argv[1], type=ControllerProcessConfig)
    child.prepare(config.name, config.settings)
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)  # until there is something to hand over
    if not use_short_slices():
        _log.debug("the kernel gives no short time slices: on a busy host decisions will be later")
    return child.run_until_stopped(lambda stop: lead_once(config, FileLease(Path(config.run_dir)), stop))


if __name__ == "__main__":
    sys.exit(main(sys.argv))

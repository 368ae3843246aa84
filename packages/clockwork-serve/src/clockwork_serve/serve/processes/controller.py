"""The controller process: one brain, one socket, one loop."""

from __future__ import annotations

import asyncio
import gc
import logging
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
from clockwork_serve.messages import Role
from clockwork_serve.serve import child
from clockwork_serve.serve.controller.hub import Brain, Hub
from clockwork_serve.serve.driver import UrgentTimer, use_short_slices
from clockwork_serve.serve.transport import SOCKET_NAME, hello, listen
from clockwork_serve.serve.worker.crash_report import read_crash_report
from clockwork_serve.telemetry import Journal, Recorder, head_of
from clockwork_serve.telemetry.journal import FILES

JOURNAL_FLUSH_S: Final = 0.25
"""What the journal holds is at most so much older than the present, whoever looks at it."""
_FREEZE_AFTER_S: Final = 5.0
_THRESHOLDS: Final = (10_000, 1000, 1000)
"""Of garbage collection, which takes 0.4 us for each young object. The brain creates no reference cycles."""

_log = logging.getLogger(__name__)


class ControllerProcessConfig(Struct, frozen=True, kw_only=True):
    """The process's configuration. Ids of actions begin at its start, whatever ``controller`` says."""

    run_dir: str
    controller: ControllerConfig = ControllerConfig()
    settings: Settings = Settings()


async def serve(config: ControllerProcessConfig, brain: Brain, stop: asyncio.Event) -> None:
    """Run ``brain`` on RUN_DIR/controller.sock until ``stop``."""
    settings, journal = config.settings, None
    if (path := settings.journal_path(config.run_dir)) is not None:
        head = head_of(config.controller, datetime.now(UTC), time.monotonic_ns())
        journal = Journal(path, head, file_bytes=settings.journal_bytes // FILES)
        _log.info("journal: %s", path)
    hub = Hub(
        brain,
        Recorder(config.settings.trace_sample if config.settings.otlp_endpoint else None),
        journal,
        read_crash_report=partial(read_crash_report, Path(config.run_dir)),
        timer=UrgentTimer,
    )
    listener = await listen(
        Path(config.run_dir) / SOCKET_NAME,
        hello(Role.CONTROLLER, "controller"),
        hub.on_link,
        hub.on_frames,
        hub.on_lost,
    )
    hub.driver.wake()
    # What came since is frozen without a pass over it, which would stop the serving controller.
    asyncio.get_running_loop().call_later(_FREEZE_AFTER_S, gc.freeze)
    child.freeze_live_objects(*_THRESHOLDS)
    child.answer_beats()
    try:
        await _flush_until(stop, journal)
    finally:
        listener.close()
        hub.driver.close()
        if journal is not None:
            journal.close()


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
    child.prepare("controller", config.settings)
    if not use_short_slices():
        _log.debug("the kernel gives no short time slices: on a busy host decisions will be later")
    # Less than one id is used per ns, so all ids of an earlier controller are smaller.
    brain = structs.replace(config.controller, first_id=time.time_ns())
    config = structs.replace(config, controller=brain)
    return child.run_until_stopped(lambda stop: serve(config, Controller(brain), stop))


if __name__ == "__main__":
    sys.exit(main(sys.argv))

"""The controller process: one brain, one socket, one loop; or a standby, until the lease is free."""

from __future__ import annotations

import asyncio
import gc
import logging
import os
import signal
import socket
import ssl
import sys
import time
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Final

import msgspec
from msgspec import Struct, structs

from clockwork_serve.config import Settings
from clockwork_serve.config.values import split_address
from clockwork_serve.controller import Controller, ControllerConfig
from clockwork_serve.errors import TransportError
from clockwork_serve.messages import Role
from clockwork_serve.serve import child
from clockwork_serve.serve.controller.hub import Brain, Hub
from clockwork_serve.serve.driver import UrgentTimer, use_short_slices
from clockwork_serve.serve.lease import STANDBY_NAME, FileLease, Lease, StoreLease, fingerprints
from clockwork_serve.serve.transport import SOCKET_NAME, Link, hello, listen
from clockwork_serve.serve.worker.crash_report import read_crash_report
from clockwork_serve.telemetry import Journal, Recorder, head_of
from clockwork_serve.telemetry.counters import WANTED_FILE, DevicesWanted
from clockwork_serve.telemetry.journal import FILES, machine_name

JOURNAL_FLUSH_S: Final = 0.25
"""What the journal holds is at most so much older than the present, whoever looks at it."""
_FREEZE_AFTER_S: Final = 5.0
HAND_OVER_S: Final = 0.02
"""So long a controller that gives the lead up goes on with the requests that it has; gateways ask the next
one for those that are left."""
HEARD_S: Final = 0.002  # by then gateways have heard of it, and what they sent before is here
IDS_BITS: Final = 44
"""Where hosts share a lease, the ids of a controller's actions are its epoch, and so many bits."""
WORKERS_LOOK: Final = 0.1
"""How often a leader looks whether any worker is connected, as a share of the lease's time."""
LOOK_S: Final = 0.1  # how often one who stands by tries to reach who leads
_THRESHOLDS: Final = (10_000, 1000, 1000)
"""Of garbage collection, which takes 0.4 us for each young object. The brain creates no reference cycles."""

_log = logging.getLogger(__name__)


class ControllerProcessConfig(Struct, frozen=True, kw_only=True):
    """The process's configuration. Ids of actions begin when it takes the lead, not as in ``controller``.

    ``shared``: who leads has the lease in the shared store, for which controllers on other hosts wait, too.
    """

    run_dir: str
    name: str = "controller"
    controller: ControllerConfig = ControllerConfig()
    shared: bool = False
    settings: Settings = Settings()


async def lead_once(config: ControllerProcessConfig, lease: Lease, stop: asyncio.Event) -> None:
    """Wait for the lease, with everything ready, and lead until ``stop``, or until the lease is lost.

    Raises :class:`ConfigError` where the lease cannot be had. By SIGUSR1 who leads hands over, and returns.
    """
    Controller(config.controller)  # imports its policy
    child.freeze_live_objects(*_THRESHOLDS)
    child.answer_beats()
    watching = None
    if isinstance(lease, StoreLease):
        note = partial(_note_standby, Path(config.run_dir) / STANDBY_NAME)
        watching = asyncio.create_task(watch_leader(lease, config.name, config.settings, note))
    epoch = await _acquired(lease, stop)
    if watching is not None:
        watching.cancel()
    if epoch:
        (Path(config.run_dir) / STANDBY_NAME).unlink(missing_ok=True)
        _log.info("leads, with epoch %d", epoch, extra={"pid": os.getpid()})
        lost = asyncio.create_task(_stop_if_lost(lease, stop))
        brain = structs.replace(config.controller, first_id=first_id(epoch, shared=config.shared))
        leave = asyncio.Event()
        loop = asyncio.get_running_loop()
        # Where another host takes over, even who is to end for good loses no request.
        for number in (signal.SIGUSR1, *([signal.SIGTERM] if config.shared else [])):
            loop.add_signal_handler(number, leave.set)
        config = structs.replace(config, controller=brain)
        shared = lease if isinstance(lease, StoreLease) else None
        await serve(config, Controller(brain), stop, epoch=epoch, leave=leave, lease=shared)
        lost.cancel()
    lease.release()


def first_id(epoch: int, *, shared: bool) -> int:
    """The first id of a controller's actions, larger than all of those that led before.

    On one host it is the time, for less than one id is used per ns. Clocks of hosts differ, so what hosts
    share goes by the epoch: there are ids for five years of 100,000 a second.
    """
    return epoch << IDS_BITS if shared else time.time_ns()


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
    config: ControllerProcessConfig, brain: Brain, stop: asyncio.Event, *, epoch: int, leave: asyncio.Event,
    lease: StoreLease | None = None,
) -> None:  # fmt: skip
    """Run ``brain`` on RUN_DIR/controller.sock until ``stop``, which it sets itself soon after ``leave``.

    It sets that, too, where the ``lease`` is to be given up, since other controllers may reach workers.
    """
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
        brain, recorder, journal, read_crash_report=partial(read_crash_report, Path(config.run_dir)),
        read_wanted=lambda: DevicesWanted.read(Path(config.run_dir, WANTED_FILE), time.monotonic_ns()),
        timer=UrgentTimer,
    )  # fmt: skip
    listener = await listen(
        Path(config.run_dir) / SOCKET_NAME, hello(Role.CONTROLLER, config.name, epoch), hub.on_link,
        hub.on_frames, hub.on_lost,
    )  # fmt: skip
    hub.driver.wake()
    # What came since is frozen without a pass over it, which would stop the serving controller.
    asyncio.get_running_loop().call_later(_FREEZE_AFTER_S, gc.freeze)
    waiting = [asyncio.create_task(_hand_over(hub, leave, stop))]
    if lease is not None:
        waiting.append(asyncio.create_task(_leave_if_deserted(hub, lease, leave)))
    try:
        await _flush_until(stop, journal)
    finally:
        for task in waiting:
            task.cancel()
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


async def _leave_if_deserted(hub: Hub, lease: StoreLease, leave: asyncio.Event) -> None:
    """Ask to leave once no worker has been connected for so long that another controller had better lead."""
    while not lease.deserted(hub.workers):  # noqa: ASYNC110 - time alone may make it so
        await asyncio.sleep(lease.lease_s * WORKERS_LOOK)
    _log.error("no worker is connected any more: gives up the lease, for another controller may reach them")
    leave.set()


async def _flush_until(stop: asyncio.Event, journal: Journal | None) -> None:
    while not stop.is_set():
        try:
            await asyncio.wait_for(stop.wait(), None if journal is None else JOURNAL_FLUSH_S)
        except TimeoutError:
            assert journal is not None
            journal.flush()


# ------------------------------------------------------------
# Standing by for a leader on another host: the lease is in the shared store.


def shared_lease(settings: Settings) -> StoreLease:
    """The lease of controllers on several hosts.

    Raises ``ProblemError`` if no library reaches the store.
    """
    from clockwork_serve.store.shared import files_of

    host, port = split_address(settings.listen_machines)
    if host in ("0.0.0.0", "::"):
        host = socket.getfqdn()
    address = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
    authorities = partial(fingerprints, settings.cluster_ca)
    return StoreLease(files_of(settings.store), settings.lease, settings.lease_time_s, address, authorities)


async def check_shared_lease(settings: Settings) -> None:
    """Raise :class:`ConfigError` if a controller with these settings could never lead; for its start."""
    await shared_lease(settings).check()


def _note_standby(path: Path, text: str) -> None:
    """Write who leads, for the gateway of this controller: without a leader it has no link to ask."""
    draft = path.with_suffix(".draft")
    draft.write_text(text)
    draft.rename(path)


async def watch_leader(
    lease: StoreLease, name: str, settings: Settings, note: Callable[[str], None] = lambda text: None
) -> None:
    """Tell the lease at once when who leads is dead, and not merely slow; never returns.

    This keeps a link to the bridge beside the leader, which closes it when the leader ends; or the kernel
    does. Then who leads is dead if another link is refused, too. Of a host that is cut off nothing is heard,
    and its lease has to end by itself. ``note`` gets who leads, whenever there was a link to another one.
    """
    from clockwork_serve.serve.remote.config import ClusterContext, cluster_files
    from clockwork_serve.serve.remote.link import connect_machine

    context = ClusterContext(cluster_files(settings), server=False)
    reached = 0  # the epoch of the last leader to which there was a link
    while True:
        lost = asyncio.Event()
        epoch, address = lease.leader
        if not address:
            await asyncio.sleep(LOOK_S)
            continue
        try:
            async with asyncio.timeout(settings.silence_s):
                link = await connect_machine(
                    split_address(address), context.now(), hello(Role.CONTROLLER, name),
                    lambda link, frames: None, partial(_set, lost), settings.silence_s,
                )  # fmt: skip
        except TransportError as error:
            refused = isinstance(error.__cause__, ConnectionError | ssl.SSLError)
            if refused and epoch == reached:
                lease.leader_died(epoch)
            await asyncio.sleep(LOOK_S)
        except TimeoutError:
            pass  # it is slow, or cut off
        else:
            reached = link.peer.epoch
            note(f"this controller stands by; the one at {address} leads, with epoch {epoch}")
            try:
                await lost.wait()
            finally:
                link.close()


def _set(event: asyncio.Event, link: Link) -> None:
    event.set()


def main(argv: Sequence[str]) -> int:
    """Run the process whose configuration is the JSON in ``argv[1]``; returns its exit status."""
    config = msgspec.json.decode(argv[1], type=ControllerProcessConfig)
    child.prepare(config.name, config.settings)
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)  # until there is something to hand over
    if not use_short_slices():
        _log.debug("the kernel gives no short time slices: on a busy host decisions will be later")

    async def lead(stop: asyncio.Event) -> None:
        lease: Lease = FileLease(Path(config.run_dir))
        if config.shared:
            lease = shared_lease(config.settings)
        await lead_once(config, lease, stop)

    return child.run_until_stopped(lead)


if __name__ == "__main__":
    sys.exit(main(sys.argv))

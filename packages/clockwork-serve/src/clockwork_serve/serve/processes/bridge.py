"""The bridge process, to which workers and gateways on other machines connect."""

from __future__ import annotations

import asyncio
import logging
import sys
from collections.abc import Sequence
from pathlib import Path

import msgspec

from clockwork_serve.config.values import split_address
from clockwork_serve.errors import ConfigError
from clockwork_serve.messages import Role
from clockwork_serve.serve import child
from clockwork_serve.serve.driver import use_batch_policy
from clockwork_serve.serve.remote.bridge import NAME, Bridge, judge_of
from clockwork_serve.serve.remote.config import BridgeConfig, ClusterContext, bound, cluster_files, runtime
from clockwork_serve.serve.remote.link import MachineListener
from clockwork_serve.serve.transport import SOCKET_NAME, hello

_log = logging.getLogger(__name__)


async def serve(config: BridgeConfig, stop: asyncio.Event) -> None:
    """Accept other machines until ``stop``. Raises :class:`ConfigError` if a file or port cannot be used.

    Where controllers on other machines may lead, too, it accepts them only while the one here does, and says
    its epoch. That of a controller by itself means nothing to others.
    """
    settings, kinds = config.settings, set(config.kinds)
    host, port = split_address(settings.listen_machines)

    def leads(epoch: int) -> None:
        if config.shared:
            listener.turns_away, listener.own = not epoch, hello(Role.CONTROLLER, NAME, epoch)

    judge = judge_of(runtime(), kinds, grow=config.shared, store=bool(settings.store))
    bridge = Bridge(Path(config.run_dir) / SOCKET_NAME, judge, kinds, leads)
    listener = MachineListener(
        ClusterContext(cluster_files(settings), server=True), hello(Role.CONTROLLER, NAME),
        bridge.on_link, bridge.on_frames, bridge.on_lost, settings.silence_s,
    )  # fmt: skip
    leads(0)
    try:
        listener.listen(bound(host, port))
    except OSError as error:
        raise ConfigError(f"listen_machines: {host}:{port}: {error.strerror}") from None
    _log.info("workers and gateways may join at %s:%d", host, port)
    catalogue = asyncio.get_running_loop().create_task(bridge.run())
    child.freeze_live_objects()
    child.answer_beats()
    try:
        await stop.wait()
    finally:
        listener.close()
        bridge.close()
        catalogue.cancel()


def main(argv: Sequence[str]) -> int:
    """Run the process whose configuration is the JSON in ``argv[1]``; returns its exit status."""
    config = msgspec.json.decode(argv[1], type=BridgeConfig)
    child.prepare(NAME, config.settings)
    use_batch_policy()
    return child.run_until_stopped(lambda stop: serve(config, stop))


if __name__ == "__main__":
    sys.exit(main(sys.argv))

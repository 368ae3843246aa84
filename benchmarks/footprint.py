"""What a server of three tiny models holds in memory, at default settings: PSS of all its processes."""

from __future__ import annotations

import sys
import tempfile
import time
from pathlib import Path
from typing import Final

from clockwork_serve.config import Settings
from clockwork_serve.devices import DeviceConfig
from clockwork_serve.serve.supervisor.config import ServerConfig
from clockwork_serve.store import StoreConfig
from clockwork_serve.units import MIB
from harness.process_tree import descendants, pss_bytes
from harness.report import Outcome, finish, parser
from harness.server import started

MODELS: Final = Path(__file__).parents[1] / "examples" / "models"
LIMIT_MIB: Final = 240
SETTLES_S: Final = 5.0
"""Sizes between those that were measured at the start are measured later."""


def held_mib(folder: Path) -> tuple[float, int]:
    """MiB of all processes of a server of the examples, and how many processes there are."""
    settings = Settings(repository=str(MODELS), http_port=0, grpc_port=0, metrics_port=0, log_level="error")
    config = ServerConfig(
        settings=settings, store=StoreConfig(cache_dir=str(folder / "cache")),
        devices=(DeviceConfig(device="cpu:0", memory_bytes=int(settings.device_memory)),),
    )  # fmt: skip
    with started(config, folder / "server.log") as server:
        time.sleep(SETTLES_S)
        pids = descendants(server.process.pid)
        return pss_bytes(pids) / MIB, len(pids)


def main() -> int:
    """Run it; returns the exit status."""
    given = parser(__doc__).parse_args()
    outcome = Outcome("benchmarks.footprint")
    with tempfile.TemporaryDirectory(prefix="cw-") as folder:
        mib, processes = held_mib(Path(folder))
    outcome.judge(
        "three tiny models: PSS of all processes", asked=f"at most {LIMIT_MIB} MiB",
        found=f"{mib:.0f} MiB in {processes} processes", good=mib <= LIMIT_MIB,
    )  # fmt: skip
    outcome.figures["mib"] = round(mib, 1)
    return finish(outcome, given.json)


if __name__ == "__main__":
    sys.exit(main())

"""A child that measures one code on a device of its own and prints what it found; then it is gone.

One process per code, because only so is its memory known, and because a model may crash whoever runs it.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

import msgspec
from msgspec import Struct

from clockwork_serve.devices import DeviceConfig, build
from clockwork_serve.messages import Code, Model
from clockwork_serve.serve import child
from clockwork_serve.serve.profiler import profile
from clockwork_serve.units import align


class ProfileConfig(Struct, frozen=True, kw_only=True):
    """What to measure, with whose weights."""

    device: DeviceConfig
    code: Code
    model: Model
    log_level: str = "warning"
    log_format: str = "text"


def main(argv: Sequence[str]) -> int:
    """Measure what the JSON in ``argv[1]`` says; the last line of stdout is a ``Measured``."""
    config = msgspec.json.decode(argv[1], type=ProfileConfig)
    child.prepare("profile", config.log_level, config.log_format)
    page_bytes = config.device.page_bytes
    device = build(
        msgspec.structs.replace(
            config.device, memory_bytes=align(max(1, config.model.weights.size), page_bytes), warm_up_ns=0,
            memory_share=0.0, pool_bytes=0,
        )
    )  # fmt: skip
    try:
        measured = profile(device, config.code, config.model)
    finally:
        device.close()
    sys.stdout.write(msgspec.json.encode(measured).decode() + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv))

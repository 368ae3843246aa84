"""A child that measures one code on a device of its own and prints what it found; then it is gone.

One process per code, because only so is its memory known, and because a model may crash whoever runs it. Its
stdout is for what it found alone: what a model prints goes to stderr.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from typing import Final

import msgspec
from msgspec import Struct

from clockwork_serve.devices import DeviceConfig, build
from clockwork_serve.errors import ModelError
from clockwork_serve.messages import Code, Model
from clockwork_serve.serve import child
from clockwork_serve.serve.profiler import Measured, profile
from clockwork_serve.units import align

PREPARED: Final = b"prepared"
"""The first line of a child whose device has prepared the code."""


class ImportFailed(Struct, frozen=True, tag=True):
    """Said instead of a ``Measured``: the code's own Python raised where it was imported."""

    why: str


class ProfileConfig(Struct, frozen=True, kw_only=True):
    """What to measure, with whose weights."""

    device: DeviceConfig
    code: Code
    model: Model
    log_level: str = "warning"
    log_format: str = "text"


def main(argv: Sequence[str]) -> int:
    """Measure what the JSON in ``argv[1]`` says; stdout ends with a ``Measured`` or an ``ImportFailed``."""
    stdout = os.dup(1)
    os.dup2(2, 1)
    config = msgspec.json.decode(argv[1], type=ProfileConfig)
    child.prepare("profile", config.log_level, config.log_format)
    page_bytes = config.device.page_bytes
    device = build(
        msgspec.structs.replace(
            config.device, memory_bytes=align(max(1, config.model.weights.size), page_bytes), warm_up_ns=0,
            memory_share=0.0, pool_bytes=0,
        )
    )  # fmt: skip
    prepared: list[bool] = []

    def on_prepared() -> None:
        prepared.append(True)
        _say(stdout, PREPARED)

    try:
        found: Measured | ImportFailed = profile(device, config.code, config.model, on_prepared=on_prepared)
    except ModelError as error:
        if prepared:
            raise
        found = ImportFailed(str(error))
    finally:
        device.close()
    _say(stdout, msgspec.json.encode(found))
    return 0


def _say(stdout: int, line: bytes) -> None:
    with open(stdout, "wb", closefd=False) as file:
        file.write(line + b"\n")


if __name__ == "__main__":
    _status = main(sys.argv)
    # Not sys.exit: all is said, and threads of the model, or a stderr that it made, may not take that back.
    os._exit(_status)

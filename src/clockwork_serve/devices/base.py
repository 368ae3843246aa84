"""What a device is to a worker: blocking calls, each made by the thread of one lane."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
from msgspec import Struct

from clockwork_serve.devices.cores import cores
from clockwork_serve.messages import Code, DeviceSpec, Infer, Load, TensorRef, Unload
from clockwork_serve.units import KIB, MIB, NS_PER_MS


class DeviceConfig(Struct, frozen=True, kw_only=True):
    """What to build: ``device`` is its name (``cpu:0``), ``kind`` one of ``kinds.BACKENDS``.

    ``memory_bytes`` is the weights arena, cut into pages of ``page_bytes``. ``profile`` (emulated only) is a
    file or the name of a built-in profile. ``jitter`` is the share by which emulated durations vary.
    ``memory_share`` (cuda only), if not 0, is the share of the GPU's free memory to take instead of
    ``memory_bytes``. ``pool_bytes`` (torch only) is the host memory that keeps weights files ready to be
    copied (0: each LOAD reads the file). ``graphs`` (cuda only) bounds the CUDA graphs kept (0: none).
    ``warm_up_ns`` bounds the time that ``prepare`` spends on running batch sizes beyond the first.
    ``apart`` (emulated only) gives it a worker process of its own, as every real device has.
    """

    device: str
    kind: str = "cpu"
    memory_bytes: int = 1024 * MIB
    page_bytes: int = 256 * KIB
    workspace_bytes: int = 1024 * MIB
    io_bytes: int = 256 * MIB
    threads: int = 1
    profile: str = ""
    jitter: float = 0.0
    seed: int = 0
    warm_up_ns: int = 100 * NS_PER_MS
    memory_share: float = 0.0
    pool_bytes: int = 0
    graphs: int = 256
    apart: bool = False

    @property
    def lanes_share(self) -> bool:
        """Whether LOADs take their time from INFERs, where the CPU does both: no core is left for them."""
        return cores() < self.threads + 1


@dataclass(slots=True)
class CallBuffers:
    """One call's tensors, in shared memory of its gateway.

    ``inputs`` maps names to arrays of the request's full shape (BYTES: object arrays of ``bytes``).
    ``output`` is the room for outputs, writable; ``outputs`` is filled by ``infer`` with references whose
    offsets count from the start of ``output``, each aligned to ``units.TENSOR_ALIGN``.
    """

    inputs: Mapping[str, npt.NDArray[Any]]
    output: memoryview
    outputs: list[TensorRef] = field(default_factory=list)


@dataclass(slots=True)
class Phases:
    """Where the lane time of an INFER went, in ns."""

    input_ns: int
    run_ns: int
    output_ns: int


class Device(Protocol):
    """One device. ``load``, ``unload`` and ``prepare`` run on the load lane, ``infer`` on the exec lane.

    Errors: :class:`~clockwork_serve.errors.ModelError` if the model raised,
    :class:`~clockwork_serve.errors.DeviceError` for anything else that was foreseen.
    """

    spec: DeviceSpec

    def prepare(self, code: Code) -> None:
        """Make a code ready to run (session, buffers, one warm-up per batch size). Idempotent."""

    def retire(self, code_id: str) -> None:
        """Free what ``prepare`` took; unknown codes are ignored."""

    def load(self, action: Load) -> int:
        """Copy the weights into the extent and return when they are there, verified.

        How many ns of that a further LOAD of the same weights will not take: they were verified for the
        first time. :class:`~clockwork_serve.errors.DamageError` if they are not what their name says.
        """

    def unload(self, action: Unload) -> None:
        """Forget the weights in the extent."""

    def infer(self, action: Infer, calls: Sequence[CallBuffers]) -> Phases:
        """Run one batch; returns when every call's outputs are written."""

    def close(self) -> None:
        """Free everything."""


Array = npt.NDArray[Any]

NUMPY_DTYPES: dict[str, np.dtype[Any]] = {
    name: np.dtype(kind)
    for name, kind in {
        "BOOL": "?", "UINT8": "u1", "UINT16": "u2", "UINT32": "u4", "UINT64": "u8",
        "INT8": "i1", "INT16": "i2", "INT32": "i4", "INT64": "i8",
        "FP16": "f2", "BF16": "u2", "FP32": "f4", "FP64": "f8", "BYTES": "O",
    }.items()
}  # fmt: skip
"""OIP element types as numpy dtypes; BF16 travels as its 16 bits."""

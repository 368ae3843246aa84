"""Records made up for tests and benchmarks: a code, its profile, models of it, a device, actions on a device.

What a caller does not care about has a value that serves; what he does care about he names.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Final

from clockwork_serve.messages import (
    Call,
    Code,
    DeviceSpec,
    Extent,
    Infer,
    Load,
    Model,
    Profile,
    TensorSpec,
    Weights,
    Window,
)
from clockwork_serve.units import MIB

X: Final = TensorSpec(name="x", datatype="FP32", shape=(4,))
Y: Final = TensorSpec(name="y", datatype="FP32", shape=(4,))
SIZES: Final = (1, 2, 4, 8)
"""Batch sizes."""
AMPLE_BYTES: Final = 1 << 30
WHENEVER: Final = Window(0, 1 << 62)


def code(code_id: str = "c", sizes: tuple[int, ...] = SIZES, **fields: Any) -> Code:
    """A code of one input and one output whose weights are apart."""
    plain: dict[str, Any] = {
        "backend": "emulated", "path": "", "inputs": (X,), "outputs": (Y,), "batched": True, "lifted": True,
    }  # fmt: skip
    return Code(code_id=code_id, batch_sizes=sizes, **(plain | fields))


def profile(code_id: str, infer_ns: Mapping[int, int], *, load_ns: int = 0, **fields: Any) -> Profile:
    """Durations of INFER by batch size; LOAD takes ``load_ns`` whatever the size of the weights."""
    plain: dict[str, Any] = {"device_kind": "emulated", "load_ns_per_mib": 0}
    return Profile(code_id=code_id, infer_ns=dict(infer_ns), load_base_ns=load_ns, **(plain | fields))


def model(
    name: str, code_id: str = "c", *, version: str = "1", size: int = MIB, sizes: tuple[int, ...] = SIZES,
    path: str = "", **fields: Any,
) -> Model:  # fmt: skip
    """A model of so many bytes of weights, in a file of its own."""
    plain: dict[str, Any] = {
        "weights": Weights(weights_id=name, path=path, size=size), "platform": "emulated",
        "max_batch_size": sizes[-1], "output_bytes": 64,
    }  # fmt: skip
    return Model(
        key=f"{name}/{version}", name=name, version=version, code_id=code_id, batch_sizes=sizes,
        **(plain | fields),
    )  # fmt: skip


def device(name: str, pages: int, page_bytes: int = MIB, **fields: Any) -> DeviceSpec:
    """A device with room for any workspace and any tensors."""
    plain: dict[str, Any] = {
        "kind": "emulated", "workspace_bytes": AMPLE_BYTES, "io_bytes": AMPLE_BYTES,
    }  # fmt: skip
    return DeviceSpec(device=name, pages=pages, page_bytes=page_bytes, **(plain | fields))


def load(served: Model, extent: Extent, device: str = "cpu:0") -> Load:
    """A LOAD of that model, for a device that is driven without a worker."""
    return Load(
        action_id=1, device=device, model=served.key, code_id=served.code_id, weights=served.weights,
        extent=extent, version=1, window=WHENEVER, expected_ns=0,
    )  # fmt: skip


def infer(
    served: Model, extent: Extent, rows: Sequence[int] = (1,), *, batch: int = 0, device: str = "cpu:0"
) -> Infer:
    """An INFER of requests of so many rows each, in a batch as large as they are if none is given."""
    return Infer(
        action_id=2, device=device, model=served.key, code_id=served.code_id, extent=extent, version=1,
        batch=batch or sum(rows), window=WHENEVER, expected_ns=0,
        calls=tuple(Call(request_id=f"r{at}", rows=count, tensors=b"") for at, count in enumerate(rows)),
    )  # fmt: skip

"""Served models of the shapes that matter, without a server."""

from __future__ import annotations

from typing import Any

from clockwork_serve.messages import Code, Model, TensorSpec, Weights
from clockwork_serve.oip import Served


def spec(name: str, datatype: str, *shape: int, optional: bool = False) -> TensorSpec:
    return TensorSpec(name=name, datatype=datatype, shape=shape, optional=optional)


def code(
    inputs: tuple[TensorSpec, ...],
    outputs: tuple[TensorSpec, ...],
    *,
    batched: bool = True,
    batch_sizes: tuple[int, ...] = (1, 2, 4, 8),
) -> Code:
    return Code(
        code_id="code", backend="onnx", path="/nowhere", inputs=inputs, outputs=outputs, batched=batched,
        batch_sizes=batch_sizes if batched else (1,), lifted=True,
    )  # fmt: skip


def model(of: Code, name: str = "ident", version: str = "1", **fields: object) -> Model:
    plain: dict[str, object] = {
        "key": f"{name}/{version}",
        "name": name,
        "version": version,
        "code_id": of.code_id,
        "weights": Weights(weights_id="w", path="/nowhere", size=1),
        "platform": "onnxruntime_onnx",
        "max_batch_size": max(of.batch_sizes) if of.batched else 0,
        "batch_sizes": of.batch_sizes,
        "output_bytes": 1024,
    }
    return Model(**(plain | fields))  # type: ignore[arg-type]


def served(
    inputs: tuple[TensorSpec, ...],
    outputs: tuple[TensorSpec, ...],
    *,
    batched: bool = True,
    labels: dict[str, tuple[str, ...]] | None = None,
) -> Served:
    of = code(inputs, outputs, batched=batched)
    return Served(model(of, labels=labels or {}), of, 100_000_000)


def identity(datatype: str = "FP32", *shape: int, batched: bool = True) -> Served:
    """One input X, one output Y, of ``shape`` (default: two elements)."""
    shape = shape or (2,)
    return served((spec("X", datatype, *shape),), (spec("Y", datatype, *shape),), batched=batched)


class Recorded(bytes):
    """Bytes that know the parts that were taken of them."""

    taken: list[int]

    def __init__(self, content: bytes) -> None:
        self.taken = []

    def __getitem__(self, key: Any) -> Any:
        found = super().__getitem__(key)
        if isinstance(key, slice):
            self.taken.append(len(found))
        return found

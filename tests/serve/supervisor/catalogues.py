"""Models as the supervisor has compiled and profiled them."""

from __future__ import annotations

from clockwork_serve.messages import (
    Code,
    Model,
    Profile,
    Weights,
)
from clockwork_serve.store import ServedVersion


def served(key: str, code_id: str = "c1", priority: int = 0) -> ServedVersion:
    name, version = key.split("/")
    code = Code(
        code_id=code_id, backend="onnx", path="/c", inputs=(), outputs=(), batched=True, batch_sizes=(1,),
        lifted=True,
    )  # fmt: skip
    model = Model(
        key=key, name=name, version=version, code_id=code_id, platform="", max_batch_size=1, batch_sizes=(1,),
        weights=Weights(weights_id=key, path="/w", size=1), output_bytes=1, priority=priority,
    )  # fmt: skip
    return ServedVersion(model=model, code=code)


def profile(code_id: str = "c1", infer_ns: int = 5) -> Profile:
    return Profile(
        code_id=code_id, device_kind="cpu", infer_ns={1: infer_ns}, load_base_ns=1, load_ns_per_mib=1
    )

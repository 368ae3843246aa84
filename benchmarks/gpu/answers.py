"""Whether the torch device answers what the network answers in double precision on the CPU."""

from __future__ import annotations

import numpy as np

from benchmarks.gpu.rig import Batch, Rig, compile_model, error_of, exact, load_action, rows_of
from harness.report import Outcome


def answers(rig: Rig, outcome: Outcome, name: str) -> None:
    """One network at every batch size that it has, each row its own call."""
    from benchmarks.gpu import models as gpu_models

    served = rig.served.get(name) or compile_model(rig, name)
    kind = gpu_models.kinds(short=rig.sizes.short)[name]
    sizes = [size for size in served.code.batch_sizes if size <= served.model.max_batch_size] or [1]
    rows = rows_of(name, max(sizes), rig.seed + 1, short=rig.sizes.short)
    rig.tell(f"{name} in double precision on the CPU")
    wanted = exact(rig.models[name], rows)
    errors = {}
    with rig.device(served) as device:
        device.load(load_action(device, served))
        for size in sizes:
            batch = Batch(device, served, rows[:size])
            batch.infer()
            errors[size] = error_of(batch.answers(), wanted[:size])
    worst = max(errors, key=lambda size: errors[size])
    good = all(np.isfinite(list(errors.values()))) and errors[worst] <= kind.error
    outcome.judge(
        f"{name}: max|a-b| / max|b| against float64", asked=f"<= {kind.error:g}",
        found=f"{errors[worst]:.1e} (batch {worst}, of {', '.join(map(str, sizes))})", good=good,
    )  # fmt: skip
    outcome.figures[name] = {"errors": errors, "batched": served.code.batched, "code_id": served.code.code_id}

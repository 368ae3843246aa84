"""Whether the CPU device keeps what it took: resident memory over LOAD/UNLOAD cycles, codes coming and going.

    python -m benchmarks.device_memory [--cycles 2000] [--json FILE]

Each cycle loads one model into pages chosen at random, runs it at a random batch size and unloads it. Every
fifth cycle a code is retired and another prepared, so that sessions are opened and dropped all the time. Some
codes are not lifted: their LOAD opens a session.
"""

from __future__ import annotations

import hashlib
import os
import random
import shutil
import tempfile
from pathlib import Path

import msgspec
import numpy as np

from benchmarks.device_lane_time import compiled
from clockwork_serve.devices import CallBuffers, Device, DeviceConfig, build
from clockwork_serve.messages import Extent, Unload, Weights
from clockwork_serve.store import ServedVersion
from clockwork_serve.units import MIB
from harness import records, repositories
from harness.machine import rss_bytes
from harness.report import Outcome, finish, parser, table

ARENA = 256 * MIB
GROWTH = 0.03
SETTLED = 0.1
"""The share of the cycles after which the device has seen all it will see; memory is compared with then."""


def main() -> int:
    """Cycle and compare."""
    arguments = parser(__doc__)
    arguments.add_argument("--cycles", type=int, default=2000)
    given = arguments.parse_args()
    outcome = Outcome("benchmarks.device_memory")
    dice = random.Random(given.seed)
    with tempfile.TemporaryDirectory() as folder:
        models = make_models(Path(folder))
        device = build(DeviceConfig(device="cpu:0", memory_bytes=ARENA))
        try:
            resident = cycle(device, models, given.cycles, dice)
        finally:
            device.close()
    beside = {at: size - ARENA for at, size in resident.items()}
    growth = beside[given.cycles] / beside[round(SETTLED * given.cycles)] - 1
    print(
        table(
            ("cycle", "resident MB", "beside the arena"),
            ((at, f"{resident[at] / 1e6:.1f}", f"{beside[at] / 1e6:.1f}") for at in resident),
        )
    )
    what = f"growth beside the arena, cycle {round(SETTLED * given.cycles)} to {given.cycles}"
    outcome.at_most(what, 100 * GROWTH, 100 * growth, "%")
    outcome.figures = {"resident_bytes": resident, "cycles": given.cycles}
    return finish(outcome, given.json)


def make_models(root: Path) -> list[ServedVersion]:
    """Models of ten architectures, two of them as codes that are not lifted."""
    repository = root / "models"
    for place, (width, depth) in enumerate(((64, 2), (128, 4), (256, 4), (512, 2), (512, 8), (1024, 2))):
        repositories.layers(repository, f"dense_{place}", width=width, depth=depth, seed=place)
    for place, channels in enumerate((16, 32, 64, 96)):
        depth = 4 + place
        repositories.convolutions(
            repository, f"conv_{place}", side=32, channels=channels, depth=depth, seed=depth, mean=True
        )
    models = compiled(repository, root / "cache")
    return [*models, *(not_lifted(served, root / "whole", repository) for served in models[:2])]


def not_lifted(served: ServedVersion, folder: Path, repository: Path) -> ServedVersion:
    """The same model as a code whose weights are in its file."""
    folder.mkdir(exist_ok=True)
    file = folder / f"{served.model.name}.onnx"
    shutil.copy(repository / served.model.name / "1" / "model.onnx", file)
    code = msgspec.structs.replace(served.code, code_id=f"whole-{served.code.code_id}", lifted=False)
    weights_id = hashlib.sha256(file.read_bytes()).hexdigest()
    weights = Weights(weights_id=weights_id, path=str(file), size=2 * file.stat().st_size)
    return ServedVersion(
        model=msgspec.structs.replace(served.model, code_id=code.code_id, weights=weights), code=code
    )


def cycle(device: Device, models: list[ServedVersion], cycles: int, dice: random.Random) -> dict[int, int]:
    """Resident bytes by cycle, at eleven points."""
    ready = dice.sample(models, len(models) - 3)
    for served in ready:
        device.prepare(served.code)
    resident = {0: rss_bytes(os.getpid())}
    for at in range(1, cycles + 1):
        if at % 5 == 0:
            gone = ready.pop(dice.randrange(len(ready)))
            device.retire(gone.code.code_id)
            ready.append(dice.choice([one for one in models if one not in ready]))
            device.prepare(ready[-1].code)
        use(device, dice.choice(ready), dice)
        if at % (cycles // 10) == 0:
            resident[at] = rss_bytes(os.getpid())
            print(f"  {at} cycles, {resident[at] / 1e6:.1f} MB", flush=True)
    return resident


def use(device: Device, served: ServedVersion, dice: random.Random) -> None:
    """LOAD, INFER, UNLOAD."""
    pages = device.spec.pages_of(served.model.weights.size)
    extent = Extent(dice.randrange(device.spec.pages - pages), pages)
    device.load(records.load(served.model, extent))
    batch = dice.choice(served.code.batch_sizes)
    spec = served.code.inputs[0]
    inputs = {spec.name: np.zeros((batch, *spec.shape), np.float32)}
    call = CallBuffers(inputs=inputs, output=memoryview(bytearray(served.model.output_bytes * batch)))
    device.infer(records.infer(served.model, extent, (batch,)), [call])
    assert call.outputs, "an INFER gives outputs"
    name, key = device.spec.device, served.model.key
    device.unload(
        Unload(action_id=3, device=name, model=key, extent=extent, version=1, window=records.WHENEVER)
    )


if __name__ == "__main__":
    raise SystemExit(main())

"""What all parts of the GPU benchmark work with: sizes, models, devices, actions. It measures nothing."""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from benchmarks.device_lane_time import output
from benchmarks.gpu.machine import Target, free_bytes
from clockwork_serve.devices import CallBuffers, Device, DeviceConfig, build, torch_target
from clockwork_serve.messages import Call, Extent, Infer, Load, Profile, Weights, Window
from clockwork_serve.serve.supervisor.profile_process import profile
from clockwork_serve.store import Cache, Compiler, Repository, ServedVersion, StoreConfig
from clockwork_serve.units import GIB, KIB, MIB, TENSOR_ALIGN, align

Floats = npt.NDArray[np.float32]
WHENEVER: Final = Window(0, 1 << 62)
MAIN: Final = "resnet50"
"""The network that all parts but the answers use: the paper's."""


@dataclass(frozen=True, slots=True)
class Sizes:
    """How much is measured. ``largest``: batch; ``copies``: models of one code; ``thousand``: served."""

    short: bool
    largest: int
    others_largest: int
    inferences: int
    copies: tuple[int, ...]
    thousand: int
    slos_ms: tuple[float, ...]
    served: int
    clients: int
    bases: int
    gpu_bytes: int
    paging_bytes: int
    host_bytes: int


FULL: Final = Sizes(
    short=False, largest=16, others_largest=16, inferences=20_000, copies=(1000, 4000), thousand=1000,
    slos_ms=(5, 10, 25, 50, 100),
    served=15, clients=16, bases=3, gpu_bytes=GIB, paging_bytes=6 * GIB, host_bytes=512 * MIB,
)  # fmt: skip
SHORT: Final = Sizes(
    short=True, largest=2, others_largest=1, inferences=400, copies=(20, 40), thousand=20, slos_ms=(25, 100),
    served=3, clients=2, bases=2, gpu_bytes=2 * MIB, paging_bytes=MIB, host_bytes=16 * MIB,
)  # fmt: skip
"""``gpu_bytes``: the arena of parts that need but a few places; ``host_bytes``: their pool of host memory.

``paging_bytes``: the arena that thousands of copies take turns in.
"""


@dataclass(slots=True)
class Rig:
    """One run. ``tell`` shows what is being done."""

    target: Target
    sizes: Sizes
    folder: Path
    cache_dir: Path
    seed: int
    tell: Callable[[str], None]
    served: dict[str, ServedVersion] = field(default_factory=dict)
    models: dict[str, Any] = field(default_factory=dict)
    """Plain networks by name, for references: on the CPU, in float32."""
    profiles: dict[str, Profile] = field(default_factory=dict)
    infer_ns: list[int] = field(default_factory=list)
    """Durations of batch 1 in the order in which they were measured, without anything beside."""
    load_ns: list[int] = field(default_factory=list)

    @property
    def repository(self) -> Path:
        """Where the benchmark's own models are written."""
        return self.cache_dir / f"models-{'short' if self.sizes.short else 'full'}-{self.seed}"

    @property
    def main(self) -> ServedVersion:
        """The compiled ResNet50. LookupError before it is compiled."""
        return self.served[MAIN]

    def config(
        self, *, memory_bytes: int = 0, host_bytes: int = 0, graphs: int | None = None
    ) -> DeviceConfig:
        """The device to measure; what is not said is as the parts with few places want it."""
        settings: dict[str, Any] = {} if graphs is None else {"graphs": graphs}
        return DeviceConfig(
            device=self.target.name,
            kind=self.target.kind,
            memory_bytes=memory_bytes or self.sizes.gpu_bytes,
            page_bytes=16 * MIB if self.target.gpu else 16 * KIB,
            pool_bytes=host_bytes or self.sizes.host_bytes,
            **settings,
        )

    @contextlib.contextmanager
    def device(self, served: ServedVersion, **settings: int) -> Iterator[Device]:
        """A device that is ready for a code; its memory is given back at the end, for the next one."""
        device = build(self.config(**settings))
        try:
            device.prepare(served.code)
            yield device
        finally:
            device.close()
            del device
            self.give_back()

    def give_back(self) -> None:
        """Have torch return GPU memory that nobody uses, so that other processes can take it."""
        gc.collect()
        if self.target.gpu:
            import torch

            torch.cuda.synchronize()
            torch.cuda.empty_cache()

    def free_bytes(self) -> int:
        """GPU memory that is free."""
        return free_bytes(self.target)

    def profile(self, name: str = MAIN) -> Profile:
        """Durations as the server would measure them before it serves; measured once."""
        if name not in self.profiles:
            self.tell(f"profiling {name}")
            served = self.served[name]
            device = build(self.config())
            try:
                self.profiles[name] = profile(device, served.code, served.model).profile
            finally:
                device.close()
                self.give_back()
        return self.profiles[name]


def compile_models(rig: Rig, names: Sequence[str]) -> None:
    """All at once: each compiler is a process of its own. What fails is left for who asks for it."""
    for name in names:
        exported(rig, name)
    with ThreadPoolExecutor(len(names)) as pool:
        found = {name: pool.submit(compiled, rig, name) for name in names}
    for name, future in found.items():
        if future.exception() is None:
            rig.served[name] = future.result()


def compile_model(rig: Rig, name: str) -> ServedVersion:
    """Write a network into the benchmark's repository and compile it, or find it in the cache."""
    exported(rig, name)
    rig.served[name] = compiled(rig, name)
    return rig.served[name]


def exported(rig: Rig, name: str) -> None:
    """Make a network and write it into the benchmark's repository, unless it is there."""
    from benchmarks.gpu import models as gpu_models

    kind = gpu_models.kinds(short=rig.sizes.short)[name]
    if name not in rig.models:
        rig.tell(f"making {name}")
        rig.models[name] = gpu_models.built(kind, rig.seed)
    if not (rig.repository / name / gpu_models.FOLDER / gpu_models.FILE).exists():
        rig.tell(f"exporting {name}")
        largest = rig.sizes.largest if name == MAIN else rig.sizes.others_largest
        program = gpu_models.exported(kind, rig.models[name], largest)
        gpu_models.write(rig.repository, name, program, largest)


def compiled(rig: Rig, name: str) -> ServedVersion:
    """A model of the benchmark's repository, compiled for the device. Raises ``ProblemError``."""
    rig.tell(f"compiling {name} (minutes the first time, then it is in the cache)")
    place = torch_target((rig.config(),))
    assert place is not None, "a torch device has a target"
    config = StoreConfig(cache_dir=str(rig.cache_dir), max_batch_size=rig.sizes.largest, torch_target=place)
    (entry,) = (entry for entry in Repository(rig.repository, config).scan() if entry.name == name)
    with Cache(rig.cache_dir) as cache:
        compiler = Compiler(cache, config)
        return compiler.compile(entry, entry.versions[-1], lambda step: rig.tell(f"{name}: {step}"))


def pages_of(device: Device, served: ServedVersion) -> int:
    """What one model takes."""
    return device.spec.pages_of(served.model.weights.size)


def places_of(device: Device, served: ServedVersion) -> int:
    """How many models of one code a device holds."""
    return device.spec.pages // pages_of(device, served)


def extent_of(device: Device, served: ServedVersion, place: int) -> Extent:
    """The place of that number."""
    pages = pages_of(device, served)
    return Extent(place * pages, pages)


def load_action(
    device: Device, served: ServedVersion, place: int = 0, weights: Weights | None = None
) -> Load:
    """A LOAD of a model, or of other weights of its code."""
    return Load(
        action_id=1, device=device.spec.device, model=served.model.key, code_id=served.code.code_id,
        weights=weights or served.model.weights, extent=extent_of(device, served, place), version=1,
        window=WHENEVER, expected_ns=0,
    )  # fmt: skip


class Batch:
    """An INFER of as many calls as its batch has rows, as they come while serving."""

    def __init__(self, device: Device, served: ServedVersion, rows: Floats, place: int = 0) -> None:
        self.rows = rows
        self._device, self._served = device, served
        self._name = served.code.inputs[0].name
        self._output = served.code.outputs[0].name
        room = align(served.model.output_bytes) + TENSOR_ALIGN * len(served.code.outputs)
        self.calls = [
            CallBuffers(inputs={self._name: rows[at : at + 1]}, output=memoryview(bytearray(room)))
            for at in range(len(rows))
        ]
        self.move(place)

    def move(self, place: int) -> None:
        """Run on the weights at another place from now on."""
        device, served = self._device, self._served
        self._action = Infer(
            action_id=2, device=device.spec.device, model=served.model.key, code_id=served.code.code_id,
            extent=extent_of(device, served, place), version=1, batch=len(self.rows), window=WHENEVER,
            expected_ns=0,
            calls=tuple(Call(request_id=str(i), rows=1, tensors=b"") for i in range(len(self.calls))),
        )  # fmt: skip

    def infer(self) -> Any:
        """Run once; the phases."""
        for call in self.calls:
            call.outputs.clear()
        return self._device.infer(self._action, self.calls)

    def answers(self) -> Floats:
        """What the calls were answered last, one row each."""
        return np.concatenate([output(call, self._output) for call in self.calls])


def rows_of(name: str, count: int, seed: int, *, short: bool) -> Floats:
    """Inputs of a network."""
    from benchmarks.gpu import models as gpu_models

    found: Floats = gpu_models.kinds(short=short)[name].rows(count, seed).numpy()
    return found


def exact(model: Any, rows: Floats) -> npt.NDArray[np.float64]:
    """What a network answers in double precision on the CPU."""
    import copy

    import torch

    with torch.no_grad():
        found: npt.NDArray[np.float64] = (
            copy.deepcopy(model).double()(torch.from_numpy(rows).double()).numpy()
        )
    return found


def error_of(found: npt.NDArray[Any], wanted: npt.NDArray[Any]) -> float:
    """max|a-b| / max|b|."""
    return float(np.abs(found - wanted).max() / (np.abs(wanted).max() or 1.0))


def device_counters(device: Device) -> dict[str, int]:
    """What a device counts of itself; nothing where it does not."""
    counters = getattr(device, "counters", None)
    return dict(counters()) if counters is not None else {}


@contextlib.contextmanager
def undisturbed() -> Iterator[None]:
    """Keep the collector away, as a worker does."""
    gc.collect()
    gc.freeze()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()
        gc.unfreeze()


def gigabytes(nbytes: float, nanoseconds: float) -> str:
    """A bandwidth, for a table."""
    return f"{nbytes / max(1.0, nanoseconds):.1f} GB/s"


def grown(before: dict[str, int], after: dict[str, int], names: Sequence[str]) -> dict[str, int]:
    """By how much counters changed."""
    return {
        name: after.get(name, 0) - before.get(name, 0) for name in names if name in after or name in before
    }

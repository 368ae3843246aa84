"""What an operator may say about one model, whichever file it was said in; nothing here reads a file."""

from __future__ import annotations

import msgspec
from msgspec import Struct

from clockwork_serve.messages import DATATYPES
from clockwork_serve.store.problems import did_you_mean, problem
from clockwork_serve.units import MIB

BACKENDS = ("onnx", "torch", "python", "emulated")
"""The backends that ``clockwork.toml`` may name."""


class StoreConfig(Struct, frozen=True, kw_only=True):
    """How models are compiled and what holds where a model's own configuration says nothing.

    ``cache_dir`` is where artefacts are kept. ``max_batch_size`` is what a model that can be batched gets.
    ``output_bytes`` is the least room per request row for outputs whose size depends on the request.
    ``largest_batch`` is the most that a model may ask for. ``torch_target`` is what torch programs are
    compiled for: ``cpu``, ``cuda:sm_90``, ``cuda`` (the GPU that is here), ``auto`` (that, or else the CPU),
    or empty: nothing here runs them.
    """

    cache_dir: str
    max_batch_size: int = 16
    largest_batch: int = 64
    output_bytes: int = 4 * MIB
    queue_limit: int = 1000
    torch_target: str = "cpu"


class VersionPolicy(Struct, frozen=True, kw_only=True):
    """Which versions are served: the ``latest`` n, those in ``specific``, or all if neither is said."""

    latest: int | None = 1
    specific: tuple[int, ...] = ()

    def choose(self, versions: tuple[int, ...]) -> tuple[int, ...]:
        """The versions to serve out of those on disk, ascending."""
        found = sorted(versions)
        if self.specific:
            return tuple(v for v in found if v in self.specific)
        return tuple(found if self.latest is None else found[-self.latest :])


class TensorSettings(Struct, frozen=True, kw_only=True):
    """What is declared about one input or output; ``dims`` mean what they mean in Triton."""

    name: str
    dims: tuple[int, ...] | None = None
    datatype: str | None = None
    optional: bool = False


class EmulatedSettings(Struct, frozen=True, kw_only=True):
    """The durations an emulated model takes, and the room it claims."""

    weights_bytes: int
    infer_ns: dict[int, int]
    load_ns: int


class ModelSettings(Struct, frozen=True, kw_only=True):
    """Everything that was said about one model; None and empty mean that nothing was."""

    backend: str | None = None
    max_batch_size: int | None = None
    slo_ms: float | None = None
    queue_limit: int | None = None
    output_bytes: int | None = None
    memory_bytes: int | None = None
    priority: int | None = None
    inputs: tuple[TensorSettings, ...] = ()
    outputs: tuple[TensorSettings, ...] = ()
    version_policy: VersionPolicy | None = None
    labels: dict[str, tuple[str, ...]] = {}
    label_files: dict[str, str] = {}
    file_name: str | None = None
    emulated: EmulatedSettings | None = None

    def compile_key(self, config: StoreConfig) -> bytes:
        """All that compiling depends on beside the model's file; equal bytes, equal result."""
        said = (
            self.backend, self.max_batch_size, self.output_bytes, self.memory_bytes, self.inputs,
            self.outputs, self.emulated, config.max_batch_size, config.largest_batch, config.output_bytes,
        )  # fmt: skip
        return msgspec.json.encode(said)


def merged(over: ModelSettings, under: ModelSettings) -> ModelSettings:
    """``over`` where it says something, ``under`` elsewhere."""
    values = {}
    for name in ModelSettings.__struct_fields__:
        above = getattr(over, name)
        values[name] = getattr(under, name) if above in (None, (), {}) else above
    return ModelSettings(**values)


def datatype_of(text: str, where: str) -> str:
    """An OIP element type from its own name or Triton's (``FP32``, ``TYPE_FP32``, ``TYPE_STRING``)."""
    name = text.removeprefix("TYPE_")
    name = "BYTES" if name == "STRING" else name
    if name not in DATATYPES:
        raise problem(where, expected="an element type", found=text, advice=did_you_mean(name, DATATYPES))
    return name

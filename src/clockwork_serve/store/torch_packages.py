"""Compiles flat graphs into packages without constants, and proves that a package does what the graph does.

A package that gives the same answers as the program, with the model's weights and with others, has no value
of a weight in it.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from clockwork_serve.store.graph_tensors import GraphTensor
from clockwork_serve.store.torch_job import OPTIONS
from clockwork_serve.store.torch_lowering import Flat, Values
from clockwork_serve.store.trial import Array, RunError, difference

SAME = {"float32": 1e-5, "float64": 1e-5}
"""Relative difference up to which answers are the same on a CPU, by element type of the weights."""
SAME_COARSE = 2e-2
"""The same for other element types, and for float32 on a GPU, which may multiply in TF32."""
_TIMED_S = 0.5
_TIMED_RUNS = (3, 30)


class Eager:
    """A graph run operator by operator: what the program says."""

    def __init__(self, module: Any, inputs: Sequence[GraphTensor], device: str) -> None:
        self._module = module
        self._inputs = inputs
        self._device = device

    def run(self, inputs: Mapping[str, Array]) -> list[Array]:
        """All outputs in order. Raises ``RunError``."""
        try:
            with torch.no_grad():
                outputs = self._module(*tensors_of(inputs, self._inputs, self._device))
        except Exception as error:  # operators raise whatever they like on inputs that do not fit
            raise RunError(f"{type(error).__name__}: {error}") from error
        return [array_of(output) for output in outputs]


class Package:
    """A compiled package with constants put in, as a device does it."""

    def __init__(self, path: Path, inputs: Sequence[GraphTensor], device: str) -> None:
        self._runner: Any = torch._inductor.aoti_load_package(str(path))  # noqa: SLF001 - torch's own interface
        self.inputs = inputs
        self.device = device
        self._kept: object = None

    def constants(self) -> set[str]:
        """The names of the constants that it reads."""
        return set(self._runner.get_constant_fqns())

    def load(self, tensors: Mapping[str, Any]) -> None:
        """Read these constants from now on; they are not copied."""
        self._kept = tensors
        self._runner.load_constants(dict(tensors), check_full_update=True, user_managed=True)

    def run(self, inputs: Mapping[str, Array]) -> list[Array]:
        """All outputs in order. Raises ``RunError``."""
        try:
            outputs = self.call(tensors_of(inputs, self.inputs, self.device))
        except Exception as error:
            raise RunError(f"{type(error).__name__}: {error}") from error
        return [array_of(output) for output in outputs]

    def call(self, inputs: Sequence[Any]) -> Sequence[Any]:
        """The outputs of one run."""
        with torch.no_grad():
            outputs: Sequence[Any] = self._runner(*inputs)
        return outputs


def compile_package(module: Any, inputs: Sequence[Any], path: Path) -> None:
    """Compile a graph for inputs of exactly these shapes. Raises whatever the compiler raises."""
    with torch.no_grad():
        exported = torch.export.export(module, tuple(inputs))
        torch._inductor.aoti_compile_and_package(  # noqa: SLF001 - torch's own interface
            exported, package_path=str(path), inductor_configs=dict(OPTIONS)
        )


def tensors_of(arrays: Mapping[str, Array], inputs: Sequence[GraphTensor], device: str) -> list[Any]:
    """Arrays as tensors, in calling order. BF16 is in arrays of 16 bits."""
    tensors = []
    for each in inputs:
        tensor = torch.from_numpy(np.ascontiguousarray(arrays[each.name]))
        tensors.append((tensor.view(torch.bfloat16) if each.datatype == "BF16" else tensor).to(device))
    return tensors


def array_of(output: Any) -> Array:
    """A tensor as an array; BF16, which numpy has not, as float32."""
    if not isinstance(output, torch.Tensor):
        raise TypeError(f"expected a tensor as output, found {type(output).__name__}")
    plain = output.detach().cpu()
    array: Array = (plain.float() if plain.dtype == torch.bfloat16 else plain).contiguous().numpy()
    return array


def scrambled(values: Values, dtypes: Sequence[str], seed: int = 1) -> Values:
    """Other weights of the same scale and signs: the elements of each constant in another order, stretched.

    Integers stay, for they are positions and the like.
    """
    random = np.random.default_rng(seed)
    made: dict[int, npt.NDArray[np.void]] = {}

    def other(number: int) -> npt.NDArray[np.void]:
        if number not in made:
            old = values(number)
            made[number] = old
            if dtypes[number] in ("float16", "float32", "float64") and old.size:
                numbers = old.view(np.dtype(dtypes[number]))
                flat = random.permutation(numbers.reshape(-1)) * random.uniform(0.8, 1.25, numbers.size)
                new = flat.astype(numbers.dtype).reshape(numbers.shape)
                made[number] = new.view(old.dtype)
        return made[number]

    return other


def proved(
    package: Package, program: Flat, packed: Flat, values: Values, inputs: Mapping[str, Array]
) -> float:
    """The largest relative difference between program and package, over the model's weights and others."""
    device = package.device
    worst = 0.0
    for each in (values, scrambled(values, [source.dtype for source in program.sources])):
        wanted = Eager(program.module(each, device), package.inputs, device).run(inputs)
        package.load(packed.tensors(each, device))
        worst = max(worst, difference(package.run(inputs), wanted))
    package.load(packed.tensors(values, device))
    return worst


def allowed(program: Flat, device: str) -> float:
    """The difference that rounding alone may make."""
    dtypes = {source.dtype for source in program.sources if "float" in source.dtype}
    if device != "cpu":
        return SAME_COARSE
    return max((SAME.get(dtype, SAME_COARSE) for dtype in dtypes), default=SAME["float32"])


def timed_ns(package: Package, inputs: Sequence[Any], device: str) -> int:
    """The median time of a run: of this process's CPU where that computes, so that others do not matter."""
    package.call(inputs)
    clock = time.process_time_ns if device == "cpu" else time.perf_counter_ns
    taken: list[int] = []
    until = time.perf_counter() + _TIMED_S
    least, most = _TIMED_RUNS
    while len(taken) < least or (len(taken) < most and time.perf_counter() < until):
        start = clock()
        package.call(inputs)
        if device != "cpu":
            torch.cuda.synchronize()
        taken.append(clock() - start)
    return round(statistics.median(taken))

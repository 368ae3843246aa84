"""``clockwork validate --self-test``: a built-in model compiled for one device, run there, and compared.

It compiles, loads, runs and measures by the code that serves, and never by a copy of it.
"""

from __future__ import annotations

import contextlib
import functools
import platform
import re
import tempfile
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any, Final

import msgspec
import numpy as np
from msgspec import Struct

from clockwork_serve import __version__
from clockwork_serve.devices import CallBuffers, Device, DeviceConfig, build, torch_target
from clockwork_serve.devices.base import NUMPY_DTYPES, Array
from clockwork_serve.devices.kinds import gpus, ordinal_of
from clockwork_serve.errors import ClockworkError, ConfigError, DeviceError, described
from clockwork_serve.messages import Call, Extent, Infer, Load, Window
from clockwork_serve.serve.supervisor.config import share_of_memory
from clockwork_serve.serve.supervisor.profile_process import profile
from clockwork_serve.store import Cache, ProblemError, Repository, ServedVersion, StoreConfig, compile_all
from clockwork_serve.store.onnx.compiler import TOLERANCE
from clockwork_serve.store.trial import difference
from clockwork_serve.telemetry.journal import processor_name
from clockwork_serve.units import MIB, NS_PER_MS, TENSOR_ALIGN, align, to_ms

RUNTIMES: Final = {"cpu": "onnxruntime", "torch-cpu": "torch", "cuda": "torch"}
"""By kind of device: what runs the built-in model there. Other kinds compute nothing."""
OK: Final = "ok"
FAILED: Final = "failed"
NOT_RUN: Final = "not run"
MAX_BATCH: Final = 2
"""Each further batch size of a torch program takes as long to compile as the first."""
ARENA_BYTES: Final = 64 * MIB
"""For weights, where a server takes all that is configured: beside a server there may be no more."""

_ANY_TIME: Final = Window(0, 1 << 62)

Reference = Callable[[Array], Array]
"""The model's outputs for some rows, by the plain runtime on the CPU."""
Progress = Callable[[int, int, str], None]


class SelfTestStep(Struct, frozen=True, kw_only=True):
    """One step: ``result`` is ok, failed or not run; ``found`` is what it found, or the error with advice."""

    name: str
    result: str
    found: str = ""
    took_ms: float = 0.0


class SelfTest(Struct, kw_only=True):
    """What the steps found of one device. Durations are medians in ms, and judge nothing."""

    device: str
    kind: str
    facts: dict[str, str]
    steps: list[SelfTestStep]
    load_ms: float | None = None
    infer_ms: dict[int, float] = {}

    @property
    def ok(self) -> bool:
        """Whether every step passed."""
        return all(step.result == OK for step in self.steps)


class WrongOutputs(ClockworkError):
    """The device answers, and its answers are wrong; later steps can still be run."""


def self_test(
    config: DeviceConfig, progress: Progress | None = None, make: Callable[[DeviceConfig], Device] = build
) -> SelfTest:
    """Run all steps on the device that ``make`` builds. A step that fails is a result, and is not raised."""
    found = SelfTest(device=config.device, kind=config.kind, facts=facts_of(config), steps=[])
    with tempfile.TemporaryDirectory(prefix="clockwork-self-test-") as folder, contextlib.ExitStack() as ends:
        test = _Test(config, found, Path(folder), progress, make, ends)
        for name, act in test.steps().items():
            found.steps.append(
                SelfTestStep(name=name, result=NOT_RUN) if test.stopped else _ran(name, act, test)
            )
    return found


def _ran(name: str, act: Callable[[], str], test: _Test) -> SelfTestStep:
    """One step. What torch, ONNX Runtime or a driver raises has no common base."""
    began_ns = time.monotonic_ns()
    result, test.stopped = FAILED, True
    try:
        text, result, test.stopped = act(), OK, False
    except WrongOutputs as error:
        text, test.stopped = str(error), False
    except ProblemError as error:  # without the name of the built-in model
        problem = error.problem
        text = f"{problem.field}: expected {problem.expected}, found {problem.found}; {problem.advice}"
    except ClockworkError as error:
        text = str(error)
    except Exception as error:  # noqa: BLE001
        text = f"expected no error, found {described(error)}; check the versions, or report all of this"
    return SelfTestStep(name=name, result=result, found=text, took_ms=to_ms(time.monotonic_ns() - began_ns))


class _Test:
    """The steps, each of which needs those before it, and returns what it found in words."""

    def __init__(
        self, config: DeviceConfig, found: SelfTest, folder: Path, progress: Progress | None,
        make: Callable[[DeviceConfig], Device], ends: contextlib.ExitStack,
    ) -> None:  # fmt: skip
        self.stopped = False
        memory_bytes = align(ARENA_BYTES, config.page_bytes)
        self._config = msgspec.structs.replace(config, memory_bytes=memory_bytes, memory_share=0.0)
        self._found = found
        self._folder = folder
        self._progress = progress
        self._make = make
        self._ends = ends
        self._rows = rows_of_inputs()

    def steps(self) -> dict[str, Callable[[], str]]:
        """By name, in order."""
        return {
            "device": self._start, "compile": self._compile, "load": self._load, "run": self._run,
            "compare": self._compare, "batch": self._batch, "timings": self._timings,
        }  # fmt: skip

    def _start(self) -> str:
        """The device as a worker starts it."""
        if self._config.kind not in RUNTIMES:
            raise ConfigError(
                f"device {self._config.device}: expected one that computes (cpu, torch-cpu or cuda:N), found"
                f" {self._config.kind}, which only takes its time; correct --device"
            )
        self._target = torch_target((self._config,)) or "cpu"
        self._device = self._make(self._config)
        self._ends.callback(self._device.close)
        memory, cuda = memory_of(self._config)
        self._found.facts |= {"memory": memory} | ({"cuda": cuda} if cuda else {})
        return f"{self._device.spec.pages} pages of {self._config.page_bytes >> 10} KiB for weights"

    def _compile(self) -> str:
        root = self._folder / "models"
        (root / "self_test" / "1").mkdir(parents=True)
        (root / "self_test" / "clockwork.toml").write_text(f"max_batch_size = {MAX_BATCH}\n")
        write = write_torch if RUNTIMES[self._config.kind] == "torch" else write_onnx
        self._reference = write(root / "self_test" / "1")
        config = StoreConfig(cache_dir=str(self._folder / "cache"), torch_target=self._target)
        with Cache(config.cache_dir) as cache:
            served, problems = compile_all(Repository(root, config), cache, self._progress)
        if problems:
            raise ProblemError(problems[0])
        self._served: ServedVersion = served[0]
        sizes = ", ".join(map(str, self._served.code.batch_sizes))
        return f"for {self._target}, batch sizes {sizes}"

    def _load(self) -> str:
        """To pages in the middle: their addresses are others than those of the first page."""
        device, model = self._device, self._served.model
        device.prepare(self._served.code)
        self._extent = Extent(device.spec.pages // 2, device.spec.pages_of(model.weights.size))
        device.load(
            Load(
                action_id=1, device=device.spec.device, model=model.key, code_id=model.code_id,
                weights=model.weights, extent=self._extent, version=1, window=_ANY_TIME, expected_ns=0,
            )
        )  # fmt: skip
        return f"{model.weights.size / MIB:.1f} MiB to pages from {self._extent.first} on"

    def _run(self) -> str:
        self._alone = [self._infer(self._rows[at : at + 1]) for at in range(MAX_BATCH)]
        return f"{MAX_BATCH} answers of {self._alone[0].shape[1]} numbers, one row at a time"

    def _compare(self) -> str:
        alone = np.concatenate(self._alone)
        return self._judged(alone, self._reference(self._rows), "the plain runtime on the CPU")

    def _batch(self) -> str:
        together = self._infer(self._rows)
        return self._judged(together, np.concatenate(self._alone), "the same rows alone")

    def _timings(self) -> str:
        """As a server measures before it serves; this needs the device idle, and ends with nothing loaded."""
        measured = profile(self._device, self._served.code, self._served.model).profile
        size = self._served.model.weights.size
        self._found.load_ms = round(measured.load_ns(size) / NS_PER_MS, 3)
        self._found.infer_ms = {
            batch: round(lasted_ns / NS_PER_MS, 3) for batch, lasted_ns in measured.infer_ns.items()
        }
        batches = ", ".join(f"batch {batch}: {lasted} ms" for batch, lasted in self._found.infer_ms.items())
        return f"LOAD: {self._found.load_ms} ms, {batches} (medians)"

    def _infer(self, rows: Array) -> Array:
        """The outputs of one INFER of a request for each row."""
        device, code, model = self._device, self._served.code, self._served.model
        room = align(model.output_bytes) + TENSOR_ALIGN
        calls = [
            CallBuffers(inputs={code.inputs[0].name: row[None]}, output=memoryview(bytearray(room)))
            for row in rows
        ]
        device.infer(
            Infer(
                action_id=2, device=device.spec.device, model=model.key, code_id=model.code_id,
                extent=self._extent, version=1, batch=len(calls), window=_ANY_TIME, expected_ns=0,
                calls=tuple(Call(request_id=str(at), rows=1, tensors=b"") for at in range(len(calls))),
            ),
            calls,
        )  # fmt: skip
        return np.concatenate([_output(call) for call in calls])

    def _judged(self, got: Array, wanted: Array, other: str) -> str:
        gap, most = difference([got], [wanted]), tolerance(self._config.kind)
        text = f"largest difference {gap:.1e} of the largest output, tolerance {most:.0e}"
        if gap > most:
            raise WrongOutputs(
                f"outputs: expected those of {other}, found a {text}; do not serve on this device, and"
                " report all of this"
            )
        return f"as {other}: {text}"


def _output(call: CallBuffers) -> Array:
    if len(call.outputs) != 1:
        raise DeviceError(f"outputs: expected one, found {len(call.outputs)}; report all of this")
    [ref] = call.outputs
    return np.ndarray(ref.shape, NUMPY_DTYPES[ref.datatype], buffer=call.output, offset=ref.offset)


def tolerance(kind: str) -> float:
    """The relative difference that rounding alone may make on such a device, as when models are compiled."""
    if RUNTIMES[kind] == "onnxruntime":
        return TOLERANCE
    from clockwork_serve.store.torch.packages import SAME, SAME_COARSE

    return SAME_COARSE if kind == "cuda" else SAME["float32"]


# ------------------------------------------------------------
# The built-in model: a convolution, a mean, and two matrices, which are larger than one copy of a LOAD.


_SHAPES: Final = {
    "0.weight": (64, 3, 3, 3), "0.bias": (64,), "4.weight": (2048, 64), "4.bias": (2048,),
    "6.weight": (1024, 2048), "6.bias": (1024,),
}  # fmt: skip
"""The weights, by their names in torch's ``Sequential``."""


def rows_of_inputs() -> Array:
    """Rows whose answers differ from each other by more than any tolerance."""
    random = np.random.default_rng(1)
    rows: Array = random.standard_normal((MAX_BATCH, 3, 16, 16)).astype(np.float32)
    return rows * np.arange(1, MAX_BATCH + 1, dtype=np.float32)[:, None, None, None]


@functools.cache
def weights() -> Mapping[str, Array]:
    """The same at every call, of a size that keeps the sums near 1."""
    random = np.random.default_rng(2)
    return {
        name: (random.standard_normal(shape) / np.sqrt(np.prod(shape[1:]))).astype(np.float32)
        for name, shape in _SHAPES.items()
    }


def write_onnx(folder: Path) -> Reference:
    """Write the model as ONNX."""
    import onnxruntime
    from onnx import TensorProto, helper, numpy_helper

    nodes = [
        helper.make_node("Conv", ["input", "0.weight", "0.bias"], ["1"]),
        helper.make_node("Relu", ["1"], ["2"]),
        helper.make_node("GlobalAveragePool", ["2"], ["3"]),
        helper.make_node("Flatten", ["3"], ["4"]),
        helper.make_node("Gemm", ["4", "4.weight", "4.bias"], ["5"], transB=1),
        helper.make_node("Relu", ["5"], ["6"]),
        helper.make_node("Gemm", ["6", "6.weight", "6.bias"], ["output"], transB=1),
    ]
    graph = helper.make_graph(
        nodes, "self_test",
        [helper.make_tensor_value_info("input", TensorProto.FLOAT, ["batch", 3, 16, 16])],
        [helper.make_tensor_value_info("output", TensorProto.FLOAT, ["batch", 1024])],
        [numpy_helper.from_array(array, name) for name, array in weights().items()],
    )  # fmt: skip
    opsets = [helper.make_opsetid("", 17)]
    data = helper.make_model(graph, opset_imports=opsets, ir_version=8).SerializeToString()
    (folder / "model.onnx").write_bytes(data)
    session = onnxruntime.InferenceSession(data, providers=["CPUExecutionProvider"])

    def reference(rows: Array) -> Array:
        outputs: Sequence[Array] = session.run(None, {"input": rows})
        return outputs[0]

    return reference


def write_torch(folder: Path) -> Reference:
    """Write the model as a program of torch."""
    import torch
    from torch import nn

    layers = (
        nn.Conv2d(3, 64, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 2048), nn.ReLU(),
        nn.Linear(2048, 1024),
    )  # fmt: skip
    model: Any = nn.Sequential(*layers).eval()
    model.load_state_dict({name: torch.from_numpy(array) for name, array in weights().items()})
    batch = torch.export.Dim("batch", min=1, max=MAX_BATCH)
    with warnings.catch_warnings(action="ignore"):  # torch warns about its own export
        inputs = (torch.from_numpy(rows_of_inputs()[:2]),)
        program = torch.export.export(model, inputs, dynamic_shapes=({0: batch},))
        torch.export.save(program, folder / "model.pt2")

    def reference(rows: Array) -> Array:
        with torch.inference_mode():
            outputs: Array = model(torch.from_numpy(rows)).numpy()
        return outputs

    return reference


# ------------------------------------------------------------
# What the screen says of the device and the versions.


def facts_of(config: DeviceConfig) -> dict[str, str]:
    """The device's name and all versions; no driver, GPU or runtime needs to be there."""
    facts = {"name": processor_name()}
    if config.kind == "cuda":
        found, number = gpus(), ordinal_of(config.device)
        facts["name"] = f"{found[number].name}, {found[number].capability}" if number < len(found) else "none"
        facts["driver"] = driver_version()
    runtimes = [RUNTIMES[config.kind]] if config.kind in RUNTIMES else []
    versions = {name: _version(name) for name in runtimes}
    return facts | {"clockwork-serve": __version__} | versions | {"python": platform.python_version()}


def driver_version(path: Path = Path("/proc/driver/nvidia/version")) -> str:
    """The version of the NVIDIA driver, as it says itself."""
    try:
        found = re.search(r"\d+\.[\d.]+", path.read_text(encoding="utf-8", errors="replace"))
    except OSError:
        return "none"
    return found[0] if found else "unknown"


def _version(distribution: str) -> str:
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return "not installed"


def memory_of(config: DeviceConfig) -> tuple[str, str]:
    """The memory of a device that was started, and the version of CUDA that torch was built for, if any."""
    if config.kind != "cuda":
        return f"{share_of_memory(1.0) / MIB:.0f} MiB", ""
    import torch

    free, total = torch.cuda.mem_get_info(ordinal_of(config.device))
    return f"{total / MIB:.0f} MiB, {free / MIB:.0f} MiB free", str(torch.version.cuda)

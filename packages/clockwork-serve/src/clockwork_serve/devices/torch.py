"""Torch models on ``torch-cpu`` and ``cuda:N``: packages without constants, run on weights in pages."""

from __future__ import annotations

import contextlib
import logging
import math
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

import msgspec
import torch
from torch._C._aoti import AOTIModelPackageLoader

from clockwork_serve.devices.accelerator import Accelerator, Cuda, HostPool, Tensor
from clockwork_serve.devices.arena import check_page_size, span
from clockwork_serve.devices.base import (
    NUMPY_DTYPES,
    Array,
    Bindings,
    CallBuffers,
    DeviceConfig,
    Phases,
    PreparedCodes,
    check_blob,
    check_input,
    forget_outputs,
    full_shape,
    gather,
    is_static,
    nbytes_of,
    rows_of,
    stack,
    within,
    write_outputs,
)
from clockwork_serve.devices.files import check_file, read_record
from clockwork_serve.devices.kinds import BACKENDS
from clockwork_serve.errors import DeviceError, DeviceGone, ModelError
from clockwork_serve.messages import (
    Code,
    Extent,
    Infer,
    Load,
    TensorSpec,
    TorchIndex,
    TorchTensor,
    Unload,
    Weights,
)
from clockwork_serve.units import MIB, align, scratch_for

# ------------------------------------------------------------
# A compiled torch model on disk: ``index.json`` beside its packages.
#
# CODE/code.json, CODE/index.json, CODE/B.pt2    one package without constants per batch size B
# one blob of weights per model, laid out by the index


INDEX_FILE: Final = "index.json"
TENSOR_START: Final = 256  # alignment of tensors in the blob, in bytes, as of CUDA's allocators

_decoder: Final = msgspec.json.Decoder(TorchIndex)  # built before there are threads


def package_name(batch: int) -> str:
    """The file of a batch size's package."""
    return f"{batch}.pt2"


def read_index(code: Code) -> TorchIndex:
    """The code's index; DeviceError if it is missing or inconsistent."""
    path = f"{code.path}/{INDEX_FILE}"
    index = read_record(code, INDEX_FILE, _decoder)
    for tensor in index.tensors:
        fault = _fault(tensor, index.blob_bytes)
        if fault:
            raise DeviceError(f"code {path}: {tensor.name}: {fault}; compile the model again")
    return index


def _fault(tensor: TorchTensor, blob_bytes: int) -> str:
    """What is wrong with one entry; empty if nothing is."""
    dtype = getattr(torch, tensor.dtype, None)
    if not isinstance(dtype, torch.dtype):
        return f"dtype: expected an element type of torch such as float32; found {tensor.dtype!r}"
    if len(tensor.shape) != len(tensor.stride) or min((*tensor.shape, *tensor.stride), default=0) < 0:
        return f"expected a stride per dimension, none negative; found {tensor.shape} and {tensor.stride}"
    reach = sum((dim - 1) * step for dim, step in zip(tensor.shape, tensor.stride, strict=True)) + 1
    needed = dtype.itemsize * reach if math.prod(tensor.shape) else 0
    if needed > tensor.size:
        return f"expected {needed} bytes for {tensor.shape} {tensor.dtype}, found {tensor.size}"
    if tensor.offset % TENSOR_START:
        return f"expected to start at a multiple of {TENSOR_START}, found {tensor.offset}"
    if tensor.offset < 0 or tensor.offset + tensor.size > blob_bytes:
        return f"expected to end by {blob_bytes}, found {tensor.offset + tensor.size}"
    return ""


# ------------------------------------------------------------
# One (code, batch size) of a torch model: its package, its place in the I/O area, the weights it reads.
#
# Required, as measurements showed: constants are loaded with ``user_managed=True`` (else they are copied
# beyond the end of their memory); a package is loaded once per process and kept (its code stays mapped
# anyway); no constants are folded at run time.


DTYPES: Final[dict[str, Any]] = {
    "BOOL": torch.bool, "UINT8": torch.uint8, "UINT16": torch.uint16, "UINT32": torch.uint32,
    "UINT64": torch.uint64, "INT8": torch.int8, "INT16": torch.int16, "INT32": torch.int32,
    "INT64": torch.int64, "FP16": torch.float16, "BF16": torch.bfloat16, "FP32": torch.float32,
    "FP64": torch.float64,
}  # fmt: skip

Views = dict[str, Tensor]


@dataclass(slots=True, eq=False)
class TorchSlot:
    """A tensor of a batch in the I/O area; ``array`` and ``host`` are the same memory."""

    spec: TensorSpec
    dtype: Any
    array: Array
    host: Tensor
    device: Tensor


@dataclass(slots=True, eq=False)
class LoadedPackage:
    """A compiled batch size, loaded for good.

    ``page`` is the first page of the constants that are loaded (-1: none that are valid). ``lock`` is held
    while it runs or loads constants, which both lanes do. ``captures``: a CUDA graph may be captured of it.
    """

    batch: int
    loader: Any
    inputs: list[TorchSlot]
    outputs: list[TorchSlot]
    lock: threading.Lock = field(default_factory=threading.Lock)
    page: int = -1
    views: Views = field(default_factory=dict)
    captures: bool = True

    def run(self, views: Views, page: int, inputs: Sequence[Tensor] | None = None) -> list[Tensor]:
        """Run with these constants, on ``inputs`` or those in the area. The caller holds the lock."""
        if page < 0 or self.page != page:
            self.page = -1
            self.loader.load_constants(views, use_inactive=False, check_full_update=True, user_managed=True)
            self.page, self.views = page, views  # keeps their memory alive
        taken = [slot.device for slot in self.inputs] if inputs is None else list(inputs)
        outputs: list[Tensor] = self.loader.boxed_run(taken)
        return outputs

    def zeros(self) -> list[Tensor]:
        """Zero inputs outside the area, which may be in use."""
        return [torch.zeros_like(slot.device) for slot in self.inputs]

    def misfit(self, outputs: Sequence[Tensor]) -> str:
        """How a run's outputs differ from the code's declaration; empty if they do not."""
        if len(outputs) != len(self.outputs):
            return f"expected {len(self.outputs)} outputs, found {len(outputs)}"
        for slot, tensor in zip(self.outputs, outputs, strict=True):
            if tensor.dtype is not slot.dtype or tuple(tensor.shape) != slot.array.shape:
                return (
                    f"output {slot.spec.name}: expected {slot.dtype} {slot.array.shape}, found {tensor.dtype}"
                    f" {tuple(tensor.shape)}"
                )
        return ""


def open_package(
    code: Code, index: TorchIndex, batch: int, accelerator: Accelerator, area: tuple[Tensor, Tensor]
) -> LoadedPackage:
    """Load one package; DeviceError if it does not match the index."""
    path = check_file(code, package_name(batch))
    try:
        loader = AOTIModelPackageLoader(str(path), "model", True, 1, accelerator.index)  # noqa: FBT003
        found = set(loader.get_constant_fqns())
    except RuntimeError as error:
        raise DeviceError(
            f"code {path}: cannot be loaded: {one_line(error)}; compile the model again"
        ) from error
    check_file(code, package_name(batch))  # that it did not change while torch read it by its path
    wanted = {tensor.name for tensor in index.tensors}
    if found != wanted:
        raise DeviceError(
            f"code {path}: the package and its index differ: not in the index {sorted(found - wanted)[:5]},"
            f" not in the package {sorted(wanted - found)[:5]}; compile the model again"
        )
    slots = _slots(code, batch, area)
    return LoadedPackage(batch, loader, slots[: len(code.inputs)], slots[len(code.inputs) :])


def check_code(code: Code, index: TorchIndex, accelerator: Accelerator, device: str) -> None:
    """DeviceError unless the code can run here: the same torch and target, tensors of known sizes."""
    ours, theirs = torch.__version__.partition("+")[0], index.torch_version.partition("+")[0]
    if theirs != ours:
        raise DeviceError(
            f"code {code.code_id}: compiled with torch {theirs}, and torch {ours} is installed; compile the"
            " model again"
        )
    if index.target != accelerator.target:
        raise DeviceError(
            f"code {code.code_id}: compiled for {index.target}, and {device} is {accelerator.target}; compile"
            " the model again"
        )
    if not code.lifted:
        raise DeviceError(f"code {code.code_id}: expected weights apart from it; compile the model again")
    for spec in (*code.inputs, *code.outputs):
        if not is_static(spec) or spec.optional:
            raise DeviceError(
                f"code {code.code_id}: tensor {spec.name}: expected numbers of a known size in every request,"
                f" found {spec.datatype} {spec.shape}"
            )
    names = tuple(spec.name for spec in code.inputs), tuple(spec.name for spec in code.outputs)
    if names != (index.inputs, index.outputs):
        raise DeviceError(
            f"code {code.code_id}: the code and its index differ in names or their order: {names} and"
            f" {(index.inputs, index.outputs)}; compile the model again"
        )


def area_bytes(code: Code, batch: int) -> int:
    """Bytes of a batch in the I/O area."""
    rows = batch if code.batched else 1
    return sum(align((spec.row_bytes or 0) * rows) for spec in (*code.inputs, *code.outputs))


def _slots(code: Code, batch: int, area: tuple[Tensor, Tensor]) -> list[TorchSlot]:
    slots, start = [], 0
    for spec in (*code.inputs, *code.outputs):
        shape, dtype = full_shape(code, spec, batch), DTYPES[spec.datatype]
        end = start + nbytes_of(shape, NUMPY_DTYPES[spec.datatype])
        host, device = (memory[start:end].view(dtype).view(shape) for memory in area)
        array = area[0][start:end].numpy().view(NUMPY_DTYPES[spec.datatype]).reshape(shape)
        slots.append(TorchSlot(spec, dtype, array, host, device))
        start = align(end)
    return slots


def fill(code: Code, slot: TorchSlot, calls: Sequence[CallBuffers], rows: Sequence[int]) -> None:
    """Copy the rows of calls to their place in the area."""
    if code.batched:
        stack(gather(code, slot.spec, calls, rows), slot.array)
        return
    array = calls[0].inputs.get(slot.spec.name)
    check_input(code, slot.spec, array, 1)
    slot.array[...] = array


def copy_out(package: LoadedPackage, outputs: Sequence[Tensor], accelerator: Accelerator) -> list[Array]:
    """Copy outputs to the host; the arrays are valid once the lane's mark is reached."""
    fault = package.misfit(outputs)
    if fault:
        raise ModelError(f"{fault}; compile the model again")
    if not accelerator.shares_memory:
        for slot, tensor in zip(package.outputs, outputs, strict=True):
            slot.host.copy_(tensor, non_blocking=True)
        return [slot.array for slot in package.outputs]
    return [
        (tensor.view(torch.uint16) if tensor.dtype is torch.bfloat16 else tensor).numpy()
        for tensor in outputs
    ]


def views_of(index: TorchIndex, memory: Tensor) -> Views:
    """Views of every weight of a blob in ``memory``; nothing is copied."""
    return {
        tensor.name: memory[tensor.offset : tensor.offset + tensor.size]
        .view(getattr(torch, tensor.dtype))
        .as_strided(tensor.shape, tensor.stride)
        for tensor in index.tensors
    }


def one_line(error: BaseException) -> str:
    """Torch's error message without its stack trace."""
    text = str(error).partition("Exception raised from")[0]
    return " ".join(text.split()) or type(error).__name__


# ------------------------------------------------------------
# Torch models on ``torch-cpu`` and ``cuda:N``: compiled packages without constants, run on weights in pages.
#
# The arena is allocated at start and never grows. An extent of it holds a model's blob, and a package's
# constants are views of it (zero-copy). LOAD copies in chunks on a stream of its own; INFER copies inputs in,
# runs alone, and copies outputs out.


KEPT_MAX: Final = 256  # retired codes whose packages are kept for reuse; each package takes about 0.5 MB
Graph = tuple[Callable[[], None], list[Tensor]]  # a function that replays the graph, and its outputs

_log = logging.getLogger(__name__)


@dataclass(slots=True)
class PreparedTorch:
    """A prepared code."""

    code: Code
    index: TorchIndex
    packages: dict[int, LoadedPackage]


class TorchDevice:
    """``load`` and ``prepare`` run on the load lane, ``infer`` on the exec lane."""

    def __init__(self, config: DeviceConfig, accelerator: Accelerator | None = None) -> None:
        page_bytes = config.page_bytes
        check_page_size(page_bytes, 16 * MIB)
        self._accelerator = accelerator or (Cuda(config) if config.kind == "cuda" else Accelerator(config))
        pages = self._accelerator.memory_bytes() // page_bytes
        if pages < 1:
            raise DeviceError(f"device_memory: expected at least one page of {page_bytes} bytes; raise it")
        self._config = config
        self._arena = self._accelerator.arena(pages * page_bytes)
        self._area = self._accelerator.area(config.io_bytes)
        self._pool = HostPool(self._accelerator, config.pool_bytes)
        self._prepared = PreparedCodes[PreparedTorch](config.device)
        self._kept: OrderedDict[str, PreparedTorch] = OrderedDict()  # retired, ready to return
        self._bindings: Bindings[Views] = Bindings()
        self._graphs: OrderedDict[tuple[str, int, int], Graph] = OrderedDict()  # by code, page and batch
        self._running: Graph | None = None  # kept alive while it runs
        self._swaps = 0
        self.spec = config.spec(
            self._accelerator.kind, pages, backends=BACKENDS[config.kind],
            lanes_share=self._accelerator.shares_memory and config.lanes_share,
        )  # fmt: skip

    # The load lane

    def prepare(self, code: Code) -> None:
        """Load the code's packages and run each once; DeviceError if they do not match this device."""
        if code.code_id in self._prepared:
            return
        prepared = self._kept.pop(code.code_id, None)
        if prepared is None:
            with self._safe(f"code {code.code_id}"), torch.inference_mode():
                prepared = self._open(code)
                self._warm_up(prepared)
        self._prepared[code.code_id] = prepared

    def retire(self, code_id: str) -> None:
        """Free all but the packages: what a package maps stays mapped, so it is kept for reuse."""
        prepared = self._prepared.pop(code_id, None)
        if prepared is None:
            return
        self._bindings.retire(code_id)
        for key in [key for key in self._graphs if key[0] == code_id]:
            self._graphs.pop(key, None)
        self._kept[code_id] = prepared
        if len(self._kept) > KEPT_MAX:
            dropped, _ = self._kept.popitem(last=False)
            _log.warning(
                "%s: code %s was dropped after %d others; its mappings stay until the worker restarts",
                self._config.device, dropped, KEPT_MAX,
            )  # fmt: skip

    def load(self, action: Load) -> int:
        """Copy the blob into its extent, and wait until it is complete."""
        prepared = self._prepared[action.code_id]
        weights, blob_bytes = action.weights, prepared.index.blob_bytes
        check_blob(action, blob_bytes)
        target = self._extent(action.extent, blob_bytes)
        with self._safe(f"weights {weights.weights_id}"), torch.inference_mode():
            with self._accelerator.lane("load"):
                once_ns = self._pool.copy(weights, target)
                loaded = self._accelerator.mark("load")
            self._accelerator.wait(loaded)
            views = self._views(prepared, action.extent.first)
            for package in prepared.packages.values():
                self._capture(prepared, package, action.extent.first, views)
        return once_ns

    def verify(self, weights: Weights) -> None:
        """Verify a weights file before it is needed; thread-safe."""
        self._pool.verify(weights)

    def _open(self, code: Code) -> PreparedTorch:
        if code.backend != "torch":
            raise DeviceError(f"code {code.code_id}: {self.spec.misfit(code.backend)}")
        index = read_index(code)
        check_code(code, index, self._accelerator, self._config.device)
        sizes = code.batch_sizes if code.batched else (1,)
        packages = {}
        for size in sizes:
            if self._accelerator.claim(area_bytes(code, size)):
                packages[size] = open_package(code, index, size, self._accelerator, self._area)
        if sizes[0] not in packages:
            needed = area_bytes(code, sizes[0])
            raise DeviceError(
                f"code {code.code_id}: its inputs and outputs take {needed} bytes, and the I/O area has"
                f" {self._config.io_bytes}; set scratch_memory to at least {scratch_for(needed)}"
            )
        return PreparedTorch(code, index, packages)

    def _warm_up(self, prepared: PreparedTorch) -> None:
        """Run batch sizes on zeros to allocate their workspace: on a GPU all, else while time allows.

        Weights are a separate buffer of zeros, as the arena's pages hold those of other models. A model may
        refuse zeros as inputs; real ones may still work.
        """
        zeros = self._accelerator.zeros(prepared.index.blob_bytes)
        if zeros is None:
            _log.warning("%s: no room to try code %s", self._config.device, prepared.code.code_id)
            return
        views, packages = views_of(prepared.index, zeros), prepared.packages.values()
        on_host = self._accelerator.shares_memory
        for package in within(packages, self._config.warm_up_ns) if on_host else packages:
            outputs: list[Tensor] | None = None
            with self._accelerator.lane("exec"), package.lock:
                try:
                    outputs = package.run(views, -1, package.zeros())
                    self._accelerator.wait(self._accelerator.mark("exec"))
                except Exception as error:
                    if self._accelerator.lost(error):
                        raise
                package.views = {}
            fault = "" if outputs is None else package.misfit(outputs)
            if fault:
                raise DeviceError(f"code {prepared.code.code_id}: {fault}; compile the model again")

    def _capture(self, prepared: PreparedTorch, package: LoadedPackage, page: int, views: Views) -> None:
        """Capture a CUDA graph for this place, unless there is one, so that no INFER has to."""
        key = (prepared.code.code_id, page, package.batch)
        if key in self._graphs or not package.captures or not self._config.graphs:
            return
        with package.lock:
            try:
                graph = self._accelerator.capture(
                    lambda: package.run(views, page, package.zeros()), lambda: package.run(views, page)
                )
            except Exception as error:
                if self._accelerator.lost(error):
                    raise
                graph = None
                _log.info(
                    "%s: code %s runs without a CUDA graph: %s", self._config.device, key[0], one_line(error)
                )
        if graph is None:
            package.captures = False
            return
        self._graphs[key] = graph
        while len(self._graphs) > self._config.graphs:
            self._graphs.popitem(last=False)

    def unload(self, action: Unload) -> None:
        """No-op: views and graphs belong to a place, and serve the next weights there."""

    # The exec lane

    def infer(self, action: Infer, calls: Sequence[CallBuffers]) -> Phases:
        """Run one batch on the weights in the action's extent."""
        started_ns = time.monotonic_ns()
        prepared = self._prepared[action.code_id]
        rows = rows_of(prepared.code, action, calls)
        package = prepared.packages.get(action.batch if prepared.code.batched else 1)
        if package is None:
            raise DeviceError(
                f"batch {action.batch}: its tensors do not fit the I/O area; set scratch_memory to at least "
                f"{scratch_for(area_bytes(prepared.code, action.batch))}"
            )
        try:
            with self._safe(f"model {action.model}", ModelError), torch.inference_mode():
                return self._run(prepared, package, action, calls, rows, started_ns)
        except DeviceError:
            forget_outputs(calls)
            raise

    def _run(
        self, prepared: PreparedTorch, package: LoadedPackage, action: Infer, calls: Sequence[CallBuffers],
        rows: Sequence[int], started_ns: int,
    ) -> Phases:  # fmt: skip
        accelerator, code = self._accelerator, prepared.code
        self._extent(action.extent, prepared.index.blob_bytes)
        for slot in package.inputs:
            fill(code, slot, calls, rows)
        filled_ns = time.monotonic_ns()
        with accelerator.lane("input"):
            copy_start = accelerator.mark("input")
            if not accelerator.shares_memory:
                for slot in package.inputs:
                    slot.device.copy_(slot.host, non_blocking=True)
            copied_in = accelerator.mark("input")
        with accelerator.lane("exec"):
            accelerator.follow(copied_in)
            run_start = accelerator.mark("exec")
            outputs = self._outputs(prepared, package, action.extent.first)
            run_end = accelerator.mark("exec")
        with accelerator.lane("output"):
            accelerator.follow(run_end)
            arrays = copy_out(package, outputs, accelerator)
            copied_out = accelerator.mark("output")
        accelerator.wait(copied_out)
        write_outputs(code, arrays, package.batch, calls, rows)
        input_ns = filled_ns - started_ns + accelerator.between_ns(copy_start, run_start)
        run_ns = accelerator.between_ns(run_start, run_end)
        return Phases(input_ns, run_ns, max(0, time.monotonic_ns() - started_ns - input_ns - run_ns))

    def _outputs(self, prepared: PreparedTorch, package: LoadedPackage, page: int) -> list[Tensor]:
        """Run by the CUDA graph of this place if there is one, else by the package."""
        key = (prepared.code.code_id, page, package.batch)
        self._running = graph = self._graphs.get(key)
        if graph is not None:
            with contextlib.suppress(KeyError):  # the load lane has just evicted it
                self._graphs.move_to_end(key)
            graph[0]()
            return graph[1]
        views = self._views(prepared, page)
        with package.lock:
            self._swaps += package.page != page
            return package.run(views, page)

    # Both lanes

    def counters(self) -> dict[str, int]:
        """Numbers for tests and benchmarks: those of the allocator must not change during serving."""
        return {
            "swaps": self._swaps, "graphs": len(self._graphs), "pool_hits": self._pool.hits,
            "pool_misses": self._pool.misses, "kept_codes": len(self._kept), **self._accelerator.counters(),
        }  # fmt: skip

    def used_bytes(self) -> int:
        """Memory in use beside weights, inputs and outputs."""
        return self._accelerator.used_bytes()

    def close(self) -> None:
        """Free everything."""
        self._running = None
        self._graphs.clear()
        self._prepared.clear()
        self._kept.clear()
        self._bindings = Bindings()
        self._pool.close()
        self._arena, self._area = None, (None, None)
        self._accelerator.close()

    def _extent(self, extent: Extent, nbytes: int) -> Tensor:
        """The first ``nbytes`` of an extent; DeviceError if they are not all inside it."""
        return self._arena[span(extent, nbytes, self.spec.pages, self.spec.page_bytes)]

    def _views(self, prepared: PreparedTorch, page: int) -> Views:
        code_id, start, index = prepared.code.code_id, page * self.spec.page_bytes, prepared.index
        views = self._bindings.get(code_id, page)
        if views is None:
            views = views_of(index, self._arena[start : start + index.blob_bytes])
            self._bindings.put(code_id, page, views, len(views))
        return views

    @contextlib.contextmanager
    def _safe(self, what: str, kind: type[DeviceError] = DeviceError) -> Iterator[None]:
        """Convert torch's errors to ours: of the model, of the device, or of a device that is lost."""
        try:
            yield
        except DeviceError:
            raise
        except Exception as error:
            message = one_line(error)
            if self._accelerator.lost(error):
                raise DeviceGone(f"{self._config.device} is lost after {what}: {message}") from error
            raise kind(f"{what}: {message}") from error

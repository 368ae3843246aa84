"""One (code, batch size) of a torch model: its package, its place in the I/O area, the weights it reads.

What must hold, for it was measured to go wrong otherwise: constants are given ``user_managed=True`` (else
they are copied over the end of their memory); a package is loaded once per process and not let go (its code
stays mapped when it is); no constants are folded at run time.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

import torch
from torch._C._aoti import AOTIModelPackageLoader

from clockwork_serve.devices.accelerator import Accelerator, Tensor
from clockwork_serve.devices.base import NUMPY_DTYPES, Array, CallBuffers
from clockwork_serve.devices.code_files import check_file
from clockwork_serve.devices.tensors import check_input, full_shape, gather, is_static, nbytes_of, stack
from clockwork_serve.devices.torch_index import package_name
from clockwork_serve.errors import DeviceError, ModelError
from clockwork_serve.messages import Code, TensorSpec, TorchIndex
from clockwork_serve.units import align

VIEWS_MAX: Final = 100_000
"""Weights seen in extents, over all places: each takes about 0.5 kB; to see it anew takes 3 us."""

DTYPES: Final[dict[str, Any]] = {
    "BOOL": torch.bool, "UINT8": torch.uint8, "UINT16": torch.uint16, "UINT32": torch.uint32,
    "UINT64": torch.uint64, "INT8": torch.int8, "INT16": torch.int16, "INT32": torch.int32,
    "INT64": torch.int64, "FP16": torch.float16, "BF16": torch.bfloat16, "FP32": torch.float32,
    "FP64": torch.float64,
}  # fmt: skip

Views = dict[str, Tensor]


@dataclass(slots=True, eq=False)
class Slot:
    """A tensor of a batch in the I/O area; ``array`` and ``host`` are the same memory."""

    spec: TensorSpec
    dtype: Any
    array: Array
    host: Tensor
    device: Tensor


@dataclass(slots=True, eq=False)
class Package:
    """A compiled batch size, loaded for good.

    ``page`` is where the constants lie that it has now (-1: nowhere that counts). ``lock`` is held while it
    runs or gets constants, for both lanes have it do that. ``captures``: a CUDA graph may be made of it.
    """

    batch: int
    loader: Any
    inputs: list[Slot]
    outputs: list[Slot]
    lock: threading.Lock = field(default_factory=threading.Lock)
    page: int = -1
    views: Views = field(default_factory=dict)
    captures: bool = True

    def run(self, views: Views, page: int, inputs: Sequence[Tensor] | None = None) -> list[Tensor]:
        """Run with these constants, on ``inputs`` or those in the area; the lock is held."""
        if page < 0 or self.page != page:
            self.page = -1
            self.loader.load_constants(views, use_inactive=False, check_full_update=True, user_managed=True)
            self.page, self.views = page, views  # which keeps what it points to
        taken = [slot.device for slot in self.inputs] if inputs is None else list(inputs)
        outputs: list[Tensor] = self.loader.boxed_run(taken)
        return outputs

    def zeros(self) -> list[Tensor]:
        """Inputs that no request gave: the area may be in use."""
        return [torch.zeros_like(slot.device) for slot in self.inputs]

    def misfit(self, outputs: Sequence[Tensor]) -> str:
        """What of a run's outputs is not as the code declares; empty if all is."""
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
) -> Package:
    """Load one package; DeviceError if it is not what the index says."""
    path = check_file(code, package_name(batch))
    try:
        loader = AOTIModelPackageLoader(str(path), "model", True, 1, accelerator.index)  # noqa: FBT003
        found = set(loader.get_constant_fqns())
    except RuntimeError as error:
        raise DeviceError(
            f"code {path}: cannot be loaded: {one_line(error)}; compile the model again"
        ) from error
    check_file(code, package_name(batch))  # it was read by its path: that it is still the same
    wanted = {tensor.name for tensor in index.tensors}
    if found != wanted:
        raise DeviceError(
            f"code {path}: the package and its index differ: not in the index {sorted(found - wanted)[:5]},"
            f" not in the package {sorted(wanted - found)[:5]}; compile the model again"
        )
    slots = _slots(code, batch, area)
    return Package(batch, loader, slots[: len(code.inputs)], slots[len(code.inputs) :])


def check_code(code: Code, index: TorchIndex, accelerator: Accelerator, device: str) -> None:
    """DeviceError unless the code can run here: for this torch, this target, with tensors of known sizes."""
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
    """What a batch takes of the I/O area."""
    rows = batch if code.batched else 1
    return sum(align((spec.row_bytes or 0) * rows) for spec in (*code.inputs, *code.outputs))


def _slots(code: Code, batch: int, area: tuple[Tensor, Tensor]) -> list[Slot]:
    slots, start = [], 0
    for spec in (*code.inputs, *code.outputs):
        shape, dtype = full_shape(code, spec, batch), DTYPES[spec.datatype]
        end = start + nbytes_of(shape, NUMPY_DTYPES[spec.datatype])
        host, device = (memory[start:end].view(dtype).view(shape) for memory in area)
        array = area[0][start:end].numpy().view(NUMPY_DTYPES[spec.datatype]).reshape(shape)
        slots.append(Slot(spec, dtype, array, host, device))
        start = align(end)
    return slots


def fill(code: Code, slot: Slot, calls: Sequence[CallBuffers], rows: Sequence[int]) -> None:
    """Bring the rows of calls into their place in the area."""
    if code.batched:
        stack(gather(code, slot.spec, calls, rows), slot.array)
        return
    array = calls[0].inputs.get(slot.spec.name)
    check_input(code, slot.spec, array, 1)
    slot.array[...] = array


def leave(package: Package, outputs: Sequence[Tensor], accelerator: Accelerator) -> list[Array]:
    """Have outputs come to the host; the arrays hold them once the lane's mark is reached."""
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


class Seen:
    """The weights of codes as they lie in extents, by (code, first page): views, made once. Thread-safe."""

    def __init__(self, tensors_max: int = VIEWS_MAX) -> None:
        self._tensors_max = tensors_max
        self._tensors = 0
        self._views_by_place: OrderedDict[tuple[str, int], Views] = OrderedDict()
        self._lock = threading.Lock()

    def get(self, code_id: str, page: int, make: Callable[[], Views]) -> Views:
        """The views of a code at a page; the least recently used others go if there are too many."""
        place = (code_id, page)
        with self._lock:
            views = self._views_by_place.get(place)
            if views is not None:
                self._views_by_place.move_to_end(place)
                return views
        views = make()
        with self._lock:
            if place not in self._views_by_place:
                self._views_by_place[place] = views
                self._tensors += len(views)
            while self._tensors > self._tensors_max and len(self._views_by_place) > 1:
                self._tensors -= len(self._views_by_place.popitem(last=False)[1])
        return views

    def retire(self, code_id: str) -> None:
        """Forget all of a code."""
        with self._lock:
            for place in [place for place in self._views_by_place if place[0] == code_id]:
                self._tensors -= len(self._views_by_place.pop(place))

    def __len__(self) -> int:
        return len(self._views_by_place)


def views_of(index: TorchIndex, memory: Tensor) -> Views:
    """Every weight of a blob that lies in ``memory``; nothing is copied."""
    return {
        tensor.name: memory[tensor.offset : tensor.offset + tensor.size]
        .view(getattr(torch, tensor.dtype))
        .as_strided(tensor.shape, tensor.stride)
        for tensor in index.tensors
    }


def one_line(error: BaseException) -> str:
    """What torch complains about, without its own stack."""
    text = str(error).partition("Exception raised from")[0]
    return " ".join(text.split()) or type(error).__name__

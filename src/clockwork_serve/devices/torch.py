"""Torch models on ``torch-cpu`` and ``cuda:N``: compiled packages without constants, run on weights in pages.

One arena is taken at start and never grows; an extent of it holds a model's blob, and a package's constants
are views of it (zero-copy). LOAD copies in chunks on a stream of its own; INFER copies inputs in, runs alone,
copies outputs out. Decides nothing.
"""

from __future__ import annotations

import contextlib
import logging
import mmap
import time
from collections import OrderedDict, deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Final

import torch

from clockwork_serve.devices.accelerator import Accelerator, Cuda, Host, Tensor
from clockwork_serve.devices.base import CallBuffers, DeviceConfig, Phases
from clockwork_serve.devices.host_pool import HostPool
from clockwork_serve.devices.kinds import BACKENDS
from clockwork_serve.devices.tensors import Room, rows_of, split
from clockwork_serve.devices.torch_index import read_index
from clockwork_serve.devices.torch_package import (
    Package,
    Seen,
    Views,
    area_bytes,
    check_code,
    fill,
    leave,
    one_line,
    open_package,
    views_of,
)
from clockwork_serve.errors import DeviceError, DeviceGone, ModelError
from clockwork_serve.messages import Code, DeviceSpec, Extent, Infer, Load, TorchIndex, Unload, Weights

KEPT_MAX: Final = 256
"""Retired codes whose packages are kept for their return; each package takes about 0.5 MB."""
SAMPLES_MAX: Final = 1024

Graph = tuple[Callable[[], None], list[Tensor]]
"""How to run it again, and where it leaves its outputs."""

_log = logging.getLogger(__name__)


@dataclass(slots=True)
class Prepared:
    """A code that is ready."""

    code: Code
    index: TorchIndex
    packages: dict[int, Package]


@dataclass(slots=True)
class Sample:
    """How long a run took by the device's own clock, and its clock rates then (MHz)."""

    code_id: str
    batch: int
    run_ns: int
    rates: dict[str, int]


class TorchDevice:
    """See the module. ``load`` and ``prepare`` run on the load lane, ``infer`` on the exec lane."""

    def __init__(self, config: DeviceConfig, accelerator: Accelerator | None = None) -> None:
        page_bytes = config.page_bytes
        if page_bytes < mmap.PAGESIZE or page_bytes % mmap.PAGESIZE:
            raise DeviceError(
                f"page_bytes: expected a multiple of {mmap.PAGESIZE}, found {page_bytes}; choose for example"
                " 16777216"
            )
        self._accelerator = accelerator or (Cuda(config) if config.kind == "cuda" else Host(config))
        pages = self._accelerator.memory_bytes() // page_bytes
        if pages < 1:
            raise DeviceError(f"memory_bytes: expected at least one page of {page_bytes} bytes; raise it")
        self._config = config
        self._arena = self._accelerator.arena(pages * page_bytes)
        self._area = self._accelerator.area(config.io_bytes)
        self._pool = HostPool(self._accelerator, config.pool_bytes)
        self._prepared: dict[str, Prepared] = {}
        self._kept: OrderedDict[str, Prepared] = OrderedDict()  # retired, ready to return
        self._seen = Seen()
        self._graphs: OrderedDict[tuple[str, int, int], Graph] = OrderedDict()  # by code, page and batch
        self._running: Graph | None = None  # whose memory must stay while it runs
        self._swaps = 0
        self.samples: deque[Sample] = deque(maxlen=SAMPLES_MAX)
        self.spec = DeviceSpec(
            device=config.device, kind=self._accelerator.kind, pages=pages, page_bytes=page_bytes,
            workspace_bytes=config.workspace_bytes, io_bytes=config.io_bytes, backends=BACKENDS[config.kind],
            lanes_share=self._accelerator.shares_memory and config.lanes_share,
        )  # fmt: skip

    # The load lane

    def prepare(self, code: Code) -> None:
        """Load the code's packages and run each once; DeviceError if they are not for this device."""
        if code.code_id in self._prepared:
            return
        prepared = self._kept.pop(code.code_id, None)
        if prepared is None:
            with self._safe(f"code {code.code_id}"), torch.inference_mode():
                prepared = self._open(code)
                self._warm_up(prepared)
        self._prepared[code.code_id] = prepared

    def retire(self, code_id: str) -> None:
        """Forget all but the packages: what a package maps stays mapped, so it is kept for its return."""
        prepared = self._prepared.pop(code_id, None)
        if prepared is None:
            return
        self._seen.retire(code_id)
        for key in [key for key in self._graphs if key[0] == code_id]:
            self._graphs.pop(key, None)
        self._kept[code_id] = prepared
        if len(self._kept) > KEPT_MAX:
            dropped, _ = self._kept.popitem(last=False)
            _log.warning(
                "%s: code %s was let go after %d others; what it mapped stays until the worker restarts",
                self._config.device, dropped, KEPT_MAX,
            )  # fmt: skip

    def load(self, action: Load) -> int:
        """Copy the blob into its extent, and wait until it is there."""
        prepared = self._get(action.code_id)
        weights, blob_bytes = action.weights, prepared.index.blob_bytes
        if weights.size != blob_bytes:
            raise DeviceError(
                f"weights {weights.weights_id}: expected {blob_bytes} bytes for code {action.code_id}, found"
                f" {weights.size}; compile the model again"
            )
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
        """Look whether a weights file is what its name says, before it is wanted; for any thread."""
        self._pool.verify(weights)

    def _open(self, code: Code) -> Prepared:
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
            raise DeviceError(
                f"code {code.code_id}: its inputs and outputs take {area_bytes(code, sizes[0])} bytes, and"
                f" the I/O area has {self._config.io_bytes}; raise io_memory"
            )
        return Prepared(code, index, packages)

    def _warm_up(self, prepared: Prepared) -> None:
        """Run batch sizes on zeros, so that their workspace is there: on a GPU all, else while time allows.

        Weights are zeros of their own, for the arena's pages hold those of others. A model may refuse made-up
        inputs; that says nothing about real ones.
        """
        zeros = self._accelerator.zeros(prepared.index.blob_bytes)
        if zeros is None:
            _log.warning("%s: no room to try code %s", self._config.device, prepared.code.code_id)
            return
        views, left_ns = views_of(prepared.index, zeros), self._config.warm_up_ns
        for package in prepared.packages.values():
            began_ns = time.monotonic_ns()
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
            took_ns = time.monotonic_ns() - began_ns
            left_ns -= took_ns
            if left_ns < 2 * took_ns and self._accelerator.shares_memory:
                return

    def _capture(self, prepared: Prepared, package: Package, page: int, views: Views) -> None:
        """Make a CUDA graph for this place, unless there is one: here, so that no INFER has to."""
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
        """Nothing to do: views and graphs are of a place, and serve whoever comes there next."""

    # The exec lane

    def infer(self, action: Infer, calls: Sequence[CallBuffers]) -> Phases:
        """Run one batch on the weights in the action's extent."""
        started_ns = time.monotonic_ns()
        prepared = self._get(action.code_id)
        rows = rows_of(prepared.code, action, calls)
        package = prepared.packages.get(action.batch if prepared.code.batched else 1)
        if package is None:
            raise DeviceError(f"batch {action.batch}: its tensors do not fit the I/O area; raise io_memory")
        try:
            with self._safe(f"model {action.model}", ModelError), torch.inference_mode():
                return self._run(prepared, package, action, calls, rows, started_ns)
        except DeviceError:
            for call in calls:
                call.outputs.clear()
            raise

    def _run(
        self, prepared: Prepared, package: Package, action: Infer, calls: Sequence[CallBuffers],
        rows: Sequence[int], started_ns: int,
    ) -> Phases:  # fmt: skip
        accelerator, code = self._accelerator, prepared.code
        self._extent(action.extent, prepared.index.blob_bytes)
        for slot in package.inputs:
            fill(code, slot, calls, rows)
        filled_ns = time.monotonic_ns()
        with accelerator.lane("input"):
            came = accelerator.mark("input")
            if not accelerator.shares_memory:
                for slot in package.inputs:
                    slot.device.copy_(slot.host, non_blocking=True)
            entered = accelerator.mark("input")
        with accelerator.lane("exec"):
            accelerator.follow(entered)
            begun = accelerator.mark("exec")
            outputs = self._outputs(prepared, package, action.extent.first)
            ran = accelerator.mark("exec")
        with accelerator.lane("output"):
            accelerator.follow(ran)
            arrays = leave(package, outputs, accelerator)
            left = accelerator.mark("output")
        accelerator.wait(left)
        rooms = [Room(call) for call in calls]
        for slot, array in zip(package.outputs, arrays, strict=True):
            split(code, slot.spec, array, package.batch, rows, rooms)
        input_ns = filled_ns - started_ns + accelerator.between_ns(came, begun)
        run_ns = accelerator.between_ns(begun, ran)
        self.samples.append(Sample(code.code_id, package.batch, run_ns, accelerator.rates))
        return Phases(input_ns, run_ns, max(0, time.monotonic_ns() - started_ns - input_ns - run_ns))

    def _outputs(self, prepared: Prepared, package: Package, page: int) -> list[Tensor]:
        """By the graph of this place if there is one, else by the package itself."""
        key = (prepared.code.code_id, page, package.batch)
        self._running = graph = self._graphs.get(key)
        if graph is not None:
            with contextlib.suppress(KeyError):  # the load lane just made room for another
                self._graphs.move_to_end(key)
            graph[0]()
            return graph[1]
        views = self._views(prepared, page)
        with package.lock:
            self._swaps += package.page != page
            return package.run(views, page)

    # What both use

    def counters(self) -> dict[str, int]:
        """Numbers for tests and benchmarks: those of the allocator must not change while it serves."""
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
        self._seen = Seen()
        self._pool.close()
        self._arena, self._area = None, (None, None)
        self._accelerator.close()

    def _get(self, code_id: str) -> Prepared:
        prepared = self._prepared.get(code_id)
        if prepared is None:
            raise DeviceError(f"code {code_id}: not prepared on {self._config.device}")
        return prepared

    def _extent(self, extent: Extent, nbytes: int) -> Tensor:
        """The first ``nbytes`` of an extent; DeviceError if they are not all inside it."""
        first, end, page_bytes = extent.first, extent.first + extent.count, self.spec.page_bytes
        if first < 0 or extent.count < 1 or end > self.spec.pages:
            raise DeviceError(
                f"extent: expected pages within 0..{self.spec.pages - 1}, found {first}..{end - 1}"
            )
        if nbytes > extent.count * page_bytes:
            raise DeviceError(
                f"extent: {nbytes} bytes do not fit into {extent.count} pages of {page_bytes} bytes"
            )
        return self._arena[first * page_bytes : first * page_bytes + nbytes]

    def _views(self, prepared: Prepared, page: int) -> Views:
        start, index = page * self.spec.page_bytes, prepared.index
        return self._seen.get(
            prepared.code.code_id,
            page,
            lambda: views_of(index, self._arena[start : start + index.blob_bytes]),
        )

    @contextlib.contextmanager
    def _safe(self, what: str, kind: type[DeviceError] = DeviceError) -> Iterator[None]:
        """What torch raises as an error of ours: of a model, of the device, or of a device that is lost."""
        try:
            yield
        except DeviceError:
            raise
        except Exception as error:
            said = one_line(error)
            if self._accelerator.lost(error):
                raise DeviceGone(f"{self._config.device} is lost after {what}: {said}") from error
            raise kind(f"{what}: {said}") from error

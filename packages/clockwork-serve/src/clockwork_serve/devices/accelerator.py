"""All use of CUDA (memory, streams, clocks), and the pool of weights files in pinned host memory."""

from __future__ import annotations

import contextlib
import ctypes
import functools
import importlib
import mmap
import threading
import time
from collections import OrderedDict
from collections.abc import Callable
from typing import Any, Final

import torch

from clockwork_serve.devices.arena import Arena, Scratch, used_bytes
from clockwork_serve.devices.base import DeviceConfig
from clockwork_serve.devices.files import Blobs, Reading
from clockwork_serve.devices.kinds import ordinal_of
from clockwork_serve.errors import DeviceError
from clockwork_serve.messages import Extent, Weights
from clockwork_serve.units import GIB, MIB, NS_PER_MS

# ------------------------------------------------------------
# Memory of a torch device, and the order of work on it: all calls of CUDA are here.
#
# The device runs the same code on the CPU, where streams are no-ops and marks are reached when they are made.


Tensor = Any
Mark = Any
Run = Callable[[], list[Tensor]]

CLOCKS_NS: Final = 100 * NS_PER_MS  # how often a GPU's clock rates are read at most, by a thread of their own
SYNC_LANES: Final = ("input", "exec", "output")
"""Lanes whose end is awaited by spinning, which occupies a core but saves the wake-up."""

_M_MMAP_THRESHOLD, _M_TRIM_THRESHOLD, _M_TOP_PAD, _M_ARENA_MAX = -3, -1, -2, -8


class Accelerator:
    """A device's memory, streams and clocks: the CPU's here, where all calls are synchronous."""

    kind = "torch-cpu"  # selects profiles: ``torch-cpu``, ``cuda:sm_90``
    target = "cpu"  # the target that packages must be compiled for: ``cpu``, ``cuda:sm_90``
    index = -1  # the device index for packages; -1 for the CPU
    shares_memory = True  # the device uses host memory, so that nothing has to be copied between them

    def __init__(self, config: DeviceConfig) -> None:
        keep_memory()
        torch.set_num_threads(config.threads)
        self._config = config
        self._areas: list[Arena | Scratch] = []
        self._scratch: Scratch | None = None

    def memory_bytes(self) -> int:
        """The memory for weights that is configured."""
        return self._config.memory_bytes

    def arena(self, nbytes: int) -> Tensor:
        """Allocate all memory for weights, once; a DeviceError says which setting to change if it fails."""
        arena = Arena(nbytes, mmap.PAGESIZE)
        arena.touch(nbytes)
        self._areas.append(arena)
        return torch.from_numpy(arena.view(Extent(0, arena.pages), nbytes))

    def zeros(self, nbytes: int) -> Tensor | None:
        """Weights for a trial run of a package; None if there is no memory for them."""
        return torch.zeros(nbytes, dtype=torch.uint8)

    def pinned(self, nbytes: int, setting: str) -> Tensor:
        """Host memory that the device copies from and to at full speed."""
        return torch.empty(nbytes, dtype=torch.uint8)

    def area(self, nbytes: int) -> tuple[Tensor, Tensor]:
        """Inputs and outputs of one batch, on the host and on the device; the same memory if shared."""
        self._scratch = Scratch(nbytes)
        self._areas.append(self._scratch)
        memory = torch.from_numpy(self._scratch.bytes())
        return memory, memory

    def claim(self, nbytes: int) -> bool:
        """Make the first ``nbytes`` of the area ready for use; False if it is smaller."""
        return self._scratch is not None and self._scratch.claim(nbytes)

    def lane(self, name: str) -> contextlib.AbstractContextManager[Any]:
        """A context in which copies and kernels are queued on the stream of that name."""
        return contextlib.nullcontext()

    def mark(self, lane: str) -> Mark:
        """Record an event on the lane's stream; called within its context."""
        return time.monotonic_ns()

    def follow(self, mark: Mark) -> None:
        """Have this lane's later work wait for another lane's mark."""

    def wait(self, mark: Mark) -> None:
        """Block until a mark is reached."""

    def between_ns(self, first: Mark, second: Mark) -> int:
        """The device's own time between two marks that were reached."""
        return int(second - first)

    def capture(self, first: Run, run: Run) -> tuple[Callable[[], None], list[Tensor]] | None:
        """Run ``first``, then capture ``run``: a function to replay it and its outputs, or None."""
        return None

    def lost(self, error: BaseException) -> bool:
        """Whether this error makes the device unusable for the rest of this process."""
        return False

    def used_bytes(self) -> int:
        """Memory in use beside arena and area: the workspace of batches."""
        return used_bytes(*self._areas)

    def counters(self) -> dict[str, int]:
        """Numbers that must not change during serving, and clock rates."""
        return {}

    def close(self) -> None:
        """Free all memory."""
        for area in self._areas:
            area.close()


class Cuda(Accelerator):
    """One GPU. The streams ``load``, ``input``, ``exec`` and ``output`` order its work.

    This was not yet run on a GPU, which ``clockwork validate --self-test`` does; tests run a stand-in.
    """

    shares_memory = False

    def __init__(self, config: DeviceConfig) -> None:
        self._config = config
        self.index = ordinal_of(config.device)
        if not torch.cuda.is_available() or self.index >= torch.cuda.device_count():
            raise DeviceError(
                f"{config.device}: torch {torch.__version__} sees {torch.cuda.device_count()} GPUs; install a"
                " torch built for CUDA, or correct --device"
            )
        torch.cuda.set_device(self.index)
        major, minor = torch.cuda.get_device_capability(self.index)
        self.target = self.kind = f"cuda:sm_{major}{minor}"
        self._device = torch.device("cuda", self.index)
        # Copies of weights have lower priority than the work of requests.
        self._streams = {
            name: torch.cuda.Stream(self._device, priority=0 if name == "load" else -1)
            for name in ("load", *SYNC_LANES)
        }
        self._graphs = torch.cuda.graph_pool_handle()
        self._io_bytes = 0
        self._fixed_bytes = 0
        self._clocks = Clocks(self.index)

    def memory_bytes(self) -> int:
        share = self._config.memory_share
        free: int = torch.cuda.mem_get_info(self._device)[0]
        return int(free * share) if share else self._config.memory_bytes

    def arena(self, nbytes: int) -> Tensor:
        free, total = torch.cuda.mem_get_info(self._device)
        share = self._config.memory_share
        try:
            return self._fixed(nbytes)
        except torch.OutOfMemoryError as error:
            asked = f"{nbytes} bytes" + (f" ({share:.0%} of what was free)" if share else "")
            raise DeviceError(
                f"device_memory: {asked} asked, {free} bytes of {total} are free on {self._config.device};"
                f" set it to at most {free * 8 // 10} or less, or end what else uses that GPU"
            ) from error

    def zeros(self, nbytes: int) -> Tensor | None:
        try:
            with torch.cuda.stream(self._streams["exec"]):  # where they are used
                return torch.zeros(nbytes, dtype=torch.uint8, device=self._device)
        except torch.OutOfMemoryError:
            return None

    def pinned(self, nbytes: int, setting: str) -> Tensor:
        try:
            return torch.empty(nbytes, dtype=torch.uint8, pin_memory=True)
        except (torch.OutOfMemoryError, RuntimeError) as error:
            raise DeviceError(
                f"{setting}: {nbytes} bytes of pinned memory cannot be had; lower it"
            ) from error

    def area(self, nbytes: int) -> tuple[Tensor, Tensor]:
        self._io_bytes = nbytes
        try:
            device = self._fixed(nbytes)
        except torch.OutOfMemoryError as error:
            raise DeviceError(
                f"scratch_memory: no {nbytes} bytes are left beside the arena; lower it"
            ) from error
        return self.pinned(nbytes, "scratch_memory"), device

    def _fixed(self, nbytes: int) -> Tensor:
        memory = torch.empty(nbytes, dtype=torch.uint8, device=self._device)
        self._fixed_bytes = int(torch.cuda.memory_reserved(self._device))
        return memory

    def claim(self, nbytes: int) -> bool:
        return nbytes <= self._io_bytes

    def lane(self, name: str) -> contextlib.AbstractContextManager[Any]:
        stream: contextlib.AbstractContextManager[Any] = torch.cuda.stream(self._streams[name])
        return stream

    def mark(self, lane: str) -> Mark:
        event = torch.cuda.Event(enable_timing=True, blocking=lane not in SYNC_LANES)
        event.record(self._streams[lane])
        return event

    def follow(self, mark: Mark) -> None:
        torch.cuda.current_stream(self._device).wait_event(mark)

    def wait(self, mark: Mark) -> None:
        mark.synchronize()

    def between_ns(self, first: Mark, second: Mark) -> int:
        elapsed_ms: float = first.elapsed_time(second)
        return round(elapsed_ms * NS_PER_MS)

    def capture(self, first: Run, run: Run) -> tuple[Callable[[], None], list[Tensor]] | None:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.stream(self._streams["load"]):
            first()  # allocations and tuning of a first run must not be captured
            # Not torch.cuda.graph(): that stops the device and collects garbage.
            graph.capture_begin(pool=self._graphs, capture_error_mode="thread_local")
            try:
                outputs = run()
            finally:
                graph.capture_end()
            self._streams["load"].synchronize()
        return graph.replay, outputs

    def lost(self, error: BaseException) -> bool:
        if isinstance(error, torch.OutOfMemoryError):
            return False
        try:
            torch.cuda.synchronize(self._device)
        except Exception:  # noqa: BLE001 - whatever it says, the context answers no more
            return True
        return False

    def used_bytes(self) -> int:
        return max(0, int(torch.cuda.memory_reserved(self._device)) - self._fixed_bytes)

    def counters(self) -> dict[str, int]:
        stats = torch.cuda.memory_stats(self._device)
        names = {
            "reserved_bytes": "reserved_bytes.all.current", "segments": "segment.all.current",
            "alloc_retries": "num_alloc_retries", "out_of_memory": "num_ooms",
        }  # fmt: skip
        return {name: int(stats.get(key, 0)) for name, key in names.items()} | self._clocks.rates

    def close(self) -> None:
        self._clocks.close()


class Clocks:
    """A GPU's clock rates in MHz, read beside the work: heat and power change them, and durations too."""

    def __init__(self, index: int, read: Callable[[int], dict[str, int]] | None = None) -> None:
        self.rates: dict[str, int] = {}
        self._index = index
        self._read = read or read_clocks
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="gpu-clocks", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Read no more."""
        self._ended.set()
        self._thread.join()

    def _watch(self) -> None:
        while True:
            try:
                self.rates = self._read(self._index)
            except Exception:  # noqa: BLE001 - no driver library, no rates: nothing depends on them
                return
            if self._ended.wait(CLOCKS_NS / 1e9):
                return


def read_clocks(index: int) -> dict[str, int]:
    """By NVML, which torch asks through ``pynvml``; it raises if there is none."""
    rates = {"sm_mhz": int(torch.cuda.clock_rate(index))}
    with contextlib.suppress(Exception):
        pynvml = importlib.import_module("pynvml")
        handle = torch.cuda._get_pynvml_handler(index)  # noqa: SLF001 - it knows CUDA_VISIBLE_DEVICES
        rates["memory_mhz"] = int(pynvml.nvmlDeviceGetClockInfo(handle, pynvml.NVML_CLOCK_MEM))
    return rates


@functools.cache
def keep_memory() -> bool:
    """Have the C library keep freed memory for the next batch; False if it is not glibc.

    Otherwise each of torch's inferences returns its workspace to the system and incurs thousands of page
    faults. This applies to the whole process and cannot be undone.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        return False
    wanted = {_M_ARENA_MAX: 1, _M_MMAP_THRESHOLD: GIB, _M_TRIM_THRESHOLD: 2 * GIB - 1, _M_TOP_PAD: 64 * MIB}
    done = [mallopt(name, value) for name, value in wanted.items()]
    return all(done)


# ------------------------------------------------------------
# A cache of weights files in pinned host memory, from which a device copies at full speed.
#
# It is allocated once and divided into chunks: a file occupies any of them, and the least recently loaded
# files are evicted. A file that is not cached is read chunk by chunk while the previous chunk is copied.
# Files are read, not mapped, so that a truncated file is an error and does not kill the process.


CHUNK: Final = 2 * MIB
"""Bytes of one copy: about 0.1 ms on PCIe, the longest that a request's own copy has to wait for it."""
STAGING: Final = 2  # chunks reserved for files that are not cached, filled and copied alternately


class HostPool:
    """Used by the load lane only, within its context (``Accelerator.lane``); each load is awaited."""

    def __init__(self, accelerator: Accelerator, nbytes: int) -> None:
        self._accelerator = accelerator
        self._blobs = Blobs()
        self._direct = accelerator.shares_memory and nbytes == 0
        count = 0 if self._direct else max(STAGING, nbytes // CHUNK)
        self._memory = accelerator.pinned(count * CHUNK, "pool_bytes")
        self._staging = list(range(min(STAGING, count)))
        self._free = list(range(STAGING, count))
        self._chunks_by_path: OrderedDict[str, list[int]] = OrderedDict()
        self.chunks = len(self._free)  # how many chunks can hold files
        self.hits = 0
        self.misses = 0

    def copy(self, weights: Weights, target: Tensor) -> int:
        """Fill ``target`` with a file of exactly its length, or raise DeviceError; complete at the next mark.

        Returns the time spent on verification (ns); cached files were verified when they were read.
        """
        if self._direct:
            return self._blobs.read_into(weights, target.numpy())
        path = weights.path
        kept = self._chunks_by_path.get(path)
        if kept is not None:
            self.hits += 1
            self._chunks_by_path.move_to_end(path)
            for at, chunk in enumerate(kept):
                self._send(chunk, at, target)
            return 0
        self.misses += 1
        chunks = self._room(-(-len(target) // CHUNK))
        if chunks is None:
            return self._stream(weights, target)
        try:
            with self._blobs.reading(weights, len(target)) as reading:
                for at, chunk in enumerate(chunks):
                    self._read(reading, chunk, at, target)
                    self._send(chunk, at, target)
        except BaseException:
            self._free += chunks
            raise
        self._chunks_by_path[path] = chunks
        return reading.once_ns

    def verify(self, weights: Weights) -> None:
        """Verify a weights file before it is needed; thread-safe."""
        self._blobs.verify(weights)

    def close(self) -> None:
        """Free everything."""
        self._blobs.close()
        self._chunks_by_path.clear()
        self._memory = None

    def _room(self, count: int) -> list[int] | None:
        """Chunks for a file, after evicting others; None if it is larger than the pool."""
        if count > self.chunks:
            return None
        while len(self._free) < count:
            self._free += self._chunks_by_path.popitem(last=False)[1]
        taken, self._free = self._free[:count], self._free[count:]
        return taken

    def _stream(self, weights: Weights, target: Tensor) -> int:
        """Copy through the staging chunks, each refilled once its last copy is complete."""
        marks: list[Mark] = [None] * len(self._staging)
        with self._blobs.reading(weights, len(target)) as reading:
            for at in range(-(-len(target) // CHUNK)):
                turn = at % len(self._staging)
                if marks[turn] is not None:
                    self._accelerator.wait(marks[turn])
                self._read(reading, self._staging[turn], at, target)
                self._send(self._staging[turn], at, target)
                marks[turn] = self._accelerator.mark("load")
        return reading.once_ns

    def _read(self, reading: Reading, chunk: int, at: int, target: Tensor) -> None:
        memory: Any = self._chunk(chunk, at, target).numpy()
        reading.part(memory, at * CHUNK)

    def _send(self, chunk: int, at: int, target: Tensor) -> None:
        start = at * CHUNK
        target[start : start + CHUNK].copy_(self._chunk(chunk, at, target), non_blocking=True)

    def _chunk(self, chunk: int, at: int, target: Tensor) -> Tensor:
        """As much of a chunk as this part of the file fills."""
        return self._memory[chunk * CHUNK : chunk * CHUNK + min(CHUNK, len(target) - at * CHUNK)]

"""The other side of the GPU benchmark's ratios: torch as anyone would use it, without our device."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch._inductor import aoti_load_package

from benchmarks.gpu.machine import Target
from benchmarks.gpu.rig import Floats
from clockwork_serve.messages import TorchIndex
from clockwork_serve.store import ServedVersion


class Stopwatch:
    """The GPU's own time between two points of the current stream; on the CPU, the wall's."""

    def __init__(self, target: Target) -> None:
        self._gpu = target.gpu
        self._marks = [torch.cuda.Event(enable_timing=True) for _ in range(2)] if self._gpu else []
        self._walls = [0, 0]

    def mark(self, number: int) -> None:
        """This is the first (0) or the second (1) point."""
        if self._gpu:
            self._marks[number].record()
        else:
            self._walls[number] = time.perf_counter_ns()

    def wait_ns(self) -> int:
        """Wait for the second point; the time between the two."""
        if not self._gpu:
            return self._walls[1] - self._walls[0]
        self._marks[1].synchronize()
        milliseconds: float = self._marks[0].elapsed_time(self._marks[1])
        return round(milliseconds * 1e6)


class PlainPackage:
    """A compiled batch size with constants of its own, its input on the device and, pinned, on the host."""

    def __init__(self, target: Target, served: ServedVersion, index: TorchIndex, rows: Floats) -> None:
        place = torch.device("cuda", target.number) if target.gpu else torch.device("cpu")
        path = Path(served.code.path) / f"{len(rows)}.pt2"
        self._package = aoti_load_package(
            str(path), run_single_threaded=True, device_index=target.number if target.gpu else -1
        )
        self._memory = torch.from_numpy(np.fromfile(served.model.weights.path, np.uint8)).to(place)
        self._package.load_constants(
            {
                tensor.name: self._memory[tensor.offset : tensor.offset + tensor.size]
                .view(getattr(torch, tensor.dtype)).as_strided(tensor.shape, tensor.stride)
                for tensor in index.tensors
            },
            check_full_update=True, user_managed=True,
        )  # fmt: skip
        self._host = pinned(torch.from_numpy(rows.copy()), target)
        self._device = self._host.to(place)
        self._answer: Any = None
        self._watch = Stopwatch(target)
        self.run()

    def run(self) -> int:
        """The package alone, its input already there; its time."""
        with torch.inference_mode():
            self._watch.mark(0)
            self._package(self._device)
            self._watch.mark(1)
            return self._watch.wait_ns()

    def whole(self) -> Floats:
        """Input to the device, run, output to the host."""
        with torch.inference_mode():
            self._device.copy_(self._host, non_blocking=True)
            (answer,) = _leaves(self._package(self._device))
            if self._answer is None:
                self._answer = torch.empty_like(answer, device="cpu", pin_memory=answer.is_cuda)
            self._answer.copy_(answer, non_blocking=True)
        if answer.is_cuda:
            torch.cuda.current_stream().synchronize()
        found: Floats = self._answer.numpy()
        return found


class PlainCopy:
    """The bytes of a file in pinned host memory, and room for them on the device."""

    def __init__(self, target: Target, path: str) -> None:
        self._host = pinned(torch.from_numpy(np.fromfile(path, np.uint8)), target)
        self._device = torch.empty_like(self._host, device=f"cuda:{target.number}" if target.gpu else "cpu")
        self._stream = torch.cuda.Stream(target.number) if target.gpu else None
        self.nbytes = len(self._host)

    def copy(self) -> None:
        """One copy of all, waited for."""
        with torch.inference_mode(), torch.cuda.stream(self._stream):
            self._device.copy_(self._host, non_blocking=True)
        if self._stream is not None:
            self._stream.synchronize()


def pinned(tensor: Any, target: Target) -> Any:
    """Memory that a GPU copies from at full speed."""
    return tensor.pin_memory() if target.gpu else tensor


def _leaves(found: Any) -> list[Any]:
    return [found] if isinstance(found, torch.Tensor) else list(found)

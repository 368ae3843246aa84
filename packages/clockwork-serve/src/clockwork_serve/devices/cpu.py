"""The ``cpu`` device: one arena, and a backend for each kind of code that it runs."""

from __future__ import annotations

from collections.abc import Sequence

from clockwork_serve.devices.arena import Arena
from clockwork_serve.devices.base import CallBuffers, DeviceConfig, Phases, PreparedCodes
from clockwork_serve.devices.onnx import OnnxBackend
from clockwork_serve.devices.python import PythonBackend
from clockwork_serve.errors import DeviceError
from clockwork_serve.messages import Code, DeviceSpec, Infer, Load, Unload, Weights

Backend = OnnxBackend | PythonBackend


class CpuDevice:
    """Runs ``onnx`` and ``python`` codes."""

    def __init__(self, config: DeviceConfig) -> None:
        self._arena = Arena(config.memory_bytes, config.page_bytes)
        self._onnx = OnnxBackend(config, self._arena)
        self._backends: dict[str, Backend] = {
            "onnx": self._onnx,
            "python": PythonBackend(config, self._arena),
        }
        self._backend_by_code = PreparedCodes[Backend](config.device)
        self.spec = DeviceSpec(
            device=config.device,
            kind="cpu",
            pages=self._arena.pages,
            page_bytes=config.page_bytes,
            workspace_bytes=config.workspace_bytes,
            io_bytes=config.io_bytes,
            backends=tuple(self._backends),
            lanes_share=config.lanes_share,
        )

    def prepare(self, code: Code) -> None:
        """Prepare the code with its backend; DeviceError if there is none for it here."""
        backend = self._backends.get(code.backend)
        if backend is None:
            raise DeviceError(
                f"code {code.code_id}: backend: expected one of {sorted(self._backends)} on"
                f" {self.spec.device}, found {code.backend!r}; serve it on a device of that kind"
            )
        backend.prepare(code)
        self._backend_by_code[code.code_id] = backend

    def retire(self, code_id: str) -> None:
        """Free the resources of ``prepare``."""
        backend = self._backend_by_code.pop(code_id, None)
        if backend is not None:
            backend.retire(code_id)

    def load(self, action: Load) -> int:
        """Load with the code's backend."""
        return self._backend_by_code[action.code_id].load(action)

    def verify(self, weights: Weights) -> None:
        """Verify a weights file before it is needed; thread-safe."""
        self._onnx.verify(weights)

    def unload(self, action: Unload) -> None:
        """Release the extent in every backend: the action does not name its code."""
        for backend in self._backends.values():
            backend.unload(action)

    def infer(self, action: Infer, calls: Sequence[CallBuffers]) -> Phases:
        """Run with the code's backend."""
        return self._backend_by_code[action.code_id].infer(action, calls)

    def close(self) -> None:
        """Free everything."""
        for backend in self._backends.values():
            backend.close()
        self._backend_by_code.clear()
        self._arena.close()

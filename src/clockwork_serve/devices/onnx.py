"""ONNX models on the CPU: weights are copied into arena pages and bound where they lie. Decides nothing."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np

from clockwork_serve.devices.arena import Arena, Scratch
from clockwork_serve.devices.base import CallBuffers, DeviceConfig, Phases
from clockwork_serve.devices.blobs import Blobs
from clockwork_serve.devices.code_files import read_file
from clockwork_serve.devices.onnx_open import OpenBatch, TextBatch
from clockwork_serve.devices.onnx_session import Session, one_line, open_session, trim, value_of
from clockwork_serve.devices.onnx_static import StaticBatch, fits_area
from clockwork_serve.devices.onnx_warmup import warm_up
from clockwork_serve.devices.onnx_weights import Bindings, Bound, Index, bind, read_index
from clockwork_serve.devices.tensors import rows_of
from clockwork_serve.errors import DeviceError, ModelError
from clockwork_serve.messages import Code, Infer, Load, Unload, Weights

NO_WEIGHTS = Index(tensors=(), blob_bytes=0)


class Batch(Protocol):
    """How a code is run at one batch size."""

    def run(self, bound: Bound, calls: Sequence[CallBuffers], rows: Sequence[int], started_ns: int) -> Phases:
        """Run the calls as one batch, which fills their outputs; raises what ONNX Runtime raises."""


@dataclass(slots=True)
class Prepared:
    """A code that is ready. ``session`` is None where each model has a session of its own (not lifted)."""

    code: Code
    session: Session | None
    index: Index
    batches: dict[int, Batch]


class OnnxBackend:
    """Runs codes of backend ``onnx``. Blobs go to the arena, which it shares with nobody."""

    def __init__(self, config: DeviceConfig, arena: Arena) -> None:
        self._config = config
        self._arena = arena
        self._scratch = Scratch(config.io_bytes)
        self._blobs = Blobs()
        self._bindings = Bindings()
        self._prepared_by_code: dict[str, Prepared] = {}
        self._opened_by_page: dict[int, tuple[str, Bound]] = {}  # sessions of models that are not lifted
        self._placeholder = value_of(np.zeros(1, np.float32), "FP32")

    def prepare(self, code: Code) -> None:
        """Open the code's session and warm it; DeviceError if the artefact is unusable."""
        if code.code_id in self._prepared_by_code:
            return
        index, session = NO_WEIGHTS, None
        if code.lifted:
            index = read_index(code)
            graph = read_file(code, "model.onnx")
            session = open_session(Path(code.path) / "model.onnx", self._config.threads, graph)
            _check_names(code, index, session)
        sizes = code.batch_sizes if code.batched else (1,)
        batches = {size: self._batch(code, size) for size in sizes}
        if session is not None:
            # Zeros of its own: the arena's pages may hold the weights of others.
            memory = np.zeros(index.blob_bytes, np.uint8)
            warm_up(code, bind(session, index, memory), sizes, self._config.warm_up_ns)
        self._prepared_by_code[code.code_id] = Prepared(code, session, index, batches)

    def retire(self, code_id: str) -> None:
        """Drop the code's session, bindings and models."""
        if self._prepared_by_code.pop(code_id, None) is None:
            return
        self._bindings.retire(code_id)
        for page in [page for page, (owner, _) in self._opened_by_page.items() if owner == code_id]:
            del self._opened_by_page[page]
        trim()

    def load(self, action: Load) -> int:
        """Read the blob into its extent, or open the session of a model that is not lifted."""
        prepared = self._get(action.code_id)
        page, weights = action.extent.first, action.weights
        if not prepared.code.lifted:
            return self._open_apart(prepared, action)
        if weights.size != prepared.index.blob_bytes:
            raise DeviceError(
                f"weights {weights.weights_id}: expected {prepared.index.blob_bytes} bytes for code"
                f" {action.code_id}, found {weights.size}; compile the model again"
            )
        once_ns = self._blobs.read_into(weights, self._arena.view(action.extent, weights.size))
        if self._bindings.get(action.code_id, page) is None:
            self._bind(prepared, action.code_id, page)
        return once_ns

    def verify(self, weights: Weights) -> None:
        """Look whether a weights file is what its name says; for any thread. DamageError if it is not."""
        self._blobs.verify(weights)

    def _open_apart(self, prepared: Prepared, action: Load) -> int:
        """Open the session of a model that is not lifted; it is read by its path, so looked at twice."""
        self._arena.view(action.extent, 0)
        began_ns = time.monotonic_ns()
        self._blobs.verify(action.weights)
        once_ns = time.monotonic_ns() - began_ns
        session = open_session(Path(action.weights.path), self._config.threads)
        self._blobs.verify(action.weights)
        _check_names(prepared.code, NO_WEIGHTS, session)
        bound = bind(session, NO_WEIGHTS, np.empty(0, np.uint8))
        warm_up(prepared.code, bound, (1,), self._config.warm_up_ns)
        self._opened_by_page[action.extent.first] = (action.code_id, bound)
        return once_ns

    def unload(self, action: Unload) -> None:
        """Forget; bindings stay, for whoever comes to these pages next."""
        if self._opened_by_page.pop(action.extent.first, None) is not None:
            trim()

    def infer(self, action: Infer, calls: Sequence[CallBuffers]) -> Phases:
        """Run one batch on the weights in the action's extent."""
        started_ns = time.monotonic_ns()
        prepared = self._get(action.code_id)
        rows = rows_of(prepared.code, action, calls)
        batch = prepared.batches[action.batch if prepared.code.batched else 1]
        try:
            return batch.run(self._bound(prepared, action), calls, rows, started_ns)
        except DeviceError:
            _clear(calls)
            raise
        except Exception as error:  # whatever ONNX Runtime raises: its classes have no common base
            _clear(calls)
            raise ModelError(f"model {action.model}: {one_line(error)}") from error

    def close(self) -> None:
        """Free everything but the arena."""
        for code_id in list(self._prepared_by_code):
            self.retire(code_id)
        self._blobs.close()
        self._scratch.close()

    def _get(self, code_id: str) -> Prepared:
        prepared = self._prepared_by_code.get(code_id)
        if prepared is None:
            raise DeviceError(f"code {code_id}: not prepared on {self._config.device}")
        return prepared

    def _bound(self, prepared: Prepared, action: Infer) -> Bound:
        """The session to run, with the weights in the extent bound."""
        page, code_id = action.extent.first, action.code_id
        if prepared.session is not None:
            return self._bindings.get(code_id, page) or self._bind(prepared, code_id, page)
        owner, bound = self._opened_by_page.get(page, ("", None))
        if bound is None or owner != code_id:
            raise DeviceError(f"model {action.model}: not loaded at page {page} of {self._config.device}")
        return bound

    def _batch(self, code: Code, size: int) -> Batch:
        if any(spec.datatype == "BYTES" for spec in code.inputs):
            return TextBatch(code, size)
        if fits_area(code, size, self._scratch):
            return StaticBatch(code, size, self._scratch)
        return OpenBatch(code, size, self._scratch, self._placeholder)

    def _bind(self, prepared: Prepared, code_id: str, page: int) -> Bound:
        index = prepared.index
        bound = bind(prepared.session, index, self._arena.bytes_at(page, index.blob_bytes))
        self._bindings.put(code_id, page, bound)
        return bound


def _check_names(code: Code, index: Index, session: Session) -> None:
    """DeviceError unless code, index and graph speak of the same tensors."""
    given = {spec.name for spec in code.inputs} | {tensor.name for tensor in index.tensors}
    wanted = {node.name for node in session.get_inputs()}
    made = {node.name for node in session.get_outputs()}
    lacking = wanted - given
    unknown = {spec.name for spec in code.inputs if not spec.optional} - wanted
    unknown |= {tensor.name for tensor in index.tensors} - wanted
    unknown |= {spec.name for spec in code.outputs} - made
    if lacking or unknown:
        raise DeviceError(
            f"code {code.code_id}: the graph and its description differ: not described {sorted(lacking)[:5]},"
            f" not in the graph {sorted(unknown)[:5]}; compile the model again"
        )


def _clear(calls: Sequence[CallBuffers]) -> None:
    for call in calls:
        call.outputs.clear()

"""What calls bring back: plain records. Fields that a server adds later are left out, not refused."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy.typing as npt
from msgspec import Struct


@dataclass(slots=True, frozen=True)
class Result:
    """The answer to an inference request. ``outputs`` are the caller's own arrays.

    ``id`` is the caller's own, ``request_id`` the server's, in its logs and journal. The times are what the
    server says of itself, None where it says nothing: ``expected_ms`` was predicted before it ran.
    """

    outputs: dict[str, npt.NDArray[Any]]
    model: str
    version: str
    id: str = ""
    request_id: str = ""
    parameters: Mapping[str, Any] = field(default_factory=dict)
    headers: Mapping[str, str] = field(default_factory=dict)

    def __getitem__(self, name: str) -> npt.NDArray[Any]:
        return self.outputs[name]

    @property
    def queue_ms(self) -> float | None:
        """How long it waited for its turn."""
        return self.parameters.get("queue_ms")

    @property
    def exec_ms(self) -> float | None:
        """How long the model ran."""
        return self.parameters.get("exec_ms")

    @property
    def expected_ms(self) -> float | None:
        """How long it was expected to run."""
        return self.parameters.get("expected_ms")

    @property
    def batch_size(self) -> int | None:
        """How many rows ran together."""
        return self.parameters.get("batch_size")

    @property
    def cold_start(self) -> bool | None:
        """Whether the model's weights had to be loaded first."""
        return self.parameters.get("cold_start")


class ServerMetadata(Struct, frozen=True):
    """Who serves, and which extensions of the protocol it has."""

    name: str
    version: str = ""
    extensions: tuple[str, ...] = ()


class TensorMetadata(Struct, frozen=True):
    """An input or output of a model; -1 in its shape is for a request to choose."""

    name: str
    datatype: str
    shape: tuple[int, ...]


class ModelMetadata(Struct, frozen=True):
    """A model's inputs and outputs."""

    name: str
    versions: tuple[str, ...] = ()
    platform: str = ""
    inputs: tuple[TensorMetadata, ...] = ()
    outputs: tuple[TensorMetadata, ...] = ()


class ModelState(Struct, frozen=True):
    """A version of a model in the server's repository; ``state`` is READY where it can be asked."""

    name: str
    version: str = ""
    state: str = ""
    reason: str = ""


class Tally(Struct, frozen=True):
    """How often, and how long in all."""

    count: int = 0
    ns: int = 0


class ModelStatistics(Struct, frozen=True):
    """What a model did so far. ``inference_stats`` has success, fail, queue, compute_infer and others."""

    name: str
    version: str = ""
    last_inference: int = 0
    inference_count: int = 0
    execution_count: int = 0
    inference_stats: dict[str, Tally] = {}
    batch_stats: list[dict[str, Any]] = []

"""The client under the name that it had as a part of this package; it is :mod:`clockwork_client`."""

from __future__ import annotations

from clockwork_client import (
    AsyncClient,
    Client,
    Denied,
    Disconnected,
    Expired,
    Failed,
    Invalid,
    ModelMetadata,
    ModelState,
    ModelStatistics,
    NotServing,
    Rejected,
    Result,
    ServerMetadata,
    ServingError,
    StatisticDuration,
    TensorMetadata,
)

__all__ = [
    "AsyncClient", "Client", "Denied", "Disconnected", "Expired", "Failed", "Invalid", "ModelMetadata",
    "ModelState", "ModelStatistics", "NotServing", "Rejected", "Result", "ServerMetadata", "ServingError",
    "StatisticDuration", "TensorMetadata",
]  # fmt: skip

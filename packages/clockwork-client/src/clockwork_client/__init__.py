"""A small client of the Open Inference Protocol over HTTP, which knows deadlines and outcomes.

:class:`Client` blocks, :class:`AsyncClient` awaits. Both are thin: what is sent, what an answer means and how
long to wait is decided by parts that open no socket and read no clock.
"""

from __future__ import annotations

from clockwork_client.asynchronous import AsyncClient
from clockwork_client.blocking import Client
from clockwork_client.calls import (
    ModelMetadata,
    ModelState,
    ModelStatistics,
    Result,
    ServerMetadata,
    Tally,
    TensorMetadata,
)
from clockwork_client.errors import (
    Denied,
    Disconnected,
    Expired,
    Failed,
    Invalid,
    NotServing,
    Rejected,
    ServingError,
)

__all__ = [
    "AsyncClient", "Client", "Denied", "Disconnected", "Expired", "Failed", "Invalid", "ModelMetadata",
    "ModelState", "ModelStatistics", "NotServing", "Rejected", "Result", "ServerMetadata", "ServingError",
    "Tally", "TensorMetadata",
]  # fmt: skip

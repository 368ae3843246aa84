"""A small HTTP client of the Open Inference Protocol with deadlines and typed outcomes.

:class:`Client` blocks, :class:`AsyncClient` awaits. Both are thin: building requests, reading responses and
computing timeouts is done by modules without sockets and clocks.

Names are imported on first use: the server's processes import :mod:`clockwork_client.datatypes` and
:mod:`clockwork_client.errors`, and need nothing else of this package.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from clockwork_client.asynchronous import AsyncClient
    from clockwork_client.blocking import Client
    from clockwork_client.calls import (
        ModelMetadata,
        ModelState,
        ModelStatistics,
        Result,
        ServerMetadata,
        StatisticDuration,
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

__version__ = "0.2.0"

__all__ = [
    "AsyncClient", "Client", "Denied", "Disconnected", "Expired", "Failed", "Invalid", "ModelMetadata",
    "ModelState", "ModelStatistics", "NotServing", "Rejected", "Result", "ServerMetadata", "ServingError",
    "StatisticDuration", "TensorMetadata",
]  # fmt: skip

_MODULE_OF: Final = {
    "AsyncClient": "asynchronous", "Client": "blocking",
    "ModelMetadata": "calls", "ModelState": "calls", "ModelStatistics": "calls", "Result": "calls",
    "ServerMetadata": "calls", "StatisticDuration": "calls", "TensorMetadata": "calls",
    "Denied": "errors", "Disconnected": "errors", "Expired": "errors", "Failed": "errors",
    "Invalid": "errors", "NotServing": "errors", "Rejected": "errors", "ServingError": "errors",
}  # fmt: skip


def __getattr__(name: str) -> Any:
    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    import importlib

    found = getattr(importlib.import_module(f"{__name__}.{_MODULE_OF[name]}"), name)
    globals()[name] = found
    return found


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})

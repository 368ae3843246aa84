"""Clockwork Serve: thousands of models on a few devices, each request in time, or refused once it cannot be.

The names of the client are here too, and are imported when they are used.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

from clockwork_serve.version import VERSION

if TYPE_CHECKING:
    from clockwork_client import (
        AsyncClient,
        Client,
        Denied,
        Disconnected,
        Expired,
        Failed,
        Invalid,
        NotServing,
        Rejected,
        Result,
        ServingError,
    )

__version__ = VERSION

# ONNX Runtime reports its use over the network, from a thread of its own. It reads this when it is imported,
# so it is said before anything of ours can do that; its disable_telemetry_events() comes too late.
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")

__all__ = [
    "AsyncClient", "Client", "Denied", "Disconnected", "Expired", "Failed", "Invalid", "NotServing",
    "Rejected", "Result", "ServingError", "__version__",
]  # fmt: skip


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    import importlib

    found = getattr(importlib.import_module("clockwork_client"), name)
    globals()[name] = found
    return found


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})

"""Runs of the headline figure, made up."""

from __future__ import annotations

from typing import Any


def line(
    server: str, share: float, in_time: float, no_ms: float | None = None, **more: Any
) -> dict[str, Any]:
    """One, as it is kept; its load 1 is 100 requests a second."""
    figures = {
        "asked": 1000, "asked_per_s": share * 100, "in_time_per_s": in_time, "late": 0, "no_p50_ms": no_ms,
        "no_p99_ms": no_ms, "p50_ms": 10.0, **more.pop("figures", {}),
    }  # fmt: skip
    return {
        "server": server, "share": share, "repeat": 1, "figures": figures, "noise": [], "tries": 1,
        "cpu_ms_per_request": 5.0, "pss_bytes": 2**20, "others_share": 0.01, "image_ms": 10.0,
        "version": "1", "onnxruntime": "1", "machine": "a machine", **more,
    }  # fmt: skip

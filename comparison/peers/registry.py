"""The servers of the comparison by name."""

from __future__ import annotations

from importlib import import_module
from typing import Final

from comparison.peers.peer import Peer

NAMES: Final = (
    "clockwork", "triton", "mosec", "ray_serve", "bentoml", "litserve", "kserve", "mlserver", "torchserve",
    "fastapi_ort",
)  # fmt: skip


def peer(name: str) -> Peer:
    """One of them."""
    found = import_module(f"comparison.peers.{name}.adapter").PEER
    assert isinstance(found, Peer)
    return found

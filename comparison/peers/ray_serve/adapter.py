"""Ray Serve: a proxy and a replica that has all models, multiplexed."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final

from comparison.peers.peer import Answer, Floats, Peer, Request, Setup, raw

QUEUED: Final = 16


class RayServe(Peer):
    """Its processes (13 with one model) share the core, which its makers would not do."""

    name = "ray_serve"
    package = "ray"
    configured = (
        f"batches of 8, `request_timeout_s` = SLO, `max_queued_requests` {QUEUED}, `@serve.multiplexed` "
        "with as many models as memory has room for"
    )
    source = "https://docs.ray.io/en/latest/serve/advanced-guides/performance.html"
    binds_all = True
    loads_on_demand = True
    ready_path = "/-/healthz"
    start_s = 180.0
    stop_s = 20.0

    @property
    def note(self) -> str:
        """Its processes share the core."""
        return "some 11 processes on the one core"

    def command(self, setup: Setup) -> Sequence[str]:
        """A program that starts a cluster of one node."""
        return [self.python, "-m", "comparison.peers.ray_serve.app"]

    def environment(self, setup: Setup) -> dict[str, str]:
        """Without what it would send."""
        return {**super().environment(setup), "RAY_USAGE_STATS_ENABLED": "0", "RAY_SERVE_LOG_TO_STDERR": "0"}

    def more(self, setup: Setup) -> dict[str, Any]:
        """Its limits."""
        return {"queued": QUEUED, "held": setup.memory_models or len(setup.models)}

    def request(self, setup: Setup, x: Floats) -> Request:
        """The bytes as they are."""
        return Request("/{model}", (("Content-Type", "application/octet-stream"),), x.tobytes())

    def output(self, answer: Answer) -> Floats:
        """The bytes as they are."""
        return raw(answer)


PEER = RayServe()

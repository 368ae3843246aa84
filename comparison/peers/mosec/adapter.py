"""Mosec: a front end in Rust, a worker process per model."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final

from comparison.peers.peer import Answer, Floats, Peer, Request, Setup, raw

CAPACITY: Final = 24
"""Requests in its queue beyond which it says 429: sized by hand for an SLO of some batches of eight."""


class Mosec(Peer):
    """Its timeout is the SLO, its queue no longer than can be served within it."""

    name = "mosec"
    package = "mosec"
    configured = (
        f"batches of 8, timeout = SLO, `--capacity {CAPACITY}` (by hand: what can be served within the SLO)"
    )
    source = "https://mosecorg.github.io/mosec/reference/arguments.html"
    per_model = True

    def command(self, setup: Setup) -> Sequence[str]:
        """Names of its options are its documentation's."""
        return [
            self.python, "-m", "comparison.peers.mosec.app", "--address", "127.0.0.1",
            "--port", str(setup.port),
            "--timeout", f"{setup.slo_ms:.0f}", "--capacity", str(CAPACITY), "--log-level", "warning",
        ]  # fmt: skip

    def more(self, setup: Setup) -> dict[str, Any]:
        """A full batch is waited for as long as the first of a batch takes alone."""
        return {"wait_ms": 1, "workers": 1}

    def request(self, setup: Setup, x: Floats) -> Request:
        """The bytes as they are."""
        return Request("/{model}", (("Content-Type", "application/octet-stream"),), x.tobytes())

    def output(self, answer: Answer) -> Floats:
        """The bytes as they are."""
        return raw(answer)


PEER = Mosec()

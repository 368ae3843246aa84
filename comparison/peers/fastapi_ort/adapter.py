"""What people write first: FastAPI on uvicorn, a session in a thread pool."""

from __future__ import annotations

from collections.abc import Sequence

from comparison.peers.peer import Answer, Floats, Peer, Request, Setup, raw


class FastApi(Peer):
    """It knows no deadlines and no batches, so there is nothing to configure."""

    name = "fastapi_ort"
    package = "fastapi"
    configured = "no deadline, no batches, no limit: it has none"
    source = "https://fastapi.tiangolo.com/async/"

    def command(self, setup: Setup) -> Sequence[str]:
        """Uvicorn with uvloop and httptools, one process."""
        return [
            self.python, "-m", "uvicorn", "comparison.peers.fastapi_ort.app:app", "--host", "127.0.0.1",
            "--port", str(setup.port), "--loop", "uvloop", "--http", "httptools", "--no-access-log",
            "--log-level", "warning",
        ]  # fmt: skip

    def request(self, setup: Setup, x: Floats) -> Request:
        """The bytes as they are."""
        return Request("/{model}", (("Content-Type", "application/octet-stream"),), x.tobytes())

    def output(self, answer: Answer) -> Floats:
        """The bytes as they are."""
        return raw(answer)


PEER = FastApi()

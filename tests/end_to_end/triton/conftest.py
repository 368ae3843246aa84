"""A Triton and a server of ours, on one and the same repository."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

from clockwork_serve.messages import Profile
from clockwork_serve.store import Cache, Repository, StoreConfig, compile_all
from clockwork_serve.units import MIB, NS_PER_MS, NS_PER_S
from comparison.triton import Triton, running_triton
from harness.serving import Serving, until
from tests.end_to_end.triton.asking import Answer, Case, Http, ask
from tests.end_to_end.triton.models import LATER, MODELS, SLOW_S

Start = Callable[..., AbstractContextManager[Serving]]
ROOM = 512 * MIB
"""For all models at once: each takes 16 MiB, for a Python model may take anything."""


@dataclass(frozen=True)
class Both:
    """Two servers that should say the same."""

    triton: Triton
    ours: Serving

    def ask(self, case: Case) -> tuple[Answer, Answer]:
        """Triton's answer and ours."""
        return (
            ask(case, self.triton.http_url, self.triton.grpc_url),
            ask(case, self.ours.http_url, self.ours.grpc_url),
        )


@contextmanager
def serving_both(root: Path, cache: Path, start: Start) -> Iterator[Both]:
    """Both servers with all models, one of them unloaded and one that could not be loaded."""
    # Else one model that cannot be loaded makes all of Triton unready.
    with running_triton(root, *MODELS, options=["--strict-readiness=false"]) as triton:
        _know_durations(root, cache)
        # Of what is compared none is about deadlines unless it says so.
        with start(root, memory_bytes=ROOM) as ours:
            both = Both(triton, ours)
            LATER.write(root)
            for model, verb in ((LATER.name, "load"), ("gone", "unload")):
                path = f"/v2/repository/models/{model}/{verb}"
                both.ask(Http(name="", method="POST", path=path, body=b"{}"))
            until("Triton has unloaded", lambda: _unloaded(both), timeout_s=10)
            yield both


@pytest.fixture(scope="session")
def both(tmp_path_factory: pytest.TempPathFactory, cache: Path, start: Start) -> Iterator[Both]:
    """Both servers, for all requests."""
    with serving_both(tmp_path_factory.mktemp("triton") / "models", cache, start) as found:
        yield found


def _unloaded(both: Both) -> bool:
    """Whether both are done: Triton answers before it is."""
    index = Http(name="", method="POST", path="/v2/repository/index", body=b"{}")
    return all(answer.facts["gone 1.state"] == "UNAVAILABLE" for answer in both.ask(index))


def _know_durations(root: Path, cache: Path) -> None:
    """What measuring two dozen models would tell our server at its start, in half a minute."""
    config = StoreConfig(cache_dir=str(cache))
    with Cache(config.cache_dir) as kept:
        for each in compile_all(Repository(str(root), config), kept)[0]:
            slow = each.model.name in ("slow", "patient")
            duration_ns = int(SLOW_S * NS_PER_S) if slow else NS_PER_MS
            kept.save_profile(
                Profile(
                    code_id=each.code.code_id, device_kind="cpu", load_base_ns=100_000,
                    load_ns_per_mib=NS_PER_MS,
                    infer_ns=dict.fromkeys(each.code.batch_sizes, duration_ns),
                    workspace_bytes=dict.fromkeys(each.code.batch_sizes, MIB),
                )
            )  # fmt: skip

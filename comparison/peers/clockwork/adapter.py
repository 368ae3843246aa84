"""Clockwork Serve itself, as the others are served: one core for all of its processes."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path

from comparison.peers import v2
from comparison.peers.peer import Answer, Floats, Peer, Request, Setup, binary

PAGE_BYTES = 256 << 10


class Clockwork(Peer):
    """Ours. It is told no durations: what it has not measured it does not know."""

    name = "clockwork"
    package = "clockwork-serve"
    configured = "`chrt -b 0`, defaults; header `x-slo-ms` on every request"
    source = "docs/operate/operations.md"
    loads_on_demand = True
    ready_path = "/v2/health/ready"
    start_s = 180.0  # the first time, it compiles

    @property
    def python(self) -> str:
        """This one."""
        return binary("python")

    def why_not(self, setup: Setup | None = None, *, isolated: bool = True) -> str:
        """It is here."""
        return ""

    def command(self, setup: Setup) -> Sequence[str]:
        """A repository of links is made of the models' files."""
        repository = setup.folder / "repository"
        for name, where in setup.models.items():
            version = repository / name / "1"
            version.mkdir(parents=True)
            if isinstance(where, str):
                _link(Path(where), version / "model.onnx")
                settings = f'backend = "onnx"\nmax_batch_size = {setup.batch}\n'
            else:
                shutil.copy(self.folder / "model.py", version)
                settings = (
                    f'backend = "python"\nmax_batch_size = {setup.batch}\nmemory_bytes = 65536\n'
                    f'inputs = [{{name = "x", dims = {json.dumps(setup.shape)}, datatype = "FP32"}}]\n'
                    f'outputs = [{{name = "y", dims = {json.dumps(setup.shape)}, datatype = "FP32"}}]\n'
                )
            (repository / name / "clockwork.toml").write_text(settings)
        more = ["--device-memory", str(_memory_bytes(setup))]
        return [
            "chrt", "-b", "0", binary("clockwork"), "serve", str(repository),
            "--http-port", str(setup.port), "--grpc-port", str(setup.port + 1),
            "--metrics-port", str(setup.port + 2), "--cache", str(setup.cache), "--log-level", "warning",
            *more,
        ]  # fmt: skip

    def environment(self, setup: Setup) -> dict[str, str]:
        """Its own source, where it is not installed."""
        found = super().environment(setup)
        sources = sorted(map(str, Path(__file__).parents[3].glob("packages/*/src")))
        return {**found, "PYTHONPATH": ":".join((*sources, found["PYTHONPATH"]))}

    def request(self, setup: Setup, x: Floats) -> Request:
        """Binary tensors over HTTP."""
        return v2.http_request(x, headers=(("x-slo-ms", f"{setup.slo_ms:g}"),))

    def output(self, answer: Answer) -> Floats:
        """The binary part."""
        return v2.http_output(answer)


def _link(file: Path, to: Path) -> None:
    """A second name of the file: symbolic links out of a repository are not followed."""
    try:
        to.hardlink_to(file)
    except OSError:
        shutil.copy(file, to)


def _memory_bytes(setup: Setup) -> int:
    """Room for so many models, each in whole pages."""
    if setup.emulated:
        return 64 << 20
    largest = max(Path(str(where)).stat().st_size for where in setup.models.values())
    each = -(-largest // PAGE_BYTES) * PAGE_BYTES
    return each * (setup.memory_models or len(setup.models) + 1)


PEER = Clockwork()

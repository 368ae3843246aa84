"""Starts this server for a question, checks its answers, plays loads on it; it judges nothing."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from comparison.peers import load
from comparison.peers.ask import check
from comparison.peers.clockwork.adapter import PEER
from comparison.peers.measure import CLIENT_CORE, SERVER_CORE, Meter, free_port, running
from comparison.peers.models import Kinds
from comparison.peers.peer import HOST, Floats, Peer, Setup
from comparison.peers.run import write_result
from comparison.promises import capacity
from comparison.promises.loads import SLO_MS, Played, names
from harness.process_tree import Server
from harness.serving import Metrics, read_metrics, total


@dataclass(slots=True)
class Serving:
    """A server that is up, and whose answers are right."""

    asked: Peer
    setup: Setup
    server: Server
    x: Floats
    slot: dict[str, Any] = field(default_factory=dict)
    """What :meth:`apart` measured: goes to the run's result."""

    @property
    def url(self) -> str:
        """Of its HTTP port."""
        return f"http://{HOST}:{self.setup.port}"

    @property
    def grpc(self) -> str:
        """Of its gRPC port."""
        return f"{HOST}:{self.setup.port + 1}"

    def metrics(self) -> Metrics:
        """All that it counts, by name and labels."""
        return read_metrics(f"http://{HOST}:{self.setup.port + 2}/metrics")

    def loads(self) -> float:
        """LOADs that went well so far."""
        return total(self.metrics(), "clockwork_actions_total", action="load", status="ok")

    def cold_starts(self) -> float:
        """Good answers so far that waited for a LOAD."""
        return total(self.metrics(), "clockwork_model_cold_starts_total")

    def play(self, text: str, seed: int) -> Played:
        """Play a scenario from the client's core."""
        path = self.setup.folder / "load.toml"
        path.write_text(text)
        given = load.command(self.asked, self.setup, path, self.x, seed=seed, core=CLIENT_CORE)
        load.play(given, self.setup.folder / "bench.log")
        head, table, ends = load.read(self.setup.folder / "record", self.asked)
        return Played(head, table, ends, load.generator(self.setup.folder / "bench.json"))

    @contextmanager
    def apart(self) -> Iterator[None]:
        """What is measured within is what the run's CPU times are about."""
        meter = Meter(self.server)
        yield
        self.slot.update(meter.read(self.server))


@dataclass(slots=True)
class Rig:
    """Where results and scratch files go, and the models that there are."""

    out: Path
    kinds: Kinds = field(default_factory=Kinds)

    @contextmanager
    def serving(
        self,
        kind: str,
        models: Sequence[str],
        *,
        memory_mib: float | None = None,
        asked: Peer = PEER,
        cores: Sequence[int] = (SERVER_CORE,),
    ) -> Iterator[Serving]:
        """The server with these models; its answers are checked before, and after if nothing went wrong."""
        folder = self.out / "work"
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        setup = self.kinds.setup(
            kind, models, slo_ms=SLO_MS[kind], folder=folder, port=free_port(), memory_mib=memory_mib
        )
        x = self.kinds.input(kind)
        expected = self.kinds.expected(kind, setup.names, x)
        command = asked.command(setup)
        with ExitStack() as stack:
            # Names of sockets have at most 107 bytes, so they do not go into a folder of any length.
            sockets = stack.enter_context(TemporaryDirectory(prefix="promises-"))
            environment = {**asked.environment(setup), "TMPDIR": sockets}
            server, _ = stack.enter_context(running(asked, setup, command, environment, cores))
            check(asked, setup, x, expected, rounds=2)
            yield Serving(asked, setup, server, x)
            check(asked, setup, x, expected)

    def limit(self, kind: str, copies: int, repeat: int, **more: Any) -> float:
        """Answers in time a second that are 100 % in this repeat, all models in memory; measured once."""
        path = self.out / "limits" / f"{kind}-{copies}-{repeat}.json"
        if not path.is_file():
            with self.serving(kind, names(copies)) as serving:
                write_result(
                    path, capacity.top(serving.play(capacity.staircase(kind, copies, **more), repeat))
                )
        return float(json.loads(path.read_text())["per_s"])

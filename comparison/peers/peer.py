"""What a server is to the rest of the comparison: how it is started, asked and understood; no more."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Final, Literal
from urllib.request import urlopen

import numpy as np
import numpy.typing as npt

from comparison.peers import served

ROOT: Final = Path(__file__).parents[2]
INSTALLED: Final = ROOT / "build" / "peers"
"""Each server's own Python, in a folder of its name."""
MARK: Final = ".set-up"
"""A file there once it is installed."""
APPS: Final = Path(__file__).parent / "apps"
"""What runs there."""
HOST: Final = "127.0.0.1"

Floats = npt.NDArray[np.float32]
Kind = Literal["rejected", "expired", "failed"]
"""How a request ends that is not answered: there is too much; its time is up; anything else."""


@dataclass(frozen=True, slots=True)
class Answer:
    """What came back."""

    status: int
    headers: Mapping[str, str]
    body: bytes


@dataclass(frozen=True, slots=True)
class Request:
    """How to ask: the same for all models, but for ``{model}`` in ``path``."""

    path: str
    headers: tuple[tuple[str, str], ...] = ()
    body: bytes = b""


@dataclass(frozen=True, slots=True)
class Setup:
    """What is served, and where. ``models`` maps names to files, or to offsets on the emulated device."""

    kind: str
    models: Mapping[str, str | float]
    shape: tuple[int, ...]
    slo_ms: float
    folder: Path
    port: int
    out: tuple[int, ...] = ()
    cache: Path = INSTALLED / "cache"
    image_ms: float = 2.0
    """What one input of a network takes alone, measured on this machine before."""
    memory_models: int | None = None
    """Device memory, in models; None: all of them fit."""
    batch: int = 8

    @property
    def names(self) -> tuple[str, ...]:
        """The models."""
        return tuple(self.models)

    @property
    def emulated(self) -> bool:
        """Whether it is the device that uses no core."""
        return self.kind == served.DEVICE

    def exec_ms(self, rows: int) -> float:
        """What a batch takes: what some servers have to be told by hand."""
        return served.exec_ms(rows) if self.emulated else self.image_ms * rows

    @property
    def reserve_ms(self) -> float:
        """What must be left of a deadline when a batch starts, for servers that know only queues."""
        return self.exec_ms(self.batch) + 4.0

    @property
    def waiting(self) -> int:
        """How many requests are served one by one in half of the SLO; the rest is for HTTP and luck."""
        return max(1, int(0.5 * self.slo_ms / self.exec_ms(1)))

    def write(self, more: Mapping[str, Any]) -> Path:
        """The file that :mod:`comparison.peers.served` reads in the server's processes."""
        plan = {
            "kind": self.kind, "models": dict(self.models), "shape": self.shape, "slo_ms": self.slo_ms,
            "batch": self.batch, "lock": str(self.folder / "device.lock"), "log": str(self.device_log),
            "memory_models": self.memory_models, "port": self.port, "waiting": self.waiting, **more,
        }  # fmt: skip
        path = self.folder / "models.json"
        path.write_text(json.dumps(plan))
        return path

    @property
    def device_log(self) -> Path:
        """What the emulated device did."""
        return self.folder / "device.log"


class Peer:
    """One server; ``packages.txt`` has what its Python holds, ``apps/`` what runs there."""

    name: ClassVar[str]
    package: ClassVar[str]
    """Whose version is its version."""
    configured: ClassVar[str]
    """Its configuration for deadlines, in words for the table."""
    source: ClassVar[str]
    """Where its documentation advises that."""
    note: ClassVar[str] = ""
    """What a reader of the table must know of it."""
    arguments: ClassVar[str] = ""
    """Of its Python, if that starts it; ``{port}`` is filled in."""
    variables: ClassVar[Mapping[str, str]] = {}
    """More of its environment; ``{folder}`` is filled in."""
    more: ClassVar[Mapping[str, Any]] = {}
    """Its own settings, which its files read in ``served.plan()``; they are recorded with each result."""
    binds_all: ClassVar[bool] = False
    """Whether it listens on all interfaces and cannot be told otherwise."""
    loads_on_demand: ClassVar[bool] = False
    """Whether it keeps no more models in memory than it is told, and loads the one that is asked for."""
    loads_by_call: ClassVar[bool] = False
    """Whether clients can have models loaded and unloaded, see :meth:`load_path`."""
    ready_path: ClassVar[str] = "/"
    stop_s: ClassVar[float] = 10.0
    start_s: ClassVar[float] = 90.0

    @property
    def home(self) -> Path:
        """Its own Python."""
        return INSTALLED / self.name

    @property
    def python(self) -> str:
        """Its interpreter."""
        return str(self.home / "bin" / "python")

    def why_not(self, setup: Setup | None = None, *, isolated: bool = True) -> str:
        """Why it cannot be run here and so; "" if it can."""
        if not (self.home / MARK).is_file():
            return f"not installed: python -m comparison.peers install {self.name}"
        if self.binds_all and not isolated:
            return "it listens on all interfaces, and no network namespace could be made for it"
        return ""

    def command(self, setup: Setup) -> Sequence[str]:
        """How to start it; writes what it needs into ``setup.folder``."""
        return [self.python, *self.arguments.format(port=setup.port).split()]

    def environment(self, setup: Setup) -> dict[str, str]:
        """Its whole environment: the runner's own would bring the runner's Python."""
        return {
            "PATH": f"{self.home / 'bin'}:/usr/local/bin:/usr/bin:/bin", "HOME": str(setup.folder),
            "PYTHONPATH": str(ROOT), "PYTHONDONTWRITEBYTECODE": "1", "TMPDIR": str(setup.folder),
            "PEER_MODELS": str(setup.write(self.more)),
            # One core: libraries that make a thread per core of the machine make one.
            "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "MKL_NUM_THREADS": "1",
            **{name: value.format(folder=setup.folder) for name, value in self.variables.items()},
        }  # fmt: skip

    def ready(self, setup: Setup) -> bool:
        """Whether all models answer; OSError counts as no."""
        with urlopen(f"http://{HOST}:{setup.port}{self.ready_path}", timeout=2) as response:
            return bool(response.status == 200)

    def request(self, setup: Setup, x: Floats) -> Request:
        """How to ask for the output of ``x``, one row, in time: by its bytes as they are."""
        return Request("/{model}", (("Content-Type", "application/octet-stream"),), x.tobytes())

    def understood(self, kind: Kind, words: str) -> Kind:
        """What an end means that is no answer.

        ``kind`` is by the status alone: rejected for 429 and 503, expired for 408 and 504. ``words`` are the
        status and the first words of the body.
        """
        return kind

    def output(self, answer: Answer) -> Floats:
        """The numbers of a good answer: its bytes as they are."""
        return np.frombuffer(answer.body, np.float32)

    def left_behind(self, setup: Setup) -> Iterable[Path]:
        """Files outside ``setup.folder`` that a server may leave when it is killed; they are removed."""
        return ()

    def counted(self, setup: Setup) -> Mapping[str, float]:
        """What it counts itself that a table shows, read after a load."""
        return {}

    def load_path(self, name: str, *, unload: bool = False) -> str:
        """Where to POST to have a model loaded or unloaded, if ``loads_by_call``."""
        return f"/v2/repository/models/{name}/{'unload' if unload else 'load'}"


MOST_PROCESSES: Final = 40
"""Models of a server with a process for each."""


def differs(found: Floats, expected: Floats) -> float:
    """The worst error relative to the largest number; infinite for another shape."""
    if found.size != expected.size:
        return math.inf
    scale = float(np.abs(expected).max()) or 1.0
    return float(np.abs(found.ravel() - expected.ravel()).max()) / scale

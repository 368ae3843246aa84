"""The models of a load: their files, one input for all, the right outputs, and their durations here."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any, Final

import numpy as np

from comparison.peers import networks, served
from comparison.peers.peer import INSTALLED, Floats, Setup

_RUNS: Final = 30


class Kinds:
    """Makes what is not there yet, and remembers what was measured."""

    def __init__(self, folder: Path = INSTALLED / "models", core: int = 0) -> None:
        self._folder = folder
        self._core = core
        self._image_ms: dict[str, float] = {}
        self._expected: dict[tuple[str, int], Floats] = {}

    def setup(
        self,
        kind: str,
        names: Sequence[str],
        *,
        slo_ms: float,
        folder: Path,
        port: int,
        memory_mib: float | None,
    ) -> Setup:
        """For models of these names: the n-th is the n-th copy of its kind."""
        if kind == served.DEVICE:
            shape: tuple[int, ...] = (served.WIDTH,)
            return Setup(
                kind, {name: float(row) for row, name in enumerate(names)}, shape, slo_ms, folder, port, shape
            )
        files = {name: str(networks.network_file(self._folder, kind, row)) for row, name in enumerate(names)}
        largest = max(Path(path).stat().st_size for path in files.values())
        held = None if memory_mib is None else int(memory_mib * 2**20 // largest)
        return Setup(
            kind, files, networks.SHAPE, slo_ms, folder, port, (networks.CLASSES,),
            image_ms=self.image_ms(kind), memory_models=held,
        )  # fmt: skip

    def input(self, kind: str) -> Floats:
        """One row, the same for all."""
        shape = (served.WIDTH,) if kind == served.DEVICE else networks.SHAPE
        return np.random.default_rng(7).standard_normal((1, *shape), dtype=np.float32)

    def expected(self, kind: str, names: Sequence[str], x: Floats) -> Floats:
        """The right outputs, a row for each model."""
        rows = []
        for row in range(len(names)):
            if (kind, row) not in self._expected:
                if kind == served.DEVICE:
                    found: Any = x + np.float32(row)
                else:
                    found = served.Network(str(networks.network_file(self._folder, kind, row)))(x)
                self._expected[kind, row] = found[0]
            rows.append(self._expected[kind, row])
        return np.stack(rows)

    def image_ms(self, kind: str) -> float:
        """What one input takes on the server's core, the median of some runs."""
        if kind not in self._image_ms:
            before = os.sched_getaffinity(0)
            os.sched_setaffinity(0, {self._core})
            try:
                run, x = served.Network(str(networks.network_file(self._folder, kind, 0))), self.input(kind)
                run(x)
                self._image_ms[kind] = median(_timed_ms(run, x) for _ in range(_RUNS))
            finally:
                os.sched_setaffinity(0, before)
        return self._image_ms[kind]


def _timed_ms(run: served.Run, x: Floats) -> float:
    began_s = time.perf_counter()
    run(x)
    return (time.perf_counter() - began_s) * 1e3

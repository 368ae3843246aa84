"""Runs inputs through one parser and says what is wrong with how it ended.

Wrong is: an exception that the parser does not declare, over a second of CPU time, memory out of all
proportion, an error whose words cannot be sent. With atheris (libFuzzer) inputs are found by the edges that
they reach; without it, seeds are changed at random.
"""

from __future__ import annotations

import atexit
import importlib.util
import os
import resource
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from random import Random
from typing import Final

from tests.fuzz.mutators import Mutator, mixed

CORPUS: Final = Path(__file__).parent / "corpus"
MIB: Final = 1 << 20
HANG_S: Final = 1.0
STUCK_S: Final = 30
"""Seconds of CPU after which an input is not waited for."""
TOLD_BYTES: Final = 64 * 1024


class Wrong(AssertionError):
    """What a parser may not do."""


@dataclass(frozen=True)
class Target:
    """A parser: ``run`` gives it one input, and raises one of ``errors`` where it is refused.

    ``growth_bytes``: so much more memory than ever before may one input take.
    """

    name: str
    run: Callable[[bytes], object]
    errors: tuple[type[Exception], ...]
    mutate: Mutator
    growth_bytes: int = 64 * MIB
    input_bytes: int = 16_384

    def seeds(self) -> list[Path]:
        """The inputs that are kept with the tests; those called ``good`` are accepted."""
        return sorted((CORPUS / self.name).glob("*.seed"))


GROUPS: Final = {
    "tests.fuzz.targets.gateway": (
        "http_connection", "http_infer", "http_routes", "grpc_infer", "grpc_rpcs", "compression",
        "api_keys", "shared_memory",
    ),
    "tests.fuzz.targets.links": ("frames", "tensor_calls", "region_names", "crash_report"),
    "tests.fuzz.targets.machines": ("tensor_server", "tensor_source"),
    "tests.fuzz.targets.files": (
        "clockwork_toml", "config_pbtxt", "settings", "repository", "scenario", "azure_trace", "csv_trace",
        "zoo", "profiles", "journal", "cache_records", "bench_records",
    ),
    "tests.fuzz.targets.models": ("onnx", "onnx_external", "torch_pt2"),
    "tests.fuzz.targets.clients": (
        "client_http", "client_answers", "bench_http", "bench_http2", "hpack", "addresses",
    ),
}  # fmt: skip
NAMES: Final = tuple(name for names in GROUPS.values() for name in names)


def scratch() -> Path:
    """A folder for the time of this process."""
    folder = Path(tempfile.mkdtemp(prefix="fuzz-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder


def group_of(name: str) -> str:
    """The module of the target of that name."""
    return next(module for module, names in GROUPS.items() if name in names)


def target(name: str) -> Target:
    """The target of that name; only what it needs is imported."""
    found: dict[str, Target] = {each.name: each for each in importlib.import_module(group_of(name)).TARGETS}
    return found[name]


def check(parser: Target, data: bytes) -> bool:
    """Whether the parser accepts ``data``. Raises :class:`Wrong`, or what the parser may not raise."""
    peak = _peak_bytes()
    accepted, took_s = _timed(parser, data)
    if took_s > HANG_S:
        # Instrumented code is slow, and so is a machine with other work: the best of three counts.
        took_s = min(took_s, *(_timed(parser, data)[1] for _ in range(2)))
        if took_s > HANG_S:
            raise Wrong(f"{parser.name}: {took_s:.2f} s of CPU for {len(data)} bytes")
    grown = _peak_bytes() - peak
    if grown > parser.growth_bytes:
        raise Wrong(f"{parser.name}: {grown / MIB:.0f} MiB more for {len(data)} bytes")
    return accepted


def _timed(parser: Target, data: bytes) -> tuple[bool, float]:
    start = time.thread_time()
    try:
        parser.run(data)
    except parser.errors as error:
        told = str(error).encode()
        if not 0 < len(told) <= TOLD_BYTES:
            raise Wrong(f"{parser.name}: an error of {len(told)} bytes for {len(data)}") from error
        return False, time.thread_time() - start
    return True, time.thread_time() - start


def _peak_bytes() -> int:
    # Not ru_maxrss: a process begins with that of the one that it was forked from.
    status = _status_of(os.getpid())
    if status is None:
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return int(os.pread(status, 4096, 0).partition(b"VmHWM:")[2].split(maxsplit=1)[0]) * 1024


@cache
def _status_of(pid: int) -> int | None:
    """The open file that says how a process is, for two looks an input; None where there is none."""
    path = Path(f"/proc/{pid}/status")
    return os.open(path, os.O_RDONLY) if path.is_file() else None


def changed(parser: Target, data: bytes, dice: Random) -> bytes:
    """An input made of another one."""
    for _ in range(dice.choice((1, 1, 2, 3))):
        data = mixed(parser.mutate)(data, dice)
    return data


def plain(name: str, seconds: float, found: Path, seed: int) -> int:
    """Change seeds at random for a while; the input of a failure is left in ``found``. The exit status."""
    parser = target(name)
    pool = [path.read_bytes() for path in parser.seeds()] or [b""]
    dice = Random(seed)
    end = time.monotonic() + seconds
    count = 0
    running = found / f"stuck-{name}"
    with running.open("w+b") as current:
        while time.monotonic() < end:
            data = changed(parser, dice.choice(pool), dice)[: parser.input_bytes]
            current.seek(0)
            current.truncate()
            current.write(data)
            current.flush()
            signal.setitimer(signal.ITIMER_PROF, STUCK_S)
            try:
                check(parser, data)
            except BaseException:
                running.rename(found / f"crash-{name}")
                raise
            finally:
                signal.setitimer(signal.ITIMER_PROF, 0)
            count += 1
            if len(pool) < 500 and dice.random() < 0.01:
                pool.append(data)
    running.unlink()
    sys.stderr.write(f"stat::number_of_executed_units: {count}\n")
    return 0


def has_atheris() -> bool:
    """Whether inputs can be guided by coverage here."""
    try:
        return importlib.util.find_spec("atheris") is not None
    except ValueError:
        return False


def everything() -> Iterator[Target]:
    """All targets."""
    for name in NAMES:
        yield target(name)

"""Hostile clients leave nothing behind, nor anything that only garbage collection would free.

Reference cycles are collected late, and hold their requests' memory until then.
"""

from __future__ import annotations

import asyncio
import dataclasses
import gc
import mmap
import platform
import random
import ssl
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from clockwork_serve.serve.child import ARENAS, MUCH_BYTES, PAUSE_CHECKS, Trimmer, own_bytes
from clockwork_serve.units import MIB
from qa.hostile import frames as hostile_frames
from qa.hostile import http as hostile_http
from qa.hostile.http import Plan
from qa.hostile.traffic import attack
from tests.serve.certificates import certificates
from tests.serve.gateway.fake_controller import served, spec
from tests.serve.gateway.running import RunningGateway, running_gateway
from tests.serve.http.requests import INFER, post

EACH = 12
OURS = {
    "HttpConnection",
    "Exchange",
    "Head",
    "TCPTransport",
    "CoreCall",
    "AioCall",
    "Task",
    "_Alone",
    "_Streamed",
}
"""Of each connection, request or call; what else ends in a test process is not of interest."""


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningGateway]:
    with running_gateway(tmp_path_factory.mktemp("gateway"), grpc_port=0) as found:
        attacked = served("m1", (spec("x", "FP32", 64),), (spec("y", "FP32", 64),))
        found.controller.catalogue.append(attacked)
        found.loop.call_soon_threadsafe(found.controller.send, *attacked)
        found.until(lambda: found.servers.gateway.models.versions("m1"))
        yield found


@pytest.fixture
def garbage() -> Iterator[Callable[[], Counter[str]]]:
    """Our objects found in reference cycles since the test began, by type."""

    def found() -> Counter[str]:
        gc.collect()
        kinds = Counter(name for each in gc.garbage if (name := type(each).__qualname__) in OURS)
        gc.garbage.clear()
        return kinds

    gc.collect()
    gc.freeze()  # what is there already is no garbage of this test's, and need not be looked through again
    gc.disable()
    gc.set_debug(gc.DEBUG_SAVEALL)
    yield found
    gc.set_debug(0)
    gc.garbage.clear()
    gc.enable()


@pytest.mark.parametrize("make", hostile_http.ATTACKS, ids=lambda make: make.__name__)
def test_no_attack_over_http_leaves_garbage(
    gateway: RunningGateway, make: Callable[[random.Random], Plan], garbage: Callable[[], Counter[str]]
) -> None:
    carry_out(gateway.http_port, make)
    gateway.until(lambda: gateway.servers.gateway.connections == 0)
    assert not garbage()


@pytest.mark.parametrize("make", hostile_frames.ATTACKS, ids=lambda make: make.__name__)
def test_no_attack_over_grpc_leaves_garbage(
    gateway: RunningGateway, make: Callable[[random.Random], Plan], garbage: Callable[[], Counter[str]]
) -> None:
    carry_out(gateway.servers.port_by_name["grpc_port"], make)
    gateway.until(lambda: not calls_of(gateway))
    assert not garbage()


@pytest.mark.parametrize("ends", ["no handshake", "half a request", "answered"])
def test_no_connection_over_tls_leaves_garbage(
    tmp_path: Path, ends: str, garbage: Callable[[], Counter[str]]
) -> None:
    files = certificates(tmp_path)
    trusting = ssl.create_default_context(cafile=files.ca)
    (tmp_path / "run").mkdir()
    with running_gateway(tmp_path / "run", **files.tls_settings()) as gateway:
        garbage()  # of its start
        for _ in range(EACH):
            with gateway.connect() as plain:
                if ends == "no handshake":
                    plain.sendall(b"no handshake at all")
                    plain.recv(1000)
                    continue
                with trusting.wrap_socket(plain, server_hostname="localhost") as client:
                    client.sendall(
                        b"GET /v2" if ends == "half a request" else post(INFER, b"{}", close=False)
                    )
                    assert ends != "answered" or client.recv(1000)
        gateway.until(lambda: gateway.servers.gateway.connections == 0)
        # The end of the last handshake is not reported.
        gateway.until(lambda: not gateway.servers.http._servers[0]._handshaking)
        found = garbage()
    assert not found


def carry_out(port: int, make: Callable[[random.Random], Plan]) -> None:
    dice = random.Random(7)
    for _ in range(EACH):
        attack(port, dataclasses.replace(make(dice), hold_s=0.02, pause_s=0))


def calls_of(gateway: RunningGateway) -> list[Any]:
    """Open streams, by their tasks."""
    return [task for task in asyncio.all_tasks(gateway.loop) if "_run" in task.get_coro().__qualname__]


def test_a_waiting_connection_holds_no_large_body(gateway: RunningGateway) -> None:
    large = b'{"inputs":[]}' + b" " * 200_000
    with gateway.connect() as client:
        client.sendall(post(INFER, large, close=False))
        assert client.recv(65536).startswith(b"HTTP/1.1 413")
        (kept,) = gateway.servers.http._connections
        assert kept._complete == []


class Trimmed:
    """A C library whose trim frees all but ``used`` bytes."""

    def __init__(self) -> None:
        self.held = self.used = 100 << 20
        self.times = 0

    def trim(self) -> None:
        self.times += 1
        self.held = self.used


def test_memory_is_trimmed_once_it_has_grown_and_not_again_while_it_is_in_use() -> None:
    library = Trimmed()
    trimmer = Trimmer(library.trim, lambda: library.held)

    def look(more_bytes: int, *, in_use: bool) -> int:
        library.held += more_bytes
        library.used += more_bytes * in_use
        asyncio.run(trimmer.check())
        return library.times

    assert look(MUCH_BYTES, in_use=False) == 0
    assert look(1, in_use=False) == 1
    assert look(MUCH_BYTES + 1, in_use=True) == 2
    assert look(0, in_use=True) == 2
    assert look(-MUCH_BYTES, in_use=True) == 2
    assert look(MUCH_BYTES + 1, in_use=False) == 3


def test_memory_that_was_in_use_at_a_trim_is_trimmed_once_it_is_free() -> None:
    library = Trimmed()
    trimmer = Trimmer(library.trim, lambda: library.held)

    def look(times: int) -> int:
        before = library.times
        for _ in range(times):
            asyncio.run(trimmer.check())
        return library.times - before

    library.held = library.used = library.used + 3 * MUCH_BYTES
    assert look(1) == 1
    assert look(60) <= 60 / PAUSE_CHECKS + 2, "seldom, while it is in use"
    library.used -= 3 * MUCH_BYTES
    assert look(PAUSE_CHECKS) == 1
    assert library.held == library.used
    assert look(60) == 0


def test_a_process_s_private_memory_is_measured() -> None:
    # Not a bytes object: the allocator may still hold as much as that.
    with mmap.mmap(-1, 64 * MIB, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS) as mine:
        before = own_bytes()
        mine.write(b"\1" * len(mine))
        assert own_bytes() - before > len(mine) // 2


HEAPS = """
import asyncio, ctypes, sys
from clockwork_serve.config import Settings
from clockwork_serve.serve.gateway.settings import GatewayConfig
from clockwork_serve.serve.processes import gateway

async def main():
    if sys.argv[2] == "unbounded":
        gateway.limit_arenas = lambda: None
    settings = Settings(http_port=0, grpc_port=0, metrics_port=None)
    servers = gateway.GatewayServers(GatewayConfig(settings=settings, run_dir=sys.argv[1], name="g"))
    await servers.start()
    library = ctypes.CDLL(None)
    library.fdopen.restype = ctypes.c_void_p
    library.malloc_info(0, ctypes.c_void_p(library.fdopen(1, b"w")))
    library.fflush(None)
    await servers.close(0)

asyncio.run(main())
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc has arenas")
def test_all_threads_of_a_gateway_share_two_heaps(tmp_path: Path) -> None:
    def heaps(how: str) -> int:
        done = subprocess.run(
            [sys.executable, "-c", HEAPS, str(tmp_path), how], capture_output=True, text=True, check=True
        )
        return done.stdout.count("<heap nr=")

    assert heaps("bounded") <= ARENAS
    assert heaps("unbounded") > ARENAS, "else this test shows nothing"

"""Limits of the system: raised where that may be, refused by name where they are too low for the settings."""

from __future__ import annotations

import resource
import subprocess
import sys
from pathlib import Path

import pytest
from msgspec import structs

from clockwork_serve.config import Settings
from clockwork_serve.devices import DeviceConfig
from clockwork_serve.errors import ConfigError
from clockwork_serve.serve.supervisor.limits import (
    address_needs,
    address_space_bytes,
    check_limits,
    file_needs,
)
from clockwork_serve.units import GIB, MIB

CPU = DeviceConfig(device="cpu:0", memory_bytes=GIB, io_bytes=64 * MIB)
SMALL = Settings(gateway_memory=64 * MIB, max_body=16 * MIB, grpc_port=None)

CHILD = """
import logging, resource, sys
from clockwork_serve.config import Settings
from clockwork_serve.devices import DeviceConfig
from clockwork_serve.errors import ConfigError
from clockwork_serve.serve.supervisor.limits import check_limits

which, soft, hard, kind, joining = sys.argv[1:]
logging.basicConfig(stream=sys.stdout, format="%(message)s")
which, limits = getattr(resource, which), (int(soft), int(hard))
resource.setrlimit(which, limits)
try:
    check_limits(Settings(), (DeviceConfig(device=f"{kind}:0", kind=kind),), joining=joining == "True")
    print(*resource.getrlimit(which))
except ConfigError as error:
    print(error)
"""


def checked(which: str, soft: int, hard: int, kind: str = "cpu", *, joining: bool = False) -> list[str]:
    """What a process with these limits says of the usual settings."""
    arguments = [which, str(soft), str(hard), kind, str(joining)]
    done = subprocess.run(
        [sys.executable, "-c", CHILD, *arguments], capture_output=True, text=True, timeout=60, check=True
    )
    return done.stdout.splitlines()


def test_too_little_address_space_is_refused_with_what_asks_for_it() -> None:
    (said,) = checked("RLIMIT_AS", 700 * MIB, 700 * MIB)
    for part in (
        "address space (ulimit -v): expected at least ", "for worker-cpu:0", "device_memory",
        "scratch_memory",
        "gateway_memory 256 MiB", "found a limit of 700 MiB", "ulimit -v unlimited", "LimitAS=infinity",
    ):  # fmt: skip
        assert part in said


def test_more_memory_than_the_host_has_is_refused_by_the_name_of_the_setting() -> None:
    devices = (DeviceConfig(device="emulated:0", kind="emulated", memory_bytes=1 << 50),)
    check_limits(SMALL, devices)

    for field, name in (
        ("memory_bytes", "device_memory"), ("workspace_bytes", "scratch_memory"),
        ("io_bytes", "scratch_memory"), ("pool_bytes", "host_memory"),
    ):  # fmt: skip
        with pytest.raises(ConfigError, match=rf"{name}: expected at most \d+ MiB.* for cpu:0; lower it"):
            check_limits(SMALL, (*devices, structs.replace(CPU, **{field: 1 << 50})))


def test_too_few_files_are_refused_with_what_asks_for_them() -> None:
    (said,) = checked("RLIMIT_NOFILE", 24, 24)
    for part in (
        "open files (ulimit -n): expected at least ",
        "for a gateway",
        "found a limit of 24",
        "ulimit -n 4096",
    ):
        assert part in said


def test_soft_limits_are_raised_to_the_hard_ones() -> None:
    assert checked("RLIMIT_NOFILE", 24, 20_000) == ["20000 20000"]
    assert checked("RLIMIT_AS", GIB, 8 * GIB) == [f"{8 * GIB} {8 * GIB}"]


def test_a_soft_limit_of_memory_that_is_enough_is_the_operator_s() -> None:
    assert checked("RLIMIT_AS", 8 * GIB, 9 * GIB) == [f"{8 * GIB} {9 * GIB}"]


def test_fewer_files_than_connections_are_a_warning() -> None:
    warning, limits = checked("RLIMIT_NOFILE", 64, 64)
    assert warning == "max_connections: 10000 wanted, but the system allows a process 64 files (ulimit -n)"
    assert limits == "64 64"
    # Where there are no gateways, there are no connections.
    assert checked("RLIMIT_NOFILE", 64, 64, joining=True) == ["64 64"]


def test_a_gpu_wants_no_limit_of_address_space() -> None:
    (said,) = checked("RLIMIT_AS", 64 * GIB, 64 * GIB, "cuda")
    assert "expected at least no limit, for worker-cuda:0" in said


def most(settings: Settings, *devices: DeviceConfig, joining: bool = False) -> int:
    return max(need.amount for need in address_needs(settings, devices, 100 * MIB, joining=joining))


def test_the_need_follows_the_settings() -> None:
    emulated = DeviceConfig(device="gpu:0", kind="emulated", memory_bytes=64 * GIB)
    usual = most(SMALL, CPU)
    assert (
        most(SMALL, DeviceConfig(device="cpu:0", memory_bytes=3 * GIB, io_bytes=64 * MIB)) == usual + 2 * GIB
    )
    assert most(SMALL, DeviceConfig(device="cpu:0", memory_bytes=GIB, io_bytes=GIB)) == usual + GIB - 64 * MIB
    assert most(SMALL, emulated) < GIB  # which computes nothing, and has no memory
    torch = DeviceConfig(device="torch-cpu:0", kind="torch-cpu", memory_bytes=GIB, io_bytes=64 * MIB)
    assert most(SMALL, torch) == usual + 384 * MIB
    more = Settings(gateway_memory=GIB, max_body=16 * MIB, grpc_port=None)
    assert most(more, CPU) == usual + GIB - 64 * MIB
    # A worker on another machine has room of its own for inputs and outputs, a gateway there has no worker.
    assert most(SMALL, CPU, joining=True) > usual
    assert most(more, joining=True) - most(SMALL, joining=True) == GIB - 64 * MIB
    assert most(Settings(), joining=True) - most(Settings(grpc_port=None), joining=True) == 256 * MIB


def test_each_process_needs_a_few_files() -> None:
    def files(gateways: int, *devices: DeviceConfig) -> int:
        return max(need.amount for need in file_needs(Settings(gateways=gateways), devices))

    many = [DeviceConfig(device=f"cpu:{number}") for number in range(40)]
    assert files(1, CPU) < 64
    assert files(1, *many) == files(1, *many[:39]) + 3
    assert files(60, CPU) == files(59, CPU) + 3


def test_this_process_s_address_space_is_what_the_kernel_says() -> None:
    size = next(line for line in Path("/proc/self/status").read_text().splitlines() if "VmSize" in line)
    assert abs(address_space_bytes() - 1024 * int(size.split()[1])) < 64 * MIB
    assert resource.getpagesize() <= address_space_bytes()

"""Unusual hosts: limits, file systems, names, variables, pages. The command, as its operator runs it."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import tritonclient.grpc

from clockwork_serve.config import read_settings
from clockwork_serve.serve.supervisor.config import device_configs
from clockwork_serve.serve.supervisor.limits import address_needs, file_needs
from clockwork_serve.units import MIB
from harness import repositories
from tests.end_to_end.commands import START_S, command, started
from tests.end_to_end.conftest import call, x_json
from tests.mounts import with_everything_read_only

WIDTH = 8
LIMITED = """
import os, resource, sys
for name, limit in (("RLIMIT_AS", sys.argv[1]), ("RLIMIT_NOFILE", sys.argv[2])):
    if int(limit):
        resource.setrlimit(getattr(resource, name), (int(limit), int(limit)))
os.execv(sys.argv[3], sys.argv[3:])
"""


SUPERVISOR = """
from clockwork_serve.serve.supervisor.limits import address_space_bytes
import clockwork_serve.serve.supervisor.server
print(address_space_bytes())
"""


def limited(arguments: list[str], *, address_space: int = 0, files: int = 0) -> list[str]:
    """The command under limits."""
    return [sys.executable, "-c", LIMITED, str(address_space), str(files), *arguments]


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A repository of one model, ``dense``."""
    found = tmp_path / "models"
    repositories.layers(found, "dense", width=WIDTH, depth=2)
    return found


def failed(arguments: list[str], **more: str) -> str:
    """The one line that a command says before it ends."""
    ended = subprocess.run(
        arguments, capture_output=True, text=True, timeout=START_S, check=False, env={**os.environ, **more}
    )
    assert ended.returncode == 2, ended.stderr
    (line,) = ended.stderr.splitlines()
    return line


def infers(http: str, grpc: str = "") -> None:
    """Ask the model over every protocol."""
    assert call(http, "/v2/models/dense/infer", x_json([1.0] * WIDTH)).status == 200
    if grpc:
        tensor = tritonclient.grpc.InferInput("x", [1, WIDTH], "FP32")
        tensor.set_data_from_numpy(np.ones((1, WIDTH), np.float32))
        with tritonclient.grpc.InferenceServerClient(grpc) as client:
            assert client.infer("dense", [tensor]).as_numpy("y").shape == (1, WIDTH)


# Limits


def test_too_low_limits_end_the_start_before_anything_is_started(root: Path, cache: Path) -> None:
    said = failed(limited(command(root, cache, "--device-memory", "1GB"), address_space=700 * MIB))
    for part in (
        "error: address space (ulimit -v): expected at least",
        "device_memory",
        "found a limit of 700 MiB",
    ):
        assert part in said
    said = failed(limited(command(root, cache), files=24))
    for part in ("error: open files (ulimit -n): expected at least", "found a limit of 24", "raise it"):
        assert part in said


SMALL = {
    "device_memory": "16MiB", "scratch_memory": "80MiB", "gateway_memory": "64MiB", "max_body": "16MiB",
    "grpc_port": "off",
}  # fmt: skip


@pytest.mark.parametrize("chosen", [{}, SMALL])
def test_what_is_said_to_be_needed_is_enough_and_hardly_more(
    root: Path, cache: Path, chosen: dict[str, str]
) -> None:
    settings = read_settings(chosen, {}, None)
    devices = device_configs(settings)
    supervisor_bytes = int(subprocess.check_output([sys.executable, "-c", SUPERVISOR])) + 16 * MIB
    needs = {need.process: need.amount for need in address_needs(settings, devices, supervisor_bytes)}
    files = max(need.amount for need in file_needs(settings, devices))
    options = [word for name, text in chosen.items() for word in (f"--{name.replace('_', '-')}", text)]
    arguments = [*command(root, cache, "--device-memory", "1GB"), *options]
    with started(limited(arguments, address_space=max(needs.values()), files=files)) as (process, ready):
        infers(ready["http"], ready["grpc"])
        assert call(ready["http"], "/v2/repository/models/dense/load", b"{}").status == 200
        peaks = dict(peaks_of(process.pid))
    for name, kind in (("worker", "worker-cpu:0"), ("gateway", "a gateway")):
        assert peaks[name] < needs[kind] < 2 * peaks[name], (name, peaks, needs)


def peaks_of(supervisor: int) -> Iterator[tuple[str, int]]:
    """The most address space that each child process had, by the last word of its module."""
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            if int(stat.read_text().rpartition(")")[2].split()[1]) != supervisor:
                continue
            module = (stat.parent / "cmdline").read_text().split("\0")[2]
            status = (stat.parent / "status").read_text()
        except (OSError, IndexError):
            continue
        yield module.rpartition(".")[2], 1024 * int(status.partition("VmPeak:")[2].split()[0])


# File systems


def test_a_full_cache_serves_where_every_file_system_is_read_only(root: Path, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    with started(command(root, cache)) as (_, ready):
        infers(ready["http"])
    before = sorted((str(path), path.stat().st_mtime_ns) for path in cache.rglob("*"))
    with started([*with_everything_read_only(tmp_path), *command(root, cache)]) as (_, ready):
        infers(ready["http"], ready["grpc"])
        assert call(ready["http"], "/v2/repository/models/dense/load", b"{}").status == 200
        infers(ready["http"])
    assert sorted((str(path), path.stat().st_mtime_ns) for path in cache.rglob("*")) == before


def test_an_empty_cache_that_cannot_be_written_ends_the_start(root: Path, tmp_path: Path) -> None:
    (tmp_path / "cache").mkdir()
    begin = with_everything_read_only(tmp_path)
    ended = subprocess.run(
        [*begin, *command(root, tmp_path / "cache")],
        capture_output=True,
        text=True,
        timeout=START_S,
        check=False,
    )
    assert ended.returncode == 1
    last = ended.stderr.splitlines()[-1]
    for part in (
        "error: cache_dir: expected a folder that can be written",
        "Read-only file system",
        "clockwork profile",
    ):
        assert part in last


def test_cache_and_journal_are_the_server_s_user_s_alone(root: Path, tmp_path: Path) -> None:
    cache, journal = tmp_path / "cache", tmp_path / "journal"
    before = os.umask(0)
    try:
        with started([*command(root, cache), "--journal", str(journal)]) as (_, ready):
            infers(ready["http"])
            (inside,) = cache.iterdir()
            modes = [path.stat().st_mode & 0o777 for path in (cache, inside, journal)]
    finally:
        os.umask(before)
    assert modes == [0o700, 0o700, 0o600]


# Names


def test_a_model_whose_name_is_no_text_is_named_and_all_others_are_served(root: Path, cache: Path) -> None:
    odd = os.fsencode(root) + b"/gar\xe7on"
    shutil.copytree(os.fsencode(root / "dense"), odd)
    (root / "dense" / "\udcff.txt").touch()
    (root / "empty" / "1").mkdir(parents=True)
    (root / "empty" / "1" / "\udcff.bin").touch()
    with started([*command(root, cache), "--log-format", "json"]) as (process, ready):
        assert ready["models"] == 1
        infers(ready["http"], ready["grpc"])
        index = {entry["name"]: entry for entry in call(ready["http"], "/v2/repository/index", b"{}").json}
        assert sorted(index) == ["dense", "empty", r"gar\udce7on"]
        assert (index["dense"]["state"], index[r"gar\udce7on"]["state"]) == ("READY", "UNAVAILABLE")
        assert "rename the folder" in index[r"gar\udce7on"]["reason"]
        assert r"found \udcff.bin" in index["empty"]["reason"]
        for name in ("gar%E7on", r"gar%5Cudce7on"):
            assert call(ready["http"], f"/v2/repository/models/{name}/load", b"{}").status in (400, 404)
        assert b"clockwork_ready 1" in call(ready["metrics"].removesuffix("/metrics"), "/metrics").json
        infers(ready["http"])
        process.terminate()
        _, said = process.communicate(timeout=START_S)
    records = [json.loads(line) for line in said.splitlines()]
    assert any(r"gar\udce7on" in record["message"] for record in records)


def test_folders_whose_names_are_no_text_end_the_start_or_are_not_used(root: Path, cache: Path) -> None:
    odd = root.parent / "\udcff"
    odd.mkdir()
    (root.parent / "link").symlink_to(odd)
    for words in ([str(odd)], [str(root), "--cache", str(odd)], [str(root), "--journal", str(odd / "j")]):
        begin, end = command(root, cache)[:4], command(root, cache)[5:11]
        assert "expected text in UTF-8" in failed([*begin, *words, *end])
    ended = subprocess.run(
        command(root.parent / "link", cache), capture_output=True, text=True, timeout=START_S, check=False
    )
    assert "error: model repository: expected a path in UTF-8" in ended.stderr
    begin = ["env", f"XDG_RUNTIME_DIR={odd}", f"XDG_CACHE_HOME={odd}"]
    with started([*begin, *command(root, cache)]) as (_, ready):
        infers(ready["http"])


# Variables


def test_variables_of_a_service_do_not_end_the_start(
    root: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("HTTP", "GRPC", "METRICS"):
        monkeypatch.setenv(f"CLOCKWORK_{name}_PORT", "tcp://10.96.0.12:8000")
        monkeypatch.setenv(f"CLOCKWORK_{name}_SERVICE_HOST", "10.96.0.12")
        monkeypatch.setenv(f"CLOCKWORK_{name}_PORT_8000_TCP_ADDR", "10.96.0.12")
    with started(command(root, cache)) as (process, ready):
        infers(ready["http"])
        process.terminate()
        _, said = process.communicate(timeout=START_S)
    warnings = [line for line in said.splitlines() if line.startswith("warning: ")]
    assert [line.split(":")[1].strip() for line in warnings] == [
        "CLOCKWORK_GRPC_PORT", "CLOCKWORK_HTTP_PORT", "CLOCKWORK_METRICS_PORT",
    ]  # fmt: skip
    assert "Kubernetes" in warnings[0]
    assert "CLOCKWORK_HTTP_PORT" in failed([*command(root, cache)[:5]], CLOCKWORK_HTTP_PORT="80a")


# Pages of other sites


def test_a_page_of_another_site_unloads_nothing(root: Path, cache: Path) -> None:
    unload = "/v2/repository/models/dense/unload"
    with started(command(root, cache)) as (_, ready):
        port = ready["http"].rpartition(":")[2]
        for headers in (
            {"Origin": "https://evil.example", "Content-Type": "text/plain"},
            {"Host": f"evil.example:{port}", "Origin": f"http://evil.example:{port}"},
        ):
            found = call(ready["http"], unload, b"{}", headers)
            assert (found.status, "trusted_hosts" in found.json["error"]) == (403, True)
        infers(ready["http"])
        own = {"Host": f"{socket.gethostname()}:{port}", "Origin": f"http://{socket.gethostname()}:{port}"}
        assert call(ready["http"], unload, b"{}", own).status == 200
        assert call(ready["http"], "/v2/models/dense/infer", x_json([1.0] * WIDTH)).status == 404
    with started([*command(root, cache), "--trusted-hosts", "models.example.com"]) as (_, ready):
        assert call(ready["http"], unload, b"{}", {"Host": "models.example.com"}).status == 200
        assert json.dumps(call(ready["http"], "/v2/models").json) == '{"models": []}'

"""The private folder of a server and its ports."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from clockwork_serve.errors import ConfigError
from clockwork_serve.serve.supervisor.run_dir import LOCK, Ports, RunDir, remove_orphans
from tests.mounts import with_everything_read_only

# The folder of a server: private, locked by its owner, and removed after it, however that ended.


OWNER = """
import sys, time
from clockwork_serve.serve.supervisor.run_dir import RunDir
print(RunDir(sys.argv[1]).path, flush=True)
time.sleep(60)
"""


def test_it_is_private_and_removed_with_its_owner(tmp_path: Path) -> None:
    folder = RunDir(str(tmp_path))
    assert folder.path.stat().st_mode & 0o777 == 0o700
    (folder.path / "controller.sock").touch()
    folder.close()
    folder.close()
    assert list(tmp_path.iterdir()) == []


def test_the_folder_of_a_killed_owner_is_removed_and_that_of_a_living_one_stays(tmp_path: Path) -> None:
    command = [sys.executable, "-c", OWNER, str(tmp_path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as owner:
        assert owner.stdout is not None
        left = Path(owner.stdout.readline().strip())
        (left / "controller.sock").touch()
        (left / "regions").mkdir()
        living = RunDir(str(tmp_path))
        assert left.exists()
        os.kill(owner.pid, signal.SIGKILL)
        owner.wait()
    following = RunDir(str(tmp_path))
    assert not left.exists()
    assert living.path.exists()
    assert set(tmp_path.iterdir()) == {living.path, following.path}
    living.close()
    following.close()


def test_what_is_not_a_servers_folder_stays(tmp_path: Path) -> None:
    (tmp_path / "clockwork-notes").mkdir()
    (tmp_path / "clockwork-file").touch()
    other = tmp_path / "elsewhere"
    other.mkdir()
    (other / LOCK).touch()
    (tmp_path / "clockwork-link").symlink_to(other)
    remove_orphans(tmp_path)
    assert len(list(tmp_path.iterdir())) == 4
    assert (other / LOCK).exists()


def test_a_folder_that_cannot_be_made_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="run_dir: expected a folder that can be written"):
        RunDir(str(tmp_path / "nowhere"))


def test_a_folder_whose_sockets_would_have_too_long_a_path_is_refused_at_once(tmp_path: Path) -> None:
    base = tmp_path / ("x" * 100)
    base.mkdir()
    with pytest.raises(ConfigError, match=r"run_dir: socket path .* expected at most 107"):
        RunDir(str(base))
    assert list(base.iterdir()) == []


def test_another_folder_is_found_where_the_usual_ones_cannot_be_written(tmp_path: Path) -> None:
    code = OWNER.replace("time.sleep(60)", "").replace("sys.argv[1]", "''")
    command = [*with_everything_read_only(tmp_path), sys.executable, "-c", code]
    environment = {**os.environ, "XDG_RUNTIME_DIR": str(tmp_path / "none"), "TMPDIR": str(tmp_path)}
    ended = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60, check=False)
    assert ended.returncode == 0, ended.stderr
    found = Path(ended.stdout.strip())
    assert found.is_relative_to("/dev/shm") or found.parent == Path("/tmp")
    remove_orphans(found.parent)
    assert not found.exists()


def test_a_folder_whose_name_is_no_text_is_passed_over(tmp_path: Path) -> None:
    odd = tmp_path / "\udcff"
    odd.mkdir()
    code = OWNER.replace("time.sleep(60)", "").replace("sys.argv[1]", "''")
    environment = {**os.environ, "XDG_RUNTIME_DIR": str(odd), "TMPDIR": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=60, check=True
    )
    assert Path(done.stdout.strip()).parent == tmp_path
    with pytest.raises(
        ConfigError, match=r"run_dir: expected a folder that can be written; found .*udcff \(no"
    ):
        RunDir(str(odd))


# Ports are held for our own processes, and ports in use are named with a remedy.


@contextmanager
def listener(port: int = 0, *, shared: bool = False) -> Iterator[int]:
    with socket.socket() as listening:
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if shared:
            listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        listening.bind(("127.0.0.1", port))
        listening.listen()
        yield listening.getsockname()[1]


def test_chosen_ports_can_be_bound_by_our_processes_and_reached() -> None:
    ports = Ports("127.0.0.1", {"http_port": 0, "grpc_port": 0, "metrics_port": None})
    assert set(ports.number_by_name) == {"http_port", "grpc_port"}
    http = ports.number_by_name["http_port"]
    assert http != ports.number_by_name["grpc_port"]
    with (
        listener(http, shared=True),
        listener(http, shared=True),
        socket.create_connection(("127.0.0.1", http), 10),
    ):
        pass
    ports.close()


@pytest.mark.parametrize("shared", [False, True])
def test_a_taken_port_is_named_with_the_setting_and_a_remedy(*, shared: bool) -> None:
    with (
        listener(shared=shared) as taken,
        pytest.raises(
            ConfigError, match=rf"grpc_port: expected a free port; found {taken} .*--grpc-port \(0 lets"
        ),
    ):
        Ports("127.0.0.1", {"http_port": 0, "grpc_port": taken})


def test_ports_are_free_again_after_close() -> None:
    ports = Ports("127.0.0.1", {"http_port": 0})
    number = ports.number_by_name["http_port"]
    ports.close()
    Ports("127.0.0.1", {"http_port": number}).close()


def test_a_host_that_is_not_ours_is_named() -> None:
    with pytest.raises(ConfigError, match=r"http_port: cannot listen on 192\.0\.2\.1"):
        Ports("192.0.2.1", {"http_port": 0})

"""The folder of a server: private, locked by its owner, and removed after it, however that ended."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from clockwork_serve.errors import ConfigError
from clockwork_serve.serve.supervisor.run_dir import LOCK, RunDir, remove_orphans

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

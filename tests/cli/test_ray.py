"""``clockwork ray`` where Ray is not installed, and that nothing else imports it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

WITHOUT_RAY = """
import importlib.util, sys
found = importlib.util.find_spec
importlib.util.find_spec = lambda name, *more: None if name == "ray" else found(name, *more)
from clockwork_serve.cli.entry import run
code = run(sys.argv[1:])
assert "ray" not in sys.modules
sys.exit(code)
"""
SMALL = 'name = "small"\nstore = "store"\n[[workers]]\ndevice = "cpu"\n'


def clockwork(*words: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", WITHOUT_RAY, *words]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)


def test_help_needs_no_ray() -> None:
    for words in (["ray", "--help"], ["ray", "up", "--help"]):
        assert clockwork(*words).returncode == 0


@pytest.mark.parametrize("command", ["up", "down", "status"])
def test_without_ray_it_says_what_to_install(tmp_path: Path, command: str) -> None:
    file = tmp_path / "small.toml"
    file.write_text(SMALL)

    ended = clockwork("ray", command, str(file))

    assert ended.returncode == 2
    assert ended.stderr.startswith("error: ray: expected ray to be installed; found none;")
    assert "pip install './packages/clockwork-serve[ray]'" in ended.stderr


def test_a_file_that_will_not_do_is_told_first(tmp_path: Path) -> None:
    file = tmp_path / "small.toml"
    file.write_text(SMALL + "cuont = 1\n")

    ended = clockwork("ray", "up", str(file))

    assert ended.returncode == 2
    assert ended.stderr.endswith("found 'cuont'; did you mean count?\n")

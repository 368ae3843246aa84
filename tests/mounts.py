"""Commands whose file systems are read-only, or small, in a name space of their own."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

_READ_ONLY = """
for folder do
  shift
  test "$folder" = -- && break
  mount --bind "$folder" "$folder" && mount -o remount,bind,ro "$folder" || exit 99
done
"""
_SMALL = 'mount -t tmpfs -o size="$1" tmpfs "$2" && shift 2 || exit 99\n'


def with_everything_read_only(*folders: Path) -> list[str]:
    """How a command begins that can write neither to the root nor to these folders.

    Skips the test where the system lets nobody change what is mounted.
    """
    return _beginning(f"{_READ_ONLY}mount -o remount,bind,ro / || exit 99\n", *folders, "--")


def with_read_only(*folders: Path) -> list[str]:
    """How a command begins that cannot write to these folders; skips as above."""
    return _beginning(_READ_ONLY, *folders, "--")


def with_small_disk(folder: Path, size: str) -> list[str]:
    """How a command begins for which this folder is an empty file system of that size; skips as above."""
    return _beginning(_SMALL, size, folder)


def _beginning(script: str, *arguments: object) -> list[str]:
    begin = ["unshare", "--map-root-user", "--mount", "sh", "-c", f'{script}exec "$@"', "sh"]
    begin += map(str, arguments)
    try:
        tried = subprocess.run([*begin, "true"], capture_output=True, timeout=60, check=False)
    except FileNotFoundError:
        pytest.skip("needs unshare")
    if tried.returncode:
        pytest.skip(f"needs name spaces: {tried.stderr.decode()}")
    return begin

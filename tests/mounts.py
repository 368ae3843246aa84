"""Commands whose file systems are read-only, in a name space of their own."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

_SCRIPT = """
for folder do
  shift
  test "$folder" = -- && break
  mount --bind "$folder" "$folder" && mount -o remount,bind,ro "$folder" || exit 99
done
mount -o remount,bind,ro / || exit 99
exec "$@"
"""


def with_everything_read_only(*folders: Path) -> list[str]:
    """How a command begins that can write neither to the root nor to these folders.

    Skips the test where the system lets nobody change what is mounted.
    """
    begin = ["unshare", "--map-root-user", "--mount", "sh", "-c", _SCRIPT, "sh", *map(str, folders), "--"]
    try:
        tried = subprocess.run([*begin, "true"], capture_output=True, timeout=60, check=False)
    except FileNotFoundError:
        pytest.skip("needs unshare")
    if tried.returncode:
        pytest.skip(f"needs name spaces: {tried.stderr.decode()}")
    return begin

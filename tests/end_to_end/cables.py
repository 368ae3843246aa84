"""A network of its own for a process, and a cable to it that can be pulled."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass

import pytest

_NETWORK = os.getpid() % 0x4000
HERE, THERE = (f"10.177.{_NETWORK >> 6}.{(_NETWORK & 0x3F) * 4 + end}" for end in (1, 2))
"""Both ends of a cable, which another process that runs tests does not use."""


@dataclass
class Cable:
    """From here to a network namespace."""

    namespace: str
    near: str

    @property
    def there(self) -> tuple[str, ...]:
        """Before a command that is to run there."""
        return ("ip", "netns", "exec", self.namespace)

    def pull(self) -> None:
        ip("link", "set", self.near, "down")

    def put_back(self) -> None:
        ip("link", "set", self.near, "up")


def ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, capture_output=True)


@contextmanager
def laid() -> Iterator[Cable]:
    """One to a network namespace, until the end of the block."""
    if shutil.which("ip") is None:
        pytest.skip("no ip(8) here, which makes network namespaces")
    name, near, far = f"cw{os.getpid()}", f"cwn{os.getpid()}", f"cwf{os.getpid()}"
    try:
        ip("netns", "add", name)
        ip("link", "add", near, "type", "veth", "peer", "name", far, "netns", name)
        ip("addr", "add", f"{HERE}/30", "dev", near)
        ip("link", "set", near, "up")
        ip("-n", name, "addr", "add", f"{THERE}/30", "dev", far)
        ip("-n", name, "link", "set", far, "up")
        ip("-n", name, "link", "set", "lo", "up")  # a worker and a gateway there reach each other by it
    except subprocess.CalledProcessError as error:
        with suppress(subprocess.CalledProcessError):
            ip("netns", "del", name)
        pytest.skip(f"network namespaces are not permitted here: {error.stderr.decode().strip()}")
    try:
        yield Cable(name, near)
    finally:
        ip("netns", "del", name)

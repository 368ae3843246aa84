"""Servers that listen on all interfaces get a network in which there is nothing but loopback."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from comparison.peers.run import unshare_command, why_not_isolated

ROOT = Path(__file__).parents[3]
WHY_NOT = why_not_isolated(unshare_command())
INSIDE = """
import json, os, socket
from comparison.peers.run import isolate
os.environ["PEERS_ISOLATED"] = "1"
assert isolate() == ""
with socket.create_server(("0.0.0.0", 0)) as server, socket.create_connection(server.getsockname()):
    print(json.dumps([name for _, name in socket.if_nameindex()]))
"""


@pytest.mark.skipif(bool(WHY_NOT), reason=WHY_NOT or "it can be made")
def test_there_is_loopback_and_it_works() -> None:
    command = [*unshare_command(), sys.executable, "-c", INSIDE]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=60, check=True)

    assert "lo" in json.loads(done.stdout)
    assert not {"eth0", "docker0"} & {*json.loads(done.stdout)}


def test_where_there_can_be_none_it_says_why() -> None:
    assert "no program unshare" in why_not_isolated([])
    assert "no network namespace can be made" in why_not_isolated(["false"])

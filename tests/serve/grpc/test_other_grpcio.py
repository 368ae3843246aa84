"""A grpcio whose private part is not as expected: a gateway that is to serve gRPC says so, and ends."""

from __future__ import annotations

import re
import subprocess
import sys
import tomllib
from pathlib import Path

import grpc
import pytest

import clockwork_serve
from clockwork_serve.serve.grpc.server import SUPPORTED_GRPCIO

ROOT = Path(__file__).parents[3]
GATEWAY = """
import asyncio
import sys
from pathlib import Path
from grpc._cython import cygrpc

{changed}

from clockwork_serve.config import Settings
from clockwork_serve.errors import ConfigError
from clockwork_serve.serve.gateway.settings import GatewayConfig
from clockwork_serve.serve.processes.gateway import serve

settings = Settings(host="127.0.0.1", http_port=0, grpc_port=0, metrics_port=None)
try:
    asyncio.run(serve(GatewayConfig(run_dir=sys.argv[1], name="g0", settings=settings), asyncio.Event()))
except ConfigError as error:
    print(error)
"""
# What another release might have done, and what is said of it.
CHANGED = {
    "a class is gone": ("del cygrpc.RequestCallEvent", "without RequestCallEvent, RequestCallEvent.call"),
    "a constructor takes something else": (
        """
class Server(cygrpc.Server):
    def __new__(cls, only):
        pass

cygrpc.Server = Server
""",
        "where a trial call ends with TypeError: .*Server",
    ),
    "a method takes something else": (
        """
class Queue(cygrpc.CompletionQueue):
    def poll(self):
        pass

cygrpc.CompletionQueue = Queue
""",
        "where a trial call ends with TypeError: .*poll",
    ),
    "an answer is another": (
        """
Send = cygrpc.SendMessageOperation
cygrpc.SendMessageOperation = lambda message, flags: Send(b"other", flags)
""",
        "where a trial call ends with ValueError: other answers",
    ),
    "what is asked for in the loop raises": (
        """
def refuse(*given):
    raise LookupError("other flags")

cygrpc.SendStatusFromServerOperation = refuse
""",
        "where a trial call ends with LookupError: other flags",
    ),
    "the module is gone": (
        """
import grpc._cython

del grpc._cython.cygrpc
sys.modules["grpc._cython.cygrpc"] = None
""",
        "which cannot be imported from",
    ),
}


@pytest.mark.parametrize("change", CHANGED)
def test_a_gateway_says_what_is_missing_and_what_to_install(tmp_path: Path, change: str) -> None:
    changed, said = CHANGED[change]
    ended = subprocess.run(
        [sys.executable, "-c", GATEWAY.format(changed=changed), str(tmp_path)], cwd=ROOT, text=True,
        capture_output=True, timeout=120, check=False,
    )  # fmt: skip
    found = f"expected one whose core this server can drive, found {re.escape(grpc.__version__)}, {said}"
    assert re.match(f"grpcio: {found}.*; install grpcio{re.escape(SUPPORTED_GRPCIO)}, or", ended.stdout), (
        ended
    )
    assert (ended.returncode, ended.stdout.count("\n"), "Traceback" in ended.stderr) == (0, 1, False), ended


def test_the_versions_that_the_error_asks_for_are_those_of_the_distribution() -> None:
    project = tomllib.loads((ROOT / "packages" / "clockwork-serve" / "pyproject.toml").read_text())["project"]
    assert f"grpcio{SUPPORTED_GRPCIO}" in project["dependencies"]


def test_one_module_knows_what_is_private_to_grpcio() -> None:
    private = re.compile(r"^\s*(from|import) grpc\._", re.MULTILINE)
    package = Path(clockwork_serve.__file__).parent
    assert [path.name for path in package.rglob("*.py") if private.search(path.read_text())] == ["core.py"]

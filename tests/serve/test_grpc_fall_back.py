"""A grpcio whose private part is not as expected: a gateway starts, warns, and serves by ``grpc.aio``."""

from __future__ import annotations

import re
import subprocess
import sys
import tomllib
from pathlib import Path

import grpc
import numpy as np
import pytest
import tritonclient.grpc

import clockwork_serve
from clockwork_serve.serve.grpc.server import SUPPORTED_GRPCIO

ROOT = Path(__file__).parents[2]
GATEWAY = """
import sys
from pathlib import Path
from grpc._cython import cygrpc

{changed}

from tests.serve.gateway.running import running_gateway

with running_gateway(Path(sys.argv[1]), grpc_port=0) as found:
    print(found.grpc_url, flush=True)
    sys.stdin.read()
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
def test_the_server_starts_warns_and_serves(tmp_path: Path, change: str) -> None:
    changed, said = CHANGED[change]
    with subprocess.Popen(
        [sys.executable, "-c", GATEWAY.format(changed=changed), str(tmp_path)], cwd=ROOT, text=True,
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    ) as process:  # fmt: skip
        assert process.stdout is not None
        url = process.stdout.readline().strip()
        client = tritonclient.grpc.InferenceServerClient(url or "127.0.0.1:9")
        x = np.array([[1.5, -2]], np.float32)
        tensor = tritonclient.grpc.InferInput("X", [1, 2], "FP32")
        tensor.set_data_from_numpy(x)
        try:
            answer = client.infer("ident", [tensor]).as_numpy("Y") if url else None
        finally:
            client.close()
            _, errors = process.communicate(timeout=60)
    assert url, errors
    np.testing.assert_array_equal(answer, x)
    warning = (
        f"grpcio: expected one whose core this server can drive, found {re.escape(grpc.__version__)},? {said}"
    )
    assert re.search(warning, errors), errors
    assert f"install grpcio{SUPPORTED_GRPCIO}" in errors
    assert (process.returncode, errors.count("grpcio: "), "Traceback" in errors) == (0, 1, False), errors


def test_the_versions_that_the_warning_asks_for_are_those_of_the_distribution() -> None:
    project = tomllib.loads((ROOT / "packages" / "clockwork-serve" / "pyproject.toml").read_text())["project"]
    assert f"grpcio{SUPPORTED_GRPCIO}" in project["dependencies"]


def test_one_module_knows_what_is_private_to_grpcio() -> None:
    private = re.compile(r"^\s*(from|import) grpc\._", re.MULTILINE)
    package = Path(clockwork_serve.__file__).parent
    assert [path.name for path in package.rglob("*.py") if private.search(path.read_text())] == ["core.py"]

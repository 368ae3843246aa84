"""A real Triton server comes and goes as it should."""

from __future__ import annotations

import json
import os
import signal
import urllib.request
from pathlib import Path

import pytest

from comparison.triton import SHARED, identity, running_triton, why_not

pytestmark = [pytest.mark.system, pytest.mark.skipif(bool(why_not()), reason=why_not() or "it is here")]


def test_it_serves_python_models_and_leaves_no_process(tmp_path: Path) -> None:
    repository = tmp_path / "models"
    tensor = {"name": "X", "shape": [1, 3], "datatype": "FP32", "data": [1, -2.5, 3]}
    with running_triton(repository, identity(), identity("other")) as triton:
        body = json.dumps({"inputs": [tensor]}).encode()
        with urllib.request.urlopen(f"{triton.http_url}/v2/models/identity/infer", body, 10) as response:
            assert json.load(response)["outputs"][0]["data"] == [1, -2.5, 3]
        assert len(triton.stubs()) == 2
        pids = triton.pids()

    assert [pid for pid in pids if Path(f"/proc/{pid}").exists()] == []


def test_what_a_killed_one_leaves_behind_is_ended(tmp_path: Path) -> None:
    with running_triton(tmp_path / "models", identity()) as triton:
        (stub,) = triton.stubs()
        region = Path(f"/proc/{stub}/cmdline").read_bytes().split(b"\0")[2].decode()
        assert (SHARED / region).exists()
        os.kill(triton.pid, signal.SIGKILL)

    assert triton.stubs() == []
    assert not (SHARED / region).exists()


def test_one_that_does_not_start_says_why(tmp_path: Path) -> None:
    with (
        pytest.raises(RuntimeError, match="TYPE_NOSUCH"),
        running_triton(tmp_path / "models", identity(datatype="NOSUCH")),
    ):
        pass

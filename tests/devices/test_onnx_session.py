"""Sessions of ONNX Runtime, seen from outside: what a process that has one leaves behind."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

OPENS = """
import sys, time
from onnx import TensorProto, helper
from clockwork_serve.devices.onnx_session import open_session

ends = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [1]) for name in "xy"]
graph = helper.make_graph([helper.make_node("Identity", ["x"], ["y"])], "g", ends[:1], ends[1:])
model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)
with open(sys.argv[1], "wb") as file:
    file.write(model.SerializeToString())
open_session(sys.argv[1], 1)
"""


def test_onnx_runtime_keeps_no_records_of_its_use(tmp_path: Path) -> None:
    home, graph = tmp_path / "home", tmp_path / "model.onnx"
    home.mkdir()
    environment = {key: value for key, value in os.environ.items() if key != "ORT_DISABLE_TELEMETRY"}
    environment |= {"HOME": str(home), "XDG_CACHE_HOME": str(home / "cache")}
    command = [sys.executable, "-c", OPENS, str(graph)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    assert [str(path) for path in home.rglob("*")] == []

"""One server for all stock clients, with a model for every datatype, and each client behind one face."""

from __future__ import annotations

import asyncio
import inspect
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import onnx
import pytest
import tritonclient.grpc
import tritonclient.grpc.aio
import tritonclient.http
import tritonclient.http.aio
from onnx import TensorProto, helper
from tritonclient.utils import InferenceServerException

from clockwork_serve.units import MIB
from harness import repositories
from harness.serving import Serving
from tests.end_to_end.conftest import example_models

CLIENTS: dict[str, ModuleType] = {
    "http": tritonclient.http,
    "http.aio": tritonclient.http.aio,
    "grpc": tritonclient.grpc,
    "grpc.aio": tritonclient.grpc.aio,
}

KINDS = {
    "BOOL": TensorProto.BOOL, "UINT8": TensorProto.UINT8, "UINT16": TensorProto.UINT16,
    "UINT32": TensorProto.UINT32, "UINT64": TensorProto.UINT64, "INT8": TensorProto.INT8,
    "INT16": TensorProto.INT16, "INT32": TensorProto.INT32, "INT64": TensorProto.INT64,
    "FP16": TensorProto.FLOAT16, "BF16": TensorProto.BFLOAT16, "FP32": TensorProto.FLOAT,
    "FP64": TensorProto.DOUBLE, "BYTES": TensorProto.STRING,
}  # fmt: skip
"""The protocol's datatypes by ONNX's."""
SLOW_S = 0.2


def echo(root: Path, datatype: str) -> None:
    """``y = x`` of one datatype, three columns wide."""
    x, y = (helper.make_tensor_value_info(name, KINDS[datatype], ["n", 3]) for name in "xy")
    graph = helper.make_graph([helper.make_node("Identity", ["x"], ["y"])], "echo", [x], [y])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)
    folder = root / f"echo_{datatype}" / "1"
    folder.mkdir(parents=True)
    onnx.save(model, str(folder / "model.onnx"))


def bytes_echo(root: Path) -> None:
    """``y = x`` of BYTES of any kind, which a graph's strings are not."""
    folder = root / "any_bytes" / "1"
    folder.mkdir(parents=True)
    (folder / "model.py").write_text(repositories.echoing())
    tensor = '[{name = "%s", dims = [1], datatype = "BYTES"}]'
    (root / "any_bytes" / "clockwork.toml").write_text(
        f'backend = "python"\nmax_batch_size = 4\nmemory_bytes = 65536\noutput_bytes = 65536\n'
        f"inputs = {tensor % 'x'}\noutputs = {tensor % 'y'}\n"
    )


COLOURS = ("red", "green", "blue")
IMAGES = {"image_nchw": ("NCHW", 8), "image_nhwc": ("NHWC", 8), "image_alone": ("NCHW", 0)}
"""Models of pictures: how pixels lie, and ``max_batch_size``; without batches, one that is reshaped."""


def image(root: Path, name: str) -> None:
    """Which colour a picture of 4 x 6 pixels has most of."""
    layout, batch = IMAGES[name]
    sizes = [3, 4, 6] if layout == "NCHW" else [4, 6, 3]
    rows, means = (["n"], [3]) if batch else ([1], [3, 1, 1])
    pixels = helper.make_tensor_value_info("pixels", TensorProto.FLOAT, [*rows, *sizes])
    colour = helper.make_tensor_value_info("colour", TensorProto.FLOAT, [*rows, *means])
    axes = [layout.index(axis) for axis in "HW"]
    mean = helper.make_node("ReduceMean", ["pixels"], ["colour"], axes=axes, keepdims=int(not batch))
    given, told = ("", "") if batch else (f"reshape {{ shape: {[1, *size]} }}" for size in (sizes, means))
    graph = helper.make_graph([mean], "image", [pixels], [colour])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)
    folder = root / name
    (folder / "1").mkdir(parents=True)
    onnx.save(model, str(folder / "1" / "model.onnx"))
    (folder / "colours.txt").write_text("\n".join(COLOURS))
    (folder / "config.pbtxt").write_text(
        f"""platform: "onnxruntime_onnx" max_batch_size: {batch}
        input [ {{ name: "pixels" data_type: TYPE_FP32 format: FORMAT_{layout} dims: {sizes} {given} }} ]
        output {{ name: "colour" data_type: TYPE_FP32 dims: [3] {told} label_filename: "colours.txt" }}
        parameters {{ key: "scaling" value {{ string_value: "NONE" }} }}
        metric_tags {{ key: "team" value: "vision" }}"""
    )


class Stock:
    """A stock client of any kind. ``stock("infer", ...)`` calls a method, and waits for it if need be."""

    def __init__(self, name: str, server: Serving) -> None:
        self.name = name
        self.module = CLIENTS[name]
        self.server = server
        self.called: set[str] = set()
        self._loop = asyncio.new_event_loop()
        self.client: Any = self.wait(self._open())

    @property
    def grpc(self) -> bool:
        return self.name.startswith("grpc")

    @property
    def aio(self) -> bool:
        return self.name.endswith("aio")

    def __call__(self, method: str, *given: Any, **more: Any) -> Any:
        self.called.add(method)
        if "headers" in more:
            more["headers"] = dict(more["headers"])  # some clients add their own to it
        found = getattr(self.client, method)(*given, **more)
        return self.wait(found) if inspect.isawaitable(found) else found

    def wait(self, awaitable: Any) -> Any:
        return self._loop.run_until_complete(awaitable)

    def plain(self, method: str, *given: Any, **more: Any) -> Any:
        """What a method tells, as JSON, whatever the protocol."""
        return self(method, *given, **more, **({"as_json": True} if self.grpc else {}))

    def tensor(self, name: str, data: Any, datatype: str, **more: Any) -> Any:
        found = self.module.InferInput(name, list(data.shape), datatype)
        found.set_data_from_numpy(data, **more)
        return found

    def wish(self, name: str, **more: Any) -> Any:
        return self.module.InferRequestedOutput(name, **more)

    def refusal(self, method: str, *given: Any, words: str, **more: Any) -> str:
        """The status with which a call is refused; its message must match ``words``."""
        with pytest.raises(InferenceServerException, match=words) as caught:
            self(method, *given, **more)
        return str(caught.value.status()).removeprefix("StatusCode.")

    def close(self) -> None:
        self("close")
        self._loop.run_until_complete(self._loop.shutdown_asyncgens())
        self._loop.close()

    async def _open(self) -> Any:
        url = self.server.grpc_url if self.grpc else self.server.http_url.removeprefix("http://")
        return self.module.InferenceServerClient(url)


Start = Callable[..., AbstractContextManager[Serving]]


@pytest.fixture(scope="session")
def stock_repository(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Models of all kinds that stock clients ask for."""
    root = tmp_path_factory.mktemp("stock") / "models"
    example_models(root)
    for datatype in KINDS:
        echo(root, datatype)
    bytes_echo(root)
    for name in IMAGES:
        image(root, name)
    repositories.sleeper(root, "slow", SLOW_S)
    repositories.one_matrix(root, "spare", np.eye(4, dtype=np.float32))
    return root


def start_stock(start: Start, root: Path) -> AbstractContextManager[Serving]:
    """A server of that repository, for the time of a block."""
    # The slow model is in the others' way, as it should be: without this they would be refused.
    return start(root, memory_bytes=16 * MIB, slo_ms=20_000, shared_memory="/clockwork-stock-")


@pytest.fixture(scope="session")
def stock_server(stock_repository: Path, start: Start) -> Iterator[Serving]:
    """The server that stock clients ask; none may harm it."""
    with start_stock(start, stock_repository) as serving:
        yield serving


@pytest.fixture(params=CLIENTS)
def stock(request: pytest.FixtureRequest, stock_server: Serving) -> Iterator[Stock]:
    """Each of the four clients."""
    found = Stock(request.param, stock_server)
    yield found
    found.close()

"""What Triton's image clients do, in every mode: they order pixels by the model's configuration."""

from __future__ import annotations

import queue
from collections.abc import AsyncIterator
from typing import Any

import numpy as np
import pytest
from tritonclient.grpc import model_config_pb2

from tests.end_to_end.stock.conftest import COLOURS, IMAGES, Stock

FORMATS = model_config_pb2.ModelInput.Format


def described(stock: Stock, model: str) -> tuple[Any, Any]:
    """A model's metadata and configuration, as the client gives them."""
    metadata, config = stock("get_model_metadata", model), stock("get_model_config", model)
    return metadata, (config.config if stock.grpc else config)


def of(stock: Stock, record: Any, name: str) -> Any:
    return getattr(record, name) if stock.grpc else record[name]


def prepared(stock: Stock, model: str, colours: list[int]) -> np.ndarray[Any, Any]:
    """Pictures that are mostly of these colours, their pixels as the configuration asks for them."""
    metadata, config = described(stock, model)
    (known,), (declared,) = of(stock, metadata, "inputs"), of(stock, config, "input")
    layout = of(stock, declared, "format")
    layout = FORMATS.Value(layout) if isinstance(layout, str) else layout
    assert layout in (FORMATS.Value("FORMAT_NCHW"), FORMATS.Value("FORMAT_NHWC"))
    shape = [int(dim) for dim in of(stock, known, "shape")]
    batched = of(stock, config, "max_batch_size") > 0
    sizes = shape[1:] if batched else shape
    height, width, channels = sizes if layout == FORMATS.Value("FORMAT_NHWC") else (*sizes[1:], sizes[0])
    picture = np.full((len(colours), height, width, channels), 0.25, np.float32)
    for row, colour in enumerate(colours):
        picture[row, :, : width - 1, colour] = 1
    ordered = picture if layout == FORMATS.Value("FORMAT_NHWC") else picture.transpose(0, 3, 1, 2)
    return np.ascontiguousarray(ordered if batched else ordered[0])


def infer(stock: Stock, model: str, *given: Any, **more: Any) -> Any:
    return stock("infer", model, *given, **more)


def later(stock: Stock, model: str, *given: Any, **more: Any) -> Any:
    if not stock.grpc:
        return stock("async_infer", model, *given, **more).get_result()
    ends: queue.Queue[Any] = queue.Queue()
    stock("async_infer", model, *given, lambda result, error: ends.put((result, error)), **more)
    result, error = ends.get(timeout=60)
    assert error is None
    return result


def streamed(stock: Stock, model: str, inputs: list[Any], **more: Any) -> Any:
    if stock.aio:
        return stock.wait(_only(stock, {"model_name": model, "inputs": inputs, **more}))
    ends: queue.Queue[Any] = queue.Queue()
    stock("start_stream", callback=lambda result, error: ends.put((result, error)))
    stock("async_stream_infer", model, inputs, **more)
    result, error = ends.get(timeout=60)
    stock("stop_stream")
    assert error is None
    return result


async def _only(stock: Stock, request: dict[str, Any]) -> Any:
    async def asked() -> AsyncIterator[dict[str, Any]]:
        yield request

    ((result, error),) = [end async for end in stock("stream_infer", asked())]
    assert error is None
    return result


MODES = {
    "infer": (infer, ("http", "http.aio", "grpc", "grpc.aio")),
    "async": (later, ("http", "grpc")),
    "streaming": (streamed, ("grpc", "grpc.aio")),
}
CASES = [
    pytest.param(name, mode, id=f"{name}-{mode}") for mode, (_, names) in MODES.items() for name in names
]


@pytest.mark.parametrize(("stock", "mode"), CASES, indirect=["stock"])
@pytest.mark.parametrize("model", IMAGES)
def test_pictures_are_told_by_their_classes(stock: Stock, mode: str, model: str) -> None:
    colours = [2, 0, 1, 2] if IMAGES[model][1] else [1]
    pictures = prepared(stock, model, colours)
    for classes in (1, 3):
        tensor = stock.tensor("pixels", pictures, "FP32")
        wish = stock.wish("colour", class_count=classes)
        result = MODES[mode][0](stock, model, [tensor], outputs=[wish], request_id="7")
        response = result.get_response()
        assert (response.id if stock.grpc else response["id"]) == "7"
        rows = result.as_numpy("colour").reshape(len(colours), classes)
        best = [row[0].decode().split(":") for row in rows]
        assert [(int(index), label) for _, index, label in best] == [(n, COLOURS[n]) for n in colours]


def test_a_model_tells_its_clients_what_its_configuration_says(stock: Stock) -> None:
    _, config = described(stock, "image_nchw")
    parameters = of(stock, config, "parameters")
    assert of(stock, parameters["scaling"], "string_value") == "NONE"
    assert dict(of(stock, config, "metric_tags")) == {"team": "vision"}

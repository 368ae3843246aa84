"""One request by a public client."""

from __future__ import annotations

import numpy as np
import tritonclient.grpc
import tritonclient.http
from tritonclient.utils import np_to_triton_dtype

from harness.serving import Serving


def ask(
    server: Serving, protocol: str, model: str, inputs: dict[str, np.ndarray], **more: object
) -> dict[str, np.ndarray]:
    """All outputs of one request through an unmodified client."""
    module = tritonclient.http if protocol == "http" else tritonclient.grpc
    url = server.http_url.removeprefix("http://") if protocol == "http" else server.grpc_url
    tensors = []
    for name, array in inputs.items():
        tensors.append(module.InferInput(name, list(array.shape), np_to_triton_dtype(array.dtype)))
        tensors[-1].set_data_from_numpy(array)
    with module.InferenceServerClient(url) as client:
        result = client.infer(model, tensors, parameters={"slo_ms": 10_000}, **more)
    response = result.get_response()
    names = (
        [one["name"] for one in response["outputs"]]
        if protocol == "http"
        else [o.name for o in response.outputs]
    )
    return {name: result.as_numpy(name) for name in names}

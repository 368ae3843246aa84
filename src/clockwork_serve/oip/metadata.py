"""Descriptions of the server and its models as both protocols give them; it asks nobody."""

from __future__ import annotations

from typing import Any, Final

from clockwork_serve.messages import TensorSpec
from clockwork_serve.oip.served import Served

SERVER_NAME: Final = "clockwork-serve"
EXTENSIONS: Final = (
    "binary_tensor_data", "classification", "model_configuration", "model_repository", "parameters",
    "statistics",
)  # fmt: skip
"""Extensions of the protocol that this server always has."""


def server_metadata(version: str, *more: str) -> dict[str, Any]:
    """Who serves, and what of the protocol; ``more`` are extensions that were turned on."""
    return {"name": SERVER_NAME, "version": version, "extensions": sorted((*EXTENSIONS, *more))}


def model_metadata(served: Served, versions: list[str]) -> dict[str, Any]:
    """A model's inputs and outputs, with the batch axis as -1, and the versions of it that are served."""
    code = served.code
    return {
        "name": served.model.name,
        "versions": versions,
        "platform": served.model.platform,
        "inputs": [_tensor(served, spec) for spec in code.inputs],
        "outputs": [_tensor(served, spec) for spec in code.outputs],
    }


def _tensor(served: Served, spec: TensorSpec) -> dict[str, Any]:
    return {"name": spec.name, "datatype": spec.datatype, "shape": served.shown_shape(spec)}

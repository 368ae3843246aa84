"""Any of the models, for Triton's Python backend."""

from __future__ import annotations

import os
import sys
from typing import Any

import numpy as np


class TritonPythonModel:
    """One model."""

    def initialize(self, args: dict[str, Any]) -> None:
        """It is called as its folder is. The backend's process takes no ``PYTHONPATH``."""
        sys.path.append(os.environ["PYTHONPATH"])
        from comparison.peers import served

        self._run = served.load(args["model_name"])

    def execute(self, requests: list[Any]) -> list[Any]:
        """A batch, as one call."""
        import triton_python_backend_utils as utils

        inputs = [utils.get_input_tensor_by_name(one, "x").as_numpy() for one in requests]
        found = self._run(np.concatenate(inputs) if len(inputs) > 1 else inputs[0])
        responses, at = [], 0
        for one in inputs:
            rows = np.ascontiguousarray(found[at : at + len(one)])
            responses.append(utils.InferenceResponse([utils.Tensor("y", rows)]))
            at += len(one)
        return responses

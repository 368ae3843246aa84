"""A runtime that runs any of the models."""

from __future__ import annotations

import asyncio

import numpy as np
from mlserver import MLModel
from mlserver.codecs import NumpyCodec
from mlserver.types import InferenceRequest, InferenceResponse

from comparison.peers import served


class Model(MLModel):
    """One model."""

    async def load(self) -> bool:
        """It is called as its folder is."""
        self._run = served.load(self.name)
        return True

    async def predict(self, payload: InferenceRequest) -> InferenceResponse:
        """In a thread, so that others are listened to meanwhile."""
        x = np.ascontiguousarray(NumpyCodec.decode_input(payload.inputs[0]), np.float32)
        found = await asyncio.get_running_loop().run_in_executor(
            None, self._run, x.reshape(-1, *served.shape())
        )
        return InferenceResponse(
            id=payload.id, model_name=self.name, outputs=[NumpyCodec.encode_output("y", found)]
        )

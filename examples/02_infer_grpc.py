"""Sends texts to a model that is a Python class, over gRPC. First: clockwork serve examples/models."""

from __future__ import annotations

import sys

import numpy as np
from tritonclient import grpc

URL = sys.argv[1] if len(sys.argv) > 1 else "127.0.0.1:8001"

client = grpc.InferenceServerClient(URL)

texts = np.array([["a man a plan a canal"], ["never odd or even"]], object)
tensor = grpc.InferInput("text", [2, 1], "BYTES")
tensor.set_data_from_numpy(texts)

answer = client.infer("words", [tensor])
for count, backwards in zip(answer.as_numpy("words"), answer.as_numpy("reversed"), strict=True):
    print(f"{count[0]} words; backwards: {backwards[0].decode()}")

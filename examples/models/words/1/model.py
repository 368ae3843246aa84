"""Counts the words of a text and turns the text round: a model that is a Python class."""

import numpy as np


class Model:
    """Called by one thread: load once, infer for every batch, unload at the end."""

    def load(self, path: str) -> None:
        """Read what is needed from the folder ``path``; this model needs nothing."""

    def infer(self, inputs: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        """``text`` [batch, 1] of bytes to ``words`` [batch, 1] and ``reversed`` [batch, 1]."""
        texts = [text.decode() for text in inputs["text"].reshape(-1)]
        return {
            "words": np.array([[len(text.split())] for text in texts], np.int32),
            "reversed": np.array([[text[::-1].encode()] for text in texts], object),
        }

    def unload(self) -> None:
        """Let go of what load took; here, nothing."""

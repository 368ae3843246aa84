"""What a version of a model compiled to, as it is kept between runs; no logic beyond its own fields."""

from __future__ import annotations

from msgspec import Struct

from clockwork_serve.messages import Weights
from clockwork_serve.store.cache import Cache

_UNLIFTED_FACTOR = 2
"""Memory that an ordinary session takes, as a multiple of its file (measured: 1.6, more while it opens)."""


class Compiled(Struct, frozen=True, kw_only=True):
    """What a model file and its settings compiled to. ``weights_bytes`` is the size of the stored file."""

    code_id: str
    weights_id: str
    weights_bytes: int
    lifted: bool
    max_batch_size: int
    batch_sizes: tuple[int, ...]
    output_bytes: int
    warnings: tuple[str, ...] = ()

    def weights(self, cache: Cache) -> Weights:
        """The weights record, with its path in this cache."""
        return Weights(
            weights_id=self.weights_id,
            path=str(cache.weights_path(self.weights_id)),
            size=self.weights_bytes if self.lifted else _UNLIFTED_FACTOR * self.weights_bytes,
        )

    def present(self, cache: Cache) -> bool:
        """Whether code and weights are both still there, and whole."""
        whole = cache.has_weights(self.weights_id, self.weights_bytes)
        return whole and cache.code(self.code_id) is not None


def batch_sizes(max_batch_size: int) -> tuple[int, ...]:
    """The powers of two below ``max_batch_size``, and that itself; 1 alone if there is no batch."""
    sizes = []
    size = 1
    while size < max_batch_size:
        sizes.append(size)
        size *= 2
    return (*sizes, max(max_batch_size, 1))


def fine_batch_sizes(max_batch_size: int) -> tuple[int, ...]:
    """For codes that run what there is, unpadded: every size up to 8, then four between powers of two."""
    sizes = []
    size = 1
    while size < max_batch_size:
        sizes.append(size)
        size += 1 << max(0, size.bit_length() - 3)
    return (*sizes, max(max_batch_size, 1))

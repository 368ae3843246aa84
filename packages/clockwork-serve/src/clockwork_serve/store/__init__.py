"""The model repository, its compilation into code and weights, and the cache of artefacts.

It depends on no scheduler, device or process. Modules that need ONNX or its runtime are imported on first
use: most processes only need the records.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from clockwork_serve.store.repository import Entry, Repository
from clockwork_serve.store.settings import (
    Damage,
    ModelSettings,
    Problem,
    ProblemError,
    ServedVersion,
    StoreConfig,
)
from clockwork_serve.store.trial import Fill, generate_inputs

if TYPE_CHECKING:
    from clockwork_serve.store.cache import Cache, opened_code
    from clockwork_serve.store.catalogue import CatalogueCompiler, CatalogueRepository, publish
    from clockwork_serve.store.compiler import Compiler, compile_all
    from clockwork_serve.store.optimiser import runtime_fingerprint

_MODULE_OF = {
    "Cache": "cache", "opened_code": "cache", "CatalogueCompiler": "catalogue",
    "CatalogueRepository": "catalogue", "publish": "catalogue", "Compiler": "compiler",
    "compile_all": "compiler",
    "runtime_fingerprint": "optimiser",
}  # fmt: skip

__all__ = [
    "Cache", "CatalogueCompiler", "CatalogueRepository", "Compiler", "Damage", "Entry", "Fill",
    "ModelSettings", "Problem", "ProblemError",
    "Repository", "ServedVersion", "StoreConfig", "compile_all", "generate_inputs", "opened_code",
    "publish",
    "runtime_fingerprint",
]  # fmt: skip


def __getattr__(name: str) -> Any:
    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_MODULE_OF[name]}"), name)


def opened(root: str, config: StoreConfig) -> Repository:
    """The repository at a path, or without one the catalogue of the shared store, which loads compilers.

    Raises ``RepositoryError`` if there is none.
    """
    if root or not config.shared:
        return Repository(root, config)
    from clockwork_serve.store.catalogue import CatalogueRepository as InStore

    return InStore(config)

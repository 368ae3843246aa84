"""The model repository, its compilation into code and weights, and the cache of what was compiled.

It knows nothing of schedulers, devices or processes.
"""

from __future__ import annotations

from clockwork_serve.store.cache import Cache
from clockwork_serve.store.compiler import Compiler, Progress, Served, codes_of, compile_all, compile_model
from clockwork_serve.store.lifting import Index, IndexedTensor
from clockwork_serve.store.problems import Problem, ProblemError
from clockwork_serve.store.repository import Entry, Repository
from clockwork_serve.store.settings import ModelSettings, StoreConfig, VersionPolicy
from clockwork_serve.store.trial import Fill, made_up

__all__ = [
    "Cache", "Compiler", "Entry", "Fill", "Index", "IndexedTensor", "ModelSettings", "Problem",
    "ProblemError", "Progress", "Repository", "Served", "StoreConfig", "VersionPolicy", "codes_of",
    "compile_all", "compile_model", "made_up",
]  # fmt: skip

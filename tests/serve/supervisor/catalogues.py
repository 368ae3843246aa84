"""Models as the supervisor has compiled and profiled them."""

from __future__ import annotations

from collections.abc import Iterable

from clockwork_serve.messages import Frame, Profile
from clockwork_serve.serve.supervisor.catalogue import Catalogue
from clockwork_serve.serve.supervisor.preparation import PreparedRepository
from clockwork_serve.store import Problem, ServedVersion
from harness import records


def served(key: str, code_id: str = "c1", priority: int = 0) -> ServedVersion:
    name, version = key.split("/")
    code = records.code(code_id, (1,), backend="onnx", path="/c", inputs=(), outputs=())
    model = records.model(name, code_id, version=version, sizes=(1,), size=1, path="/w", priority=priority)
    return ServedVersion(model=model, code=code)


def profile(code_id: str = "c1", infer_ns: int = 5) -> Profile:
    return records.profile(code_id, {1: infer_ns}, load_ns=1, device_kind="cpu", load_ns_per_mib=1)


def prepared(
    names: Iterable[str],
    served: Iterable[ServedVersion],
    profiles: Iterable[Profile],
    problems: Iterable[Problem],
) -> PreparedRepository:
    return PreparedRepository(
        names=tuple(names), served=tuple(served), profiles=tuple(profiles), problems=tuple(problems)
    )


def put(
    catalogue: Catalogue,
    names: Iterable[str],
    served: Iterable[ServedVersion],
    profiles: Iterable[Profile],
    problems: Iterable[Problem],
) -> list[Frame]:
    return catalogue.put(prepared(names, served, profiles, problems))

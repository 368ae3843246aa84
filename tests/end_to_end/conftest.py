"""Servers made of real processes, and clients for them. Every test here starts or uses one."""

from __future__ import annotations

import json
import shutil
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

ROOT = Path(__file__).parents[2]
from clockwork_serve.units import MIB  # noqa: E402
from harness import repositories  # noqa: E402
from harness.serving import Serving, serve  # noqa: E402

if TYPE_CHECKING:
    from tests.end_to_end.cables import Cable

Floats = repositories.Floats
WIDE, LONG = 64, 16
MATRICES = 30
SMALL = 16 * MIB
"""Memory of a CPU device: a virtual machine whose host gives it slowly takes 6 ms of CPU to touch a MiB."""
PATIENT_SLO_MS = 20_000.0
"""For requests that name no SLO: the usual default of 100 ms is more than a busy machine can keep."""

MOODY = repositories.echoing(
    "import os",
    """
    if mood == 13.0:
        raise ValueError("thirteen is not served")
    if mood == 666.0:
        os.abort()
    """,
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """All tests of this folder start processes."""
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.system)


@dataclass(slots=True)
class Response:
    """Status, headers and JSON of a response."""

    status: int
    headers: dict[str, str]
    json: Any


def call(url: str, path: str, body: bytes | None = None, headers: dict[str, str] | None = None) -> Response:
    """One plain HTTP request; any status is an answer."""
    request = urllib.request.Request(f"{url}{path}", data=body, headers=headers or {})
    try:
        with urllib.request.urlopen(request, timeout=60) as response:
            status, found, text = response.status, response.headers, response.read()
    except urllib.error.HTTPError as error:
        status, found, text = error.code, error.headers, error.read()
    try:
        content = json.loads(text) if text else None
    except ValueError:
        content = text
    return Response(status, {name.lower(): value for name, value in found.items()}, content)


def x_json(values: list[float], shape: list[int] | None = None, **more: Any) -> bytes:
    """A JSON inference request with the one input ``x``."""
    tensor = {"name": "x", "shape": shape or [1, len(values)], "datatype": "FP32", "data": values}
    return json.dumps({"inputs": [tensor], **more}).encode()


def example_models(root: Path) -> Path:
    """A copy of the example models that names no SLO: its 50 ms are more than a busy machine can keep."""
    shutil.copytree(ROOT / "examples" / "models", root)
    settings = root / "mlp" / "clockwork.toml"
    said = settings.read_text()
    assert said.count("slo_ms") == said.count("slo_ms = 50\n") == 1
    settings.write_text(said.replace("slo_ms = 50\n", ""))
    return root


@pytest.fixture
def cable() -> Iterator[Cable]:
    """To a network of its own for a process."""
    from tests.end_to_end.cables import laid

    with laid() as found:
        yield found


@pytest.fixture(scope="session")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Compiled models and profiles, shared by all servers of a session."""
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="session")
def start(cache: Path) -> Callable[..., AbstractContextManager[Serving]]:
    """Starts a server for the time of a block. Unless a test is about deadlines, there are none to miss."""

    def serving(root: Path, **settings: Any) -> AbstractContextManager[Serving]:
        memory = {} if "device" in settings else {"memory_bytes": SMALL}
        return serve(root, cache=cache, **{"slo_ms": PATIENT_SLO_MS, **memory, **settings})

    return serving


@pytest.fixture(scope="session")
def repository(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The example models, a moody class, thirty matrices, and two models that are broken."""
    root = tmp_path_factory.mktemp("repository") / "models"
    example_models(root)
    repositories.python_model(root, "moody", MOODY)
    for index in range(MATRICES):
        repositories.one_matrix(root, f"m{index}", repositories.matrix_of(index, WIDE, LONG))
    (root / "corrupt" / "1").mkdir(parents=True)
    (root / "corrupt" / "1" / "model.onnx").write_bytes(b"this is no graph")
    repositories.one_matrix(root, "badconfig", repositories.matrix_of(1, WIDE, LONG))
    (root / "badconfig" / "config.pbtxt").write_text('name: "badconfig"\nmax_batch_size: many\n')
    return root


@pytest.fixture(scope="session")
def server(repository: Path, start: Callable[..., AbstractContextManager[Serving]]) -> Iterator[Serving]:
    """The server that most tests ask; none of them may harm it. It holds eight at a time."""
    with start(repository, memory_bytes=2 * MIB) as serving:
        yield serving


def product(index: int, x: Floats) -> Floats:
    """What matrix ``index`` answers."""
    return np.asarray(x @ repositories.matrix_of(index, WIDE, LONG))

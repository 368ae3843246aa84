"""Compiles repository entries into served models; a model that fails is reported, and the others go on."""

from __future__ import annotations

import ast
import contextlib
import math
import os
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import msgspec
from msgspec import Struct

from clockwork_serve.errors import described, printable
from clockwork_serve.integrity import hash_of
from clockwork_serve.messages import Code, Model, TensorSpec, Weights
from clockwork_serve.store.cache import Cache, Compiled, compiled_of, digest_of, fine_batch_sizes
from clockwork_serve.store.onnx.compiler import OnnxCompiler
from clockwork_serve.store.onnx.graph import bounded
from clockwork_serve.store.onnx.source import FileFacts, current, read_source
from clockwork_serve.store.optimiser import Optimiser, readable_names
from clockwork_serve.store.repository import PLATFORMS, Entry, Repository, model_config, model_file
from clockwork_serve.store.settings import (
    ModelSettings,
    Problem,
    ProblemError,
    ServedVersion,
    StoreConfig,
    TensorSettings,
    placed,
    problem,
)
from clockwork_serve.store.torch.compiler import OnStep, TorchCompiler
from clockwork_serve.units import MIB, ms

# ------------------------------------------------------------
# Compiles models without a graph: emulated ones, and a user's Python class, which is not imported here.


_PYTHON_MEMORY_BYTES = 16 * MIB  # memory accounted for a Python model whose configuration sets none
_LARGEST_SOURCE = 16 * MIB
_METHODS = ("load", "infer", "unload")


def compile_emulated(entry: Entry, cache: Cache, config: StoreConfig) -> tuple[Compiled, Code]:
    """The code of an emulated model: ``profile.json`` with durations in ns. Its weights have no file."""
    emulated = entry.settings.emulated
    assert emulated is not None, "the repository checks that"
    batching = bounded(entry.settings.max_batch_size or max(emulated.infer_ns), config)
    asked = 0 if entry.settings.max_batch_size == 0 else batching.max_batch_size
    sizes = tuple(size for size in emulated.infer_ns if size <= max(asked, 1))
    if max(sizes) < asked:
        raise problem(
            "emulated.infer_ms", expected=f"a duration for max_batch_size {asked}",
            found=f"batch sizes {list(emulated.infer_ns)}", advice="add it, or lower max_batch_size",
        )  # fmt: skip
    profile = msgspec.json.encode(
        {"infer_ns": {str(size): emulated.infer_ns[size] for size in sizes}, "load_ns": emulated.load_ns}
    )
    code = _code("emulated", entry.settings, batched=asked > 0, sizes=sizes)
    code_id = digest_of(cache.runtime, "emulated", profile, msgspec.json.encode(code))[:32]
    code = cache.code(code_id) or cache.save_code(
        msgspec.structs.replace(code, code_id=code_id), {"profile.json": profile}
    )
    return compiled_of(
        code, code_id, emulated.weights_bytes, entry.settings,
        max_batch_size=asked, warnings=(batching.lost,),
    ), code  # fmt: skip


def compile_python(entry: Entry, version: int, cache: Cache, config: StoreConfig) -> tuple[Compiled, Code]:
    """The code of a user's class ``Model``: its version folder, used in place."""
    path = model_file(entry, version)
    if (size := path.stat().st_size) > _LARGEST_SOURCE:
        raise problem(
            path.name, expected=f"at most {_LARGEST_SOURCE >> 20} MiB of Python", found=f"{size} bytes",
            advice="keep data in files of their own",
        )  # fmt: skip
    source = path.read_bytes()
    _check_class(source, path.name)
    batching = bounded(entry.settings.max_batch_size or 0, config)
    code = _code(
        "python", entry.settings, batched=batching.max_batch_size > 0,
        sizes=fine_batch_sizes(batching.max_batch_size),
    )  # fmt: skip
    content = digest_of(*(part for pair in _folder_facts(path.parent) for part in pair))
    code_id = digest_of("python", str(path), source, content, msgspec.json.encode(code))[:32]
    code = msgspec.structs.replace(code, code_id=code_id, path=str(path.parent))
    memory = entry.settings.memory_bytes or _PYTHON_MEMORY_BYTES
    return compiled_of(
        code, code_id, memory, entry.settings,
        max_batch_size=batching.max_batch_size, warnings=(batching.lost,),
    ), code  # fmt: skip


def _code(backend: str, settings: ModelSettings, *, batched: bool, sizes: tuple[int, ...]) -> Code:
    for role, tensors in (("inputs", settings.inputs), ("outputs", settings.outputs)):
        if not tensors:
            advice = f'write {role} = [{{name = "x", dims = [4], datatype = "FP32"}}] in clockwork.toml'
            raise problem(role, expected=f"declared {role}", found="none", advice=advice)
    return Code(
        code_id="", backend=backend, path="",
        inputs=tuple(_spec(tensor, "inputs") for tensor in settings.inputs),
        outputs=tuple(_spec(tensor, "outputs") for tensor in settings.outputs), batched=batched,
        batch_sizes=sizes, lifted=False,
    )  # fmt: skip


def _spec(tensor: TensorSettings, role: str) -> TensorSpec:
    for field, value in (("dims", tensor.dims), ("datatype", tensor.datatype)):
        if value is None:
            raise problem(
                f"{role} '{tensor.name}' {field}", expected=f"its {field}", found="nothing",
                advice="a model without a graph needs name, dims and datatype declared",
            )  # fmt: skip
    return TensorSpec(
        name=tensor.name, datatype=tensor.datatype or "", shape=tensor.dims or (), optional=tensor.optional
    )


def _check_class(source: bytes, name: str) -> None:
    """Check that there is a class ``Model`` with its methods, without running anything."""
    try:
        tree = ast.parse(source, name)
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        raise problem(name, expected="Python", found=described(error), advice="correct the file") from None
    classes = [node for node in tree.body if isinstance(node, ast.ClassDef) and node.name == "Model"]
    if not classes:
        triton = any(
            isinstance(node, ast.ClassDef) and node.name == "TritonPythonModel" for node in tree.body
        )
        raise problem(
            name, expected="a class Model",
            found="Triton's class TritonPythonModel" if triton else "none at the top level",
            advice=f"define class Model with the methods {', '.join(_METHODS)}"
            + (": docs/use/from-triton.md says what becomes which" if triton else ""),
        )  # fmt: skip
    methods = {node.name for node in classes[-1].body if isinstance(node, ast.FunctionDef)}
    missing = [method for method in _METHODS if method not in methods]
    if missing and not classes[-1].bases:
        raise problem(
            f"{name} class Model", expected=f"the methods {', '.join(_METHODS)}",
            found=f"no {', '.join(missing)}", advice="define them",
        )  # fmt: skip


def _folder_facts(folder: Path) -> list[tuple[str, str]]:
    """Names, sizes and times of the files in a Python model's folder, which it may read."""
    facts = []
    for path in sorted(folder.rglob("*")):
        if path.is_file() and "__pycache__" not in path.parts:
            stat = path.stat()
            facts.append((str(path.relative_to(folder)), f"{stat.st_size} {stat.st_mtime_ns}"))
    return facts


# ------------------------------------------------------------
# From repository entries to served models; one that cannot be compiled is reported, and the others go on.


_MOST_THREADS = 4
_LARGE_MODEL = 64 * MIB
"""Models from this size on are compiled one at a time: each takes several times its size of memory."""

Progress = Callable[[int, int, str], None]
"""Called with (done, total, text) after each version; the text names it and what was done."""


class SeenFile(Struct, frozen=True):
    """What a model compiled to; valid as long as all its files (external data too) are unchanged."""

    files: tuple[FileFacts, ...]
    compiled: Compiled


class Compiler:
    """Compiles models into ``cache``, reusing what was compiled before.

    ``optimiser.runs`` counts the graphs that had to be optimised.
    """

    def __init__(self, cache: Cache, config: StoreConfig, optimiser: Optimiser | None = None) -> None:
        self.cache = cache
        self.optimiser = optimiser or Optimiser()
        self._config = config
        self._onnx = OnnxCompiler(cache, config, self.optimiser)
        self.torch = TorchCompiler(cache, config)
        self._one_large = threading.Lock()

    def compile(self, entry: Entry, version: int, on_step: OnStep = lambda text: None) -> ServedVersion:
        """Compile one version. Raises ``ProblemError`` (a ``RepositoryError``) that names the model."""
        try:
            return self._compile(entry, version, on_step)
        except ProblemError as error:
            raise placed(error, model=entry.name, version=str(version)) from None
        except OSError as error:
            raise problem(
                "files", model=entry.name, version=str(version), expected="files that can be read",
                found=str(error), advice="check the model's folder and the cache folder",
            ) from error  # fmt: skip

    def _compile(self, entry: Entry, version: int, on_step: OnStep) -> ServedVersion:
        if entry.problems:
            raise ProblemError(entry.problems[0])
        key = f"{entry.name}/{version}"
        if entry.backend in ("onnx", "torch"):
            compiled = self._compile_file(entry, version, on_step)
            code = self.cache.code(compiled.code_id)
            if code is None:
                raise problem(
                    "cache_dir",
                    expected="the code just compiled",
                    found="none",
                    advice="is someone emptying it?",
                )
            return self._served(entry, version, compiled, code, compiled.weights(self.cache))
        if entry.backend == "emulated":
            compiled, code = compile_emulated(entry, self.cache, self._config)
            path = ""
        else:
            compiled, code = compile_python(entry, version, self.cache, self._config)
            path = code.path
        weights_id = hash_of(f"{code.code_id} {key}".encode())  # weights without a file: unique to this model
        weights = Weights(weights_id=weights_id, path=path, size=compiled.weights_bytes)
        return self._served(entry, version, compiled, code, weights)

    def _compile_file(self, entry: Entry, version: int, on_step: OnStep) -> Compiled:
        path = model_file(entry, version)
        runtime = self.torch.place() if entry.backend == "torch" else b""
        place = digest_of(str(path), entry.settings.compile_key(self._config), runtime)
        seen = self.cache.record("seen", place, SeenFile)
        if seen is not None and current(seen.files) and seen.compiled.present(self.cache):
            return seen.compiled
        large = entry.backend == "onnx" and path.stat().st_size >= _LARGE_MODEL
        with self._one_large if large else contextlib.nullcontext():
            if entry.backend == "torch":
                files: tuple[FileFacts, ...] = (FileFacts.of(path),)
                compiled = self.torch.compile(path, entry.settings, on_step)
            else:
                with readable_names():
                    source = read_source(path, path.parent)
                    files = source.files
                    compiled = self._onnx.compile(source, entry.settings)
        if all(facts.settled for facts in files) and current(files):
            self.cache.save_record("seen", place, SeenFile(files, compiled))
        return compiled

    def _served(
        self, entry: Entry, version: int, compiled: Compiled, code: Code, weights: Weights
    ) -> ServedVersion:
        settings = entry.settings
        _check_dims("input", settings.input_dims, code.inputs)
        _check_dims("output", settings.output_dims, code.outputs)
        unknown = sorted(set(settings.labels) - {spec.name for spec in code.outputs})
        extra = [f"labels for {unknown}, which are no outputs, are ignored"] if unknown else []
        extra += _without_meaning(entry, code)
        model = Model(
            key=f"{entry.name}/{version}", name=entry.name, version=str(version), code_id=code.code_id,
            weights=weights, platform=PLATFORMS[code.backend], max_batch_size=compiled.max_batch_size,
            batch_sizes=compiled.batch_sizes, output_bytes=compiled.output_bytes,
            slo_ns=None if settings.slo_ms is None else ms(settings.slo_ms),
            queue_limit=settings.queue_limit or self._config.queue_limit, priority=settings.priority or 0,
            decide_ns=-1 if settings.decide_ms is None else ms(settings.decide_ms), labels=settings.labels,
            config=model_config(entry.name, settings, code, compiled.max_batch_size),
            warnings=tuple([printable(each) for each in (*entry.warnings, *compiled.warnings, *extra)]),
        )  # fmt: skip
        return ServedVersion(model=model, code=code)


def _check_dims(role: str, reshaped: dict[str, tuple[int, ...]], specs: tuple[TensorSpec, ...]) -> None:
    """Raise ``ProblemError`` if what clients see of a reshaped tensor holds other elements than it has."""
    for spec in specs:
        dims = reshaped.get(spec.name, spec.shape)
        if dims != spec.shape and (-1 in (*dims, *spec.shape) or math.prod(dims) != math.prod(spec.shape)):
            raise problem(
                f"{role} '{spec.name}' reshape", expected=f"dims of as many elements as {list(spec.shape)}, "
                "the model's own, and no -1", found=list(dims), advice="correct dims or reshape",
            )  # fmt: skip


def _without_meaning(entry: Entry, code: Code) -> list[str]:
    """Warnings for settings that have no meaning for the model's backend."""
    settings = entry.settings
    required = {spec.name for spec in code.inputs if not spec.optional}
    given = {
        "memory_bytes": settings.memory_bytes is not None and entry.backend != "python",
        "[emulated]": settings.emulated is not None and entry.backend != "emulated",
        "optional, of inputs without a default in the graph,": any(
            tensor.optional and tensor.name in required for tensor in settings.inputs
        ),
    }
    return [
        f"{name} has no meaning for backend '{entry.backend}' and is ignored"
        for name, found in given.items()
        if found
    ]


def compile_all(
    repository: Repository, cache: Cache, progress: Progress | None = None, *,
    compiler: Compiler | None = None, entries: Sequence[Entry] | None = None, threads: int | None = None,
    urgent: Callable[[], Sequence[str]] = tuple,
    tell: Callable[[Entry, int, ServedVersion | Problem | None], None] = lambda entry, version, found: None,
) -> tuple[list[ServedVersion], list[Problem]]:  # fmt: skip
    """Scan and compile every version to be served; the second list has the problems of those that failed.

    ``progress`` is called after each version, and for the steps of those that take long. ``entries`` limits
    the work to some (already scanned). If it is interrupted, it finishes the models in progress; called
    again, it resumes. ``threads``: by default as many as there are cores, up to 4. In these, ``tell`` is
    called for each version before it is compiled, with None, and at once when it was, with what was found.
    ``urgent`` returns the names to be compiled before others, the most urgent first.
    """
    compiler = compiler or Compiler(cache, repository.config)
    chosen = repository.scan() if entries is None else entries
    work = [(entry, version) for entry in chosen for version in entry.versions]
    places = [f"{entry.name}/{version}" for entry, version in work]
    pending = _Pending(work, urgent)
    lock, done = threading.Lock(), 0

    def report(text: str, finished: int = 0) -> None:
        nonlocal done
        with lock:
            done += finished
            if progress is not None:
                progress(done, len(work), text)

    def result(at: int) -> tuple[int, ServedVersion | Problem]:
        at = pending.take(at)
        tell(*work[at], None)
        found = _result(compiler, *work[at], lambda text: report(f"{places[at]}: {text}"))
        tell(*work[at], found)
        return at, found

    results: dict[int, ServedVersion | Problem] = {}
    pool = ThreadPoolExecutor(threads or min(_MOST_THREADS, os.cpu_count() or 1), "compile")
    try:
        for at, found in pool.map(result, range(len(work))):
            results[at] = found
            report(places[at] + ("" if isinstance(found, ServedVersion) else " cannot be served"), finished=1)
    finally:
        pool.shutdown(cancel_futures=True)
    known = repository.problems if entries is None else [each for entry in chosen for each in entry.problems]
    return _divided(known, [results[at] for at in range(len(work))])


def _divided(
    known: Sequence[Problem], found: Sequence[ServedVersion | Problem]
) -> tuple[list[ServedVersion], list[Problem]]:
    """What can be served, and all problems: those ``known`` before, then those of compiling."""
    served = [each for each in found if isinstance(each, ServedVersion)]
    return served, [*known, *(each for each in found if isinstance(each, Problem))]


class _Pending:
    """The versions that are not begun, by their place in ``work``; for any thread."""

    def __init__(self, work: Sequence[tuple[Entry, int]], urgent: Callable[[], Sequence[str]]) -> None:
        self._places: dict[str, list[int]] = {}
        for at, (entry, _) in enumerate(work):
            self._places.setdefault(entry.name, []).append(at)
        self._left = dict.fromkeys(range(len(work)))
        self._urgent = urgent
        self._lock = threading.Lock()

    def take(self, at: int) -> int:
        """Begin the most urgent one, else the one at that place, else the first."""
        with self._lock:
            urgent = [place for name in self._urgent() for place in self._places.get(name, ())]
            found = next((one for one in (*urgent, at) if one in self._left), None)
            if found is None:
                found = next(iter(self._left))
            del self._left[found]
            return found


def _result(compiler: Compiler, entry: Entry, version: int, on_step: OnStep) -> ServedVersion | Problem:
    try:
        return compiler.compile(entry, version, on_step)
    except ProblemError as error:
        return error.problem
    except MemoryError as error:
        found = problem(
            "memory", expected="a model that is compiled in the memory that compile_memory gives",
            found=f"one that takes more ({described(error)})",
            advice="raise compile_memory, or serve a smaller model",
        )  # fmt: skip
    except Exception as error:  # noqa: BLE001 - whatever a strange file raises, the others are served
        found = problem(
            "model", expected="a model that can be compiled", found=described(error),
            advice="this is a fault of the compiler, please report it with the model",
        )  # fmt: skip
    return placed(found, model=entry.name, version=str(version)).problem

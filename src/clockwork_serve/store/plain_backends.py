"""Compiles models that have no graph: emulated ones and a user's Python class, which it never imports."""

from __future__ import annotations

import ast
import hashlib
from pathlib import Path

import msgspec

from clockwork_serve.errors import described
from clockwork_serve.messages import Code, TensorSpec
from clockwork_serve.store.cache import Cache, digest_of
from clockwork_serve.store.compiled import Compiled, fine_batch_sizes
from clockwork_serve.store.interface import bounded
from clockwork_serve.store.problems import problem
from clockwork_serve.store.repository import Entry, model_file
from clockwork_serve.store.settings import ModelSettings, StoreConfig, TensorSettings
from clockwork_serve.store.shapes import output_room
from clockwork_serve.units import MIB

_PYTHON_MEMORY_BYTES = 16 * MIB
"""What a Python model is taken to occupy if its configuration does not say."""
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
    stored = cache.code(code_id) or cache.save_code(
        msgspec.structs.replace(code, code_id=code_id), {"profile.json": profile}
    )
    compiled = _compiled(stored, entry.settings, config, asked, code_id, emulated.weights_bytes)
    return msgspec.structs.replace(compiled, warnings=(batching.lost,) if batching.lost else ()), stored


def compile_python(entry: Entry, version: int, cache: Cache, config: StoreConfig) -> tuple[Compiled, Code]:
    """The code of a user's class ``Model``: its version folder, left where it is."""
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
        "python",
        entry.settings,
        batched=batching.max_batch_size > 0,
        sizes=fine_batch_sizes(batching.max_batch_size),
    )
    content = digest_of(*(part for pair in _folder_facts(path.parent) for part in pair))
    code_id = digest_of("python", str(path), source, content, msgspec.json.encode(code))[:32]
    code = msgspec.structs.replace(code, code_id=code_id, path=str(path.parent))
    memory = entry.settings.memory_bytes or _PYTHON_MEMORY_BYTES
    compiled = _compiled(code, entry.settings, config, batching.max_batch_size, code_id, memory)
    return msgspec.structs.replace(compiled, warnings=(batching.lost,) if batching.lost else ()), code


def _code(backend: str, settings: ModelSettings, *, batched: bool, sizes: tuple[int, ...]) -> Code:
    for role, tensors in (("inputs", settings.inputs), ("outputs", settings.outputs)):
        if not tensors:
            advice = f'write {role} = [{{name = "x", dims = [4], datatype = "FP32"}}] in clockwork.toml'
            raise problem(role, expected=f"declared {role}", found="none", advice=advice)
    return Code(
        code_id="",
        backend=backend,
        path="",
        inputs=tuple(_spec(tensor, "inputs") for tensor in settings.inputs),
        outputs=tuple(_spec(tensor, "outputs") for tensor in settings.outputs),
        batched=batched,
        batch_sizes=sizes,
        lifted=False,
    )


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


def _compiled(
    code: Code,
    settings: ModelSettings,
    config: StoreConfig,
    max_batch_size: int,
    weights_id: str,
    memory: int,
) -> Compiled:
    return Compiled(
        code_id=code.code_id,
        weights_id=weights_id,
        weights_bytes=memory,
        lifted=code.lifted,
        max_batch_size=max_batch_size,
        batch_sizes=code.batch_sizes,
        output_bytes=output_room(code.outputs, None, least=config.output_bytes, asked=settings.output_bytes),
    )


def _check_class(source: bytes, name: str) -> None:
    """That there is a class ``Model`` with its methods, without running anything."""
    try:
        tree = ast.parse(source, name)
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        raise problem(name, expected="Python", found=described(error), advice="correct the file") from None
    classes = [node for node in tree.body if isinstance(node, ast.ClassDef) and node.name == "Model"]
    if not classes:
        raise problem(
            name, expected="a class Model", found="none at the top level",
            advice=f"define class Model with the methods {', '.join(_METHODS)}",
        )  # fmt: skip
    methods = {node.name for node in classes[-1].body if isinstance(node, ast.FunctionDef)}
    missing = [method for method in _METHODS if method not in methods]
    if missing and not classes[-1].bases:
        raise problem(
            f"{name} class Model", expected=f"the methods {', '.join(_METHODS)}",
            found=f"no {', '.join(missing)}", advice="define them",
        )  # fmt: skip


def _folder_facts(folder: Path) -> list[tuple[str, str]]:
    """What a user's class may read beside itself: names, sizes and times of the files in its folder."""
    facts = []
    for path in sorted(folder.rglob("*")):
        if path.is_file() and "__pycache__" not in path.parts:
            stat = path.stat()
            facts.append((str(path.relative_to(folder)), f"{stat.st_size} {stat.st_mtime_ns}"))
    return facts


def weights_id_of(code_id: str, key: str) -> str:
    """The id of weights that have no file: of this model alone."""
    return hashlib.sha256(f"{code_id} {key}".encode()).hexdigest()

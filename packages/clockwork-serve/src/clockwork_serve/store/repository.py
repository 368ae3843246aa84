"""A model repository on disk in Triton's layout, and model configurations as Triton's clients read them."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
from msgspec import Struct

from clockwork_serve.errors import RepositoryError, encodable
from clockwork_serve.messages import Code, TensorSpec
from clockwork_serve.store import pbtxt as pbtxt_settings
from clockwork_serve.store import settings as toml_settings
from clockwork_serve.store.settings import (
    ModelSettings,
    Problem,
    ProblemError,
    StoreConfig,
    VersionPolicy,
    merged,
    placed,
    problem,
    shortened,
)

# ------------------------------------------------------------
# A model repository on disk in Triton's layout: its models and their settings. A single model file is a
# repository too, of one model of the same name.
#
# No file outside the root is opened, after resolving symbolic links. A bad model does not affect the others.


_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.+-]*")
_VERSION = re.compile(r"[1-9][0-9]{0,17}", re.ASCII)
_LARGEST_TEXT = 4 << 20  # bytes of the largest configuration or label file that is read
FILE_OF_BACKEND = {"onnx": "model.onnx", "torch": "model.pt2", "python": "model.py"}
_BACKEND_OF_ENDING = {".onnx": "onnx", ".pt2": "torch"}
"""The version of a model file that is served by itself."""
_FOREIGN_FILES = {
    "model.pt": "TorchScript", "model.plan": "TensorRT", "model.savedmodel": "TensorFlow",
    "model.graphdef": "TensorFlow", "model.xml": "OpenVINO",
}  # fmt: skip


_PICKLES = frozenset({".pkl", ".pickle", ".joblib"})


class Entry(Struct, frozen=True, kw_only=True):
    """One model of a repository.

    ``versions`` are those to serve, ascending; ``present`` all those on disk. An entry with ``problems`` has
    no versions. ``settings`` are its files' settings, merged (``clockwork.toml`` over ``config.pbtxt``).
    ``alone``: it is one file, named by ``settings``, and ``path`` is the folder that contains it.
    """

    name: str
    path: str
    root: str
    backend: str = ""
    versions: tuple[int, ...] = ()
    present: tuple[int, ...] = ()
    settings: ModelSettings = ModelSettings()
    problems: tuple[Problem, ...] = ()
    warnings: tuple[str, ...] = ()
    alone: bool = False

    def folder(self, version: int) -> Path:
        """The folder of a version."""
        return Path(self.path) if self.alone else Path(self.path) / str(version)


class Repository:
    """The models below ``root``, or the one in the file ``root``.

    Raises ``RepositoryError`` if the root is neither a readable folder nor a readable model file.
    """

    def __init__(self, root: str | os.PathLike[str], config: StoreConfig) -> None:
        self.config = config
        self.entries: tuple[Entry, ...] = ()
        self.misplaced: tuple[Problem, ...] = ()  # what :meth:`find_misplaced` found at the last scan
        self._alone = _file_alone(Path(root)) if is_model_file(root) else None
        if self._alone is not None:
            self.root = Path(self._alone.root)
            return
        try:
            self.root = Path(root).resolve(strict=True)
            readable = self.root.is_dir() and os.access(self.root, os.R_OK | os.X_OK)
        except OSError:
            readable = False
        if not readable:
            raise RepositoryError(
                f"model repository: expected a readable folder, found {os.fspath(root)!r}; "
                "give the folder that holds MODEL/VERSION/model.onnx, or one file NAME.onnx or NAME.pt2"
            )
        if encodable(str(self.root)) != str(self.root):
            raise RepositoryError(
                f"model repository: expected a path in UTF-8, found {str(self.root)!r}; rename it, or "
                "bind it elsewhere"
            )

    @property
    def problems(self) -> tuple[Problem, ...]:
        """The problems found by the last scan: the root's, then the models'."""
        return (*self.misplaced, *(found for entry in self.entries for found in entry.problems))

    def scan(self) -> list[Entry]:
        """Read every model, ascending by name. A model that cannot be read has ``problems``."""
        if self._alone is not None:
            self.entries = (self._alone,)
        else:
            self.entries = tuple(self._entry(name) for name in sorted(model_names(self.root)))
            self.misplaced = tuple(self.find_misplaced())
        return list(self.entries)

    def find_misplaced(self) -> list[Problem]:
        """What is wrong with the root itself: model files that lie in it, or nothing at all."""
        if self._alone is not None:
            return []
        return list(_misplaced(self.root, empty=not model_names(self.root)))

    def find(self, name: str) -> Entry:
        """Read one model again. Raises ``ProblemError`` if there is none of that name."""
        if self._alone is not None and name == self._alone.name:
            return self.scan()[0]
        if self._alone is not None or not _NAME.fullmatch(name) or not (self.root / name).is_dir():
            raise problem(
                "name", model=name, expected=f"a folder in {self.root}", found="none of that name",
                advice="see the repository index",
            )  # fmt: skip
        entry = self._entry(name)
        others = [old for old in self.entries if old.name != name]
        self.entries = tuple(sorted([*others, entry], key=lambda each: each.name))
        return entry

    def _entry(self, name: str) -> Entry:
        path = self.root / name
        blank = Entry(name=shortened(name), path=shortened(str(path)), root=str(self.root))
        try:
            return self._read(blank)
        except ProblemError as error:
            found = placed(error, model=blank.name).problem
        except OSError as error:
            found = problem(
                "files", model=blank.name, expected="a readable folder", found=str(error),
                advice="check its permissions",
            ).problem  # fmt: skip
        return msgspec.structs.replace(blank, problems=(found,))

    def _read(self, blank: Entry) -> Entry:
        if not _NAME.fullmatch(blank.name):
            raise _bad_name(blank.name, "rename the folder")
        folder = inside(self.root, Path(blank.path))
        if shortened(str(folder)) != str(folder):
            raise problem(
                "path", expected="a folder whose name is text", found=str(folder), advice="rename it"
            )
        settings, warnings = _settings(folder, blank.name)
        settings = _with_labels(folder, settings)
        present = _versions(folder)
        backend = settings.backend or _guess_backend(folder, present, settings)
        if backend == "emulated" and not present:
            present = (1,)
        if backend == "emulated" and settings.emulated is None:
            raise problem(
                "emulated", expected="a table [emulated] with weights_mb, infer_ms and load_ms",
                found="nothing", advice="add it to clockwork.toml",
            )  # fmt: skip
        policy = settings.version_policy or VersionPolicy()
        versions = policy.choose(present)
        if not present:
            raise _no_version(folder, blank.name, FILE_OF_BACKEND.get(backend, "model.onnx"))
        if not versions:
            raise problem(
                "version_policy", expected=f"one of the versions {list(policy.specific)}",
                found=f"versions {list(present)}", advice="correct version_policy, or add that version",
            )  # fmt: skip
        missing = sorted(set(policy.specific) - set(present))
        if missing:
            warnings = (*warnings, f"version_policy asks for versions {missing}, which are not there")
        return msgspec.structs.replace(
            blank, path=str(folder), backend=backend, versions=versions, present=present, settings=settings,
            warnings=warnings,
        )  # fmt: skip


def _no_version(folder: Path, name: str, file: str) -> ProblemError:
    """A model's folder has no version: names the model file that lies elsewhere in it, and its place."""
    expected = "a folder whose name is a number above 0, with the model file in it"
    for path, _, names in _walk(folder):
        for found in sorted(names):
            if not _is_model(found):
                continue
            if path != folder and _VERSION.fullmatch(path.name):
                advice = (
                    f"{name} is a folder of models: give {folder}, or move {path.parent.name} up beside it"
                )
            elif path == folder and _VERSION.fullmatch(name):
                advice = f"{name} is a version: give the folder above that of the model, {folder.parents[1]}"
            else:
                backend = _BACKEND_OF_ENDING.get(Path(found).suffix, "python")
                advice = f"move it to {name}/1/{FILE_OF_BACKEND[backend]}"
            where = (path / found).relative_to(folder.parent).as_posix()
            return problem("versions", expected=expected, found=where, advice=advice)
    return problem("versions", expected=expected, found="none", advice=f"put the model at {name}/1/{file}")


def _walk(folder: Path) -> Iterator[tuple[Path, list[str], list[str]]]:
    """The folder, and those two levels below it, as ``os.walk`` gives them; links are not followed."""
    for path, folders, names in os.walk(folder):
        here = Path(path)
        folders.sort()
        if len(here.relative_to(folder).parts) == 2:
            folders.clear()
        yield here, folders, names


def _is_model(name: str) -> bool:
    return Path(name).suffix in _BACKEND_OF_ENDING or name in FILE_OF_BACKEND.values()


def _misplaced(root: Path, *, empty: bool) -> Iterator[Problem]:
    """Problems of a repository's root; ``empty``: there is no model's folder in it."""
    expected = "each model at MODEL/1/model.onnx (or model.pt2, model.py)"
    with os.scandir(root) as found:
        files = sorted(item.name for item in found if _is_model(item.name) and not _is_folder(item))
    for name in files:
        file = Path(name)
        model = "MODEL" if file.stem == "model" else file.stem
        backend = _BACKEND_OF_ENDING.get(file.suffix, "python")
        alone = f", or serve it alone: {root / name}" if file.suffix in _BACKEND_OF_ENDING else ""
        yield problem(
            "place", expected=expected, found=f"{name} in the repository's own folder",
            advice=f"move it to {model}/1/{FILE_OF_BACKEND[backend]}{alone}",
        ).problem  # fmt: skip
    if empty and not files:
        yield problem(
            "models", expected=expected, found=f"no model in {root}", advice="put one there, or name another"
        ).problem


def inside(root: Path, path: Path, field: str = "path") -> Path:
    """``path`` with all symbolic links resolved. Raises ``ProblemError`` if that is outside ``root``."""
    try:
        real = path.resolve(strict=True)
    except (OSError, RuntimeError, ValueError) as error:
        raise problem(field, expected=f"a file at {path}", found=str(error), advice="put it there") from None
    if not real.is_relative_to(root):
        raise problem(
            field, expected=f"files inside {root}", found=f"{path.name} leads to {real}",
            advice="copy the file into the repository",
        )  # fmt: skip
    return real


def model_file(entry: Entry, version: int) -> Path:
    """The file of a version, inside the repository. Raises ``ProblemError`` naming what is missing."""
    folder = inside(Path(entry.root), entry.folder(version))
    name = entry.settings.file_name or FILE_OF_BACKEND[entry.backend]
    if "/" in name or name in (".", "..") or "\0" in name:
        raise problem(
            "default_model_filename",
            expected="a file name",
            found=name,
            advice="name a file in the version folder",
        )
    path = folder / name
    if not path.exists():
        others = sorted(item.name for item in folder.iterdir())
        foreign = [f"{other} ({_FOREIGN_FILES[other]})" for other in others if other in _FOREIGN_FILES]
        pickles = [f"{other} (a pickle)" for other in others if Path(other).suffix in _PICKLES]
        advice = f"put the model file at {entry.name}/{version}/{name}"
        if foreign:
            advice = "export the model to ONNX, or with torch.export"
        elif pickles:
            advice = (
                "export the model to ONNX, or write a model.py that loads it: docs/use/model-repository.md"
            )
        found = ", ".join(foreign or pickles or others[:5]) or "an empty folder"
        raise problem("file", expected=name, found=found, advice=advice)
    real = inside(Path(entry.root), path)
    if not real.is_file():
        what = "a folder" if real.is_dir() else "a pipe, a socket or a device"
        raise problem("file", expected=f"a file {name}", found=what, advice="put the model file there")
    _check_fetched(real)
    return real


def _check_fetched(file: Path) -> None:
    """Raise ``ProblemError`` if there is something else in place of a file that was to be fetched."""
    with file.open("rb") as opened:
        start = opened.read(200)
    if start.startswith(b"version https://git-lfs"):
        found, advice = "a pointer of Git LFS", "fetch the file itself: git lfs pull"
    elif start.lstrip().lower().startswith((b"<!doctype html", b"<html")):
        found, advice = "a web page (HTML)", "download the file again, from the address of the file itself"
    else:
        return
    raise problem(file.name, expected="a model", found=found, advice=advice)


def is_model_file(root: str | os.PathLike[str]) -> bool:
    """Whether this is, by its name, a model file rather than a repository."""
    return Path(root).suffix in _BACKEND_OF_ENDING and not Path(root).is_dir()


def _file_alone(given: Path) -> Entry:
    """The model of a repository that is a single file. Raises ``RepositoryError`` if it cannot be read."""
    try:
        file = given.resolve(strict=True)
        readable = file.is_file() and os.access(file, os.R_OK)
    except (OSError, RuntimeError):
        readable = False
    if not readable:
        raise RepositoryError(
            f"model file: expected a readable file, found {os.fspath(given)!r}; correct its name"
        )
    folder = shortened(str(file.parent))
    entry = Entry(
        name=shortened(given.stem), path=folder, root=folder, alone=True, versions=(1,), present=(1,),
        backend=_BACKEND_OF_ENDING[given.suffix], settings=ModelSettings(file_name=shortened(file.name)),
    )  # fmt: skip
    wrong = [text for text in (given.stem, str(file)) if shortened(text) != text]
    if _NAME.fullmatch(given.stem) and not wrong:
        return entry
    found = _bad_name(wrong[0] if wrong else given.stem, "rename the file, whose name is the model's")
    problems = (placed(found, model=entry.name).problem,)
    return Entry(name=entry.name, path=folder, root=folder, problems=problems)


def _bad_name(found: str, advice: str) -> ProblemError:
    return problem(
        "name", expected="letters, digits and _ . + -, the first one a letter, a digit or _", found=found,
        advice=advice,
    )  # fmt: skip


def model_names(root: str | os.PathLike[str]) -> list[str]:
    """Candidates for models: the names of folders below ``root``, which need not be valid text.

    For a model file it is its name without the suffix.
    """
    if is_model_file(root):
        return [Path(root).stem]
    with os.scandir(root) as found:
        return [item.name for item in found if not item.name.startswith(".") and _is_folder(item)]


def _is_folder(item: os.DirEntry[str]) -> bool:
    """Whether it may be a model; a symbolic link that does not resolve counts, and gets a problem."""
    try:
        return item.is_dir()
    except OSError:
        return True


def _versions(folder: Path) -> tuple[int, ...]:
    with os.scandir(folder) as found:
        names = [item.name for item in found if _VERSION.fullmatch(item.name)]
    return tuple(sorted(int(name) for name in names if (folder / name).is_dir()))


def _settings(folder: Path, name: str) -> tuple[ModelSettings, tuple[str, ...]]:
    settings = ModelSettings()
    warnings: tuple[str, ...] = ()
    pbtxt = _text(folder, pbtxt_settings.FILE_NAME)
    if pbtxt is not None:
        settings, warnings = pbtxt_settings.read_pbtxt(pbtxt, name)
    toml = _text(folder, toml_settings.FILE_NAME)
    if toml is not None:
        settings = merged(toml_settings.read_toml(toml), settings)
    return settings, warnings


def _text(folder: Path, name: str) -> str | None:
    """A small text file of the model, or None where there is none."""
    path = folder / name
    if not os.path.lexists(path):
        return None
    real = inside(folder, path)
    if not real.is_file():
        raise problem(
            name,
            expected="a file",
            found="a folder, a pipe, a socket or a device",
            advice="put the file there",
        )
    data = real.read_bytes() if real.stat().st_size <= _LARGEST_TEXT else b"\xff"
    try:
        return data.decode()
    except UnicodeDecodeError:
        raise problem(
            name, expected=f"UTF-8 text of at most {_LARGEST_TEXT >> 20} MiB", found="something else",
            advice="correct the file",
        ) from None  # fmt: skip


def _with_labels(folder: Path, settings: ModelSettings) -> ModelSettings:
    """The settings with label files read: one label per line."""
    if not settings.label_files:
        return settings
    labels = dict(settings.labels)
    for output, file_name in settings.label_files.items():
        text = _text(folder, file_name)
        if text is None:
            raise problem(
                f"labels.{output}", expected=f"a file {file_name}", found="no such file",
                advice="put it into the model's folder",
            )  # fmt: skip
        labels.setdefault(output, tuple(text.splitlines()))
    return merged(ModelSettings(labels=labels), settings)


def _guess_backend(folder: Path, present: tuple[int, ...], settings: ModelSettings) -> str:
    """The backend of a model that sets none: by its newest version's file."""
    if settings.emulated is not None:
        return "emulated"
    if present and not settings.file_name:
        newest = folder / str(present[-1])
        for backend, name in FILE_OF_BACKEND.items():
            if (newest / name).exists():
                return backend
    endings = {".py": "python", ".pt2": "torch"}
    return endings.get(Path(settings.file_name or "").suffix, "onnx")


# ------------------------------------------------------------
# A served model's configuration as Triton's clients read it: snake_case JSON with every default shown.


PLATFORMS = {
    "onnx": "onnxruntime_onnx", "torch": "pytorch_libtorch", "python": "python", "emulated": "emulated",
}  # fmt: skip
"""Our backends by Triton's names."""
_BACKENDS = {"onnx": "onnxruntime", "torch": "pytorch", "python": "python", "emulated": "emulated"}


def model_config(name: str, settings: ModelSettings, code: Code, max_batch_size: int) -> bytes:
    """The configuration of a model as JSON."""
    config: dict[str, Any] = {
        "name": name,
        # Triton names its Python backend in the other field only.
        "platform": "" if code.backend == "python" else PLATFORMS[code.backend],
        "backend": _BACKENDS[code.backend],
        "runtime": "",
        "version_policy": _version_policy(settings.version_policy or VersionPolicy()),
        "max_batch_size": max_batch_size,
        "input": [_input(spec, settings) for spec in code.inputs],
        "output": [_output(spec, settings) for spec in code.outputs],
        "batch_input": [],
        "batch_output": [],
        "optimization": {
            "priority": "PRIORITY_DEFAULT",
            "input_pinned_memory": {"enable": True},
            "output_pinned_memory": {"enable": True},
            "gather_kernel_buffer_threshold": 0,
            "eager_batching": False,
        },
        "instance_group": [
            {
                "name": f"{name}_0", "kind": "KIND_CPU", "count": 1, "gpus": [], "secondary_devices": [],
                "profile": [], "passive": False, "host_policy": "",
            }
        ],
        "default_model_filename": settings.file_name or FILE_OF_BACKEND.get(code.backend, ""),
        "cc_model_filenames": {},
        "metric_tags": settings.metric_tags,
        "parameters": {name: {"string_value": text} for name, text in settings.parameters.items()},
        "model_warmup": [],
    }  # fmt: skip
    if max_batch_size:
        config["dynamic_batching"] = {
            "preferred_batch_size": [max_batch_size],
            "max_queue_delay_microseconds": 0,
            "preserve_ordering": False,
            "priority_levels": 0,
            "default_priority_level": 0,
            "priority_queue_policy": {},
        }
    return msgspec.json.encode(config)


def _version_policy(policy: VersionPolicy) -> dict[str, Any]:
    if policy.specific:
        return {"specific": {"versions": list(policy.specific)}}
    return {"all": {}} if policy.latest is None else {"latest": {"num_versions": policy.latest}}


def _data_type(spec: TensorSpec) -> str:
    return "TYPE_STRING" if spec.datatype == "BYTES" else f"TYPE_{spec.datatype}"


def _input(spec: TensorSpec, settings: ModelSettings) -> dict[str, Any]:
    return {
        "name": spec.name,
        "data_type": _data_type(spec),
        "format": settings.formats.get(spec.name, "FORMAT_NONE"),
        **_dims(spec, settings.input_dims),
        "is_shape_tensor": False,
        "allow_ragged_batch": False,
        "optional": spec.optional,
        "is_non_linear_format_io": False,
    }


def _dims(spec: TensorSpec, reshaped: dict[str, tuple[int, ...]]) -> dict[str, Any]:
    if spec.name not in reshaped:
        return {"dims": list(spec.shape)}
    return {"dims": list(reshaped[spec.name]), "reshape": {"shape": list(spec.shape)}}


def _output(spec: TensorSpec, settings: ModelSettings) -> dict[str, Any]:
    return {
        "name": spec.name,
        "data_type": _data_type(spec),
        **_dims(spec, settings.output_dims),
        "label_filename": settings.label_files.get(spec.name, ""),
        "is_shape_tensor": False,
        "is_non_linear_format_io": False,
    }

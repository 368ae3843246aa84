"""Settings of one model, the reader of ``clockwork.toml``, and problems as records."""

from __future__ import annotations

import tomllib
from collections.abc import Callable
from typing import Any

import msgspec
from msgspec import Struct

from clockwork_serve.errors import RepositoryError, did_you_mean, printable
from clockwork_serve.messages import DATATYPES, LEAST_PRIORITY, Code, Model
from clockwork_serve.units import MIB, ms

# ------------------------------------------------------------
# A problem of a model or a setting, as a record; it does not stop other models from being served.


_SHOWN = 300


class Problem(Struct, frozen=True, kw_only=True):
    """Why one model (or one version of it) is not served, and what to do about it.

    ``model`` is empty if the problem is the repository's; ``version`` is empty if it is the model's.
    """

    model: str
    field: str
    expected: str
    found: str
    advice: str
    version: str = ""

    def __str__(self) -> str:
        where = f"model '{self.model}'" if self.model else "repository"
        if self.version:
            where += f" version {self.version}"
        return f"{where}: {self.field}: expected {self.expected}, found {self.found}; {self.advice}"


class Damage(Struct, frozen=True):
    """A file that was set aside: ``what`` is ``code``, ``weights`` or ``record``, ``found`` what is wrong."""

    what: str
    name: str
    found: str


class ProblemError(RepositoryError):
    """Raises a :class:`Problem`."""

    def __init__(self, problem: Problem) -> None:
        super().__init__(str(problem))
        self.problem = problem


def problem(
    field: str, *, expected: str, found: object, advice: str, model: str = "", version: str = ""
) -> ProblemError:
    """A :class:`ProblemError`; values are shortened, and made printable."""
    text = found if isinstance(found, str) else repr(found)
    return ProblemError(
        Problem(
            model=shortened(model),
            version=version,
            field=shortened(field),
            expected=shortened(expected),
            found=shortened(text),
            advice=shortened(advice),
        )
    )


def shortened(text: str) -> str:
    """Untrusted text, shortened for a problem."""
    return printable(text, _SHOWN)


def placed(error: ProblemError, *, model: str, version: str = "") -> ProblemError:
    """The same problem with the model (and version) filled in where they are empty."""
    old = error.problem
    return ProblemError(
        msgspec.structs.replace(old, model=old.model or model, version=old.version or version)
    )


# ------------------------------------------------------------
# The settings of one model, from any file.


BACKENDS = ("onnx", "torch", "python", "emulated")  # the backends that ``clockwork.toml`` may name


class StoreConfig(Struct, frozen=True, kw_only=True):
    """How models are compiled, and defaults for what a model's own configuration leaves out.

    ``cache_dir`` is where artefacts are kept, ``shared`` the shared store behind it (a folder, or a URL), if
    any. ``max_batch_size`` is the default of a model that can be batched, ``largest_batch`` the most that a
    model may ask for. ``torch_target`` is what torch programs are compiled for: ``cpu``, ``cuda:sm_90``,
    ``cuda`` (this machine's GPU), ``auto`` (that, or else the CPU), or empty: no device here runs them.
    """

    cache_dir: str
    shared: str = ""
    max_batch_size: int = 16
    largest_batch: int = 64
    queue_limit: int = 1000
    torch_target: str = "cpu"


class VersionPolicy(Struct, frozen=True, kw_only=True):
    """Which versions are served: the ``latest`` n, those in ``specific``, or all if neither is set."""

    latest: int | None = 1
    specific: tuple[int, ...] = ()

    def choose(self, versions: tuple[int, ...]) -> tuple[int, ...]:
        """The versions to serve out of those on disk, ascending."""
        found = sorted(versions)
        if self.specific:
            return tuple(v for v in found if v in self.specific)
        return tuple(found if self.latest is None else found[-self.latest :])


class TensorSettings(Struct, frozen=True, kw_only=True):
    """Settings of one input or output; ``dims`` are as in Triton."""

    name: str
    dims: tuple[int, ...] | None = None
    datatype: str | None = None
    optional: bool = False


class EmulatedSettings(Struct, frozen=True, kw_only=True):
    """The durations and the memory of an emulated model."""

    weights_bytes: int
    infer_ns: dict[int, int]
    load_ns: int


class ModelSettings(Struct, frozen=True, kw_only=True):
    """All settings of one model; None and empty mean not set.

    ``formats``, by input, ``parameters`` and ``metric_tags`` are for clients that read the configuration.
    ``input_dims`` and ``output_dims`` are what clients see of tensors that the model has in another shape.
    """

    backend: str | None = None
    max_batch_size: int | None = None
    slo_ms: float | None = None
    queue_limit: int | None = None
    output_bytes: int | None = None
    memory_bytes: int | None = None
    priority: int | None = None
    decide_ms: float | None = None
    inputs: tuple[TensorSettings, ...] = ()
    outputs: tuple[TensorSettings, ...] = ()
    version_policy: VersionPolicy | None = None
    labels: dict[str, tuple[str, ...]] = {}
    label_files: dict[str, str] = {}
    formats: dict[str, str] = {}
    input_dims: dict[str, tuple[int, ...]] = {}
    output_dims: dict[str, tuple[int, ...]] = {}
    parameters: dict[str, str] = {}
    metric_tags: dict[str, str] = {}
    file_name: str | None = None
    emulated: EmulatedSettings | None = None

    def compile_key(self, config: StoreConfig) -> bytes:
        """All that compilation depends on beside the model's file; equal bytes give equal results."""
        fields = (
            self.backend, self.max_batch_size, self.output_bytes, self.memory_bytes, self.inputs,
            self.outputs, self.emulated, config.max_batch_size, config.largest_batch,
        )  # fmt: skip
        return msgspec.json.encode(fields)


def merged(over: ModelSettings, under: ModelSettings) -> ModelSettings:
    """``over`` where it is set, ``under`` elsewhere."""
    values = {}
    for name in ModelSettings.__struct_fields__:
        above = getattr(over, name)
        values[name] = getattr(under, name) if above in (None, (), {}) else above
    return ModelSettings(**values)


def datatype_of(text: str, where: str) -> str:
    """An OIP element type from its own name or Triton's (``FP32``, ``TYPE_FP32``, ``TYPE_STRING``)."""
    name = text.removeprefix("TYPE_")
    name = "BYTES" if name == "STRING" else name
    if name not in DATATYPES:
        raise problem(where, expected="an element type", found=text, advice=did_you_mean(name, DATATYPES))
    return name


# ------------------------------------------------------------
# Reads ``clockwork.toml`` of one model, strictly: an unknown key is an error.


FILE_NAME = "clockwork.toml"
_LARGEST = 1e12
"""The largest number of milliseconds or megabytes, so that nanoseconds and bytes fit into 64 bits."""

DIGITS_MAX = 9  # digits of a batch size; Python refuses to convert thousands of digits to an int


class Table:
    """A TOML table with checked look-ups; unknown keys are errors."""

    def __init__(self, values: object, where: str, known: tuple[str, ...]) -> None:
        if not isinstance(values, dict):
            raise problem(where, expected="a table", found=quoted(values), advice=f"keys: {', '.join(known)}")
        self._values: dict[str, Any] = values
        self._where = where
        for key in values:
            if key not in known:
                raise problem(
                    self.path(key), expected="a known key", found=key, advice=did_you_mean(key, known)
                )

    def path(self, key: str) -> str:
        """The full name of a key, for messages."""
        return f"{self._where} {key}" if self._where == FILE_NAME else f"{self._where}.{key}"

    def raw(self, key: str) -> Any:
        """The value unchecked, or None."""
        return self._values.get(key)

    def checked(self, key: str, expected: str, good: Callable[[Any], bool], *, needed: bool = False) -> Any:
        """The value, which must be ``good``; None if there is none and none is ``needed``."""
        value = self._values.get(key)
        if value is None and needed:
            raise problem(self.path(key), expected=expected, found="nothing", advice="add it")
        if value is not None and not good(value):
            raise problem(
                self.path(key), expected=expected, found=quoted(value), advice=f"correct {FILE_NAME}"
            )
        return value

    def integer(self, key: str, least: int, most: int = 1 << 62) -> int | None:
        """A whole number in ``least..most``, or None."""
        wanted = f"a whole number >= {least}" if most == 1 << 62 else f"a whole number in {least}..{most}"
        found: int | None = self.checked(
            key, wanted, lambda value: type(value) is int and least <= value <= most
        )
        return found

    def milliseconds(self, key: str, *, zero: bool = False) -> float | None:
        """A finite number above zero, or also ``zero``; None if there is none."""
        wanted = f"a number {'>=' if zero else '>'} 0 and less than {_LARGEST:g}"
        found = self.checked(key, wanted, lambda value: _is_number(value) and (zero or value > 0))
        return None if found is None else float(found)

    def amount(self, key: str) -> float:
        """A finite number that is not negative."""
        return float(self.checked(key, f"a number >= 0 and less than {_LARGEST:g}", _is_number, needed=True))

    def text(self, key: str, expected: str = "a string", *, needed: bool = False) -> Any:
        """A string that is not empty, or None if none is ``needed``."""
        return self.checked(
            key, expected, lambda value: isinstance(value, str) and value != "", needed=needed
        )


def quoted(value: object) -> object:
    """A value as it stands in the file: a text in quotes, so that "50" does not look like a number."""
    return f"the string {value!r}" if isinstance(value, str) else value


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value < _LARGEST


def read_toml(text: str) -> ModelSettings:
    """The settings in a ``clockwork.toml``. Raises ``ProblemError``."""
    try:
        values = tomllib.loads(text)
    except (ValueError, RecursionError) as error:
        raise problem(
            FILE_NAME, expected="valid TOML", found=str(error), advice="correct the line it names"
        ) from None
    table = Table(
        values,
        FILE_NAME,
        (
            "backend", "max_batch_size", "slo_ms", "queue_limit", "output_bytes", "memory_bytes", "priority",
            "decide_ms", "inputs", "outputs", "version_policy", "labels", "emulated",
        ),
    )  # fmt: skip
    backend = table.text("backend")
    if backend is not None and backend not in BACKENDS:
        advice = did_you_mean(backend, BACKENDS)
        raise problem(table.path("backend"), expected=" or ".join(BACKENDS), found=backend, advice=advice)
    labels, label_files = _labels(table.raw("labels"))
    emulated = table.raw("emulated")
    return ModelSettings(
        backend=backend, max_batch_size=table.integer("max_batch_size", 0, 65536),
        slo_ms=table.milliseconds("slo_ms"), queue_limit=table.integer("queue_limit", 1),
        output_bytes=table.integer("output_bytes", 1), memory_bytes=table.integer("memory_bytes", 1),
        priority=table.integer("priority", 0, LEAST_PRIORITY),
        decide_ms=table.milliseconds("decide_ms", zero=True),
        inputs=_tensors(table.raw("inputs"), "inputs"), outputs=_tensors(table.raw("outputs"), "outputs"),
        version_policy=_version_policy(table.raw("version_policy")), labels=labels, label_files=label_files,
        emulated=None if emulated is None else _emulated(emulated),
    )  # fmt: skip


def _tensors(value: object, key: str) -> tuple[TensorSettings, ...]:
    if value is None:
        return ()
    if not isinstance(value, list):
        advice = f'write {key} = [{{name = "x", dims = [3, 224, 224], datatype = "FP32"}}]'
        raise problem(f"{FILE_NAME} {key}", expected="a list of tables", found=quoted(value), advice=advice)
    tensors = tuple(_tensor(item, f"{key}[{index}]") for index, item in enumerate(value))
    names = [tensor.name for tensor in tensors]
    for name in names:
        if names.count(name) > 1:
            raise problem(
                f"{FILE_NAME} {key}", expected="each name once", found=name, advice="remove one of the two"
            )
    return tensors


def _tensor(item: object, where: str) -> TensorSettings:
    table = Table(item, where, ("name", "dims", "datatype", "optional"))
    name = table.text("name", "the tensor's name", needed=True)
    dims = table.checked("dims", "whole numbers > 0, or -1", _are_dims)
    datatype = table.text("datatype")
    return TensorSettings(
        name=name,
        dims=None if dims is None else tuple(dims),
        datatype=None if datatype is None else datatype_of(datatype, table.path("datatype")),
        optional=table.checked("optional", "true or false", lambda value: isinstance(value, bool)) or False,
    )


def _are_dims(value: object) -> bool:
    return isinstance(value, list) and all(type(dim) is int and (dim > 0 or dim == -1) for dim in value)


def _version_policy(value: object) -> VersionPolicy | None:
    if value is None:
        return None
    where = f"{FILE_NAME} version_policy"
    advice = 'write "all", "latest", {latest = 2} or {specific = [1, 3]}'
    if value == "all":
        return VersionPolicy(latest=None)
    if value == "latest":
        return VersionPolicy()
    if isinstance(value, dict) and len(value) == 1:
        table = Table(value, "version_policy", ("latest", "specific", "all"))
        specific = table.raw("specific")
        if isinstance(specific, list) and specific and all(type(v) is int and v > 0 for v in specific):
            return VersionPolicy(latest=None, specific=tuple(sorted(specific)))
        if table.raw("all") is True:
            return VersionPolicy(latest=None)
        latest = table.integer("latest", 1)
        if latest is not None:
            return VersionPolicy(latest=latest)
    raise problem(where, expected="a version policy", found=quoted(value), advice=advice)


def _labels(value: object) -> tuple[dict[str, tuple[str, ...]], dict[str, str]]:
    """Labels given inline, and files that contain them, by output name."""
    lists: dict[str, tuple[str, ...]] = {}
    files: dict[str, str] = {}
    if value is None:
        return lists, files
    where = f"{FILE_NAME} labels"
    advice = 'write labels = {output = "labels.txt"} or {output = ["cat", "dog"]}'
    if not isinstance(value, dict):
        raise problem(where, expected="a table", found=quoted(value), advice=advice)
    for output, item in value.items():
        if isinstance(item, str) and item:
            files[output] = item
        elif isinstance(item, list) and all(isinstance(label, str) for label in item):
            lists[output] = tuple(item)
        else:
            raise problem(f"{where}.{output}", expected="a file or a list", found=item, advice=advice)
    return lists, files


def _emulated(value: object) -> EmulatedSettings:
    table = Table(value, "emulated", ("weights_mb", "infer_ms", "load_ms"))
    weights_mb, load_ms = table.amount("weights_mb"), table.amount("load_ms")
    durations = table.raw("infer_ms")
    advice = "write infer_ms = {1 = 2.5, 2 = 4.1}, from batch size 1 upwards"
    where = table.path("infer_ms")
    if not isinstance(durations, dict) or "1" not in durations:
        raise problem(where, expected="milliseconds by batch size", found=quoted(durations), advice=advice)
    steps = Table(durations, where, tuple(durations))
    infer_ns = {}
    for key in durations:
        if not key.isascii() or not key.isdigit() or len(key) > DIGITS_MAX or int(key) < 1:
            raise problem(where, expected="batch sizes >= 1", found=key, advice=advice)
        infer_ns[int(key)] = ms(steps.milliseconds(key) or 0.0)
    return EmulatedSettings(
        weights_bytes=round(weights_mb * MIB), infer_ns=dict(sorted(infer_ns.items())), load_ns=ms(load_ms)
    )


# ------------------------------------------------------------
# The result of compilation: a model and its code, ready to be served.


class ServedVersion(Struct, frozen=True, kw_only=True):
    """A version of a model ready to be served. Models of one architecture have equal codes."""

    model: Model
    code: Code

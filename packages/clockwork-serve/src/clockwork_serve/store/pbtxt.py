"""Reads Triton's ``config.pbtxt``; fields without meaning here are named in a warning."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, Final, TypeVar, cast

from google.protobuf.text_format import ParseError, ParseFloat, ParseInteger, Tokenizer

from clockwork_serve.errors import did_you_mean
from clockwork_serve.store.settings import (
    ModelSettings,
    TensorSettings,
    VersionPolicy,
    datatype_of,
    problem,
    quoted,
)

# ------------------------------------------------------------
# Protobuf's text format without a schema: protobuf's own tokens, with the line of each field.
#
# protobuf's own parser needs a descriptor of every field of Triton's configuration. It refuses unknown
# fields, or drops them silently; here, fields without meaning must be named.


_INTEGER: Final = re.compile(r"[-+]?(?:0[xX][0-9a-fA-F]+|\d+)")
_MOST_NESTED: Final = 64
_T = TypeVar("_T")


@dataclass(slots=True, frozen=True)
class Word:
    """A bare word: an enum value, or true and false."""

    text: str


@dataclass(slots=True)
class PbtxtMessage:
    """One message: every field with its values in the order written, and the line of its first one."""

    fields: dict[str, list[object]] = field(default_factory=dict)
    lines: dict[str, int] = field(default_factory=dict)

    def add(self, name: str, values: list[object], line: int) -> None:
        """Append values of a field, which may be none."""
        self.fields.setdefault(name, []).extend(values)
        self.lines.setdefault(name, line)


def parse_prototext(text: str, where: str) -> PbtxtMessage:
    """The top-level message in ``text``. Raises ``ProblemError`` with the line of a syntax error."""
    return _Reader(text, where).block(closing="", depth=0)


class _Reader:
    def __init__(self, text: str, where: str) -> None:
        # Any: the type stubs of its errors are wrong.
        self._tokens: Any = Tokenizer(text.split("\n"))
        self._where = where

    def block(self, closing: str, depth: int) -> PbtxtMessage:
        """The fields up to ``closing``, which is consumed too; if it is empty, those of the whole text."""
        block = PbtxtMessage()
        if depth > _MOST_NESTED:
            raise self._wrong(f"at most {_MOST_NESTED} nested blocks")
        # The token at the end of the text is empty, and so is ``closing`` at the top level.
        while not self._tokens.LookingAt(closing):
            if self._tokens.AtEnd():
                raise self._wrong(f"'{closing}'")
            self._field(block, depth)
        self._tokens.NextToken()
        return block

    def _field(self, block: PbtxtMessage, depth: int) -> None:
        name = self._take(self._tokens.ConsumeIdentifier, "a field name")
        line = self._tokens.ParseErrorPreviousToken("").GetLine()
        scalar = self._tokens.TryConsume(":")
        if self._tokens.TryConsume("["):
            block.add(name, self._list(depth, scalar=scalar), line)
        else:
            block.add(name, [self._value(depth, scalar=scalar)], line)
        self._tokens.TryConsume(",") or self._tokens.TryConsume(";")

    def _list(self, depth: int, *, scalar: bool) -> list[object]:
        values: list[object] = []
        while not self._tokens.TryConsume("]"):
            values.append(self._value(depth, scalar=scalar))
            if not self._tokens.TryConsume(",") and not self._tokens.LookingAt("]"):
                raise self._wrong("',' or ']'")
        return values

    def _value(self, depth: int, *, scalar: bool) -> object:
        for opening, closing in (("{", "}"), ("<", ">")):
            if self._tokens.TryConsume(opening):
                return self.block(closing, depth + 1)
        if not scalar:
            raise self._wrong("':' or '{'")
        token = self._tokens.token
        if token.startswith(('"', "'")):
            return self._take(self._tokens.ConsumeString, "a closed string of Unicode with known escapes")
        if token[:1] in tuple("+-.0123456789"):
            return self._take(self._number, "a number of at most 64 bits")
        return Word(self._take(self._tokens.ConsumeIdentifier, "a value"))

    def _number(self) -> int | float:
        token = self._tokens.token
        number = (
            ParseInteger(token, is_signed=token.startswith("-"), is_long=True)
            if _INTEGER.fullmatch(token)
            else ParseFloat(token)
        )
        self._tokens.NextToken()
        return number

    def _take(self, consume: Callable[[], _T], expected: str) -> _T:
        try:
            return consume()
        except (ParseError, ValueError):
            raise self._wrong(expected) from None

    def _wrong(self, expected: str) -> Exception:
        line = self._tokens.ParseError("").GetLine()
        return problem(
            f"{self._where} line {line}", expected=expected, found=self._tokens.token or "end of file",
            advice="correct that line",
        )  # fmt: skip


# ------------------------------------------------------------
# Reads Triton's ``config.pbtxt``: fields without meaning here are named in a warning.
#
# Fields that would change results are refused, not ignored.


FILE_NAME = "config.pbtxt"

_TOP = (
    "name", "platform", "backend", "runtime", "version_policy", "max_batch_size", "input", "output",
    "batch_input", "batch_output", "optimization", "dynamic_batching", "sequence_batching",
    "ensemble_scheduling", "instance_group", "default_model_filename", "cc_model_filenames", "metric_tags",
    "parameters", "model_warmup", "model_operations", "model_transaction_policy",
    "model_repository_agents", "response_cache", "model_metrics",
)  # fmt: skip
_INPUT = (
    "name", "data_type", "format", "dims", "reshape", "is_shape_tensor", "allow_ragged_batch", "optional",
    "is_non_linear_format_io",
)  # fmt: skip
_OUTPUT = (
    "name", "data_type", "dims", "reshape", "label_filename", "is_shape_tensor", "is_non_linear_format_io",
)  # fmt: skip
_TENSOR_USED = ("name", "data_type", "format", "dims", "reshape", "optional", "label_filename")
_FORMATS = ("FORMAT_NONE", "FORMAT_NHWC", "FORMAT_NCHW")
_PLATFORMS = {
    "onnxruntime_onnx": "onnx", "onnxruntime": "onnx", "onnx": "onnx", "python": "python",
    "pytorch_libtorch": "torch", "pytorch": "torch", "torch_aoti": "torch", "torch": "torch",
}  # fmt: skip
"""Triton's platforms and backends that this server has, by its own names."""


def read_pbtxt(text: str, folder_name: str) -> tuple[ModelSettings, tuple[str, ...]]:
    """Settings and warnings from a model's ``config.pbtxt``. Raises ``ProblemError``."""
    config = parse_prototext(text, FILE_NAME)
    _known(config, _TOP, "")
    _refuse(config)
    name = _string(config, "name")
    if name and name != folder_name:
        raise problem(
            f"{FILE_NAME} name", expected=f"'{folder_name}', the folder's name", found=name,
            advice="rename the folder or remove the field",
        )  # fmt: skip
    warnings: list[str] = []
    inputs, input_dims, _ = _tensors(config, "input", _INPUT, warnings)
    outputs, output_dims, label_files = _tensors(config, "output", _OUTPUT, warnings)
    settings = ModelSettings(
        backend=_backend(config), max_batch_size=_max_batch_size(config),
        queue_limit=_queue_limit(config, warnings), inputs=inputs, outputs=outputs,
        version_policy=_version_policy(config), label_files=label_files, formats=_formats(config),
        input_dims=input_dims, output_dims=output_dims, parameters=_map(config, "parameters", _parameter),
        metric_tags=_map(config, "metric_tags", lambda entry: _string(entry, "value")),
        file_name=_string(config, "default_model_filename") or None,
    )  # fmt: skip
    used = {
        "name", "platform", "backend", "version_policy", "max_batch_size", "input", "output",
        "dynamic_batching", "default_model_filename", "model_transaction_policy",
    }  # fmt: skip
    for key in config.fields:
        if key in ("parameters", "metric_tags"):
            warnings.extend(f"{path}; clients are told it" for path in map(_ignored, _leaves(config, key)))
        elif key not in used:
            warnings.extend(_ignored(path) for path in _leaves(config, key))
    return settings, tuple(dict.fromkeys(warnings))


def _ignored(path: str) -> str:
    return f"{FILE_NAME}: {path} has no meaning here and is ignored"


def _known(block: PbtxtMessage, known: tuple[str, ...], prefix: str) -> None:
    for key, line in block.lines.items():
        if key not in known:
            raise problem(
                f"{FILE_NAME} line {line} {prefix}{key}", expected="a field of Triton's model configuration",
                found=key, advice=did_you_mean(key, known),
            )  # fmt: skip


def _leaves(block: PbtxtMessage, key: str, prefix: str = "") -> Iterator[str]:
    """The paths of all values below a field: ``optimization.cuda.graphs``."""
    for value in block.fields[key] or [None]:
        path = prefix + key
        if isinstance(value, PbtxtMessage) and key in ("parameters", "metric_tags"):
            yield f"{path}[{_string(value, 'key')!r}]"
        elif isinstance(value, PbtxtMessage) and value.fields:
            for inner in value.fields:
                yield from _leaves(value, inner, path + ".")
        else:
            yield path


def _refuse(config: PbtxtMessage) -> None:
    refused = {
        "ensemble_scheduling": "an ensemble",
        "sequence_batching": "sequence batching",
        "batch_input": "batch_input",
        "batch_output": "batch_output",
    }
    for key, what in refused.items():
        if key in config.fields:
            raise problem(
                f"{FILE_NAME} {key}", expected="a single stateless model", found=what,
                advice="this server does not have it: serve the parts as models of their own",
            )  # fmt: skip
    for policy in _blocks(config, "model_transaction_policy"):
        if _boolean(policy, "decoupled"):
            raise problem(
                f"{FILE_NAME} model_transaction_policy.decoupled",
                expected="one answer per request (decoupled: false)",
                found="true",
                advice="this server does not stream: serve a model that answers once",
            )


def _backend(config: PbtxtMessage) -> str | None:
    for key in ("backend", "platform"):
        name = _string(config, key)
        if not name:
            continue
        if name not in _PLATFORMS:
            raise problem(
                f"{FILE_NAME} {key}", expected=" or ".join(sorted(_PLATFORMS)), found=f"'{name}'",
                advice="export the model to ONNX, or serve it with backend 'python'",
            )  # fmt: skip
        return _PLATFORMS[name]
    return None


def _max_batch_size(config: PbtxtMessage) -> int | None:
    values = config.fields.get("max_batch_size")
    if not values:
        # Triton reads an absent max_batch_size as 0, except that it derives it for models whose inputs are
        # not declared either.
        return 0 if "input" in config.fields else None
    value = values[-1]
    if not isinstance(value, int) or value < 0:
        raise problem(
            f"{FILE_NAME} max_batch_size",
            expected="a whole number >= 0",
            found=quoted(value),
            advice="correct it",
        )
    return value


def _queue_limit(config: PbtxtMessage, warnings: list[str]) -> int | None:
    limit = None
    for batching in _blocks(config, "dynamic_batching"):
        for key in batching.fields:
            if key != "default_queue_policy":
                warnings.extend(_ignored(path) for path in _leaves(batching, key, "dynamic_batching."))
        for policy in _blocks(batching, "default_queue_policy"):
            for key, values in policy.fields.items():
                if key == "max_queue_size" and isinstance(values[-1], int):
                    limit = values[-1] or None
                else:
                    path = "dynamic_batching.default_queue_policy."
                    warnings.extend(_ignored(leaf) for leaf in _leaves(policy, key, path))
    return limit


def _version_policy(config: PbtxtMessage) -> VersionPolicy | None:
    for policy in _blocks(config, "version_policy"):
        for specific in _blocks(policy, "specific"):
            versions = [v for v in specific.fields.get("versions", []) if isinstance(v, int)]
            if versions:
                return VersionPolicy(latest=None, specific=tuple(sorted(versions)))
        if "all" in policy.fields:
            return VersionPolicy(latest=None)
        for latest in _blocks(policy, "latest"):
            count = (latest.fields.get("num_versions") or [1])[-1]
            if isinstance(count, int) and count >= 1:
                return VersionPolicy(latest=count)
        raise problem(
            f"{FILE_NAME} version_policy", expected="latest, all or specific", found=sorted(policy.fields),
            advice="write version_policy { latest { num_versions: 1 } }",
        )  # fmt: skip
    return None


def _tensors(
    config: PbtxtMessage, key: str, known: tuple[str, ...], warnings: list[str]
) -> tuple[tuple[TensorSettings, ...], dict[str, tuple[int, ...]], dict[str, str]]:
    """Inputs or outputs as the model has them; by name, dims that clients see instead, and label files."""
    tensors, reshaped, label_files = [], {}, {}
    for index, block in enumerate(_blocks(config, key)):
        _known(block, known, f"{key}.")
        name = _string(block, "name")
        where = f"{FILE_NAME} {key}[{index}]"
        if not name:
            raise problem(f"{where}.name", expected="the tensor's name", found="nothing", advice="add it")
        dims = _dims(block, "dims", f"{where}.dims")
        for reshape in _blocks(block, "reshape")[-1:]:
            reshaped[name] = dims or ()
            dims = _dims(reshape, "shape", f"{where}.reshape.shape") or ()
        label_file = _string(block, "label_filename")
        if label_file:
            label_files[name] = label_file
        for key_of_it in block.fields:
            if key_of_it not in _TENSOR_USED:
                warnings.extend(_ignored(path) for path in _leaves(block, key_of_it, f"{key}[{name}]."))
        tensors.append(
            TensorSettings(
                name=name, dims=dims, datatype=_datatype(block, where), optional=_boolean(block, "optional")
            )
        )
    return tuple(tensors), reshaped, label_files


def _formats(config: PbtxtMessage) -> dict[str, str]:
    """How the inputs that are images lie, by name: clients order pixels by that."""
    found = {}
    for index, block in enumerate(_blocks(config, "input")):
        for value in block.fields.get("format", [])[-1:]:
            text = value.text if isinstance(value, Word) else str(value)
            if text not in _FORMATS:
                raise problem(
                    f"{FILE_NAME} input[{index}].format", expected=" or ".join(_FORMATS), found=text,
                    advice=did_you_mean(text, _FORMATS),
                )  # fmt: skip
            found[_string(block, "name")] = text
    return found


def _map(config: PbtxtMessage, key: str, value_of: Callable[[PbtxtMessage], str]) -> dict[str, str]:
    """A map of texts, which is written entry by entry; of a key that is there twice the last counts."""
    entries = _blocks(config, key)
    for entry in entries:
        _known(entry, ("key", "value"), f"{key}.")
    return {_string(entry, "key"): value_of(entry) for entry in entries}


def _parameter(entry: PbtxtMessage) -> str:
    return "".join(_string(value, "string_value") for value in _blocks(entry, "value")[-1:])


def _dims(block: PbtxtMessage, key: str, where: str) -> tuple[int, ...] | None:
    values = block.fields.get(key)
    if values is None:
        return None
    if not all(isinstance(value, int) and (value > 0 or value == -1) for value in values):
        raise problem(where, expected="whole numbers > 0, or -1", found=values, advice=f"correct {FILE_NAME}")
    return tuple(cast("list[int]", values))


def _datatype(block: PbtxtMessage, where: str) -> str | None:
    values = block.fields.get("data_type")
    if not values:
        return None
    value = values[-1]
    return datatype_of(value.text if isinstance(value, Word) else str(value), f"{where}.data_type")


def _blocks(block: PbtxtMessage, key: str) -> list[PbtxtMessage]:
    values = block.fields.get(key, [])
    if not all(isinstance(value, PbtxtMessage) for value in values):
        raise problem(
            f"{FILE_NAME} line {block.lines[key]} {key}", expected="a block { ... }", found=quoted(values[0]),
            advice="correct it",
        )  # fmt: skip
    return cast("list[PbtxtMessage]", values)


def _string(block: PbtxtMessage, key: str) -> str:
    values = block.fields.get(key)
    if not values:
        return ""
    value = values[-1]
    if not isinstance(value, str):
        raise problem(
            f"{FILE_NAME} line {block.lines[key]} {key}", expected="a quoted string", found=value,
            advice="put it in quotes",
        )  # fmt: skip
    return value


def _boolean(block: PbtxtMessage, key: str) -> bool:
    values = block.fields.get(key, [])
    return any(value in (Word("true"), Word("True"), Word("t"), 1) for value in values[-1:])

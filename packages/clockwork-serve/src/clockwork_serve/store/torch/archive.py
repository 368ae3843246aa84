"""Reads a torch.export program without torch, and refuses any file that would run code when it is opened.

A ``model.pt2`` is a zip of stored files: the graph as JSON, each weight as its raw bytes. But torch opens
whatever the JSON asks for: pickles, attributes of any module, expressions that are evaluated. Here each of
these must be on a list of what programs need, or the file is refused.
"""

from __future__ import annotations

import ast
import contextlib
import json
import re
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from clockwork_serve.store.settings import problem

FILE = "model.pt2"
EXPORT = "export it with torch.export.save(torch.export.export(model.eval(), inputs), 'model.pt2')"
Json = dict[str, Any]

_GRAPH = "models/model.json"
_KINDS = {
    "weights": ("data/weights/model_weights_config.json", "data/weights/"),
    "constants": ("data/constants/model_constants_config.json", "data/constants/"),
}
_LARGEST_JSON = 64 << 20
_TARGET = re.compile(
    r"torch\.ops\.(aten|prims)\.\w+\.\w+"
    r"|torch\.ops\.higher_order\.wrap_with_(set_grad_enabled|autocast)"
    r"|_operator\.(add|sub|mul|floordiv|truediv|mod|neg|pow|getitem|lt|le|gt|ge|eq|ne|and_|or_|not_)"
    r"|torch\.sym_(int|float|max|min|not|ite|sum)"
    r"|math\.(ceil|floor|trunc|sqrt|pow)"
)
_FILE_OPERATORS = ("from_file", "save", "load")
"""Names of aten operators that would read or write files, if they exist."""
_ARGUMENTS = frozenset(
    f"as_{kind}"
    for kind in (
        "none", "tensor", "tensors", "int", "ints", "float", "floats", "string", "strings", "sym_int",
        "sym_ints", "scalar_type", "memory_format", "layout", "device", "bool", "bools", "sym_bool",
        "sym_bools", "graph", "optional_tensor", "optional_tensors", "sym_float", "sym_floats", "complex",
        "nested_tensors", "int_lists", "float_lists", "expr", "name",
    )
)  # fmt: skip
_LONGEST_EXPRESSION = 10_000
_LARGEST_NUMBER = 1 << 63
_LARGEST_POWER = 16
_POWERS_MAX = 4
_NUMBERS = ("Integer", "Float", "Rational")
_SYMBOL = re.compile(r"[a-z]{1,4}\d+")
_FUNCTIONS = frozenset(
    {
        "Symbol", "Integer", "Float", "Rational", "Add", "Mul", "Pow", "Max", "Min", "Mod", "PythonMod",
        "FloorDiv", "CleanDiv", "CeilDiv", "CeilToInt", "FloorToInt", "TruncToInt", "RoundToInt", "ToFloat",
        "IntTrueDiv", "FloatTrueDiv", "PowByNatural", "ModularIndexing", "Where", "Identity", "Eq",
        "Equality", "Ne", "Unequality", "Lt", "Le", "Gt", "Ge", "StrictLessThan", "LessThan",
        "StrictGreaterThan", "GreaterThan", "And", "Or", "Not",
    }
)  # fmt: skip
_NODES = (
    ast.Expression, ast.Call, ast.keyword, ast.Name, ast.Load, ast.Constant, ast.BinOp, ast.UnaryOp,
    ast.Compare, ast.operator, ast.unaryop, ast.cmpop,
)  # fmt: skip


@dataclass(frozen=True)
class Payload:
    """One tensor of the file: the entry that holds its bytes, and what they mean (torch's own record)."""

    entry: str
    is_param: bool
    meta: Json


@dataclass(frozen=True)
class Archive:
    """A program as it is in the file, checked. ``tensors`` are weights and constants by name."""

    path: Path
    program: Json
    tensors: dict[str, Payload]

    def read(self, entries: list[str]) -> dict[str, bytes]:
        """The bytes of entries, verified against their checksums. Raises ``ProblemError``."""
        with _opened(self.path) as file:
            return {entry: _entry(file, entry) for entry in entries}


def read_archive(path: Path) -> Archive:
    """The program at ``path``. Raises ``ProblemError`` for anything else, and for what would run code."""
    with _opened(path) as file, known_layout():
        prefix = _prefix(file, path)
        program = _json(file, prefix + _GRAPH)
        _check(program)
        names = set(file.namelist())
        tensors: dict[str, Payload] = {}
        for kind, (config, folder) in _KINDS.items():
            if prefix + config not in names:
                refuse(
                    f"its {kind} as plain bytes", f"no {config}, as older versions of torch wrote it",
                    "export it again with a later torch (2.13 writes plain bytes)",
                )  # fmt: skip
            for name, found in _json(file, prefix + config)["config"].items():
                tensors[name] = _payload(name, found, prefix + folder, names)
    return Archive(path, program, tensors)


@contextlib.contextmanager
def known_layout() -> Iterator[None]:
    """Around code that reads a record: turns errors from an unexpected structure into a problem."""
    try:
        yield
    except (LookupError, TypeError, ValueError, AttributeError, OverflowError, RecursionError) as error:
        refuse(
            "a torch.export program of a known layout", f"another one ({type(error).__name__}: {error})",
            "export it again with the version of torch that is installed here",
        )  # fmt: skip


def refuse(expected: str, found: str, advice: str) -> NoReturn:
    """Raise the problem of a program that cannot be served."""
    raise problem(FILE, expected=expected, found=found, advice=advice)


def _payload(name: str, found: Json, folder: str, names: set[str]) -> Payload:
    if found["use_pickle"] is not False or found["tensor_meta"] is None:
        refuse(
            "tensors as plain bytes", f"'{name}', a pickled object, which would run code",
            "export it with plain tensors as parameters, buffers and constants",
        )  # fmt: skip
    for table in walk(found["tensor_meta"]):
        _check_table(table)
    entry = f"{folder}{found['path_name']}"
    if entry not in names:
        refuse(f"an entry {entry}", "none", "copy the file again")
    return Payload(entry, bool(found["is_param"]), found["tensor_meta"])


def _opened(path: Path) -> zipfile.ZipFile:
    with open(path, "rb") as file:
        head = file.read(8)
    if not head:
        refuse("a torch.export program", "an empty file", "copy the file again")
    if not head.startswith(b"PK"):
        what = "a pickled object, which would run code" if head[:1] == b"\x80" else "no zip archive"
        refuse("a torch.export program", what, EXPORT)
    try:
        return zipfile.ZipFile(path)
    except (zipfile.BadZipFile, RuntimeError, ValueError) as error:
        return refuse(
            "a torch.export program", f"an archive that cannot be read ({error})",
            "the file is truncated or corrupt: copy it again",
        )  # fmt: skip


def _prefix(file: zipfile.ZipFile, path: Path) -> str:
    """The folder in the archive that holds the program."""
    names = file.namelist()
    size = path.stat().st_size
    last = {name.partition("/")[2] for name in names}
    if "constants.pkl" in last or any(name.startswith("code/") for name in last):
        refuse("a torch.export program", "a TorchScript file", EXPORT)
    if any(name.startswith("data/aotinductor/") for name in last):
        refuse(
            "a torch.export program", "a package of compiled code", "give the program it was compiled from"
        )
    if any(name == "data.pkl" or name.endswith("/data.pkl") for name in names):
        refuse("a torch.export program", "a pickled object (torch.save), which would run code", EXPORT)
    for info in file.infolist():
        if info.compress_type != zipfile.ZIP_STORED or info.file_size > size:
            refuse("entries that are not compressed", f"{info.filename}, which is", EXPORT)
    if sum(info.file_size for info in file.infolist()) > size:
        refuse("entries that lie one after the other", "some that overlap", "copy the file again")
    found = [name for name in names if name.partition("/")[2] == _GRAPH]
    models = [name for name in last if name.startswith("models/")]
    if len(found) != 1 or len(models) != 1:
        shown = ", ".join(sorted(models) or sorted(last)[:5])
        refuse(f"a torch.export program ({_GRAPH} in the archive)", shown or "an empty archive", EXPORT)
    return found[0].removesuffix(_GRAPH)


def _entry(file: zipfile.ZipFile, name: str) -> bytes:
    try:
        return file.read(name)
    except (zipfile.BadZipFile, EOFError, OSError, KeyError, RuntimeError) as error:
        return refuse(
            f"the entry {name} whole", f"a corrupt one ({error})", "the file is corrupt: copy it again"
        )


def _json(file: zipfile.ZipFile, name: str) -> Json:
    if file.getinfo(name).file_size > _LARGEST_JSON:
        refuse(f"{name} of at most {_LARGEST_JSON >> 20} MiB", "more", EXPORT)
    try:
        data = _entry(file, name)
        found = json.loads(data)
        if b"\\ud" in data.lower():  # halves of letters, which cannot be encoded, where they are not in pairs
            json.dumps(found, ensure_ascii=False).encode()
    except (ValueError, RecursionError) as error:
        return refuse(f"JSON in {name}", str(error), "the file is corrupt: copy it again")
    if not isinstance(found, dict):
        refuse(f"a table in {name}", type(found).__name__, "the file is corrupt: copy it again")
    return found


def walk(value: object) -> Iterator[Json]:
    """Every table in a JSON value, from the outside inwards."""
    stack = [value]
    while stack:
        each = stack.pop()
        if isinstance(each, dict):
            yield each
            stack.extend(each.values())
        elif isinstance(each, list):
            stack.extend(each)


def _check(program: Json) -> None:
    """Remove what is not needed, and refuse what could run code. Changes ``program``."""
    module = program["graph_module"]
    module["metadata"] = {}
    module["treespec_namedtuple_fields"] = {}
    module["module_call_graph"] = module["module_call_graph"][:1]
    program["guards_code"] = []
    for name in program["range_constraints"]:
        if not _SYMBOL.fullmatch(name):
            refuse("names of sizes such as s77", repr(name), "export it again")
    for table in walk(program):
        _check_table(table)


def _check_table(table: Json) -> None:
    if "target" in table:
        target = table["target"]
        _check_target(target if isinstance(target, str) else repr(target))
        table["metadata"] = {}
    if "expr_str" in table:
        check_expression(table["expr_str"])
    if "device" in table and isinstance(table["device"], dict):
        table["device"] = {"type": "cpu", "index": None}
    if "as_device" in table:
        table["as_device"] = {"type": "cpu", "index": None}
    for key in table:
        if key.startswith("as_") and key not in _ARGUMENTS:
            refuse(
                "arguments that are tensors, numbers or strings", f"one of kind {key}",
                "export the model without custom objects",
            )  # fmt: skip


def _check_target(target: str) -> None:
    operator = target.split(".")[3] if target.startswith("torch.ops.aten.") else ""
    if not _TARGET.fullmatch(target) or operator in _FILE_OPERATORS:
        refuse(
            "operators of torch.ops.aten", f"'{target}'",
            "export the model without custom operators and control flow (torch.cond, scan)",
        )  # fmt: skip


def check_expression(text: object) -> None:
    """Refuse an expression of sizes that is more than arithmetic: torch evaluates it as Python."""
    try:
        good = isinstance(text, str) and len(text) <= _LONGEST_EXPRESSION
        nodes = list(ast.walk(ast.parse(str(text), mode="eval"))) if good else []
        good = good and all(_is_arithmetic(node) for node in nodes)
        good = good and sum(map(_is_power, nodes)) <= _POWERS_MAX
    except (ValueError, SyntaxError, RecursionError, MemoryError):
        good = False
    if not good:
        refuse("sizes as arithmetic expressions", repr(text)[:100], "export it again")


def _is_arithmetic(node: ast.AST) -> bool:
    match node:
        case ast.Call():
            return isinstance(node.func, ast.Name) and node.func.id in _FUNCTIONS
        case ast.Name():
            return node.id in _FUNCTIONS or bool(_SYMBOL.fullmatch(node.id))
        case ast.Constant():
            if isinstance(node.value, int | float):
                return abs(node.value) <= _LARGEST_NUMBER
            return bool(_SYMBOL.fullmatch(str(node.value)))
        case ast.LShift() | ast.RShift():
            return False
        case _:
            return isinstance(node, _NODES)


def _is_power(node: ast.AST) -> bool:
    """Whether it raises to a power, which torch evaluates for two numbers: 9**9**9 never ends."""
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Pow):
        power: ast.AST | None = node.right
    elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id.startswith("Pow"):
        power = node.args[1] if len(node.args) > 1 else None
    else:
        return False
    if isinstance(power, ast.Call) and isinstance(power.func, ast.Name) and power.func.id in _NUMBERS:
        power = next(iter(power.args), None)
    if isinstance(power, ast.UnaryOp):
        power = power.operand
    number = power.value if isinstance(power, ast.Constant) else None
    if not isinstance(number, int | float) or not abs(number) <= _LARGEST_POWER:
        raise ValueError("a power that is no small number")
    return True


def write_archive(archive: Archive, path: Path) -> None:
    """The checked program alone, as torch opens it: without sample inputs, which are a pickle."""
    with known_layout():
        _write(archive, path)


def _write(archive: Archive, path: Path) -> None:
    module = archive.program["graph_module"]
    call = module["module_call_graph"][0]
    signature = module["signature"]
    given = [each for each in signature["input_specs"] if "user_input" in each or "constant_input" in each]
    call["signature"] = {
        **call["signature"],
        "in_spec": _tree(len(given), called=True),
        "out_spec": _tree(len(signature["output_specs"]), called=False),
        "forward_arg_names": None,
    }
    configs: dict[str, Json] = {config: {} for config, _ in _KINDS.values()}
    for name, payload in archive.tensors.items():
        kind = "weights" if "/data/weights/" in payload.entry else "constants"
        configs[_KINDS[kind][0]][name] = {
            "path_name": payload.entry.rpartition("/")[2],
            "is_param": payload.is_param,
            "use_pickle": False,
            "tensor_meta": payload.meta,
        }
    plain = {
        "archive_format": b"pt2", "archive_version": b"0", "byteorder": b"little", ".data/version": b"6\n",
        ".data/serialization_id": b"0" * 40, "data/sample_inputs/model.pt": b"",
        _GRAPH: json.dumps(archive.program).encode(),
    }  # fmt: skip
    entries = list(dict.fromkeys(payload.entry for payload in archive.tensors.values()))
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as file, _opened(archive.path) as source:
        for name, data in plain.items():
            file.writestr(f"program/{name}", data)
        for name, config in configs.items():
            file.writestr(f"program/{name}", json.dumps({"config": config}))
        for entry in entries:
            file.writestr(f"program/{entry.partition('/')[2]}", _entry(source, entry))


def _tree(leaves: int, *, called: bool) -> str:
    """A flat tuple of values, or the arguments of a call with such a tuple, as torch writes its trees."""
    leaf: Json = {"type": None, "context": None, "children_spec": []}
    flat: Json = {"type": "builtins.tuple", "context": "null", "children_spec": [leaf] * leaves}
    none: Json = {"type": "builtins.dict", "context": "[]", "children_spec": []}
    both: Json = {"type": "builtins.tuple", "context": "null", "children_spec": [flat, none]}
    return json.dumps([1, both if called else flat])

"""A model file, with external data, as one buffer of bytes; files outside the repository are refused."""

from __future__ import annotations

import functools
import hashlib
import os
import re
import stat
import time
from dataclasses import dataclass
from pathlib import Path

import onnx
from msgspec import Struct

from clockwork_serve.store.graph_walks import check_limits, checked_tensors
from clockwork_serve.store.optimiser import LARGEST_MODEL, parse_model
from clockwork_serve.store.repository import inside
from clockwork_serve.store.settings import problem

_NUMBER = re.compile(r"[0-9]{1,18}", re.ASCII)
_SETTLED_NS = 100_000_000
"""A file changed less than this ago may change again without a change of its time stamp."""


class FileFacts(Struct, frozen=True, array_like=True):
    """Facts that identify the state of a file without reading it."""

    path: str
    size: int
    mtime_ns: int
    ctime_ns: int
    inode: int

    @classmethod
    def of(cls, path: Path) -> FileFacts:
        """The facts of a file now."""
        found = path.stat()
        return cls(str(path), found.st_size, found.st_mtime_ns, found.st_ctime_ns, found.st_ino)

    @property
    def settled(self) -> bool:
        """Whether equal facts imply equal content from now on."""
        return time.time_ns() - max(self.mtime_ns, self.ctime_ns) > _SETTLED_NS


def current(files: tuple[FileFacts, ...]) -> bool:
    """Whether every file is unchanged."""
    try:
        return all(FileFacts.of(Path(facts.path)) == facts for facts in files)
    except OSError:
        return False


@dataclass(frozen=True)
class ModelSource:
    """A self-contained model: its bytes, and the files it came from."""

    data: memoryview
    files: tuple[FileFacts, ...]

    @functools.cached_property
    def content(self) -> str:
        """A hash of all bytes."""
        return hashlib.sha256(self.data).hexdigest()


def read_source(path: Path, folder: Path) -> ModelSource:
    """The model at ``path``, external data (of the same ``folder``) embedded. Raises ``ProblemError``."""
    facts = FileFacts.of(path)
    if not facts.size:
        raise problem(
            path.name, expected="an ONNX model", found="an empty file", advice="copy the file again"
        )
    if facts.size > LARGEST_MODEL:
        raise _too_large(facts.size)
    # Read, not mapped: truncating a mapped file would kill the process.
    whole = path.read_bytes()
    check_limits(memoryview(whole))
    whole, others = _with_external_data(whole, folder)
    return ModelSource(memoryview(whole), (facts, *others))


def _with_external_data(whole: bytes, folder: Path) -> tuple[bytes, tuple[FileFacts, ...]]:
    model = parse_model(whole)
    # All of them: the runtime would look for the others in the server's working directory.
    elsewhere = onnx.TensorProto.EXTERNAL
    outside = [
        each for each in checked_tensors(model) if each.data_location == elsewhere or each.external_data
    ]
    if not outside:
        return whole, ()
    files: dict[str, FileFacts] = {}
    total = len(whole)
    for tensor in outside:
        where = {entry.key: entry.value for entry in tensor.external_data}
        location = where.get("location", "")
        if not location or Path(location).is_absolute():
            raise problem(
                f"external data of '{tensor.name}'", expected="a file beside the model", found=repr(location),
                advice="save the model with relative locations",
            )  # fmt: skip
        path = inside(folder, folder / location, f"external data of '{tensor.name}'")
        files[location] = FileFacts.of(path)
        data = _read_piece(path, where, tensor.name, LARGEST_MODEL - total)
        total += len(data)
        tensor.raw_data = data
        tensor.data_location = onnx.TensorProto.DEFAULT
        del tensor.external_data[:]
    return model.SerializeToString(), tuple(files.values())


def _read_piece(path: Path, where: dict[str, str], name: str, room: int) -> bytes:
    """A tensor's bytes; at most ``room``, and only from a regular file."""
    given = {key: where[key] for key in ("offset", "length") if where.get(key)}
    if not all(_NUMBER.fullmatch(value) for value in given.values()):
        raise problem(
            f"external data of '{name}'", expected="whole numbers for offset and length", found=given,
            advice="export the model again",
        )  # fmt: skip
    # Do not block on a pipe without a writer.
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOFOLLOW)
    facts = os.fstat(descriptor)
    if not stat.S_ISREG(facts.st_mode):
        os.close(descriptor)
        raise problem(
            f"external data of '{name}'", expected=f"a file {path.name}",
            found=f"something else ({stat.filemode(facts.st_mode)})", advice="save the model again",
        )  # fmt: skip
    with open(descriptor, "rb") as file:
        offset = int(given.get("offset", "0"))
        there = max(facts.st_size - offset, 0)
        length = int(given["length"]) if "length" in given else there
        if length > there or offset > facts.st_size:
            raise problem(
                f"external data of '{name}'", expected=f"{length} bytes at {offset} of {path.name}",
                found=f"a file of {facts.st_size}", advice="the file is truncated: copy it again",
            )  # fmt: skip
        if length > room:
            raise _too_large(LARGEST_MODEL - room + length)
        file.seek(offset)
        data = file.read(length)
    if len(data) != length:
        raise problem(
            f"external data of '{name}'", expected=f"{length} bytes at {offset} of {path.name}",
            found=f"{len(data)} bytes", advice="the file changed while it was read: load the model again",
        )  # fmt: skip
    return data


def _too_large(size: int) -> Exception:
    return problem(
        "model.onnx", expected=f"at most {LARGEST_MODEL} bytes with its external data", found=f"{size} bytes",
        advice="one protobuf message cannot be larger: split the model or use smaller element types",
    )  # fmt: skip

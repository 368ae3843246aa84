"""The files of a code, verified against its record when they are opened; no other in its folder is read."""

from __future__ import annotations

from pathlib import Path

from clockwork_serve.errors import DamageError
from clockwork_serve.integrity import damage, file_digest, hash_of
from clockwork_serve.messages import Code


def read_file(code: Code, name: str) -> bytes:
    """What is in a file of a code, which is what was stored; DamageError otherwise."""
    path, wanted = Path(code.path) / name, _sha256(code, name)
    try:
        data = path.read_bytes()
    except OSError as error:
        raise _damaged(code, name, str(error.strerror)) from error
    if hash_of(data) != wanted:
        raise _damaged(code, name, "other content")
    return data


def has_file(code: Code, name: str) -> bool:
    """Whether a code has a file of that name."""
    return any(file.name == name for file in code.files)


def check_file(code: Code, name: str) -> Path:
    """The path of a file of a code, for who opens it by itself; DamageError unless it is what was stored."""
    path, wanted = Path(code.path) / name, _sha256(code, name)
    try:
        found = file_digest(path)
    except OSError as error:
        raise _damaged(code, name, str(error.strerror)) from error
    if found != wanted:
        raise _damaged(code, name, "other content")
    return path


def _sha256(code: Code, name: str) -> str:
    for file in code.files:
        if file.name == name:
            return file.sha256
    raise _damaged(code, name, "no such file in its record")


def _damaged(code: Code, name: str, found: str) -> DamageError:
    return damage("code", code.code_id, Path(code.path) / name, found)

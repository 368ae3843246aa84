"""Wheels and sdists of the three distributions, and Pythons that have some of them and what those need."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Iterable
from importlib.metadata import Distribution, distribution, distributions
from pathlib import Path

from packaging.requirements import Requirement

ROOT = Path(__file__).parents[2]
NAMES = ("clockwork-client", "clockwork-serve", "clockwork-lab")
BUILD_S = 900.0
_BUILD = """
import sys
from setuptools import build_meta
what, folder = sys.argv[1:]
print(getattr(build_meta, f"build_{what}")(folder))
"""


def source(name: str, folder: Path) -> Path:
    """A copy of a distribution's folder as git knows it, so that building leaves nothing in the checkout.

    The workspace's settings and pages lie above it as they do there: mypyc and the server's wheel want some.
    """
    shutil.copy2(ROOT / "pyproject.toml", folder)
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard", f"packages/{name}", "docs",
         "examples"],
        cwd=ROOT, capture_output=True, text=True, check=True,
    )  # fmt: skip
    for path in filter(None, listed.stdout.split("\0")):
        if (ROOT / path).is_file():
            (folder / path).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / path, folder / path)
    return folder / "packages" / name


def build(what: str, tree: Path, into: Path, **variables: str) -> Path:
    """The ``wheel`` or ``sdist`` of a source tree, by the setuptools that is here; nothing is fetched."""
    into.mkdir(parents=True, exist_ok=True)
    environment = {
        **os.environ, "CLOCKWORK_MYPYC": "", **variables,
        "PYTHONPATH": os.pathsep.join(filter(None, sys.path)),
    }  # fmt: skip
    done = subprocess.run(
        [sys.executable, "-c", _BUILD, what, str(into)], cwd=tree, env=environment, capture_output=True,
        text=True, timeout=BUILD_S, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    return into / done.stdout.splitlines()[-1]


def contents(wheel: Path) -> dict[str, bytes]:
    """The files of a wheel, but for the list of them."""
    with zipfile.ZipFile(wheel) as archive:
        return {name: archive.read(name) for name in archive.namelist() if not name.endswith("/RECORD")}


def metadata(wheel: Path) -> Distribution:
    """A wheel's metadata."""
    with zipfile.ZipFile(wheel) as archive:
        name = next(name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
    return next(iter(distributions(path=[str(wheel)], name=name.split("-")[0].replace("_", "-"))))


def needed(wheel: Path) -> set[str]:
    """The distributions that a wheel asks for where no extra is."""
    asked = (Requirement(one) for one in metadata(wheel).requires or ())
    return {one.name for one in asked if one.marker is None or one.marker.evaluate({"extra": ""})}


def python(folder: Path, wheels: Iterable[Path]) -> Path:
    """A Python that has these wheels and what they ask for, of those that are installed here, and no more.

    Wheels that are not among them are lacking, whatever is installed here.
    """
    wheels = list(wheels)
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(folder)], check=True)
    site = next(folder.glob("lib/python3*/site-packages"))
    third = folder / "third"
    third.mkdir()
    names = {name for wheel in wheels for name in needed(wheel)}
    done: set[str] = set(NAMES)
    while names - done:
        name = (names - done).pop()
        done.add(name)
        found = distribution(name)
        _link(found, third)
        for requirement in map(Requirement, found.requires or ()):
            if requirement.marker is None or requirement.marker.evaluate({"extra": ""}):
                names.add(requirement.name)
    (site / "third.pth").write_text(f"{third}\n")
    install = [sys.executable, "-m", "pip", "--python", str(folder / "bin" / "python"), "--quiet"]
    subprocess.run(
        [*install, "install", "--no-deps", "--no-index", *map(str, wheels)], check=True, timeout=BUILD_S
    )
    return folder / "bin" / "python"


def _link(found: Distribution, folder: Path) -> None:
    """What a distribution has at the top of its ``site-packages``; packages that several fill are merged.

    What is compiled goes along: to do it again takes ten seconds.
    """
    for path in found.files or ():
        if ".." in path.parts or path.is_absolute():
            continue
        target = folder.joinpath(*path.parts)
        if not target.exists():
            target.parent.mkdir(parents=True, exist_ok=True)
            target.symlink_to(str(found.locate_file(path)))

"""Builds the package; with ``CLOCKWORK_MYPYC=1`` the brains and the simulator's loop are compiled by mypyc.

Decides nothing. A wheel has the documentation as ``clockwork_serve/docs``, which ``clockwork docs`` prints,
and the examples as ``clockwork_serve/examples``, which ``clockwork examples`` copies; an sdist has both
beside ``src``; an editable install reads the checkout's.

Records (``msgspec.Struct``) cannot be compiled, so a module that defines one stays as it is; so does the
protocol of policies, of which other packages' interpreted classes must be instances.
"""

from __future__ import annotations

import os
import posixpath
import re
import shutil
from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py
from setuptools.command.sdist import sdist

SOURCE = Path("src/clockwork_serve")

PROTOCOL = SOURCE / "controller" / "policies" / "base.py"

LOOP = ("checks", "faults", "host", "recording", "simulation", "tally")
"""Modules of the simulator that every simulated request passes through."""

DIRECT_CALLS = ["-fno-semantic-interposition", "-fvisibility=hidden"] if os.name == "posix" else []
"""For the C compiler: simulations take 5 to 8 % less CPU time."""

ROOTS = (Path(), Path("../.."))
"""Where pages and examples are: in an sdist, and in a checkout."""

EXAMPLES = ("*.py", "*.sh", "*.toml", "models/**/*.*", "monitoring/*.*", "scenarios/*.toml")

FOLDERS = ("use", "operate", "develop")
"""Of them, which are packed beside the index: figures and measurements are large."""

LINK = re.compile(r"!?\[((?:[^\[\]]|\[[^\]]*\])+)\]\(([^)\s]+)\)")


def carried() -> dict[str, Path]:
    """Every page and every file of the examples, by its path in the package."""
    for root in ROOTS:
        docs, examples = root / "docs", root / "examples"
        if (docs / "index.md").is_file():
            found = [docs / "index.md", *(path for name in FOLDERS for path in docs.glob(f"{name}/*.md"))]
            found += [path for name in EXAMPLES for path in examples.glob(name) if path.is_file()]
            return {path.relative_to(root).as_posix(): path for path in found if path.suffix != ".pyc"}
    raise FileNotFoundError(
        f"expected docs/index.md in {' or '.join(map(str, ROOTS))}, found none; build in a checkout or sdist"
    )


def with_links_to(there: set[str], page: str, text: str) -> str:
    """The text of a page whose links to files that a wheel has not are plain text."""

    def kept(link: re.Match[str]) -> str:
        target = link[2].partition("#")[0]
        where = posixpath.normpath(posixpath.join(posixpath.dirname(page), target))
        return link[0] if not target or ":" in target or where in there else link[1]

    return LINK.sub(kept, text)


class BuildWithPages(build_py):
    """Adds pages and examples to what a wheel is made of."""

    def run(self) -> None:
        """Build, then write them."""
        super().run()
        if self.editable_mode:
            return
        package = Path(self.build_lib, "clockwork_serve")
        for folder in ("docs", "examples"):
            shutil.rmtree(package / folder, ignore_errors=True)  # an earlier build may have left what is gone
        found = carried()
        copy_to(package, found)
        pages = {name for name in found if name.endswith(".md")}
        for name in pages:
            text = with_links_to(pages, name, found[name].read_text(encoding="utf-8"))
            (package / name).write_text(text, encoding="utf-8")


class SdistWithPages(sdist):
    """Adds them, as they are, to an sdist, so that it gives the same wheel as the checkout."""

    def make_release_tree(self, base_dir: str, files: list[str]) -> None:
        """Fill the folder that becomes the sdist."""
        super().make_release_tree(base_dir, files)
        copy_to(Path(base_dir), carried())


def copy_to(folder: Path, found: dict[str, Path]) -> None:
    """Copy files to their places below a folder, with their modes."""
    for name, path in found.items():
        to = folder / name
        to.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, to)


def hot() -> list[str]:
    """The modules of the controller, the worker and the simulator's loop that mypyc can compile."""
    files = [*SOURCE.glob("controller/**/*.py"), *SOURCE.glob("worker/**/*.py")]
    files += [SOURCE / "sim" / f"{name}.py" for name in LOOP]
    return sorted(
        str(path)
        for path in files
        if path.name != "__init__.py" and path != PROTOCOL and "(Struct" not in path.read_text()
    )


def main() -> None:
    """Run setuptools."""
    compiled = []
    if os.environ.get("CLOCKWORK_MYPYC") == "1":
        from mypyc.build import mypycify

        compiled = mypycify(["--strict", *hot()], opt_level="3", group_name="clockwork_brains")
        for each in compiled:  # calls within the library need no table that others could change
            each.extra_compile_args += DIRECT_CALLS
    setup(ext_modules=compiled, cmdclass={"build_py": BuildWithPages, "sdist": SdistWithPages})


if __name__ == "__main__":  # as setuptools runs it
    main()

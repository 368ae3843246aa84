"""Builds the documentation as a site with search: ``make docs``. A warning is an error.

The pages stay as they are; links to files that are no pages (source, examples) become plain text, since the
site does not have them. A link to the folder of the packages leads to a page of their modules, which is made
here. The order of the pages is that of ``docs/index.md``. The site is ``build/site/html``.
"""

from __future__ import annotations

import ast
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
DOCS = ROOT / "docs"
STAGE = ROOT / "build" / "site"
PACKAGES = ROOT / "packages"
MODULES = DOCS / "develop" / "modules.md"  # only on the site
AROUND = ("README.md", "ARCHITECTURE.md", "CONTRIBUTING.md", "CHANGELOG.md")
SUFFIXES = {".md", ".json", ".png", ".svg"}
LINK = re.compile(r"(?<!!)\[((?:[^\[\]]|\[[^\]]*\])+)\]\(([^)\s]+)\)")


def main() -> int:
    """Stage the pages, and build them; the exit status is the builder's."""
    shutil.rmtree(STAGE, ignore_errors=True)
    found = [path for path in DOCS.rglob("*") if path.suffix in SUFFIXES]
    found += [ROOT / name for name in AROUND]
    for path in found:
        to = STAGE / "pages" / path.relative_to(ROOT)
        to.parent.mkdir(parents=True, exist_ok=True)
        if path.suffix == ".md":
            to.write_text(with_links_to(path, set(found)), encoding="utf-8")
        else:
            shutil.copy(path, to)
    (STAGE / "pages" / MODULES.relative_to(ROOT)).write_text(modules(), encoding="utf-8")
    settings = (DOCS / "zensical.toml").read_text(encoding="utf-8")
    settings = settings.replace("[project]\n", f"[project]\nnav = {navigation()}\n", 1)
    (STAGE / "zensical.toml").write_text(settings, encoding="utf-8")
    command = [str(Path(sys.executable).parent / "zensical"), "build", "--strict", "--clean"]
    if not Path(command[0]).is_file():
        sys.exit("error: zensical is not installed; make setup installs it")
    return subprocess.run(command, cwd=STAGE, check=False).returncode


def with_links_to(page: Path, there: set[Path]) -> str:
    """A page whose links to what the site has not are plain text; what exists nowhere stays, and fails."""

    def kept(link: re.Match[str]) -> str:
        target = link[2].partition("#")[0]
        where = Path(os.path.normpath(page.parent / target))
        if where == PACKAGES:
            return f"[{link[1]}]({os.path.relpath(MODULES, page.parent)})"
        is_page = not target or ":" in target or where in there
        return link[0] if is_page or not where.exists() else link[1]

    return LINK.sub(kept, page.read_text(encoding="utf-8"))


def modules() -> str:
    """The page of all modules: for each, the first line of its docstring."""
    lines = ["# Modules", "", "What each module does: the first line of its docstring, which says more."]
    for package in sorted(PACKAGES.glob("*/src/*")):
        if not (package / "__init__.py").is_file():
            continue
        lines += [
            "",
            f"## {package.name}",
            "",
            f"In `{package.relative_to(ROOT)}/`.",
            "",
            "| module | what |",
        ]
        lines += ["|---|---|"]
        for path in sorted(package.rglob("*.py")):
            name = path.relative_to(package).as_posix().removesuffix("__init__.py").removesuffix(".py")
            lines.append(f"| `{name or package.name}` | {first_line(path).replace('|', '/')} |")
    return "\n".join(lines) + "\n"


def first_line(path: Path) -> str:
    """Of a module's docstring; literals of reStructuredText and roles become those of Markdown."""
    docstring = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
    return re.sub(r":\w+:(`[^`]*`)", r"\1", docstring.partition("\n")[0].replace("``", "`"))


def navigation() -> str:
    """The pages in the order of the index, by its sections, as TOML."""
    entries = ['{ "Overview" = "README.md" }', '{ "What to read" = "docs/index.md" }']
    title = ""
    pages: list[str] = []
    for line in [*(DOCS / "index.md").read_text(encoding="utf-8").splitlines(), "## "]:
        if line.startswith("## "):
            if title:
                entries.append(f"{{ {json.dumps(title)} = {json.dumps(pages)} }}")
            title, pages = line.removeprefix("## "), []
        for _, target in LINK.findall(line) if title else ():
            path = Path(os.path.normpath(DOCS / target))
            where = os.path.relpath(MODULES if path == PACKAGES else path, ROOT)
            if where.endswith(".md") and where not in pages:
                pages.append(where)
    return f"[{', '.join(entries)}]"


if __name__ == "__main__":
    sys.exit(main())

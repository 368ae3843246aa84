"""Builds the documentation as a site with search: ``make docs``. A warning is an error.

The pages stay as they are; links to files that are no pages (source, examples) become plain text, since the
site does not have them. The order of the pages is that of ``docs/index.md``. The site is ``build/site/html``.
"""

from __future__ import annotations

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
        is_page = not target or ":" in target or where in there
        return link[0] if is_page or not where.exists() else link[1]

    return LINK.sub(kept, page.read_text(encoding="utf-8"))


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
            where = os.path.relpath(DOCS / target, ROOT)
            if where.endswith(".md") and where not in pages:
                pages.append(where)
    return f"[{', '.join(entries)}]"


if __name__ == "__main__":
    sys.exit(main())

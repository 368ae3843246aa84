"""Every link of the documentation leads somewhere: to a file that git knows, and to a heading of that page.

Links to other hosts are not followed. The site itself is built where the extra ``docs`` is installed.
"""

from __future__ import annotations

import re
import runpy
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import click
import pytest

from clockwork_serve.cli.entry import clockwork
from clockwork_serve.config import SETTINGS
from clockwork_serve.config.former import FORMER_SETTINGS
from tests.distributions.pages import PAGES, unfenced

ROOT = Path(__file__).resolve().parents[1]
FENCED = re.compile(r"^(```|~~~).*?^\1", re.MULTILINE | re.DOTALL)
CODE = re.compile(r"(`+)(?!`).*?(?<!`)\1(?!`)", re.DOTALL)
LINK = re.compile(r"!?\[(?:[^\[\]]|\[[^\]]*\])*\]\(\s*<?([^)>\s]+)>?[^)]*\)")
HTML_LINK = re.compile(r"<(?:img|a|source)\b[^>]*?\b(?:src|href|srcset)=\"([^\"]+)\"")
HEADING = re.compile(r"^#{1,6}\s+(.+?)\s*#*$", re.MULTILINE)
ELSEWHERE = re.compile(r"^[a-z][a-z0-9+.-]*:")
NAMED = re.compile(r"(?<![\w./-])docs/[\w/-]+\.(?:md|svg|jsonl)\b")
"""A page named in source, in a message or in a test."""


@cache
def known() -> frozenset[str]:
    """What git knows and has not lost, and what it would be told of next."""
    told = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT, capture_output=True, text=True, check=True,
    ).stdout.splitlines()  # fmt: skip
    return frozenset(name for name in told if (ROOT / name).is_file())


def pages() -> list[str]:
    """All pages, but those that are data of a package's."""
    return sorted(name for name in known() if name.endswith(".md") and ("docs/" in name or "/" not in name))


@cache
def prose(name: str) -> str:
    """A page without its code, which has brackets of its own."""
    text = FENCED.sub("", (ROOT / name).read_text(encoding="utf-8"))
    return re.sub(r"(?m)^(?: {4}|\t).*$", "", text)


def slug(heading: str) -> str:
    """The anchor of a heading, as GitHub makes it."""
    words = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading).replace("`", "")
    return re.sub(r"[^\w\- ]", "", words.strip().lower()).replace(" ", "-")


@cache
def anchors(name: str) -> frozenset[str]:
    """Of a page; a heading that comes again has a number."""
    seen: Counter[str] = Counter()
    found = set()
    for heading in HEADING.findall(FENCED.sub("", (ROOT / name).read_text(encoding="utf-8"))):
        base = slug(heading)
        found.add(f"{base}-{seen[base]}" if seen[base] else base)
        seen[base] += 1
    return frozenset(found)


def links(name: str) -> Iterator[str]:
    """Where a page's links and pictures lead to."""
    text = CODE.sub("``", prose(name))
    yield from LINK.findall(text)
    yield from HTML_LINK.findall(text)


def broken(name: str) -> Iterator[str]:
    """A page's links that lead nowhere, and why."""
    for link in links(name):
        if ELSEWHERE.match(link):
            continue
        path, _, anchor = link.partition("#")
        target = name
        if path:
            where = ((ROOT / name).parent / path).resolve()
            if not where.is_relative_to(ROOT):
                yield f"{link}: leads out of the project"
                continue
            target = where.relative_to(ROOT).as_posix()
            if target not in known() and not any(one.startswith(f"{target}/") for one in known()):
                yield f"{link}: there is no {target}"
                continue
        if anchor and target.endswith(".md") and anchor not in anchors(target):
            near = ", ".join(sorted(anchors(target)))
            yield f"{link}: {target} has no heading #{anchor}; it has {near}"


@pytest.mark.parametrize("name", pages())
def test_every_link_leads_to_a_file_and_a_heading_that_exist(name: str) -> None:
    assert not list(broken(name))


def test_a_link_that_leads_nowhere_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.modules[__name__], "ROOT", tmp_path)
    (tmp_path / "docs").mkdir()
    (tmp_path / "docs" / "here.md").write_text("# Here\n\n## It's `so`, twice\n\n## Again\n\n## Again\n")
    page = tmp_path / "page.md"
    page.write_text(
        "[good](docs/here.md#its-so-twice) [again](docs/here.md#again-1) [x](https://a.invalid/b.md)\n"
        "`[code](nowhere.md)`\n\n    [code](nowhere.md)\n\n"
        '[bad](docs/gone.md) [worse](docs/here.md#gone) ![image](docs/gone.svg) <img src="gone.png">\n'
    )
    subprocess.run(["git", "init", "-q"], cwd=tmp_path, check=True)
    for cached in (known, prose, anchors):
        cached.cache_clear()
    try:
        assert [found.partition(":")[0] for found in broken("page.md")] == [
            "docs/gone.md", "docs/here.md#gone", "docs/gone.svg", "gone.png",
        ]  # fmt: skip
    finally:
        for cached in (known, prose, anchors):
            cached.cache_clear()


def test_every_page_is_in_the_index() -> None:
    index = "docs/index.md"
    listed = {((ROOT / index).parent / link.partition("#")[0]).resolve() for link in links(index)}
    missing = [
        name
        for name in pages()
        if name.count("/") == 2 and not name.startswith("docs/figures/") and ROOT / name not in listed
    ]

    assert not missing


def test_pages_named_in_source_and_messages_exist() -> None:
    sources = [
        name for name in known() if name.endswith((".py", ".toml", ".sh", ".csv")) or name == "Makefile"
    ]
    gone = [
        f"{name}: {page}"
        for name in sources
        if name != "tests/test_docs.py"
        for page in NAMED.findall((ROOT / name).read_text(encoding="utf-8"))
        if page not in known()
    ]

    assert not gone


def test_no_page_names_an_option_of_an_earlier_version() -> None:
    context = click.Context(clockwork)
    commands = [clockwork.get_command(context, name) for name in clockwork.list_commands(context)]
    now = {word for command in commands if command for one in command.params for word in one.opts}
    gone = {f"--{name.replace('_', '-')}" for name in FORMER_SETTINGS} - now

    named = [
        f"{page}: {word}"
        for page in pages()
        if page not in {"CHANGELOG.md", "docs/operate/configuration.md"}
        for word in re.findall(r"(?<![\w-])--[a-z][a-z-]+", (ROOT / page).read_text(encoding="utf-8"))
        if word in gone
    ]

    assert named == []


def test_advice_to_install_one_of_our_distributions_names_its_folder_in_a_clone() -> None:
    by_name = re.compile(r"install (?:-U )?'?clockwork-(?:client|serve|lab)\b")  # they are in no index
    texts = [name for name in known() if name.startswith(("packages/", "docs/", "benchmarks/", "README"))]

    found = {
        one for one in texts if one.endswith((".py", ".md")) and by_name.search((ROOT / one).read_text())
    }

    assert not found


def test_alerts_lead_to_pages_and_headings() -> None:
    rules = (ROOT / "examples" / "monitoring" / "clockwork.rules.yml").read_text(encoding="utf-8")
    links = re.findall(r"^ +runbook: clockwork docs (\S+\.md)(?:#(\S+))?$", rules, re.MULTILINE)
    pages_by_name = {Path(name).name: name for name in pages()}

    assert len(links) == rules.count("- alert: ") > 20
    assert [page for page, _ in links if page not in pages_by_name] == []
    assert [link for link in links if link[1] and link[1] not in anchors(pages_by_name[link[0]])] == []


@pytest.mark.parametrize("page", ["ARCHITECTURE.md", "docs/develop/policies.md"])
def test_source_files_that_a_page_names_exist(page: str) -> None:
    named = re.findall(r"`((?:[a-z_]+/)+[a-z_]+\.py)`", (ROOT / page).read_text(encoding="utf-8"))

    assert [path for path in named if not any(f"/{one}".endswith(f"/{path}") for one in known())] == []


def test_files_that_pages_name_from_the_root_exist() -> None:
    file = re.compile(r"`((?:tests|benchmarks|comparison|examples|deploy|packages)/[\w./-]+\.\w+)`")
    named = {(page, path) for page in pages() for path in file.findall((ROOT / page).read_text("utf-8"))}

    assert {one for one in named if one[0] != "CHANGELOG.md" and one[1] not in known()} == set()


@pytest.mark.parametrize("page", PAGES)
def test_what_is_typed_stands_in_a_block_that_is_run(page: str) -> None:
    """So ``tests/distributions/test_commands.py`` sees it."""
    assert unfenced(page) == []


@pytest.mark.parametrize("page", ["from-triton", "from-ray-serve", "from-kserve"])
def test_what_others_names_map_to_is_there(page: str) -> None:
    text = (ROOT / "docs" / "use" / f"{page}.md").read_text(encoding="utf-8")
    rows = [row.split(" | ")[1:] for row in text.splitlines() if row.startswith("| `")]
    told = " ".join(cell for row in rows for cell in row)

    metrics = {*re.findall(r"`(clockwork_\w+)", text)}
    flags = {one.flag for one in SETTINGS} | {f"--no-{one.flag[2:]}" for one in SETTINGS}
    assert metrics
    assert metrics <= {*re.findall(r"`(clockwork_\w+)`", (ROOT / "docs/operate/metrics.md").read_text())}
    assert {*re.findall(r"--[a-z][\w-]*", told)} - flags <= {
        "--allow-grpc",
        "--allow-metrics",
        "--load-model",
    }


def test_each_page_begins_with_what_it_is_for() -> None:
    for name in pages():
        if name.startswith("docs/") and not name.startswith("docs/figures/"):
            title, _, rest = (ROOT / name).read_text(encoding="utf-8").partition("\n\n")
            assert title.startswith("# "), name
            assert re.match(r"[A-Z`\[]", rest), f"{name}: expected a paragraph after the title"


def test_the_site_has_a_line_for_each_module_and_leads_to_them_from_the_folder_of_the_packages() -> None:
    build = runpy.run_path(str(ROOT / "docs" / "build.py"))
    rows = re.findall(r"^\| `\S+` \| (.*) \|$", build["modules"](), re.MULTILINE)

    assert len(rows) == sum(bool(re.fullmatch(r"packages/[^/]+/src/.+\.py", name)) for name in known())
    assert [row for row in rows if not row.endswith(".")] == []
    assert "](develop/modules.md)" in build["with_links_to"](ROOT / "docs" / "index.md", set())


@pytest.mark.slow
def test_the_site_builds_without_a_warning() -> None:
    if not (Path(sys.executable).parent / "zensical").is_file():
        pytest.skip("zensical is not installed: make setup")

    done = subprocess.run(
        [sys.executable, "docs/build.py"], cwd=ROOT, capture_output=True, text=True, check=False
    )

    assert done.returncode == 0, done.stdout + done.stderr
    assert (ROOT / "build" / "site" / "html" / "search.json").is_file()

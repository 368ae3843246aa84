"""The rules of the house that no tool checks, over every file that git knows."""

from __future__ import annotations

import ast
import itertools
import re
import runpy
import subprocess
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
FILE_LINES = 800
TEST_FILE_LINES = 800
FUNCTION_LINES = 50
SOURCE = re.compile(r"packages/clockwork-(client|serve|lab)/src/(clockwork_\1/.*)")
"""A file of a distribution, and what it is called there."""
SERVER = "packages/clockwork-serve/src/clockwork_serve/"
LAB = "packages/clockwork-lab/src/clockwork_lab/"
MODULES_THAT_PRINT = (
    SERVER + "cli/", SERVER + "apps/", LAB + "cli/", LAB + "demo/", LAB + "reproduce/",
    "benchmarks/", "comparison/", "examples/", "harness/", "qa/",
)  # fmt: skip
INSTANTS = frozenset(
    re.findall(
        r"\w+",
        """
        accepted actual again answered armed arrival arrived at available axis before began begin bound
        by called counter ctime cut deadline delayed delivered done due earliest early end ended ends
        entered entry expires filled first free from full gone horizon idle key last latest lost
        measured monotonic mtime next now oldest origin paused place promised ran reached read ready
        received renewed requested sent since slot slowed soonest start started starts stop stopped
        switch time timer times to top unpolled until upto urgency urgent used verdict wake wakeup
        warmup when
        """,
    )
)
"""What stands before ``_ns`` in the name of an instant: an event, or a place in time."""
DURATIONS = frozenset(
    re.findall(
        r"\w+",
        """
        1 above after age ahead all allowed alone asked band base behind best between bucket burst busy
        capacity completion controller cost decide decides delay delta demand device disorder drain
        drift dropped duration each elapsed enough error estimate every exec expected extra floor for gap
        gateway given grace half hang head header headroom held high hop in infer input jitter jump kill lag
        lane lasted lasts late latency lateness least left length limit load longer low margin max mean
        median mib model more most needed network notice offset once other out output over overdue owed
        pace patience planned prepare quantile queue quiet reach rejoin remaining reserve
        reserved rest restart retry room rooms row run sample second seed served server settled share
        shares shortage shortest silent skew slack slice slo slos slots spare spent stalled sum tick
        timed timeout took total trial unit up usual value values wait waited wanted way whole window
        within worker
        """,
    )
)
"""What stands before ``_ns`` in the name of a duration: a quantity, or what it is the duration of."""
SPILL_LINES = 80
ONE_IMPORTER = {
    "lab.cli.demo": "a command is a module, imported when it is given",
    "serve.client": "the name that the client had; users import it",
    "serve.oip.build_descriptor": "a tool that makes a file that is kept",
    "serve.serve.processes.bridge": "a process is a module, started by its name",
}  # fmt: skip
"""Modules that are short and have one importer, and why."""
SAME_NAMES = {"Result"}
"""Classes of two distributions each: what users of the client import is called as they expect it."""
EMPTY_NAMES = {"utils", "util", "common", "manager", "helper", "helpers", "misc", "handler", "data", "info"}
PROMISES = re.compile(r"\b(?:TO" + r"DO|FIX" + r"ME|XX" + r"X|HACK)\b|NotImplemented" + "Error")
PLACES = re.compile(r"(?<![\w.~$}])/(?:home|root|work|Users|mnt)/\w")
REGISTRIES = re.compile(r"\b(?:py" + r"pi|files\.python" + r"hosted|npm" + r"js|crates)\.(?:org|io|com)\b")
TEXT = {".py", ".md", ".toml", ".txt", ".cfg", ".yml", ".yaml", ".sh", ".csv", ".json", ".proto", ""}


@cache
def tracked() -> list[str]:
    """Paths that git knows and that are there; outside a checkout the test has nothing to say."""
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, check=False)
    if listed.returncode:
        pytest.skip("not a git checkout")
    return [path for path in listed.stdout.decode().split("\0") if path and (ROOT / path).is_file()]


@dataclass(slots=True)
class Source:
    """What the rules ask of a Python file; its syntax tree is too large to be kept."""

    path: str
    lines: int
    documented: bool
    classes: list[str]
    """Those outside of other classes and functions."""
    functions: list[tuple[int, str, int]] = field(default_factory=list)
    """Line, name, and the number of lines."""
    calls: list[tuple[int, str]] = field(default_factory=list)
    """Line, and what is called, if that is a name with dots or without."""
    imports: list[tuple[int, str, str]] = field(default_factory=list)
    """Line, module, and the name imported from it; that is empty where the module itself is imported."""
    nanoseconds: list[tuple[int, str]] = field(default_factory=list)
    """Line, and a name that ends in ``_ns``."""

    def add(self, node: ast.AST) -> None:
        """Note what a node says."""
        line = getattr(node, "lineno", 0)
        if (name := _name_of(node)).endswith("_ns"):
            self.nanoseconds.append((line, name))
        match node:
            case ast.FunctionDef() | ast.AsyncFunctionDef():
                self.functions.append((line, node.name, _body_lines(node)))
            case ast.Call() if called := _dotted(node.func):
                self.calls.append((line, called))
            case ast.Import():
                self.imports.extend((line, alias.name, "") for alias in node.names)
            case ast.ImportFrom():
                self.imports.extend((line, node.module or "", alias.name) for alias in node.names)


@cache
def sources() -> list[Source]:
    """Every Python file, each parsed once for all tests."""
    found = []
    for path in tracked():
        if path.endswith(".py"):
            text = (ROOT / path).read_text(encoding="utf-8")
            tree = ast.parse(text)
            source = Source(
                path, text.count("\n"), documented=not text.strip() or bool(ast.get_docstring(tree)),
                classes=[node.name for node in tree.body if isinstance(node, ast.ClassDef)],
            )  # fmt: skip
            for node in ast.walk(tree):
                source.add(node)
            found.append(source)
    return found


def texts() -> Iterator[tuple[str, int, str]]:
    """Path, number and content of every line of every text file."""
    for path in tracked():
        if Path(path).suffix in TEXT and path not in {"LICENSE", "tests/test_tidy.py"}:
            text = (ROOT / path).read_text(encoding="utf-8")
            yield from ((path, number, line) for number, line in enumerate(text.splitlines(), start=1))


def test_a_file_fits_in_the_head() -> None:
    long = [
        f"{source.path}: {source.lines} lines"
        for source in sources()
        if source.lines > (TEST_FILE_LINES if source.path.startswith("tests/") else FILE_LINES)
    ]

    assert long == []


def test_a_function_fits_on_a_screen() -> None:
    long = [
        f"{source.path}:{line} {name}: {lines} lines"
        for source in sources()
        for line, name, lines in source.functions
        if lines > FUNCTION_LINES
    ]

    assert long == []


def _body_lines(function: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    """Lines of a function, its docstring not counted."""
    assert function.end_lineno is not None
    lines = function.end_lineno - function.lineno + 1
    first = function.body[0]
    if isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant):
        assert first.end_lineno is not None
        lines -= first.end_lineno - first.lineno + 1
    return lines


def _dotted(node: ast.expr) -> str:
    """``a.b.c`` as it is written; empty if it is anything else."""
    if isinstance(node, ast.Name):
        return node.id
    within = _dotted(node.value) if isinstance(node, ast.Attribute) else ""
    return f"{within}.{node.attr}" if within and isinstance(node, ast.Attribute) else ""


def test_a_module_says_what_it_is() -> None:
    assert [source.path for source in sources() if not source.documented] == []


def test_a_name_says_what_is_in_a_file() -> None:
    assert [path for path in tracked() if Path(path).stem in EMPTY_NAMES and path.endswith(".py")] == []


def test_only_what_talks_to_people_prints() -> None:
    printing = [
        f"{source.path}:{line}"
        for source in sources()
        if not source.path.startswith((*MODULES_THAT_PRINT, "tests/"))
        for line, called in source.calls
        if called == "print"
    ]

    assert printing == []


def test_fakes_are_classes_not_patches() -> None:
    patching = [
        f"{source.path}:{line}"
        for source in sources()
        for line, module, _ in source.imports
        if module == "unittest.mock"
    ]

    assert patching == []


WRITES = "clockwork_serve/controller/state.py"
"""It runs what it has written itself, of the names of fields: nothing that it was given or that it read."""


def test_nothing_runs_what_a_file_contains() -> None:
    calls = {"eval", "exec", "pickle.load", "pickle.loads", "marshal.loads", "torch.load"}
    running = [
        f"{source.path}:{line} {called}"
        for source in sources()
        if SOURCE.match(source.path)
        for line, called in source.calls
        if called in calls and not (called == "exec" and source.path.endswith(WRITES))
    ]

    assert running == []


@pytest.mark.parametrize(
    ("what", "pattern"),
    [("a promise", PROMISES), ("a place on one machine", PLACES), ("a package registry", REGISTRIES)],
)
def test_no_line_holds(what: str, pattern: re.Pattern[str]) -> None:
    found = [
        f"{path}:{number}: {line.strip()[:80]}" for path, number, line in texts() if pattern.search(line)
    ]

    assert found == [], what


def test_no_module_exists_for_one_importer() -> None:
    ours = [source for source in sources() if SOURCE.match(source.path)]
    modules = {
        found[2].removesuffix(".py").replace("/", "."): source.lines
        for source in ours
        if (found := SOURCE.match(source.path)) and not source.path.endswith(("__init__.py", "__main__.py"))
    }
    importers: dict[str, set[str]] = {name: set() for name in modules}
    for source in ours:
        for _, module, imported in source.imports:
            for name in (f"{module}.{imported}", module) if imported else ():
                if name in importers:
                    importers[name].add(source.path)
    spilled = {
        name.removeprefix("clockwork_")
        for name, lines in modules.items()
        if lines < SPILL_LINES and len(importers[name]) < 2
    }

    assert spilled - ONE_IMPORTER.keys() == set()
    assert ONE_IMPORTER.keys() - spilled == set()


def test_a_class_has_one_name_and_a_name_one_class() -> None:
    found: dict[str, list[str]] = {}
    for source in sources():
        if place := SOURCE.match(source.path):
            for name in source.classes:
                if not name.startswith("_"):
                    found.setdefault(name, []).append(place[2])

    several = {name: modules for name, modules in found.items() if len(modules) > 1}
    assert several.keys() == SAME_NAMES, several


def test_a_name_in_nanoseconds_tells_an_instant_from_a_duration() -> None:
    words: dict[str, str] = {}
    for source in sources():
        if SOURCE.match(source.path):
            for line, name in source.nanoseconds:
                if found := re.fullmatch(r"(?:[a-z0-9_]*_)?([a-z0-9]+)_ns", name):
                    words.setdefault(found[1], f"{source.path}:{line} {name}")

    assert set() == INSTANTS & DURATIONS
    assert {word: where for word, where in words.items() if word not in INSTANTS | DURATIONS} == {}
    assert (INSTANTS | DURATIONS) - words.keys() == set(), "words that no name has"


def _name_of(node: ast.AST) -> str:
    """The name that a node of a syntax tree gives or uses; empty if it is none."""
    match node:
        case ast.arg():
            return node.arg
        case ast.keyword():
            return node.arg or ""
        case ast.Name():
            return node.id
        case ast.Attribute():
            return node.attr
        case ast.FunctionDef() | ast.AsyncFunctionDef():
            return node.name
        case _:
            return ""


def test_every_brain_is_compiled_but_for_its_records(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT / "packages" / "clockwork-serve")
    compiled = {path.removeprefix("src/clockwork_serve/") for path in runpy.run_path("setup.py")["hot"]()}
    brains = {
        path.removeprefix(SERVER)
        for path in tracked()
        if re.match(SERVER + r"(controller|worker)/.*(?<!__init__)\.py", path)
    }

    loop = {f"sim/{name}.py" for name in ("checks", "faults", "host", "recording", "simulation", "tally")}
    assert compiled - brains == loop, "a new file counts from git add on"
    # A record takes its whole module with it; a compiled protocol has compiled instances only.
    assert brains - compiled == {"controller/config.py", "controller/policies/base.py", "worker/events.py"}


def test_the_distributions_are_in_lockstep() -> None:
    versions, licences = set(), {(ROOT / "LICENSE").read_text()}
    for name in ("client", "serve", "lab"):
        folder = ROOT / "packages" / f"clockwork-{name}"
        project = tomllib.loads((folder / "pyproject.toml").read_text())["project"]
        licences.add((folder / "LICENSE").read_text())
        package = (folder / "src" / f"clockwork_{name}" / "__init__.py").read_text()
        versions |= {project["version"], *re.findall(r'^__version__ = "(.*)"', package, re.MULTILINE)}
        needed = [
            *project["dependencies"],
            *itertools.chain(*project.get("optional-dependencies", {}).values()),
        ]
        versions |= {found[1] for one in needed if (found := re.match(r"clockwork-[\w\[\]]+(.*)", one))}

    version = min(versions, key=len)
    assert versions == {version, f"=={version}"}
    assert len(licences) == 1


def test_pages_that_messages_and_readmes_name_are_there() -> None:
    named, nowhere = set(), set()
    for path, _, line in texts():
        if path.startswith(("packages/", "docs/")) or "/" not in path:
            named |= {*re.findall(r"clockwork docs ([a-z][\w-]*)", line)}
            nowhere |= {*re.findall(r"https?://[\w.-]+\.(?:example|invalid|test)\b\S*", line)}
    pages = [
        Path(path) for path in tracked() if re.fullmatch(r"docs/(use/|operate/|develop/)?[\w-]+\.md", path)
    ]

    assert len(named) > 8
    assert named <= {page.stem for page in pages}
    assert len({page.stem for page in pages}) == len(pages)  # a name is one page
    assert nowhere == set()


def test_every_folder_of_the_server_has_its_layers() -> None:
    contracts = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]["contracts"]
    layered = {name for one in contracts if one["type"] == "layers" for name in one.get("containers", ())}
    folders = {
        f"clockwork_serve.serve.{found[1]}"
        for path in tracked()
        if (found := re.match(SERVER + r"serve/(\w+)/", path))
    }

    assert (
        folders | {"clockwork_serve", "clockwork_serve.serve", "clockwork_client", "clockwork_lab"} <= layered
    )


def test_every_package_of_tests_has_its_package() -> None:
    packages = {found[1] for path in tracked() if (found := re.match(SERVER + r"(\w+)/", path))}
    packages |= {"client", "lab"}
    apart = {
        "benchmarks", "comparison", "distributions", "end_to_end", "docs", "fuzz", "golden", "examples",
        "deploy", "harness", "qa",
    }  # fmt: skip
    tested = {path.split("/")[1] for path in tracked() if re.match(r"tests/\w+/", path)}

    assert tested - packages - apart == set()
    inside = {found[1] for path in tracked() if (found := re.match(SERVER + r"serve/(\w+)/", path))}
    assert {path.split("/")[2] for path in tracked() if re.match(r"tests/serve/\w+/", path)} == inside


def test_no_test_is_imported_by_another() -> None:
    importing = [
        f"{source.path}:{line} {module}"
        for source in sources()
        for line, module, imported in source.imports
        if imported and re.match(r"tests\.(\w+\.)*test_\w+$", module)
    ]

    assert importing == [], "what several tests use stands in a module beside them"


def test_what_measures_is_in_layers() -> None:
    below = {
        "src": (), "packages": (), "harness": (), "benchmarks": ("harness",), "comparison": ("harness",),
        "qa": ("harness", "benchmarks"),
    }  # fmt: skip
    importing = [
        f"{source.path}:{line} {module}"
        for source in sources()
        for line, module, imported in source.imports
        if imported
        and (layer := source.path.split("/")[0]) in below
        and (other := module.split(".")[0]) in {*below, "tests"}
        and other not in {layer, *below[layer]}
    ]

    assert importing == [], "harness serves benchmarks, comparison and qa, and knows none of them"

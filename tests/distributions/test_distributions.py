"""The three distributions as people get them: wheels and sdists, in Pythons that have nothing else."""

from __future__ import annotations

import json
import os
import posixpath
import re
import shutil
import subprocess
import tarfile
from pathlib import Path

import pytest

from tests.distributions.building import NAMES, ROOT, build, contents, metadata, needed, python

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]
RUNTIMES = {"onnx", "onnxruntime", "grpcio", "grpc", "protobuf", "google", "torch", "uvloop", "click", "rich"}
SCENARIO = ROOT / "examples" / "scenarios" / "one_model.toml"


def ran(interpreter: Path, *words: str, code: int = 0, **variables: str) -> subprocess.CompletedProcess[str]:
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    done = subprocess.run(
        [str(interpreter), *words], cwd=interpreter.parent, env=environment | variables, capture_output=True,
        text=True, timeout=300, check=False,
    )  # fmt: skip
    assert done.returncode == code, done.stdout[-2000:] + done.stderr[-2000:]
    return done


def clockwork(interpreter: Path, *words: str, code: int = 0) -> subprocess.CompletedProcess[str]:
    return ran(interpreter, str(interpreter.with_name("clockwork")), *words, code=code)


@pytest.mark.parametrize("name", NAMES)
def test_an_sdist_is_whole(
    name: str, trees: dict[str, Path], wheels: dict[str, Path], tmp_path: Path
) -> None:
    archive = build("sdist", trees[name], tmp_path)
    with tarfile.open(archive) as opened:
        opened.extractall(tmp_path / "from", filter="data")
    (tree,) = (tmp_path / "from").iterdir()
    again = build("wheel", tree, tmp_path / "wheel")

    assert {"LICENSE", "README.md", "pyproject.toml"} <= {path.name for path in tree.iterdir()}
    kept = {path for path in trees[name].rglob("*.*") if not {"build", "dist"} & {*path.parts}}
    left = {str(path.relative_to(trees[name])) for path in kept if path.is_file()}
    assert {one for one in left if ".egg-info" not in one} <= {
        str(path.relative_to(tree)) for path in tree.rglob("*")
    }
    assert contents(again) == contents(wheels[name])


@pytest.mark.parametrize("name", NAMES)
def test_a_wheel_says_what_it_is(name: str, wheels: dict[str, Path]) -> None:
    said = metadata(wheels[name])
    package = name.replace("-", "_")

    assert said.metadata["Name"] == name
    assert "# " + name in (said.metadata.get_payload() or said.metadata["Description"])
    assert f"{package}/py.typed" in contents(wheels[name])
    assert {path.split("/")[0].split("-")[0] for path in contents(wheels[name])} == {package}


def test_the_client_needs_no_runtime(wheels: dict[str, Path], tmp_path: Path) -> None:
    wheel = wheels["clockwork-client"]
    interpreter = python(tmp_path / "venv", [wheel])
    found = ran(
        interpreter, "-c",
        "import sys, numpy; from clockwork_client import AsyncClient, Client, Rejected, tensors;"
        "print(tensors.encode('x', numpy.zeros(2, numpy.float32))); Client('127.0.0.1:1').close();"
        "print(sorted({name.partition('.')[0] for name in sys.modules}))",
    ).stdout.splitlines()  # fmt: skip

    assert needed(wheel) == {"httptools", "msgspec", "numpy"}
    assert found[0] == repr(("FP32", bytes(8)))
    assert not RUNTIMES & {*json.loads(found[1].replace("'", '"'))}


def test_the_image_is_built_of_all_that_the_wheels_are_made_of(
    trees: dict[str, Path], wheels: dict[str, Path], tmp_path: Path
) -> None:
    """The container is not built here, but what it copies is enough to build what it installs."""
    recipe = (ROOT / "Containerfile").read_text()
    tree = trees["clockwork-serve"]
    for name in re.findall(r"^COPY (?!--from)(\S+) ", recipe, re.MULTILINE):
        copied = tree.parents[1] / name
        if copied.is_dir():
            shutil.copytree(copied, tmp_path / name)
    made = build("wheel", tmp_path / "packages" / "clockwork-serve", tmp_path / "wheel")

    assert "packages/clockwork-client packages/clockwork-serve" in recipe
    assert contents(made) == contents(wheels["clockwork-serve"])


def pages(wheels: dict[str, Path]) -> dict[str, str]:
    """The documentation that the server's wheel carries, by path."""
    held = contents(wheels["clockwork-serve"])
    start = "clockwork_serve/docs/"
    return {name.removeprefix(start): held[name].decode() for name in held if name.startswith(start)}


def test_the_server_carries_every_page_and_no_link_of_theirs_leads_out_of_it(wheels: dict[str, Path]) -> None:
    found = pages(wheels)
    links = {
        posixpath.normpath(posixpath.join(posixpath.dirname(page), target))
        for page, text in found.items()
        for target in re.findall(r"\]\(([^)\s#:]+)(?:#[^)\s]*)?\)", text)
    }

    folders = ("use", "operate", "develop")
    there = [
        ROOT / "docs" / "index.md",
        *(page for one in folders for page in (ROOT / "docs" / one).glob("*.md")),
    ]
    assert {*found} == {page.relative_to(ROOT / "docs").as_posix() for page in there}
    assert "operate/machines.md" in links <= {*found}


@pytest.mark.parametrize("name", NAMES)
def test_a_page_that_a_text_names_is_in_the_servers_wheel(name: str, wheels: dict[str, Path]) -> None:
    texts = b" ".join(contents(wheels[name]).values()).decode(errors="replace")

    named = {*re.findall(r"clockwork docs ([a-z][\w-]*)", texts)}
    assert named
    assert named <= {Path(page).stem for page in pages(wheels)}


def simulated(interpreter: Path) -> dict[str, object]:
    found = json.loads(clockwork(interpreter, "simulate", str(SCENARIO), "--json", "-").stdout)
    return {name: found[name] for name in ("loads", "devices", "stretches")}


def test_the_server_alone(server: Path, tmp_path: Path) -> None:
    assert "demo" in clockwork(server, "--help").stdout
    for command, extra in (("demo", "[demo]"), ("bench", ""), ("reproduce", "[figures]")):
        said = clockwork(server, command, "--anything", code=2).stderr
        assert said.endswith(f"pip install './packages/clockwork-lab{extra}'\n")
    models = shutil.copytree(ROOT / "examples" / "models", tmp_path / "models")
    clockwork(server, "validate", str(models))
    assert simulated(server)["loads"]
    assert "operate/machines" not in clockwork(server, "docs").stdout
    assert clockwork(server, "docs", "machines").stdout.startswith("# Several machines\n")
    assert clockwork(server, "docs", "../use/client.md#errors").stdout.startswith("# The Python client\n")
    assert "did you mean 'machines'?" in clockwork(server, "docs", "machine", code=2).stderr
    ran(
        server, "-c",
        "import clockwork_client as c, clockwork_serve as s, clockwork_serve.client as o;"
        "assert s.Client is o.Client is c.Client",
    )  # fmt: skip


def test_the_laboratory_adds_its_commands(wheels: dict[str, Path], tmp_path: Path) -> None:
    interpreter = python(tmp_path / "venv", wheels.values())

    for command in ("demo", "bench", "reproduce"):
        assert f"Usage: clockwork {command}" in clockwork(interpreter, command, "--help").stdout
    assert "Not installed" not in clockwork(interpreter, "--help").stdout
    said = clockwork(interpreter, "reproduce", "fig5", "--short", "--json", "-").stdout
    assert json.loads(said)["figure"] == "fig5"
    assert "tritonclient" in clockwork(interpreter, "demo", code=2).stderr


@pytest.mark.skipif(
    not os.environ.get("CLOCKWORK_MYPYC"), reason="it compiles for three minutes: make compiled does it"
)
def test_the_compiled_server_decides_as_the_pure_one(
    server: Path, trees: dict[str, Path], wheels: dict[str, Path], tmp_path: Path
) -> None:
    wheel = build("wheel", trees["clockwork-serve"], tmp_path / "wheel", CLOCKWORK_MYPYC="1")
    interpreter = python(tmp_path / "venv", [wheels["clockwork-client"], wheel])
    code = "from clockwork_serve.controller import belief; print(belief.__file__)"

    assert ran(interpreter, "-c", code).stdout.strip().endswith(".so")
    assert simulated(interpreter) == simulated(server)

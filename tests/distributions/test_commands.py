"""Every command of README and of the pages for users and operators runs as written, where the wheels are."""

from __future__ import annotations

import os
import re
import shutil
import socket
import subprocess
from fnmatch import fnmatchcase
from pathlib import Path

import pytest

from tests.distributions.pages import ELSEWHERE, PAGES, ROOT, blocks, script, steps

pytestmark = [pytest.mark.slow, pytest.mark.system, pytest.mark.timeout(1800)]
WITH_COMMANDS = [page for page in PAGES if any(blocks(page))]
STARTED = "cp -r $given/models .; clockwork examples --json > /dev/null"
SERVES = f"{STARTED}; clockwork serve examples/models"
BEFORE = {
    "README.md": "",
    "docs/use/getting-started.md": "cp $given/mine.onnx .",
    "docs/operate/security.md": f"{STARTED}; cp $given/*.pem .",
    "docs/operate/machines.md": f"{STARTED}; cp $given/{{keys.toml,chain.pem,key.pem}} .; mkdir store",
    "docs/operate/kubernetes.md": SERVES,
    "docs/operate/operations.md": SERVES,
    "docs/use/clients.md": SERVES,
    "docs/use/from-kserve.md": SERVES,
    "docs/use/rest.md": SERVES,
}
"""What a page's reader has and did before, where that is not what getting started tells."""
VARIES = {"docs/use/simulate.md": re.compile(r"^(took|clockwork) .*$", re.MULTILINE)}
"""Pages whose output is compared number by number, but for some lines; elsewhere any number is as good."""
NUMBER = re.compile(r"\d+(?:[.,]\d+)*(?:e-\d+)?")


@pytest.fixture(scope="module")
def given(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What readers have of their own: models, one in a file, certificates, keys."""
    folder = tmp_path_factory.mktemp("given")
    shutil.copytree(ROOT / "examples" / "models", folder / "models")
    shutil.copy(ROOT / "examples" / "models" / "add_sub" / "1" / "model.onnx", folder / "mine.onnx")
    shutil.copy(ROOT / "examples" / "keys.toml", folder)
    (folder / "keys.toml").chmod(0o600)
    import trustme

    authority = trustme.CA()
    authority.cert_pem.write_to_path(folder / "ca.pem")
    certificate = authority.issue_cert("localhost", "127.0.0.1")
    certificate.private_key_pem.write_to_path(folder / "key.pem")
    for pem in certificate.cert_chain_pems:
        pem.write_to_path(folder / "chain.pem", append=True)
    return folder


@pytest.fixture
def ports() -> dict[str, int]:
    """Free ones, for those that pages name."""
    held = {name: socket.create_server(("127.0.0.1", 0)) for name in ("8000", "8001", "8002", "7000")}
    numbers = {name: each.getsockname()[1] for name, each in held.items()}
    for each in held.values():
        each.close()
    return numbers


def surroundings(server: Path, given: Path, folder: Path, ports: dict[str, int]) -> dict[str, str]:
    """A shell's environment: nothing of the caller's but where programs are. One cache for all pages.

    The memory that a device has by default takes some virtual machines five seconds of CPU to touch.
    """
    (folder / "tmp").mkdir()
    http, grpc, metrics, _ = map(str, ports.values())
    return {
        "PATH": f"{server.parent}:{os.environ['PATH']}", "HOME": str(folder), "TMPDIR": str(folder / "tmp"),
        "given": str(given), "CLOCKWORK_CACHE": str(given / "cache"), "CLOCKWORK_LOG_LEVEL": "info",
        "CLOCKWORK_URL": f"http://127.0.0.1:{http}", "CLOCKWORK_HTTP_PORT": http, "CLOCKWORK_GRPC_PORT": grpc,
        "CLOCKWORK_METRICS_PORT": metrics, "CLOCKWORK_DEVICE_MEMORY": "64MiB", "LANG": "C.UTF-8",
    }  # fmt: skip


@pytest.mark.parametrize("page", WITH_COMMANDS)
def test_commands_run_as_they_are_written(
    page: str, server: Path, given: Path, ports: dict[str, int], tmp_path: Path
) -> None:
    if missing := [program for program in ("bash", "curl", "openssl") if shutil.which(program) is None]:
        pytest.skip(f"{', '.join(missing)}: not there")
    folder = tmp_path / "here"
    folder.mkdir()
    environment = surroundings(server, given, folder, ports)
    commands = script(list(blocks(page)), BEFORE.get(page, STARTED), ports)

    done = subprocess.run(
        ["bash", "-c", commands], cwd=folder, env=environment, capture_output=True, text=True, timeout=1700,
        check=False,
    )  # fmt: skip

    assert done.returncode == 0, done.stderr[-6000:]
    shown = {
        f"out-{block.line}-{number}": output
        for block in blocks(page)
        if block.console
        for number, (_, output) in enumerate(steps(block))
    }
    said = {name: (folder / "tmp" / name).read_text(encoding="utf-8") for name in shown}
    assert {name: comparable(page, text) for name, text in said.items()} == {
        name: comparable(page, text) for name, text in shown.items()
    }


def comparable(page: str, text: str) -> list[str]:
    """What must be equal of an output and of what the page shows of it; the page chooses where lines end."""
    varies = VARIES.get(page)
    if varies is None:  # whether a model was asked before its weights were there depends on how soon
        text = NUMBER.sub("#", text).replace('"cold_start":true', '"cold_start":false')
    else:
        text = varies.sub("", text)
    return re.sub(r"(?<=[,\[{])\n *", "", re.sub("─+", "─", text)).split()


def test_what_is_not_run_is_there_and_has_a_reason() -> None:
    lines = [line for page in WITH_COMMANDS for block in blocks(page) for line in block.text.splitlines()]
    there = {one for one in ELSEWHERE if any(fnmatchcase(line, f"{one}*") for line in lines)}

    assert {*ELSEWHERE} - there == set()

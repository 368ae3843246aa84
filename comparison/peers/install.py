"""Installs servers, each into a Python of its own, and reads what was installed: versions and licences."""

from __future__ import annotations

import email
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, Final

from comparison.peers.peer import MARK, Peer

PACKAGES: Final = Path(__file__).with_name("packages.txt")


def requirements(name: str) -> list[str]:
    """All packages of a server, each with its version."""
    lines = [line.split() for line in PACKAGES.read_text().splitlines() if not line.startswith("#")]
    return [package for package, *servers in lines if name in servers]


def install(asked: Peer) -> str:
    """Install one, if it is not; what happened, in words. Nothing is fetched twice for the same versions."""
    wanted = "\n".join(requirements(asked.name))
    if not wanted:
        return "nothing to install"
    mark = asked.home / MARK
    if mark.is_file() and mark.read_text() == wanted:
        return "already installed"
    began_s = time.monotonic()
    commands = (
        [sys.executable, "-m", "venv", "--clear", str(asked.home)],
        [asked.python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", *wanted.split()],
    )
    for command in commands:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            return f"failed: {done.stderr.strip()[-2000:]}"
    mark.write_text(wanted)
    size = sum(
        path.stat().st_size for path in asked.home.rglob("*") if path.is_file() and not path.is_symlink()
    )
    return f"installed in {time.monotonic() - began_s:.0f} s, {size / 2**20:.0f} MiB"


def packages(asked: Peer) -> dict[str, dict[str, str]]:
    """All that its Python holds: version and licence by name, from what the wheels say of themselves."""
    found = {}
    for path in sorted(asked.home.glob("lib/python*/site-packages/*.dist-info/METADATA")):
        told = email.message_from_string(path.read_text(errors="replace"))
        found[str(told["Name"])] = {"version": str(told["Version"]), "licence": licence(told)}
    return found


def licence(told: Any) -> str:
    """A package's licence: its expression, else its classifiers, else the first line of what it says."""
    if told["License-Expression"]:
        return str(told["License-Expression"])
    classifiers = [
        str(line).rpartition("::")[2].strip()
        for line in told.get_all("Classifier") or ()
        if line.startswith("License ::")
    ]
    named = [name for name in classifiers if name != "OSI Approved"]
    if named:
        return ", ".join(named)
    lines = str(told["License"] or "").strip().splitlines()
    return lines[0][:60] if lines else "not said"


def version(asked: Peer) -> dict[str, str]:
    """Of the server itself and of ONNX Runtime beside it, and its licence."""
    if not Path(asked.home).is_dir():
        from importlib.metadata import metadata
        from importlib.metadata import version as here

        told = metadata(asked.package)
        return {"version": here(asked.package), "onnxruntime": here("onnxruntime"), "licence": licence(told)}
    held = {name.lower().replace("_", "-"): row for name, row in packages(asked).items()}
    own = held.get(asked.package, {"version": "?", "licence": "?"})
    return {**own, "onnxruntime": held.get("onnxruntime", {}).get("version", "-")}

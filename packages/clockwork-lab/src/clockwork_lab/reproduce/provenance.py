"""The provenance of a figure: commit, machine, versions."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
from pathlib import Path

import clockwork_serve
from clockwork_serve.controller import controller


def provenance() -> dict[str, str]:
    """The provenance of every figure, by name."""
    return {
        "version": f"clockwork-serve {clockwork_serve.__version__}",
        "commit": commit(Path(__file__).parent),
        "machine": machine(),
        "python": f"{platform.python_implementation()} {platform.python_version()}",
        "brains": "compiled" if str(controller.__file__).endswith(".so") else "pure Python",
    }


def commit(folder: Path) -> str:
    """The commit of the checkout that ``folder`` is in; says so if there is none, or files differ from it."""
    git = shutil.which("git")
    if git is None:
        return "unknown (no git)"
    found = _ask(git, folder, "rev-parse", "--short=12", "HEAD")
    if not found or not _ask(git, folder, "ls-files", "--", str(folder)):
        return "unknown (not a checkout)"
    return (
        f"{found} with changes"
        if _ask(git, folder, "status", "--porcelain", "-uno", "--", ":/packages")
        else found
    )


def machine() -> str:
    """The processor, its cores that we may use, and the memory."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return f"{_processor()}, {cores} cores, {memory:.0f} GiB, {platform.system()} {platform.release()}"


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    named = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(named, platform.processor() or platform.machine())


def _ask(git: str, folder: Path, *words: str) -> str:
    ended = subprocess.run(
        [git, *words], cwd=folder, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False
    )
    return ended.stdout.strip() if ended.returncode == 0 else ""

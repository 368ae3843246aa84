"""The target of torch programs: ``cpu``, or the kind of this machine's GPU. torch is imported lazily."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from importlib import metadata
from pathlib import Path

from clockwork_serve.errors import install_advice
from clockwork_serve.store.settings import problem

INSTALL = install_advice("clockwork-serve[torch]")


def torch_version(version_of: Callable[[str], str] = metadata.version) -> str:
    """The version of torch that is installed, without importing it. Raises ``ProblemError`` without one."""
    try:
        return version_of("torch")
    except metadata.PackageNotFoundError:
        raise problem(
            "torch", expected="torch, which compiles and runs model.pt2", found="it is not installed",
            advice=INSTALL,
        ) from None  # fmt: skip


def target_here(device: str) -> str:
    """The target of this machine's first ``device``; empty if it has none."""
    if device == "cpu":
        return "cpu"
    import torch

    if not torch.cuda.is_available():
        return ""
    major, minor = torch.cuda.get_device_capability(0)
    return f"cuda:sm_{major}{minor}"


def resolved(target: str) -> str:
    """``auto`` and ``cuda`` as what this machine has, determined in a separate process; others unchanged."""
    if target not in ("auto", "cuda"):
        return target
    found = ""
    if Path("/dev/nvidiactl").exists():
        command = [sys.executable, "-m", "clockwork_serve.store.torch.target"]
        ended = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False)
        found = ended.stdout.strip() if ended.returncode == 0 else ""
    if target == "cuda" and not found:
        raise problem(
            "torch target", expected="a GPU that torch can use", found="none",
            advice="give --torch-target cpu, or check nvidia-smi and that torch was built for CUDA",
        )  # fmt: skip
    return found or "cpu"


if __name__ == "__main__":
    sys.stdout.write(target_here("cuda"))

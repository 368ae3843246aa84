"""Which GPU a measurement ran on and in what state it was: asks torch and nvidia-smi, changes nothing."""

from __future__ import annotations

import importlib.util
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from clockwork_serve.errors import install_advice
from harness.machine import machine_line

SMI_S: Final = 20.0
FIXED: Final = {
    "name": "name", "driver_version": "driver", "memory.total": "memory_mib", "pcie.link.gen.max": "pcie_max",
    "pcie.link.width.max": "pcie_width_max", "power.limit": "power_limit_w", "clocks.max.sm": "sm_max_mhz",
    "persistence_mode": "persistence", "mig.mode.current": "mig",
}  # fmt: skip
MOVING: Final = {
    "clocks.sm": "sm_mhz", "clocks.mem": "memory_mhz", "temperature.gpu": "celsius", "power.draw": "power_w",
    "pcie.link.gen.current": "pcie", "pcie.link.width.current": "pcie_width",
    "clocks_throttle_reasons.active": "throttled", "memory.used": "used_mib",
}  # fmt: skip
"""By nvidia-smi's name: ours. PCIe slows down when a GPU has nothing to do, so it is asked while it has."""


class NoGpuError(Exception):
    """There is no GPU to measure; the message says what was found and what to do."""


@dataclass(frozen=True, slots=True)
class Target:
    """What is measured: ``name`` is the device's (``cuda:0``), ``kind`` what devices call it."""

    name: str
    kind: str

    @property
    def gpu(self) -> bool:
        """Whether it is one."""
        return self.kind == "cuda"

    @property
    def number(self) -> int:
        """Which of several."""
        return int(self.name.rpartition(":")[2])


def target(device: str) -> Target:
    """What ``--device`` names. Raises :class:`NoGpuError` if it is not there."""
    kind, _, number = device.partition(":")
    if kind not in ("cuda", "torch-cpu") or not (number or "0").isdigit():
        raise NoGpuError(f"--device: expected cuda:N or torch-cpu; found {device!r}")
    if importlib.util.find_spec("torch") is None:
        raise NoGpuError(
            f"torch: expected it to be installed; found none; {install_advice('clockwork-serve[torch]')}"
        )
    found = Target(f"{kind}:{number or 0}", kind)
    if found.gpu:
        _check_gpu(found)
    return found


def _check_gpu(found: Target) -> None:
    import torch

    seen = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if found.number < seen:
        torch.cuda.set_device(found.number)
        return
    built = f"for CUDA {torch.version.cuda}" if torch.version.cuda else "without CUDA"
    listed = _smi("-L") or "none that nvidia-smi lists"
    raise NoGpuError(
        f"--device {found.name}: expected an NVIDIA GPU that torch can use; found torch {torch.__version__}, "
        f"built {built}, which sees {seen}; GPUs of this machine: {listed}. Give one that is there, install "
        "a torch built for CUDA, or try the same on the CPU, with small models: "
        "python -m benchmarks.gpu --device torch-cpu --short"
    )


def facts(found: Target) -> dict[str, Any]:
    """What stays the same during a run."""
    import torch

    known: dict[str, Any] = {
        "machine": machine_line(), "torch": torch.__version__, "cuda": torch.version.cuda or "none",
        "compiler": shutil.which("g++") or "none",
    }  # fmt: skip
    if found.gpu:
        known |= _asked(found, FIXED)
        properties = torch.cuda.get_device_properties(found.number)
        known["gpu"] = known.get("name", properties.name)
        known["capability"] = f"sm_{properties.major}{properties.minor}"
        known["cudnn"] = torch.backends.cudnn.version()
        flags = {"convolutions": torch.backends.cudnn, "products": torch.backends.cuda.matmul}
        known["tf32"] = ", ".join(f"{name} {each.allow_tf32}" for name, each in flags.items())
    return known


def state(found: Target) -> dict[str, Any]:
    """Clock rates, heat, power and link, now; nothing where there is no GPU or nobody to ask."""
    return _asked(found, MOVING) if found.gpu else {}


def free_bytes(found: Target) -> int:
    """Memory of the GPU that nobody has; 0 on the CPU. It counts all processes."""
    if not found.gpu:
        return 0
    import torch

    return int(torch.cuda.mem_get_info(found.number)[0])


def available_bytes() -> int:
    """Host memory that can be had without swapping, within this container's own limit."""
    lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
    known = {line.split(":")[0]: int(line.split()[1]) << 10 for line in lines if line.split()[1:]}
    return min(known.get("MemAvailable", 0), _limit_bytes())


def _limit_bytes() -> int:
    group = Path("/sys/fs/cgroup")
    try:
        limit = (group / "memory.max").read_text().strip()
        used = int((group / "memory.current").read_text())
        stat = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
    except (OSError, ValueError):
        return 1 << 62
    cached = int(stat.get("inactive_file", 0)) + int(stat.get("active_file", 0))
    return 1 << 62 if limit == "max" else max(0, int(limit) - used + cached)


def _asked(found: Target, names: dict[str, str]) -> dict[str, Any]:
    """Answers of nvidia-smi; one by one if it does not know some of the names."""
    answers = _query(found, list(names))
    if answers is None:
        one_by_one = {name: _query(found, [name]) for name in names}
        return {names[name]: _value(answer[0]) for name, answer in one_by_one.items() if answer}
    return {ours: _value(answer) for ours, answer in zip(names.values(), answers, strict=True)}


def _query(found: Target, names: list[str]) -> list[str] | None:
    said = _smi(f"--query-gpu={','.join(names)}", "--format=csv,noheader,nounits", f"--id={_id(found)}")
    parts = [part.strip() for part in said.split(",")]
    return parts if said and len(parts) == len(names) else None


def _id(found: Target) -> str:
    """CUDA's numbers are not the driver's where CUDA_VISIBLE_DEVICES is set."""
    import torch

    known = torch.cuda.get_device_properties(found.number) if torch.cuda.is_available() else None
    uuid = getattr(known, "uuid", None)
    return str(found.number) if uuid is None else f"GPU-{uuid}"


def _value(text: str) -> Any:
    try:
        return float(text) if "." in text else int(text)
    except ValueError:
        return text


def _smi(*arguments: str) -> str:
    """What nvidia-smi prints; empty if there is none or it fails."""
    path = shutil.which("nvidia-smi")
    if path is None:
        return ""
    try:
        ended = subprocess.run([path, *arguments], capture_output=True, text=True, timeout=SMI_S, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return "; ".join(ended.stdout.strip().splitlines()) if ended.returncode == 0 else ""

"""Where and with what something was made or measured."""

import platform
import shutil
import subprocess
from collections.abc import Iterable
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from arl2 import __version__

PACKAGES = ("triton", "diffusers", "transformers", "flash-linear-attention")
SMI_FIELDS = ("driver_version", "clocks.sm", "clocks.max.sm", "clocks.mem", "power.draw", "power.limit")
ROOT = Path(__file__).parents[1]


def environment(device: torch.device) -> dict[str, Any]:
    """Card, driver, clocks, versions, commit and time; None for what cannot be found out."""
    on_gpu = device.type == "cuda"
    return {
        "device": device_name(device),
        "device_memory_bytes": torch.cuda.get_device_properties(device).total_memory if on_gpu else None,
        "nvidia_smi": nvidia_smi(device) if on_gpu else None,
        "cuda": torch.version.cuda if on_gpu else None,
        "cudnn": torch.backends.cudnn.version() if on_gpu else None,
        "versions": versions(PACKAGES),
        "commit": git_commit(),
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def device_name(device: torch.device) -> str:
    """The card, or the processor."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or platform.machine()


def nvidia_smi(device: torch.device) -> dict[str, str] | None:
    """Driver, clocks and power of the card at this moment."""
    uuid = f"GPU-{torch.cuda.get_device_properties(device).uuid}"
    line = _output("nvidia-smi", f"--id={uuid}", f"--query-gpu={','.join(SMI_FIELDS)}", "--format=csv,noheader")
    return None if line is None else dict(zip(SMI_FIELDS, line.split(", "), strict=False))


def versions(packages: Iterable[str]) -> dict[str, str | None]:
    """Of some packages, PyTorch with its build, this code and Python."""
    ours = {"torch": torch.__version__, "arl2": __version__, "python": platform.python_version()}
    return {package: package_version(package) for package in packages} | ours


def git_commit() -> str | None:
    """The commit of this code, with a mark if files differ from it; None outside of a repository."""
    return _output("git", "-C", str(ROOT), "describe", "--always", "--dirty", "--exclude=*", "--abbrev=40")


def package_version(name: str) -> str | None:
    """Version of an installed package."""
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _output(*command: str) -> str | None:
    """What a program prints; None if it is missing, fails or hangs."""
    if shutil.which(command[0]) is None:
        return None
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True)
    except (subprocess.SubprocessError, OSError):
        return None
    return done.stdout.strip() or None

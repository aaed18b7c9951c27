"""Where a number or a file comes from: device, driver, versions, commit, command."""

import contextlib
import importlib.metadata
import os
import platform
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path

import torch

from wfnet.version import __version__

_PACKAGES = ("torch", "numpy", "safetensors", "triton", "timm", "torchvision", "transformers")
_PACKAGES += ("scikit-learn", "matplotlib")


def versions() -> dict[str, str]:
    """Returns the versions of what computes; packages are not imported for it."""
    found = {"wfnet": __version__, "python": platform.python_version()}
    for package in _PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[package] = importlib.metadata.version(package)
    if torch.cuda.is_available():
        found |= {"cuda": str(torch.version.cuda), "device": torch.cuda.get_device_name()}
    return found


def provenance(device: torch.device | str, command: Sequence[str]) -> dict[str, str]:
    """Returns what belongs beside every number, as JSON takes it.

    Args:
        command: script and arguments, as they were typed.
    """
    device = torch.device(device)
    found = versions() | {"device": device_name(device)}
    if device.type == "cuda":
        found["driver"] = _nvidia_smi(device, "driver_version")
        found["clocks"] = _nvidia_smi(device, "clocks.sm,clocks.mem,power.limit")
    return found | {
        "commit": commit(),
        "command": " ".join(["python", *command]),
        "date": time.strftime("%Y-%m-%d", time.gmtime()),
    }


def commit() -> str:
    """Returns the checkout's commit, with "+changes" if files differ from it.

    WFNET_COMMIT names it where files were copied without their repository; else "unknown" there.
    """
    told = os.environ.get("WFNET_COMMIT")
    if told:
        return told
    git = ["git", "-C", str(Path(__file__).parent)]
    options = {"capture_output": True, "text": True, "check": False}
    try:
        head = subprocess.run([*git, "rev-parse", "--short", "HEAD"], **options)
        dirty = subprocess.run([*git, "status", "--porcelain", "-uno"], **options)
    except OSError:
        return "unknown"
    return (head.stdout.strip() or "unknown") + ("+changes" if dirty.stdout.strip() else "")


def device_name(device: torch.device) -> str:
    """Returns the device as people call it; of a CPU, the threads too."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    name = platform.processor()
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            name = line.partition(":")[2].strip()
            break
    return f"{name}, {torch.get_num_threads()} threads"


def _nvidia_smi(device: torch.device, query: str) -> str:
    """Returns what the driver's tool answers to ``--query-gpu``; "unknown" if it does not."""
    command = ["nvidia-smi", f"--query-gpu={query}", "--format=csv,noheader"]
    command.append(f"--id={device.index or 0}")
    try:
        found = subprocess.run(command, capture_output=True, text=True, timeout=20, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return "unknown"
    return found.stdout.strip() or "unknown"

"""Where a number comes from: device, driver, versions, commit, command."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path

import torch

from wfnet.version import __version__

_PACKAGES = ("torch", "triton", "timm", "torchvision", "transformers", "numpy", "scikit-learn")


def provenance(device: torch.device | str, command: Sequence[str]) -> dict[str, str | None]:
    """Returns what belongs beside every number, as JSON takes it.

    Args:
        command: script and arguments, as they were typed.
    """
    device = torch.device(device)
    found: dict[str, str | None] = {
        "device": device_name(device),
        "python": platform.python_version(),
    }
    if device.type == "cuda":
        found["driver"] = _nvidia_smi(device, "driver_version")
        found["clocks"] = _nvidia_smi(device, "clocks.sm,clocks.mem,power.limit")
        found["cuda"] = torch.version.cuda
    for package in _PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = None
    return found | {
        "wfnet": __version__,
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

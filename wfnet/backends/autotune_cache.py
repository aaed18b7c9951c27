"""Decisions of :mod:`wfnet.backends.autotune` on disk, a file for each device and its versions."""

import contextlib
import ctypes
import importlib
import importlib.metadata
import json
import os
import re
from collections.abc import Mapping
from pathlib import Path

import torch

from wfnet.backends import cuda_launch
from wfnet.services.files import cache_folder, sha256, write_json
from wfnet.services.log import logger
from wfnet.version import __version__

# {"backend": its name, "ms": {name: milliseconds}, "excluded": {name: reason}}
Entry = dict
Choices = dict[str, dict[int, Entry]]  # by kind of call, then by the largest batch it serves


class TuningCache:
    """The file of one device: in ``$XDG_CACHE_HOME/wfnet/tuning``, and before it, read only, in
    the folder that ``WFNET_TUNING`` names, for files that came with a cluster or a container.

    Attributes:
        about: device and versions that the decisions hold for.
        path: of the file that is written.
    """

    def __init__(self, device: torch.device):
        self.about = _identity(device)
        digest = sha256(json.dumps(self.about))[:12]
        name = f"{re.sub(r'[^A-Za-z0-9]+', '_', self.about['device'])}-{digest}.json"
        self.path = cache_folder() / "tuning" / name
        self._writes = True

    def read(self) -> Choices:
        """Returns the decisions of both files; a damaged or foreign one has none."""
        found: Choices = {}
        shipped = os.environ.get("WFNET_TUNING")
        if shipped and not Path(shipped, self.path.name).exists():
            logger.warning("WFNET_TUNING=%s has no file %s", shipped, self.path.name)
        for folder in (shipped, self.path.parent):
            if folder and Path(folder, self.path.name).exists():
                for kind, sizes in self._read(Path(folder, self.path.name)).items():
                    found.setdefault(kind, {}).update(sizes)
        return found

    def _read(self, path: Path) -> Choices:
        try:
            content = json.loads(path.read_text())
            if content["about"] != self.about:
                raise ValueError("it is of another device, or of other versions")
            return {
                kind: {int(size): _checked(entry) for size, entry in sizes.items()}
                for kind, sizes in content["choices"].items()
            }
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            logger.warning("%s is not used (%s); what it should say is measured anew", path, error)
            return {}

    def write(self, choices: Mapping[str, Mapping[int, Entry]]) -> None:
        """Adds decisions to the file, atomically; where that is impossible, says so once.

        What other processes have decided meanwhile stays.
        """
        try:
            if self._writes:
                kept = self._read(self.path) if self.path.exists() else {}
                merged = {kind: kept.get(kind, {}) | sizes for kind, sizes in choices.items()}
                write_json(self.path, {"about": self.about, "choices": kept | merged})
        except OSError as error:
            self._writes = False
            logger.warning("%s cannot be written (%s): what is measured is lost", self.path, error)


def _checked(entry: Entry) -> Entry:
    known = isinstance(entry["backend"], str) and isinstance(entry["excluded"], dict)
    if not known or not all(float(ms) >= 0 for ms in entry["ms"].values()):
        raise ValueError(f"{entry} is no decision")
    return entry


def _identity(device: torch.device) -> dict[str, str]:
    """What times and results depend on."""
    triton = importlib.import_module("triton")
    packages = [importlib.import_module(f"wfnet.{name}") for name in ("kernels", "backends")]
    sources = [str(getattr(cuda_launch.library().module, "sources", ""))]
    for package in packages:
        sources += [path.read_bytes() for path in sorted(Path(package.__path__[0]).glob("*.py"))]
    frontend = None
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
        frontend = importlib.metadata.version("nvidia-cudnn-frontend")
    driver = ctypes.c_int()
    with contextlib.suppress(OSError):
        ctypes.CDLL("libcuda.so.1").cuDriverGetVersion(ctypes.byref(driver))
    return {
        "device": torch.cuda.get_device_name(device),
        "torch": torch.__version__,
        "triton": triton.__version__,
        "wfnet": __version__,
        "cuda": f"{torch.version.cuda}, driver {driver.value}",
        "cudnn": f"{torch.backends.cudnn.version()}, frontend {frontend}",
        "kernels": sha256(*sources)[:12],
    }


def describe_entries(kind: str, sizes: Mapping[int, Entry]) -> list[str]:
    """Returns one line for every size of a batch: the choice, all times, and who is left out."""
    lines = []
    for size, entry in sorted(sizes.items()):
        why = [f"{name} {ms:.3f} ms" for name, ms in entry["ms"].items()]
        why += [f"{name} left out: {reason}" for name, reason in entry["excluded"].items()]
        text = f" ({', '.join(why)})" if why else " (nothing else takes it)"
        lines.append(f"{kind}, up to {size} samples: {entry['backend']}{text}")
    return lines

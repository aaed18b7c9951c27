"""Modules of csrc/ on the emulated device, built with g++ and cached under build/."""

import functools
import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).resolve().parent.parent


def _load(name: str, path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@functools.cache
def build() -> ModuleType:
    """csrc/build.py, which is not part of the installed package."""
    module = _load("csrc_build", ROOT / "csrc/build.py")
    sys.modules["csrc_build"] = module
    return module


@functools.cache
def emulated(name: str, *sources: str) -> ModuleType:
    """The emulated module ``name`` of ``sources`` (paths in the repository); skips without g++."""
    try:
        library = build().build_emulated(
            name, [ROOT / source for source in sources], ROOT / "build/emulated"
        )
    except build().BuildError as error:
        if "ninja failed" in str(error):
            raise
        pytest.skip(str(error))
    return _load(name, library)


def emulated_kernels() -> ModuleType:
    """All kernels of the extension on the emulated device."""
    sources = [str(path.relative_to(ROOT)) for path in build().kernel_sources()]
    return emulated("_emulated", *sources)

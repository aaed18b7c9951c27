"""Builds what is in this folder: the extension ``wfnet._C`` (nvcc) and its emulation (g++).

``setup.py`` calls :func:`build_extension`; tests call :func:`build_emulated`.

    python csrc/build.py      wfnet/_C*.so in place, for compute capability 9.0 (Hopper)
"""

from __future__ import annotations

import fcntl
import hashlib
import importlib.util
import os
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

HERE = Path(__file__).resolve().parent
SUFFIX = sysconfig.get_config_var("EXT_SUFFIX")
_ARCH = "-gencode=arch=compute_90a,code=sm_90a"
# 177: constants and functions that only the emulated device asks for.
NVCC_FLAGS = ["-std=c++17", "-O3", "-Xcompiler", "-fPIC,-fvisibility=hidden", "-diag-suppress=177"]
NVCC_FLAGS += ["--cudart=static", _ARCH]
_HOST_FLAGS = ["-std=c++17", "-O2", "-fPIC", "-fvisibility=hidden", "-Wall", "-Wextra"]


class BuildError(RuntimeError):
    """The extension cannot be built here; the message says what is missing."""


def nvcc() -> str:
    """Path of nvcc: in CUDA_HOME if that is set, else on PATH, else in /usr/local/cuda."""
    root = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    places = [f"{root}/bin/nvcc"] if root else [shutil.which("nvcc"), "/usr/local/cuda/bin/nvcc"]
    for place in places:
        if place and Path(place).exists():
            return place
    where = f"{root}/bin" if root else "PATH"
    raise BuildError(
        f"nvcc was not found in {where} (install the CUDA toolkit 13.0 or newer, or set CUDA_HOME)"
    )


def kernel_sources() -> list[Path]:
    """What the extension, or its emulation, is compiled from."""
    return sorted(HERE.glob("*.cu")) + sorted(HERE.glob("*.cpp"))


def sources_digest() -> str:
    """A hash of the extension's sources: what tells a stale extension from a fresh one."""
    return _digest([], [*kernel_sources(), *HERE.glob("*.h")])


def _digest(words: Sequence[str], files: Sequence[Path]) -> str:
    digest = hashlib.sha256(" ".join(words).encode())
    for path in sorted(files):
        digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


def _includes() -> list[str]:
    """Options for the headers of Python, pybind11 and this folder."""
    if importlib.util.find_spec("pybind11") is None:
        raise BuildError("pybind11 is not installed (pip install pybind11)")
    import pybind11

    return [f"-I{p}" for p in (sysconfig.get_path("include"), pybind11.get_include(), HERE)]


def _run(command: Sequence[str | Path]) -> None:
    done = subprocess.run([str(word) for word in command], capture_output=True, text=True)
    if done.returncode:
        raise BuildError(f"{command[0]} failed:\n{done.stdout}{done.stderr}")


def _library(
    folder: Path, name: str, compilers: dict[Path, Sequence[str]], link: Sequence[str]
) -> Path:
    """Compiles sources, each with a command of its own and all at once, into a module ``name``."""
    folder.mkdir(parents=True, exist_ok=True)
    library = folder / f"{name}{SUFFIX}"
    with open(folder / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # processes that build at once wait for each other
        if not library.exists():
            objects = {source: folder / f"{source.name}.o" for source in compilers}
            commands = [[*compilers[s], "-c", s, "-o", target] for s, target in objects.items()]
            with ThreadPoolExecutor() as pool:
                list(pool.map(_run, commands))
            _run([*link, *objects.values(), "-o", library])
    return library


def build_extension(folder: Path) -> Path:
    """Compiles ``_C`` with nvcc into ``folder``, cached by its sources; returns the library.

    Raises:
        BuildError: if a tool is missing or a source does not compile.
    """
    digest = sources_digest()
    kernels = [nvcc(), *NVCC_FLAGS, f"-I{HERE}"]
    host = [os.environ.get("CXX", "g++"), *_HOST_FLAGS, f"-DWF_SOURCES={digest}", *_includes()]
    compilers = {s: kernels if s.suffix == ".cu" else host for s in kernel_sources()}
    return _library(folder / digest, "_C", compilers, [nvcc(), "-shared", "--cudart=static", _ARCH])


def build_emulated(name: str, sources: Sequence[Path], root: Path) -> Path:
    """Compiles ``sources`` with g++, kernels on the emulated device, into a Python module ``name``.

    Cached by the hash of all sources.

    Raises:
        BuildError: if there is no C++ compiler, or a source does not compile.
    """
    compiler = os.environ.get("CXX") or shutil.which("g++")
    if compiler is None:
        raise BuildError("no C++ compiler (g++) was found")
    command = [compiler, *_HOST_FLAGS, "-U_FORTIFY_SOURCE", "-DWF_EMULATED", f"-DWF_MODULE={name}"]
    command += [*_includes(), "-x", "c++"]
    digest = _digest([*command, SUFFIX], [*sources, *HERE.rglob("*.h")])
    compilers = dict.fromkeys(sources, command)
    return _library(root / f"{name}-{digest}", name, compilers, [compiler, "-shared"])


def main() -> None:
    """Builds ``wfnet/_C`` of this checkout in place."""
    root = HERE.parent
    library = build_extension(root / "build" / "cuda")
    shutil.copy2(library, root / "wfnet" / library.name)
    print(f"wrote wfnet/{library.name}")


if __name__ == "__main__":
    try:
        main()
    except BuildError as error:
        sys.exit(f"error: {error}")

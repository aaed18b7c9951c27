"""Builds what is in this folder: the extension ``wfnet._C`` (nvcc) and its emulation (g++).

``setup.py`` calls :func:`build_extension`; tests call :func:`build_emulated`. Both write a
``build.ninja`` and run ninja, so a second build compiles what changed.

    python csrc/build.py               wfnet/_C*.so in place, for compute capability 9.0 (Hopper)
    python csrc/build.py --emulated    build/emulated/..., for WFNET_CUDA_EMULATE; needs no nvcc

With WFNET_CUDA_DEADLINE=SECONDS a wait of the kernels that lasts longer is an error: to find
the one that never ends.
"""

from __future__ import annotations

import argparse
import fcntl
import hashlib
import importlib.util
import os
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Sequence
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


def includes() -> list[str]:
    """Header folders of Python and pybind11."""
    if importlib.util.find_spec("pybind11") is None:
        raise BuildError("pybind11 is not installed (pip install pybind11)")
    import pybind11

    return [sysconfig.get_path("include"), pybind11.get_include(), str(HERE)]


def ninja() -> str:
    """Path of ninja, from its Python package or PATH."""
    if importlib.util.find_spec("ninja") is not None:
        import ninja as package

        found = Path(package.BIN_DIR) / "ninja"
        if found.exists():
            return str(found)
    found = shutil.which("ninja")
    if found is None:
        raise BuildError("ninja is not installed (pip install ninja)")
    return found


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


def _write_ninja(folder: Path, rules: dict[str, str], edges: list[tuple[str, str, list[Path]]]):
    """``edges``: (output, rule, inputs). Header dependencies come from the compilers."""
    lines = ["ninja_required_version = 1.8"]
    for name, command in rules.items():
        lines += [f"rule {name}", f"  command = {command}", f"  description = {name} $out"]
        if name != "link":
            lines += ["  depfile = $out.d", "  deps = gcc"]
    for output, rule, inputs in edges:
        lines.append(f"build {output}: {rule} " + " ".join(str(path) for path in inputs))
    text = "\n".join(lines) + "\n"
    path = folder / "build.ninja"
    if not path.exists() or path.read_text() != text:
        path.write_text(text)


def _run_ninja(folder: Path) -> None:
    done = subprocess.run([ninja(), "-C", str(folder)], capture_output=True, text=True)
    if done.returncode:
        raise BuildError(f"ninja failed in {folder}:\n{done.stdout}{done.stderr}")


def kernel_sources() -> list[Path]:
    """What the extension is compiled from."""
    return sorted(HERE.glob("*.cu")) + sorted(HERE.glob("*.cpp"))


def emulated_sources() -> list[Path]:
    """The same on the emulated device, and the functions that steer it."""
    return [*kernel_sources(), *sorted(HERE.glob("emulation/*.cpp"))]


def sources_digest() -> str:
    """A hash of the extension's sources: what tells a stale extension from a fresh one."""
    digest = hashlib.sha256()
    for path in sorted([*kernel_sources(), *HERE.glob("*.h")]):
        digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


def build_extension(folder: Path) -> Path:
    """Compiles ``_C`` with nvcc into ``folder`` and returns the shared library.

    Raises:
        BuildError: if a tool is missing or a source does not compile.
    """
    compiler = nvcc()
    folder.mkdir(parents=True, exist_ok=True)
    include = " ".join(f"-I{path}" for path in includes())
    host = " ".join(_HOST_FLAGS)
    deadline = os.environ.get("WFNET_CUDA_DEADLINE")
    flags = " ".join(NVCC_FLAGS) + (f" -DWF_DEADLINE={int(deadline)}" if deadline else "")
    define = f"-DWF_SOURCES={sources_digest()}"
    rules = {
        "nvcc": f"{compiler} -MD -MF $out.d {flags} -I{HERE} -c $in -o $out",
        "cxx": f"{os.environ.get('CXX', 'g++')} -MD -MF $out.d {host} {define} {include} "
        "-c $in -o $out",
        "link": f"{compiler} -shared --cudart=static {_ARCH} $in -o $out",
    }
    sources = kernel_sources()
    rule = {".cu": "nvcc", ".cpp": "cxx"}
    edges = [(f"{source.name}.o", rule[source.suffix], [source]) for source in sources]
    edges.append((f"_C{SUFFIX}", "link", [Path(edge[0]) for edge in edges]))
    _write_ninja(folder, rules, edges)
    _run_ninja(folder)
    return folder / f"_C{SUFFIX}"


def build_emulated(name: str, sources: Sequence[Path], root: Path) -> Path:
    """Compiles ``sources`` with g++, kernels on the emulated device, into a Python module ``name``.

    Cached by the hash of all sources; processes that build at once wait for each other.

    Raises:
        BuildError: if there is no C++ compiler, or a source does not compile.
    """
    compiler = os.environ.get("CXX") or shutil.which("g++")
    if compiler is None:
        raise BuildError("no C++ compiler (g++) was found")
    flags = [*_HOST_FLAGS, "-U_FORTIFY_SOURCE", "-DWF_EMULATED", f"-DWF_MODULE={name}"]
    include = " ".join(f"-I{path}" for path in includes())
    digest = hashlib.sha256(" ".join([compiler, *flags, include, SUFFIX]).encode())
    for path in sorted({*sources, *HERE.rglob("*.h")}):
        digest.update(path.read_bytes())
    folder = root / f"{name}-{digest.hexdigest()[:16]}"
    folder.mkdir(parents=True, exist_ok=True)
    library = folder / f"{name}{SUFFIX}"
    with open(folder / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not library.exists():
            command = f"{compiler} -MD -MF $out.d {' '.join(flags)} {include} -x c++ -c $in -o $out"
            edges = [(f"{i}-{path.name}.o", "cxx", [path]) for i, path in enumerate(sources)]
            link = f"{compiler} -shared $in -o $out"
            edges.append((library.name, "link", [Path(edge[0]) for edge in edges]))
            _write_ninja(folder, {"cxx": command, "link": link}, edges)
            _run_ninja(folder)
    return library


def main() -> None:
    """Builds ``wfnet/_C`` of this checkout in place, or the emulated module."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--emulated", action="store_true", help="the kernels on the host")
    root = HERE.parent
    if parser.parse_args().emulated:
        print(build_emulated("_emulated", emulated_sources(), root / "build/emulated"))
        return
    library = build_extension(root / "build" / "cuda")
    shutil.copy2(library, root / "wfnet" / library.name)
    print(f"wrote wfnet/{library.name}")


if __name__ == "__main__":
    try:
        main()
    except BuildError as error:
        sys.exit(f"error: {error}")

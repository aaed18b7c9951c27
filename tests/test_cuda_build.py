"""Machine code of the portable CUDA kernels, and how the extension is built.

Compiled by nvcc for sm_80 and sm_90a (about 40 s), cached by the hash of the sources.
"""

import functools
import hashlib
import os
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import cuda_modules
import pytest

CSRC = cuda_modules.ROOT / "csrc"
SOURCES = ("conv_fprop.cu", "conv_dgrad.cu", "epilogue_bwd.cu", "gate.cu")
ARCHS = ("sm_80", "sm_90a")
# Of a multiprocessor: bytes of shared memory for all its blocks (1 KB of each is the system's).
SHARED = {"sm_80": 164 * 1024, "sm_90a": 228 * 1024}
SMALLEST_BLOCK = 99 * 1024  # what one block may have on sm_86 and sm_89, which run sm_80's code
REGISTERS = 65536


@dataclass(frozen=True)
class Kernel:
    """What the assembler and the disassembler say of one kernel."""

    registers: int
    stack_bytes: int
    code: str

    def has(self, instruction: str) -> bool:
        return re.search(rf"\b{instruction}\b", self.code) is not None


def cuobjdump() -> Path:
    triton = pytest.importorskip("triton")
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    if not tool.exists():
        pytest.skip("this Triton carries no cuobjdump")
    return tool


@functools.cache
def compiled(source: str, arch: str) -> dict[str, Kernel]:
    """Kernels of a source by mangled name."""
    build = cuda_modules.build()
    try:
        compiler = build.nvcc()
    except build.BuildError as error:
        pytest.skip(str(error))
    number = arch.removeprefix("sm_")
    command = [compiler, "-std=c++17", "-O3", "-diag-suppress=177", f"-I{CSRC}", "-cubin"]
    command += [f"-gencode=arch=compute_{number},code={arch}", str(CSRC / source)]
    digest = hashlib.sha256(" ".join(command).encode())
    headers = [path for path in (*CSRC.glob("*.h"), *CSRC.glob("*.cuh")) if "sm90" not in path.name]
    for path in sorted([*headers, CSRC / source]):
        digest.update(path.read_bytes())
    folder = cuda_modules.ROOT / "build/machine-code"
    folder.mkdir(parents=True, exist_ok=True)
    dump = folder / f"{source}.{arch}.{digest.hexdigest()[:16]}.txt"
    if not dump.exists():
        cubin = dump.with_suffix(f".{os.getpid()}.cubin")
        done = subprocess.run([*command, "-o", str(cubin)], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        assert "warning" not in done.stderr, done.stderr
        text = subprocess.run(
            [cuobjdump(), "-res-usage", "-sass", str(cubin)],
            check=True,
            capture_output=True,
            text=True,
        ).stdout
        cubin.unlink()
        written = cubin.with_suffix(".tmp")
        written.write_text(text)
        written.replace(dump)
    return dict(parsed(dump.read_text()))


def parsed(text: str):
    usage = dict(re.findall(r"Function (\S+):\s*\n\s*(REG:.*)", text))
    for part in re.split(r"\n\s*Function : ", text)[1:]:
        name, code = part.split("\n", 1)
        numbers = dict(re.findall(r"(\w+):(\d+)", usage[name]))
        yield name, Kernel(int(numbers["REG"]), int(numbers["STACK"]), code)


@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("source", SOURCES)
def test_no_spills_and_wide_accesses(source, arch):
    """No register lives in memory; whatever moves pixels moves 16 bytes at a time."""
    kernels = compiled(source, arch)
    assert kernels
    for name, kernel in kernels.items():
        assert kernel.stack_bytes == 0, name
        assert not kernel.has(r"[LS][TD]L(\.\w+)*"), name
        assert kernel.registers <= 255
        if "SumColumns" not in name:  # reads fp32 sums, 4 bytes a lane, 128 contiguous
            assert kernel.has(r"LDG\.E\.128(\.\w+)*"), name
            assert kernel.has(r"STG\.E\.128"), name


@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("source", SOURCES[:2])
def test_tensor_cores_and_asynchronous_copies(source, arch):
    kernels = {n: k for n, k in compiled(source, arch).items() if "ImplicitGemm" in n}
    assert len(kernels) == 4  # two types, two widths
    for name, kernel in kernels.items():
        element = r"\.BF16" if "Bf16" in name else ""
        assert kernel.has(rf"HMMA\.16816\.F32{element}"), name
        assert ("BF16" in kernel.code) == ("Bf16" in name)
        assert kernel.has(r"LDGSTS\.E(\.\w+)*\.128(\.\w+)*"), name
        assert kernel.has(r"LDSM(\.\w+)*\.4"), name


@pytest.mark.parametrize("arch", ARCHS)
def test_blocks_share_a_multiprocessor(arch):
    """Registers and shared memory leave room for as many blocks as the tiles were chosen for."""
    geometry = cuda_modules.emulated("geometry", "tests/cuda/geometry.cpp")
    seen = 0
    for pattern, threads, blocks, shared in geometry.kernels():
        assert shared <= SMALLEST_BLOCK
        assert blocks * (shared + 1024) <= SHARED[arch]
        for source in SOURCES[:2]:
            for name, kernel in compiled(source, arch).items():
                if "ImplicitGemm" in name and pattern in name:
                    seen += 1
                    allocated = -(-kernel.registers // 8) * 8
                    assert blocks * threads * allocated <= REGISTERS, name
    assert seen == 8


# --- the build -----------------------------------------------------------------------------------


def run_setup(**environment):
    return subprocess.run(
        [sys.executable, "setup.py", "--version"],
        cwd=cuda_modules.ROOT,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
    )


@pytest.mark.parametrize(
    ("environment", "code", "message"),
    [
        ({"WFNET_BUILD_CUDA": "auto"}, 0, "wfnet: without the CUDA extension: nvcc was not found"),
        ({"WFNET_BUILD_CUDA": "0"}, 0, ""),
        ({"WFNET_BUILD_CUDA": "1"}, 1, "WFNET_BUILD_CUDA=1, but nvcc was not found in /nowhere"),
        ({"WFNET_BUILD_CUDA": "yes"}, 1, "WFNET_BUILD_CUDA='yes' must be 0"),
    ],
    ids=lambda value: value["WFNET_BUILD_CUDA"] if isinstance(value, dict) else None,
)
def test_installation_without_nvcc(environment, code, message):
    done = run_setup(CUDA_HOME="/nowhere", **environment)
    assert done.returncode == code, done.stderr
    lines = [line for line in done.stderr.splitlines() if "wfnet: " in line or "WFNET" in line]
    assert len(lines) == bool(message)
    assert message in done.stderr


def test_targets(monkeypatch):
    build = cuda_modules.build()
    known = ["8.0", "8.6", "9.0", "9.0a", "10.0"]
    monkeypatch.setattr(build, "known_archs", lambda compiler: known)
    monkeypatch.delenv("WFNET_CUDA_ARCHS", raising=False)
    assert build.chosen_archs("nvcc") == ["8.0", "9.0a", "10.0"]
    assert build.chosen_archs("nvcc", every=True) == ["8.0", "8.6", "9.0", "10.0", "9.0a"]
    monkeypatch.setenv("WFNET_CUDA_ARCHS", "8.6;9.0a")
    assert build.chosen_archs("nvcc") == ["8.6", "9.0a"]
    monkeypatch.setenv("WFNET_CUDA_ARCHS", "7.0")
    with pytest.raises(build.BuildError, match=r"'7\.0', which nvcc does not know; choose among"):
        build.chosen_archs("nvcc")


def test_newest_portable_target_also_as_ptx():
    gencode = cuda_modules.build().gencode
    assert gencode(["8.0", "10.0", "9.0a"]) == [
        "-gencode=arch=compute_80,code=sm_80",
        "-gencode=arch=compute_100,code=sm_100",
        "-gencode=arch=compute_90a,code=sm_90a",
        "-gencode=arch=compute_100,code=compute_100",
    ]
    assert gencode(["9.0a"]) == ["-gencode=arch=compute_90a,code=sm_90a"]


def test_source_distribution_carries_every_kernel():
    """Patterns of MANIFEST.in cover whatever lies in csrc/."""
    patterns = (cuda_modules.ROOT / "MANIFEST.in").read_text().split()[2:]
    for path in CSRC.iterdir():
        if path.is_file():
            assert any(path.match(pattern) for pattern in patterns), path

"""How the extension is built (csrc/build.py, setup.py)."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


def run_setup(**environment):
    return subprocess.run(
        [sys.executable, "setup.py", "--version"],
        cwd=ROOT,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
    )


@pytest.mark.parametrize(
    ("environment", "code", "message"),
    [
        ({"WFNET_BUILD_CUDA": "auto"}, 0, "wfnet: without the CUDA extension: nvcc was not found"),
        ({"WFNET_BUILD_CUDA": "0"}, 0, ""),
        ({"WFNET_BUILD_CUDA": "1"}, 1, "=1, but nvcc was not found in /nowhere/bin (install the"),
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


def test_source_distribution_carries_every_kernel():
    """Patterns of MANIFEST.in cover whatever lies in csrc/."""
    patterns = (ROOT / "MANIFEST.in").read_text().split()[2:]
    for path in (ROOT / "csrc").rglob("*"):
        if path.is_file() and path.suffix != ".pyc":
            assert any(path.match(pattern) for pattern in patterns), path


def test_a_missing_host_compiler_is_named(csrc_build, monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    with pytest.raises(csrc_build.BuildError, match=r"no C\+\+ compiler"):
        csrc_build.build_emulated("none", [], tmp_path)

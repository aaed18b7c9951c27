"""Runs triton_interpreted.py in a process of its own, with Triton's interpreter switched on."""

import os
import subprocess
import sys
from pathlib import Path

import numpy
import pytest

triton = pytest.importorskip("triton")


def version(text: str) -> tuple[int, int]:
    major, minor = text.split(".")[:2]
    return int(major), int(minor)


@pytest.mark.skipif(
    version(triton.__version__) < (3, 7) and version(numpy.__version__) >= (2, 4),
    reason="the interpreter of this Triton needs numpy < 2.4",
)
def test_kernels_in_the_interpreter(tmp_path):
    """Every kernel's numerics against fp64; the report of the other process on failure."""
    here = Path(__file__).parent
    environment = {
        **os.environ,
        "TRITON_INTERPRET": "1",
        "OMP_NUM_THREADS": "1",
        "WFNET_AUTOTUNE": "0",
    }
    run = subprocess.run(
        [
            sys.executable,
            "-m",
            "pytest",
            "--quiet",
            "--no-header",
            "--override-ini=addopts=",  # this test has its own time limit
            "-p",
            "no:cacheprovider",
            str(here / "triton_interpreted.py"),
        ],
        cwd=tmp_path,  # not the repository: `-m` puts the working directory on sys.path
        env=environment,
        capture_output=True,
        text=True,
        timeout=280,
        check=False,
    )
    assert run.returncode == 0, run.stdout[-8000:] + run.stderr[-2000:]
    assert " passed" in run.stdout

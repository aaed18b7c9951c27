"""compute-sanitizer over every kernel on small shapes: no bad access, no race in shared memory."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

SANITIZER = shutil.which("compute-sanitizer") or "/usr/local/cuda/bin/compute-sanitizer"

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
    pytest.mark.skipif(not Path(SANITIZER).exists(), reason="compute-sanitizer is not installed"),
]


@pytest.mark.parametrize("tool", ["memcheck", "racecheck"])
def test_sanitizer_finds_nothing(tool, tmp_path):
    script = Path(__file__).with_name("sanitized.py")
    run = subprocess.run(
        [SANITIZER, "--tool", tool, "--error-exitcode", "9", sys.executable, str(script)],
        cwd=tmp_path,
        env={**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"},
        capture_output=True,
        text=True,
        timeout=280,
        check=False,
    )
    assert run.returncode == 0, run.stdout[-4000:] + run.stderr[-4000:]
    assert "every kernel ran" in run.stderr

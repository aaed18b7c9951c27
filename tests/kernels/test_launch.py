"""Launches: descriptors, what is compiled and when, the numerics of all kernels, interpreted."""

from pathlib import Path

import numpy
import pytest
import torch
from numpy.lib import NumpyVersion as Version

pytest.importorskip("triton")

import triton
from wfnet.kernels.gate import gate_rows_kernel
from wfnet.kernels.launch import descriptor
from wfnet.kernels.launch import interpreted as is_interpreted

TESTS = Path(__file__).parents[1]
compiles = pytest.mark.skipif(is_interpreted(gate_rows_kernel), reason="TRITON_INTERPRET=1")


@compiles
@pytest.mark.skipif(
    Version(triton.__version__) < "3.7.0" and Version(numpy.__version__) >= "2.4.0",
    reason="the interpreter of this Triton needs numpy < 2.4",
)
def test_numerics_of_all_kernels_in_the_interpreter(interpreted):
    """The interpreter's bf16 products are wrong, so bf16 is tested on devices only (tests/gpu)."""
    places = str(TESTS / "kernels"), str(TESTS / "backends/test_triton.py")
    run = interpreted("-m", "pytest", "-m", "interpreter", *places)
    assert run.returncode == 0, run.stdout[-8000:] + run.stderr[-2000:]
    assert " passed" in run.stdout


def test_descriptor_strides_come_from_the_shape():
    """PyTorch gives dimensions of size 1 arbitrary strides; a descriptor may not have them."""
    x = torch.zeros(64).as_strided((1, 1, 4, 16), (7, 3, 16, 1))
    view = descriptor(x, (1, 1, 4, 16), (1, 1, 4, 16))
    assert view.strides == [64, 64, 16, 1]

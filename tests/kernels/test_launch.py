"""Launches: descriptors, what is compiled and when, the numerics of all kernels, interpreted."""

from pathlib import Path

import numpy
import pytest
import torch

pytest.importorskip("triton")

import triton
from wfnet.kernels.conv_dgrad import conv_dgrad
from wfnet.kernels.conv_fprop import conv_fprop
from wfnet.kernels.epilogue_bwd import epilogue_bwd
from wfnet.kernels.gate import gate_rows, gate_rows_bwd, gate_rows_kernel
from wfnet.kernels.launch import descriptor
from wfnet.kernels.launch import interpreted as is_interpreted
from wfnet.kernels.linear import linear_dgrad, linear_fprop

from wfnet.backends.contract import ConvGeometry, Epilogue, LayerBelow

TESTS = Path(__file__).parents[1]
compiles = pytest.mark.skipif(is_interpreted(gate_rows_kernel), reason="TRITON_INTERPRET=1")


def _version(text: str) -> tuple[int, int]:
    major, minor = text.split(".")[:2]
    return int(major), int(minor)


@compiles
@pytest.mark.skipif(
    _version(triton.__version__) < (3, 7) and _version(numpy.__version__) >= (2, 4),
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


def _launch_all(batch: int) -> None:
    """Every kernel, on ``batch`` samples of a layer with and without descriptors."""

    def empty(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
        return torch.empty(*shape, device="cuda", dtype=dtype)

    geometry, table = ConvGeometry(padding=(1, 1)), (batch, 64)
    scale, shift, t1, t0 = empty(4, *table, dtype=torch.float32).unbind()
    for channels in (64, 3):
        x, weight = empty(batch, channels, 28, 28), empty(64, channels, 3, 3)
        found = conv_fprop(x, weight, geometry, Epilogue(scale, shift, save=True))
        conv_dgrad(found.out, weight, tuple(x.shape), geometry)
    below = LayerBelow(scale, shift, found.branch, relu=True, t1=t1, t0=t0)
    filters = empty(64, 64)
    linear_fprop(found.out, filters, Epilogue(scale, shift))
    linear_dgrad(found.out, filters, None, below)
    epilogue_bwd(found.out, below)
    alpha = empty(1000, 64, dtype=torch.float32)
    forget = torch.zeros(batch, 1, device="cuda", dtype=torch.int64)
    gate_rows(alpha, forget, 1.0)
    gate_rows_bwd(scale, alpha, forget)


def test_another_size_of_a_batch_compiles_nothing(pretended_cuda):
    """The last batch of an epoch, for one: sizes are not what kernels are specialised on."""
    with pretended_cuda(values=False) as device:

        def compiled() -> dict[str, int]:
            return {kernel.__name__: len(kernel.device_caches[0][0]) for kernel in device.kernels}

        _launch_all(512)
        first = compiled()
        launched = {name for name, _ in device.launches}
        assert launched >= {
            "conv_fprop_kernel",
            "conv_fprop_gather_kernel",
            "conv_dgrad_kernel",
            "linear_fprop_kernel",
            "linear_dgrad_kernel",
            "epilogue_bwd_kernel",
            "column_sums_kernel",
            "gate_rows_kernel",
        }
        _launch_all(500)
        assert compiled() == first

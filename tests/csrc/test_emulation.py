"""The emulated device itself (csrc/emulation/): it computes, and names what a device would not."""

import random

import pytest
import torch


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_numbers_round_as_pytorch_does(inspection, dtype):
    """Normal and subnormal numbers, ties, overflow and infinities; NaN stays NaN."""
    generator = random.Random(0)
    bits = [generator.randrange(2**32) for _ in range(4000)]
    bits += [b + d for b in (0x33000000, 0x38800000, 0x477FE000, 0x7F800000) for d in (-1, 0, 1)]
    bits += [exponent << 23 | tie << 12 for exponent in range(96, 144) for tie in range(8)]
    signed = torch.tensor([b - 2**32 if b >= 2**31 else b for b in bits], dtype=torch.int32)
    truth = signed.view(torch.float32).to(dtype).float()
    found = [inspection.as_float(b, dtype == torch.bfloat16) for b in bits]
    found = torch.tensor([b - 2**32 if b >= 2**31 else b for b in found], dtype=torch.int32)
    found = found.view(torch.float32)
    torch.testing.assert_close(found, truth, rtol=0, atol=0, equal_nan=True)


def multiply_once(inspection, a, b, **changes):
    """[64, 64] of ``a`` times ``b``, as each block of a cluster has it in its accumulators."""
    d = torch.zeros(2, 128, 32)
    numbers = {"leading": 8192, "stride_a": 1024, "stride_b": 1024, "step_b": 32, **changes}
    numbers = {"transposed": False, "fenced": True, **numbers}
    inspection.multiply_once(a=a.data_ptr(), b=b.data_ptr(), d=d.data_ptr(), **numbers)
    return d


@pytest.mark.parametrize("transposed", [False, True], ids=["K-major", "N-major"])
@pytest.mark.parametrize(
    ("change", "right"),
    [
        ({}, True),
        ({"stride_a": 512}, False),
        ({"stride_b": 512}, False),
        ({"step_b": 16}, False),
        ({"leading": 16}, True),  # no second group of 64 columns: not read
    ],
    ids=str,
)
def test_emulated_wgmma_follows_its_descriptors(inspection, transposed, change, right):
    """A product is right with the right strides, and wrong with wrong ones."""
    a, b = torch.randn(2, 64, 64).bfloat16()
    change = {"step_b": 2048 if transposed else 32, **change, "transposed": transposed}
    truth = a.double() @ (b.double() if transposed else b.double().T)
    # Thread t of 128, accumulator 4 * j + 2 * h + i: see wgmma() in csrc/ptx.h.
    thread, j, h, i = torch.meshgrid(*map(torch.arange, (128, 8, 2, 2)), indexing="ij")
    row = thread // 32 * 16 + h * 8 + thread % 32 // 4
    column = j * 8 + thread % 4 * 2 + i
    expected = truth[row, column].reshape(128, 32)
    for block in multiply_once(inspection, a, b, **change):
        error = (block.double() - expected).norm() / expected.norm()
        assert (error < 1e-6) == right


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"step_b": 128}, "within an atom"),  # needs a base offset, which the kernels leave at 0
        ({"fenced": False}, "no wgmma_fence"),
    ],
    ids=str,
)
def test_emulated_wgmma_refuses(inspection, change, message):
    a = torch.randn(64, 64).bfloat16()
    with pytest.raises(RuntimeError, match=message):
        multiply_once(inspection, a, a, **change)


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ("", None),
        ("unfenced barrier", "initialisation is not visible"),
        ("too many bytes", "more bytes"),
        ("named barrier", "barriers are 1 to 7"),
        ("half a warp elects", "elect_one"),
        ("lanes apart at a named barrier", "is at .* while others of its group are at"),
        ("three warps give registers", "wait at setmaxnreg.dec"),
        ("arrival at an ended block", "block of the cluster has ended"),
        ("lanes apart at a shuffle", "shuffle_xor while others of its group are at sync_warp"),
        ("a warp waits alone", "threads .first 0. wait at sync_block"),
        ("shared outside", r"shared bytes \[.*\) of 2048"),
        ("misaligned", "not aligned to 16"),
        ("reads outside", "outside of registered global memory"),
        ("writes input", "write of 4 bytes outside"),
        ("writes twice", "of output is written twice"),
        ("unwritten is a number", None),
    ],
)
def test_a_misused_primitive_is_named(inspection, fault, message):
    """What a device would do wrong in silence, or never finish."""
    if message is None:
        inspection.misuse(fault)
        return
    with pytest.raises(RuntimeError, match=message):
        inspection.misuse(fault)

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


@pytest.mark.parametrize(
    ("fault", "message"),
    [
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

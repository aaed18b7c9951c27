"""Every kernel once, on small and awkward shapes: what compute-sanitizer watches."""

import sys

import torch
from wfnet.kernels.conv_dgrad import conv_dgrad
from wfnet.kernels.epilogue_bwd import LayerBelow
from wfnet.kernels.gate import GatedLayer, GateTables

import wfnet.functional as wf


def conv_steps() -> None:
    """Forward and backward of masked convolutions, with labels and sources out of range."""
    for channels, kernel, stride, size in (
        (16, 3, 1, 7),
        (16, 3, 2, 8),
        (16, 1, 1, 7),
        (3, 7, 2, 9),
    ):
        x = torch.randn(2, channels, size, size, device="cuda", dtype=torch.bfloat16)
        weight = torch.randn(24, channels, kernel, kernel, device="cuda", dtype=torch.bfloat16)
        alpha = torch.randn(5, 24, device="cuda", requires_grad=True)
        forget = torch.tensor([[0, 1], [7, -1], [2, 2]], device="cuda")
        source = torch.tensor([0, 1, 1], device="cuda")
        y = wf.wf_conv2d(
            x.requires_grad_(), weight, None, alpha, None, forget, stride, kernel // 2,
            source=source, backend="triton",
        )  # fmt: skip
        y.backward(torch.ones_like(y))


def linear_steps() -> None:
    """Flat tiles that meet one, two and many samples."""
    for tokens in (1, 49, 130):
        x = torch.randn(3, tokens, 32, device="cuda", dtype=torch.float16, requires_grad=True)
        weight = torch.randn(40, 32, device="cuda", dtype=torch.float16)
        alpha = torch.randn(5, 40, device="cuda", requires_grad=True)
        y = wf.wf_linear(x, weight, None, alpha, None, 3, backend="triton")
        y.backward(torch.ones_like(y))


def fused_steps() -> None:
    """Column sums in the epilogue, and the tables of a network."""
    ag = torch.randn(3, 7, 7, 32, device="cuda", dtype=torch.bfloat16)
    weight = torch.randn(32, 3, 3, 16, device="cuda", dtype=torch.bfloat16)
    below = LayerBelow(
        torch.randn(3, 7, 7, 16, device="cuda", dtype=torch.bfloat16),
        torch.rand(3, 16, device="cuda"),
        torch.rand(3, 16, device="cuda"),
        relu=True,
    )
    conv_dgrad(ag, weight, (7, 7), below, padding=(1, 1), want=("scaled_grad", "t0", "t1"))
    tables = GateTables([GatedLayer(torch.randn(5, 20, device="cuda"))])
    forget = torch.tensor([[1], [9], [-1]], device="cuda")
    tables.scale_and_shift(forget)
    tables.backward(forget, tables.empty(3).zero_(), tables.empty(3).zero_())


if __name__ == "__main__":
    conv_steps()
    linear_steps()
    fused_steps()
    torch.cuda.synchronize()
    print("every kernel ran", file=sys.stderr)

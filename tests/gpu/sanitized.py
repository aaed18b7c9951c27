"""Every kernel once, on small and awkward shapes: what compute-sanitizer watches."""

import sys

import torch
from wfnet.kernels.conv_dgrad import conv_dgrad
from wfnet.kernels.epilogue_bwd import LayerBelow
from wfnet.kernels.gate import GatedLayer, GateTables

import wfnet.functional as wf
from wfnet.backends import contract, cuda, cuda_launch
from wfnet.gate_tables import GatedLayer as TableLayer


def conv_steps(backend: str) -> None:
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
            source=source, backend=backend,
        )  # fmt: skip
        y.backward(torch.ones_like(y))


def linear_steps(backend: str) -> None:
    """Flat tiles that meet one, two and many samples."""
    for tokens in (1, 49, 130):
        x = torch.randn(3, tokens, 32, device="cuda", dtype=torch.float16, requires_grad=True)
        weight = torch.randn(40, 32, device="cuda", dtype=torch.float16)
        alpha = torch.randn(5, 40, device="cuda", requires_grad=True)
        y = wf.wf_linear(x, weight, None, alpha, None, 3, backend=backend)
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


def compiled_chain() -> None:
    """A link of the backward chain, its top, and the tables of a network; both widths of tiles."""
    for channels in (16, 136):
        ag = torch.randn(3, 32, 4, 4, device="cuda", dtype=torch.bfloat16)
        weight = torch.randn(32, channels, 3, 3, device="cuda", dtype=torch.bfloat16)
        branch = torch.randn(3, channels, 7, 7, device="cuda", dtype=torch.bfloat16)
        scale, shift, t1, t0 = torch.rand(4, 3, channels, device="cuda").unbind()
        below = contract.LayerBelow(scale, shift, branch, None, True, t1, t0, need_grad=True)
        geometry = contract.ConvGeometry((2, 2), (1, 1))
        cuda.backend.conv2d_dgrad(ag, weight, tuple(branch.shape), geometry, branch, below)
        cuda.backend.epilogue_backward(branch.mean((2, 3), keepdim=True).expand_as(branch), below)
    tables = cuda.backend.gate_tables([TableLayer(torch.randn(5, 20, device="cuda"))])
    step = tables(torch.tensor([[1], [9], [-1]], device="cuda"), save=True)
    step.gradients()


if __name__ == "__main__":
    conv_steps("triton")
    linear_steps("triton")
    fused_steps()
    if cuda_launch.library().missing is None:
        conv_steps("cuda")
        linear_steps("cuda")
        compiled_chain()
    torch.cuda.synchronize()
    print("every kernel ran", file=sys.stderr)

"""Every kernel once, on small and awkward shapes: what compute-sanitizer watches."""

import sys

import torch

import wfnet.functional as wf
from wfnet import backends
from wfnet.backends import cuda
from wfnet.backends.contract import ConvGeometry, LayerBelow
from wfnet.gate_tables import GatedLayer

DEVICE = "cuda"


def randn(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return torch.randn(*shape, device=DEVICE, dtype=dtype)


def convolutions(backend: str) -> None:
    """Forward and backward of masked convolutions, with labels and sources out of range."""
    for channels, kernel, stride, size in (
        (16, 3, 1, 7),
        (40, 3, 2, 8),
        (40, 1, 1, 7),
        (3, 7, 2, 9),
    ):
        weight = randn(24, channels, kernel, kernel)
        alpha = torch.randn(5, 24, device=DEVICE, requires_grad=True)
        forget = torch.tensor([[0, 1], [7, -1], [2, 2]], device=DEVICE)
        for source in (None, torch.tensor([0, 1, 1], device=DEVICE)):
            x = randn(3 if source is None else 2, channels, size, size).requires_grad_()
            geometry = (stride, kernel // 2)
            how = {"source": source, "backend": backend}
            y = wf.wf_conv2d(x, weight, None, alpha, None, forget, *geometry, **how)
            y.backward(torch.ones_like(y))


def linear_maps(backend: str) -> None:
    """Flat tiles that meet one, two and many samples."""
    for tokens in (1, 49, 130):
        x = randn(3, tokens, 32, dtype=torch.float16).requires_grad_()
        weight = randn(40, 32, dtype=torch.float16)
        alpha = torch.randn(5, 40, device=DEVICE, requires_grad=True)
        y = wf.wf_linear(x, weight, None, alpha, None, 3, backend=backend)
        y.backward(torch.ones_like(y))


def chain(backend: str) -> None:
    """A link of the backward chain, its top, and the tables of a network; both widths of tiles."""
    kernels = backends.get(backend)
    for channels in (16, 136):
        ag, weight, branch = randn(3, 32, 4, 4), randn(32, channels, 3, 3), randn(3, channels, 7, 7)
        scale, shift, t1, t0 = torch.rand(4, 3, channels, device=DEVICE).unbind()
        below = LayerBelow(scale, shift, branch, relu=True, t1=t1, t0=t0, need_grad=True)
        geometry = ConvGeometry((2, 2), (1, 1))
        kernels.conv2d_dgrad(ag, weight, tuple(branch.shape), geometry, branch, below)
        kernels.epilogue_backward(branch.mean((2, 3), keepdim=True).expand_as(branch), below)
    tables = kernels.gate_tables([GatedLayer(torch.randn(5, 20, device=DEVICE))])
    tables(torch.tensor([[1], [9], [-1]], device=DEVICE), save=True).gradients()


if __name__ == "__main__":
    names = ["triton"] if cuda._refuse_tensor(randn(1)) else ["triton", "cuda"]
    for name in names:
        convolutions(name)
        linear_maps(name)
        chain(name)
    torch.cuda.synchronize()
    print("every kernel ran", file=sys.stderr)

"""Every kernel once, on small and awkward shapes: what compute-sanitizer watches."""

import sys
from pathlib import Path

import torch

import wfnet.functional as wf
from wfnet import backends
from wfnet.backends import cuda
from wfnet.gate_tables import GatedLayer, GateTables

sys.path.insert(0, str(Path(__file__).parents[1]))
from masked_products import Backward, check_public, sizes

DEVICE = "cuda"


def randn(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, device=DEVICE, dtype=torch.bfloat16)


def watch(backend: str) -> None:
    """Convolutions, linear maps, links of a chain; labels and sources out of range."""
    kernels = backends.get(backend)
    forget = torch.tensor([[0, 1], [3, -1], [2, 2]], device=DEVICE)
    for channels, kernel, stride, size in (
        (16, 3, 1, 7),
        (40, 3, 2, 8),
        (40, 1, 1, 7),
        (3, 7, 2, 9),
    ):
        weight, how = randn(24, channels, kernel, kernel), (stride, kernel // 2)
        check_public(backend, randn(3, channels, size, size), weight, forget, how)
        source = torch.tensor([0, 1, 1], device=DEVICE)
        check_public(backend, randn(2, channels, size, size), weight, forget, how, source)
    for tokens in (1, 49, 130):  # flat tiles that meet one, two and many samples
        check_public(backend, randn(3, tokens, 32), randn(40, 32), forget)
    for channels in (16, 136):  # both widths of tiles
        case = Backward(sizes(3, 7, 7, channels, 32, 3, 2), torch.bfloat16, DEVICE, mask="kept")
        case.check(kernels.conv2d_dgrad)
        dout = case.below.branch.mean((2, 3), keepdim=True).expand_as(case.below.branch)
        kernels.epilogue_backward(dout, case.below)
    alpha, outside = torch.randn(5, 40, device=DEVICE), torch.tensor([9, -7], device=DEVICE)
    wf.wf_linear(randn(2, 3, 32), randn(40, 32), None, alpha, None, outside, backend=backend)
    tables = GateTables([GatedLayer(torch.randn(5, 20, device=DEVICE))], kernels)
    tables(torch.tensor([[1], [9], [-1]], device=DEVICE), save=True).gradients()


if __name__ == "__main__":
    torch.manual_seed(0)
    for name in ["triton"] if cuda._refuse_tensor(randn(1)) else ["triton", "cuda"]:
        watch(name)
    torch.cuda.synchronize()
    print("every kernel ran", file=sys.stderr)

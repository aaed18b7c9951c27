"""The captured untraining step on a device: equal to ordinary steps, whatever the labels."""

import copy

import pytest
import torch
from captured_steps import CLASSES, Residual, minibatch, network, step_of, untrained
from masked_products import check
from torch import nn

import wfnet
from wfnet.backends import cuda
from wfnet.gate_tables import flatten_filters

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

BACKENDS = ["eager", "triton", "cuda"]


@pytest.fixture(autouse=True)
def usable(request):
    """Skips what backend ``cuda`` cannot run here."""
    named = getattr(getattr(request.node, "callspec", None), "params", {}).get("backend")
    refusal = named == "cuda" and cuda._refuse_tensor(torch.empty(0, device="cuda").bfloat16())
    if refusal:
        pytest.skip(refusal)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("accumulate", [1, 2])
def test_captured_steps_equal_ordinary_ones_bitwise(backend: str, accumulate: int):
    """A smaller batch in between runs uncaptured."""
    sizes = [8] * 8 + [5] + [8] * 3
    found, expected = (
        untrained(network(Residual, "cuda", backend=backend), sizes, capture, accumulate)
        for capture in (True, False)
    )
    for one, other in zip(found, expected, strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("backend", BACKENDS)
def test_replays_allocate_nothing_and_wait_for_nothing(backend: str):
    net = network(Residual, "cuda", backend=backend)
    with flatten_filters(net.filter_parameters()):
        step = step_of(net, capture=True)
        parts = [(images.cuda(), batch.to("cuda")) for images, batch in map(minibatch, range(8))]
        for part in parts:
            step([part], lr=0.1)
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.set_sync_debug_mode("error")
        try:
            losses = [step([part], lr=0.1).total for part in parts]
        finally:
            torch.cuda.set_sync_debug_mode("default")
        grown = torch.cuda.memory_allocated() - before
        assert torch.stack(losses).isfinite().all()
        assert grown <= 64 * 1024, f"{grown} bytes more than the losses need"


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("gate", [1.0, 1e-1, 1e-2, 1e-3])
def test_gradients_of_a_resnet_in_bf16(backend: str, gate: float):
    """The whole chain, projection shortcuts included; the bound is twice the unfused error."""
    torchvision = pytest.importorskip("torchvision")
    torch.manual_seed(0)
    base = torchvision.models.resnet50(num_classes=CLASSES).eval()
    net = wfnet.WFNet(base, CLASSES).cuda().to(memory_format=torch.channels_last)
    alpha = torch.logit(torch.tensor(gate * torch.sigmoid(torch.tensor(3.0)).item())).item()
    for parameter in net.filter_parameters():
        nn.init.normal_(parameter, alpha, 0.1)
    images = torch.randn(16, 3, 64, 64, device="cuda")
    source = torch.arange(16, device="cuda").repeat_interleave(2)
    labels = torch.randint(CLASSES, (32,), device="cuda")
    weights = torch.randn(32, CLASSES, device="cuda", dtype=torch.float64)

    def gradients(how: str, fuse: bool, dtype: torch.dtype) -> torch.Tensor:
        network = copy.deepcopy(net).to(torch.float64 if dtype is torch.float64 else torch.float32)
        for layer in network.masked_layers.values():
            layer.backend = how
        network.fuse = fuse
        x = images.to(network.filter_parameters()[0].dtype)
        with torch.autocast("cuda", torch.bfloat16, enabled=dtype is torch.bfloat16):
            out = network(x, labels, source)
        (out.double() * weights).sum().backward()
        assert not fuse or network._fusion.network is not None, "the network runs unfused"
        return torch.cat([p.grad.double().flatten() for p in network.filter_parameters()])

    exact = gradients("eager", False, torch.float64)
    mine = gradients(backend, True, torch.bfloat16)
    theirs = gradients("eager", False, torch.bfloat16)
    check(mine, exact, bound=2 * ((theirs - exact).norm() / exact.norm()).item())
    assert torch.equal(mine, gradients(backend, True, torch.bfloat16)), "not repeatable"

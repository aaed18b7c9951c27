"""The captured untraining step on a device: equal to ordinary steps, whatever the labels."""

import copy

import pytest
import torch
from masked_products import check
from torch import nn

import wfnet
from wfnet.backends import cuda
from wfnet.gate_tables import flatten_filters
from wfnet.untraining.expansion import expand
from wfnet.untraining.objectives import BalancedObjective
from wfnet.untraining.optimizers import RowAdam
from wfnet.untraining.step import UntrainingStep

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

CLASSES = 10
BACKENDS = ["eager", "triton", "cuda"]


@pytest.fixture(autouse=True)
def usable(request):
    """Skips what backend ``cuda`` cannot run here."""
    named = getattr(getattr(request.node, "callspec", None), "params", {}).get("backend")
    refusal = named == "cuda" and cuda._refuse_tensor(torch.empty(0, device="cuda").bfloat16())
    if refusal:
        pytest.skip(refusal)


def network(backend: str) -> wfnet.WFNet:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 32, 3, padding=1, bias=False),
        nn.BatchNorm2d(32),
        nn.ReLU(),
        nn.Conv2d(32, 64, 3, stride=2, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(64, 64, 1),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(64, CLASSES),
    )
    net = wfnet.WFNet(model.eval(), CLASSES, fuse=True, backend=backend).cuda()
    return net.to(memory_format=torch.channels_last)


def minibatches(sizes):
    for seed, n in enumerate(sizes):
        generator = torch.Generator().manual_seed(seed)
        images = torch.randn(n, 3, 32, 32, generator=generator)
        labels = torch.randint(CLASSES, (n,), generator=generator)
        yield images.pin_memory(), expand(labels, CLASSES, 3, generator, share_images=True)


def run(backend: str, capture: bool, accumulate: int = 1):
    net = network(backend)
    sizes = [8] * 8 + [5] + [8] * 3  # a smaller batch in between runs uncaptured
    losses = []
    with flatten_filters(net.filter_parameters()) as flat:
        step = UntrainingStep(
            net,
            BalancedObjective(),
            RowAdam(net.filter_parameters()),
            torch.bfloat16,
            True,
            capture=capture,
        )
        parts = list(minibatches(sizes))
        for number, start in enumerate(range(0, len(parts), accumulate)):
            found = step(parts[start : start + accumulate], lr=0.2 / (number + 1))
            losses.append(found.total)
        graphs = 0 if step.graphs is None else len(step.graphs.graphs)
        return flat.clone(), torch.stack(losses), graphs


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("accumulate", [1, 2])
def test_captured_steps_equal_ordinary_ones_bitwise(backend: str, accumulate: int):
    filters, losses, _ = run(backend, False, accumulate)
    captured, captured_losses, graphs = run(backend, True, accumulate)
    assert graphs >= 2, "nothing was captured"
    assert torch.equal(captured_losses, losses)
    assert torch.equal(captured, filters)


@pytest.mark.parametrize("backend", BACKENDS)
def test_replays_allocate_nothing_and_wait_for_nothing(backend: str):
    net = network(backend)
    with flatten_filters(net.filter_parameters()):
        step = UntrainingStep(
            net,
            BalancedObjective(),
            RowAdam(net.filter_parameters()),
            torch.bfloat16,
            True,
            capture=True,
        )
        parts = [(images.cuda(), batch.to("cuda")) for images, batch in minibatches([8] * 8)]
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

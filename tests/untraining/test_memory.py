"""What a run is said to take is what it takes."""

import pytest
import torch

from wfnet import UntrainConfig, models
from wfnet.gate_tables import flatten_filters
from wfnet.network import WFNet
from wfnet.services.peak_memory import peak_bytes
from wfnet.services.seeds import generator_for
from wfnet.untraining import memory
from wfnet.untraining.expansion import expand
from wfnet.untraining.memory import filter_memory, step_memory
from wfnet.untraining.objectives import BalancedObjective
from wfnet.untraining.optimizers import RowAdam
from wfnet.untraining.step import UntrainingStep


@pytest.mark.parametrize(("fuse", "share"), [(True, True), (False, False)])
def test_the_estimate_of_a_step_is_close_to_the_measured_peak(fuse, share):
    net = WFNet(models.create("resnet", 10, 1, seed=0, width=8), 10, fuse=fuse)
    before = [p.detach().clone() for p in net.filter_parameters()]
    estimate = step_memory(net, (1, 16, 16), UntrainConfig(steps=1, share_images=share), 64)
    assert all(torch.equal(p, q) for p, q in zip(net.filter_parameters(), before, strict=True))
    with flatten_filters(net.filter_parameters()):
        optimizer = RowAdam(net.filter_parameters())
        step = UntrainingStep(net, BalancedObjective(), optimizer, None, True)
        batch = expand(torch.arange(64) % 10, 10, 3, generator_for(1), share)
        pixels = torch.randn(64, 1, 16, 16)
        peak = peak_bytes(lambda: step.differentiate([(pixels, batch)]), step.device)
    assert estimate.total == pytest.approx(peak, rel=0.05)
    assert peak > 20 * pixels.numel() * 4  # more than the logits and the images


@pytest.mark.parametrize(("dtype", "size"), [(torch.float32, 4), (torch.bfloat16, 2)])
def test_filters_and_optimiser(runs, dtype, size):
    net = runs.network(filter_dtype=dtype)
    entries = sum(p.numel() for p in net.filter_parameters())
    # Two moments, gradient, two copies.
    assert filter_memory(net) == (size * entries, 2 * size * entries, 6 * size * entries)
    assert filter_memory(net, "sgd").moments == 0


@pytest.mark.parametrize(("share", "most"), [(True, 1), (True, 5), (False, 6)])
def test_measuring_takes_no_more_memory_than_the_run(runs, monkeypatch, share, most):
    measured, real = [], memory.expand
    monkeypatch.setattr(
        memory,
        "expand",
        lambda labels, *a, **k: measured.append(len(labels)) or real(labels, *a, **k),
    )
    config = UntrainConfig(steps=1, label_expansion=2, share_images=share)
    assert step_memory(runs.network(), (1, 12, 12), config, most).total > 0
    assert max(measured) == most

"""What a run is said to take is what it takes."""

import pytest
import torch

from wfnet import models
from wfnet.gate_tables import flatten_filters
from wfnet.network import WFNet
from wfnet.services.seeds import generator_for
from wfnet.untraining import memory
from wfnet.untraining.expansion import expand
from wfnet.untraining.memory import filter_memory, peak_bytes, step_memory
from wfnet.untraining.objectives import BalancedObjective
from wfnet.untraining.optimizers import RowAdam
from wfnet.untraining.step import UntrainingStep


@pytest.mark.parametrize("fuse", [True, False])
@pytest.mark.parametrize("share", [True, False])
def test_the_estimate_of_a_step_is_close_to_the_measured_peak(fuse, share):
    net = WFNet(models.create("resnet", 10, 1, seed=0, width=8), 10, fuse=fuse)
    before = [p.detach().clone() for p in net.filter_parameters()]
    estimate = step_memory(net, (1, 16, 16), 3, share)
    assert all(torch.equal(p, q) for p, q in zip(net.filter_parameters(), before, strict=True))
    with flatten_filters(net.filter_parameters()):
        optimizer = RowAdam(net.filter_parameters())
        step = UntrainingStep(net, BalancedObjective(), optimizer, None, True)
        for images in (24, 64):
            labels = torch.arange(images) % 10
            batch = expand(labels, 10, 3, generator_for(images), share)
            pixels = torch.randn(images, 1, 16, 16)
            peak = peak_bytes(lambda p=pixels, b=batch: step.differentiate([(p, b)]), step.device)
            assert estimate.of(images) == pytest.approx(peak, rel=0.05)
            # More than the logits and the images, or nothing was measured.
            assert peak > 20 * pixels.numel() * 4


def test_the_peak_is_the_most_at_a_time():
    def work():
        for _ in range(3):  # one after the other
            torch.empty(1_000_000, dtype=torch.uint8).fill_(1)
        kept = [torch.empty(1_000_000, dtype=torch.uint8) for _ in range(4)]
        del kept

    assert peak_bytes(work, torch.device("cpu")) == pytest.approx(4_000_000, rel=0.01)


@pytest.mark.parametrize(("dtype", "size"), [(torch.float32, 4), (torch.bfloat16, 2)])
def test_filters_and_optimiser(runs, dtype, size):
    net = runs.network(filter_dtype=dtype)
    entries = sum(p.numel() for p in net.filter_parameters())
    found = filter_memory(net)
    assert (found.entries, found.filters) == (entries, size * entries)
    assert found.total == 6 * size * entries  # two moments, gradient, two copies
    assert filter_memory(net, "sgd").moments == 0
    moments = RowAdam(net.filter_parameters()).moments()
    held = [
        moments[name].numel() * moments[name].element_size() for name in ("exp_avg", "exp_avg_sq")
    ]
    assert sum(held) == found.moments


@pytest.mark.parametrize(("share", "most"), [(True, 1), (True, 2), (True, 5), (False, 6)])
def test_measuring_takes_no_more_memory_than_the_run(runs, monkeypatch, share, most):
    measured = []
    real = memory.expand

    def expand_noted(labels, *rest, **options):
        measured.append(len(labels))
        return real(labels, *rest, **options)

    monkeypatch.setattr(memory, "expand", expand_noted)
    estimate = step_memory(runs.network(), (1, 12, 12), 2, share, most_images=most)
    assert max(measured) == most
    assert estimate.of(most) > 0

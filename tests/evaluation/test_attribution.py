import math

import pytest
import torch

import wfnet
from wfnet import models
from wfnet.evaluation import metrics
from wfnet.evaluation.attribution import (
    attribution,
    changed_rows,
    network_with_filters,
)

K = 7


def curve_by_hand(net, dataset, label, steps, closing, order_of):
    """One class, one curve: a baked network for every step, its weights masked by hand."""
    images, labels, _ = dataset.batch((dataset.labels == label).nonzero().flatten())
    with torch.no_grad():
        original = net.bake(None)(images)
        values = []
        for step in range(steps + 1):
            plain = net.bake(None)
            for number, (name, gates) in enumerate(net.gates().items()):
                gate = gates[label].detach().clone()
                count = round(step / steps * len(gate))
                first = order_of(number, gate)[:count]
                if closing:
                    gate = torch.ones_like(gate)
                    gate[first] = 0.0
                else:
                    gate[first] = 1.0
                module, _, kind = name.rpartition(".alpha_")
                weight = getattr(plain.get_submodule(module), kind)
                weight.mul_(gate.reshape(-1, *[1] * (weight.dim() - 1)))
            kept = metrics.confidence_kept(plain(images), original, labels)
            values.append(kept.mean().item())
    return values


def lowest_first(number, gate):
    return gate.argsort(stable=True)


def farthest_first(number, gate):
    return gate.log().abs().argsort(stable=True, descending=True)


def test_gates_farthest_from_1_first(dataset, make_model):
    net = wfnet.WFNet(make_model(), K, alpha_init=-1.0)
    with torch.no_grad():
        for alpha in net.filter_parameters():
            alpha.copy_(3 * torch.randn(alpha.shape, generator=torch.Generator().manual_seed(6)))
    result = attribution(net, dataset, steps=4, order="farthest", progress=False)
    other = attribution(net, dataset, steps=4, progress=False)
    for name in ("insertion", "deletion"):
        for record in result.records:
            expected = curve_by_hand(
                net, dataset, record.index, 4, name == "deletion", farthest_first
            )
            assert record.curves[name] == pytest.approx(expected, abs=2e-5)
        assert result.mean[name] != other.mean[name]  # gates above 1 are among the farthest
    assert result.settings["order"] == "farthest"
    with pytest.raises(ValueError, match="order='highest'"):
        attribution(net, dataset, order="highest")


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("fuse", [True, False])
def test_equals_baked_networks_masked_by_hand(dataset, normalize, fuse, make_net, plain_gates):
    net = make_net() if normalize else plain_gates
    net.fuse = fuse
    result = attribution(net, dataset, steps=5, batch_size=37, classes_together=3, progress=False)
    assert [record.index for record in result.records] == list(range(K))
    for record in result.records:
        for name in ("insertion", "deletion"):
            expected = curve_by_hand(
                net, dataset, record.index, 5, name == "deletion", lowest_first
            )
            assert record.curves[name] == pytest.approx(expected, abs=2e-5), name
            area = (sum(expected) - (expected[0] + expected[-1]) / 2) / 5
            assert getattr(record, name) == pytest.approx(area, abs=2e-5)
    # Curves differ between classes and orders, or the comparison would prove nothing.
    assert len({round(record.insertion, 4) for record in result.records}) > 3
    assert result.mean["deletion"] != result.mean["deletion_random"]


@pytest.fixture
def plain_gates(make_model):
    net = wfnet.WFNet(make_model(), K, normalize_gate=False)
    with torch.no_grad():
        for alpha in net.filter_parameters():
            alpha.copy_(3 * torch.randn(alpha.shape, generator=torch.Generator().manual_seed(5)))
    return net


def test_ends_of_the_curves_are_exact(dataset, make_net):
    net = make_net()
    result = attribution(net, dataset, steps=3, progress=False)
    for name in ("insertion", "insertion_random"):
        assert (result.curve(name)[:, -1] - 1).abs().max() < 1e-6  # all gates 1: the original
    for name in ("deletion", "deletion_random"):
        assert (result.curve(name)[:, 0] - 1).abs().max() < 1e-6
    # At share 0 insertion is the learned row, whatever the order; at share 1 deletion is nothing.
    assert torch.equal(result.curve("insertion")[:, 0], result.curve("insertion_random")[:, 0])
    assert torch.equal(result.curve("deletion")[:, -1], result.curve("deletion_random")[:, -1])
    assert result.shares == [0, 1 / 3, 2 / 3, 1]


def test_gates_of_zero_and_one_are_exact(make_model):
    for start in (3.0, -1.0):
        net = wfnet.WFNet(make_model(), K, alpha_init=start)
        rows = torch.tensor([[-math.inf], [start]])
        tables = {n: rows.expand(2, p.shape[1]) for n, p in net.named_filters().items()}
        changed = network_with_filters(net, tables)
        for gates in changed.gates().values():
            assert torch.equal(gates[0], torch.zeros_like(gates[0]))
            assert torch.equal(gates[1], torch.ones_like(gates[1]))
        assert changed.num_classes == 2
        assert net.num_classes == K
        # Weights are shared, not copied.
        for name, layer in net.masked_layers.items():
            assert changed.masked_layers[name].weight is layer.weight
    with pytest.raises(ValueError, match="names of"):
        network_with_filters(net, {})


def test_bad_arguments_are_refused(dataset, make_net):
    with pytest.raises(ValueError, match="steps must be a whole number of at least 1, got 0"):
        attribution(make_net(), dataset, steps=0)
    with pytest.raises(ValueError, match="class 9"):
        attribution(make_net(), dataset, classes=[9])


@torch.no_grad()
def test_durable_gates_start_at_the_row_and_end_at_the_original():
    torch.manual_seed(0)
    model = models.create("resnet", 3, seed=0, width=8).eval()
    net = wfnet.WFNet(model, 3, gate="durable")
    for name, table in (net.named_filters() | net.named_statistics()).items():
        table.add_(2 * torch.randn_like(table)).abs_() if "var" in name else table.add_(
            2 * torch.randn_like(table)
        )
    changed = changed_rows(net, torch.tensor([2]), 4, 0, "lowest")
    images = torch.randn(2, 1, 16, 16)
    insertion_start, insertion_end, deletion_start, deletion_end = (
        changed(images, row) for row in (0, 4, 5, 9)
    )
    torch.testing.assert_close(insertion_start, net(images, 2))
    torch.testing.assert_close(insertion_end, net(images, None))
    torch.testing.assert_close(deletion_start, net(images, None))
    assert all(not layer.gates()[9].any() for layer in changed.masked_layers.values())
    assert (deletion_end[0] - deletion_end[1]).abs().max() < 1e-5

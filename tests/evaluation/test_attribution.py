import pytest
import torch

import wfnet
from wfnet import models
from wfnet.evaluation import metrics
from wfnet.evaluation.attribution import attribution, changed_rows
from wfnet.evaluation.pair_engine import RunOptions

K = 7
QUIET = RunOptions(batch_size=37, progress=False)


def curve_by_hand(net, dataset, label, steps, curve):
    """One class, one curve: a baked network for every step, its weights masked by hand."""
    images, labels, _ = dataset.batch((dataset.labels == label).nonzero().flatten())
    values = []
    for step in range(steps + 1):
        plain = net.bake(None)
        for name, gates in net.gates().items():
            gate = gates[label].detach().clone()
            first = gate.argsort(stable=True)[: round(step / steps * len(gate))]
            if curve == "deletion":
                gate = torch.ones_like(gate)
            gate[first] = 0.0 if curve == "deletion" else 1.0
            module, _, kind = name.rpartition(".alpha_")
            weight = getattr(plain.get_submodule(module), kind)
            weight.mul_(gate.reshape(-1, *[1] * (weight.dim() - 1)))
        kept = metrics.confidence_kept(plain(images), net.bake(None)(images), labels)
        values.append(kept.mean().item())
    return values


@pytest.mark.parametrize("options", [{"fuse": True}, {"normalize_gate": False}])
@torch.no_grad()
def test_equals_baked_networks_masked_by_hand(dataset, make_model, options):
    net = wfnet.WFNet(make_model(), K, **options)
    for alpha in net.filter_parameters():
        alpha.copy_(3 * torch.randn(alpha.shape, generator=torch.Generator().manual_seed(6)))
    result = attribution(net, dataset, None, 5, classes_together=3, options=QUIET)
    assert [record.index for record in result.records] == list(range(K))
    for record in result.records:
        for name in ("insertion", "deletion"):
            expected = curve_by_hand(net, dataset, record.index, 5, name)
            assert record.curves[name] == pytest.approx(expected, abs=2e-5), name
            area = (sum(expected) - (expected[0] + expected[-1]) / 2) / 5
            assert getattr(record, name) == pytest.approx(area, abs=2e-5)
    # Curves differ between classes and orders, or the comparison would prove nothing.
    assert len({round(record.insertion, 4) for record in result.records}) > 3
    assert result.mean["deletion"] != result.mean["deletion_random"]


@torch.no_grad()
def test_durable_gates_start_at_the_row_and_end_at_the_original():
    model = models.create("resnet", 3, seed=0, width=8).eval()
    net = wfnet.WFNet(model, 3, gate="durable")
    for name, table in (net.named_filters() | net.named_statistics()).items():
        table.add_(2 * torch.randn_like(table))
        if "var" in name:
            table.abs_()
    changed = changed_rows(net, torch.tensor([2]), 4, 0)
    images = torch.randn(2, 1, 16, 16)
    torch.testing.assert_close(changed(images, 0), net(images, 2))
    torch.testing.assert_close(changed(images, 4), net(images, None))
    torch.testing.assert_close(changed(images, 5), net(images, None))
    assert all(not layer.gates()[9].any() for layer in changed.masked_layers.values())
    assert changed(images, 9).std(0).max() < 1e-5  # nothing of the images is left

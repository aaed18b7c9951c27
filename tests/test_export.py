"""Baking: a plain network of one row, or several; what is refused; how it exports."""

import math

import numpy as np
import pytest
import torch

X = torch.randn(2, 1, 8, 8, generator=torch.Generator().manual_seed(3))


@pytest.mark.parametrize("forget", [None, [3], torch.tensor([5, 3]), np.int64(3)])
def test_bake(forget, make_net):
    net = make_net()
    baked = net.bake(forget)
    assert not baked.training
    assert all(p.requires_grad for p in baked.parameters())
    labels = torch.as_tensor(-1 if forget is None else forget).reshape(1, -1).expand(2, -1)
    torch.testing.assert_close(baked(X), net(X, labels))
    if forget is None:
        assert torch.equal(baked(X), net(X))
    exported = torch.export.export(baked, (X,)).module()
    torch.testing.assert_close(exported(X), baked(X))
    baked[0].weight.data.zero_()
    assert net.model[0].weight.any()


@pytest.mark.parametrize(
    ("forget", "error"),
    [(wrong, ValueError) for wrong in ([1, 99], [], -1, torch.tensor([]).long())]
    + [(wrong, TypeError) for wrong in (True, "1", [1, 2.0])],
)
def test_bake_refuses_wrong_labels(forget, error, make_net):
    with pytest.raises(error, match="forget"):
        make_net().bake(forget)


@pytest.mark.parametrize("forget", [1, [0, 2]])
def test_gates_below_become_zero_and_others_stay(forget, make_net):
    net, threshold = make_net(), 0.9
    whole, pruned = net.bake(forget), net.bake(forget, prune_below=threshold)
    rows = torch.tensor([forget]).reshape(-1)
    for name, gates in net.gates().items():
        layer, _, kind = name.rpartition(".alpha_")
        before = getattr(whole.get_submodule(layer), kind)
        after = getattr(pruned.get_submodule(layer), kind)
        below = gates[rows].prod(0) < threshold
        assert below.any()
        assert not after[below].any()
        assert torch.equal(after[~below], before[~below])
    assert torch.equal(pruned[-1].weight, whole[-1].weight)  # the head is not masked
    original = net.bake(None, prune_below=1.0).state_dict()  # has no gates to prune
    assert all(torch.equal(original[n], v) for n, v in net.bake(None).state_dict().items())


def test_what_makes_no_sense_is_refused(make_net):
    net = make_net()
    for threshold in (-0.1, math.nan, 1.5):
        with pytest.raises(ValueError, match="must be a number from 0 to 1"):
            net.bake(1, prune_below=threshold)
    with torch.no_grad():
        net.filter_parameters()[1][1, 0] = math.nan
    with pytest.raises(ValueError, match="are NaN for what is to be forgotten"):
        net.bake([0, 1])
    assert net.bake(0)[0].bias.isfinite().all()

"""Images with several labels each: expansion, objective, runs."""

import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import wfnet
from wfnet.data import MultiLabelTensors
from wfnet.untraining.expansion import expand
from wfnet.untraining.multilabel import MultiLabelObjective, bernoulli_divergence
from wfnet.untraining.objectives import BalancedObjective, PaperObjective
from wfnet.untraining.run_state import identity_of

K = 7


def network():
    torch.manual_seed(0)
    layers = nn.Conv2d(1, 6, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, K)
    return wfnet.WFNet(nn.Sequential(*layers).eval(), K)


def random_labels(count):
    multi_hot = torch.rand(count, K, generator=torch.Generator().manual_seed(0)) < 0.35
    multi_hot[:, 0] |= ~multi_hot.any(1)
    multi_hot[multi_hot.all(1), 1] = False
    return multi_hot


def tensors():
    images = torch.rand(24, 1, 8, 8, generator=torch.Generator().manual_seed(1))
    names = [f"name{i}" for i in range(K)]
    return MultiLabelTensors(images, random_labels(24), names, mean=0.5, std=0.2)


@pytest.mark.parametrize("share", [True, False])
def test_rows_are_true_labels_in_one_half_and_lacking_ones_in_the_other(share):
    multi_hot = random_labels(10)
    batch = expand(multi_hot, K, 3, torch.Generator().manual_seed(0), share)
    assert batch.forget_size == (10 if share else 5)
    assert len(batch) == batch.forget_size * 4
    truth = multi_hot[batch.source]
    assert torch.equal(batch.target, truth.float())
    own = truth.gather(1, batch.forget.unsqueeze(1)).squeeze(1)
    assert own[batch.forget_half].all()
    assert not own[batch.retain_half].any()
    many = expand(multi_hot[:1].expand(600, K), K, 1, torch.Generator().manual_seed(0), True)
    for half, rows in ((many.forget_half, multi_hot[0]), (many.retain_half, ~multi_hot[0])):
        drawn = many.forget[half].bincount(minlength=K)[rows]
        assert (drawn > 600 / len(drawn) / 1.5).all()  # all about equally often


@pytest.mark.parametrize("distil", [True, False])
def test_objective_is_its_definition(distil):
    multi_hot = random_labels(6)
    batch = expand(multi_hot, K, 2, torch.Generator().manual_seed(1), True)
    generator = torch.Generator().manual_seed(2)
    logits = torch.randn(len(batch), K, dtype=torch.float64, generator=generator)
    original = torch.randn(6, K, dtype=torch.float64, generator=generator)
    objective = MultiLabelObjective(BalancedObjective(0.4, distil))
    losses = objective(logits, batch, original if distil else None, network())
    forget, retain = [], []
    truth = multi_hot[batch.source]
    for b in range(len(batch)):
        row, image = int(batch.forget[b]), int(batch.source[b])
        unlearns = b < batch.forget_size
        if unlearns:
            lacking = original[batch.source[~truth[:, row]], row].tolist()
            level = sum(lacking) / max(len(lacking), 1) if distil else 0.0
            forget.append(-math.log(1 - (logits[b, row] - level).sigmoid().item()))
        cost = 0.0
        for k in range(K):
            if unlearns and k == row:
                continue
            q = logits[b, k].sigmoid().item()
            p = original[image, k].sigmoid().item() if distil else float(multi_hot[image, k])
            cost += p * (math.log(p) if distil else 0) - p * math.log(q) - (1 - p) * math.log(1 - q)
            cost += (1 - p) * math.log(1 - p) if distil else 0.0
        retain.append(cost)
    expected = sum(retain) / len(retain) + 0.4 * sum(forget) / len(forget)
    assert losses.total.item() == pytest.approx(expected, rel=1e-6)


def test_the_forget_term_has_a_gradient_where_the_network_is_sure():
    objective = MultiLabelObjective(BalancedObjective())
    for margin in (0.0, 10.0, 100.0):
        z = torch.tensor([margin], requires_grad=True)
        objective.forget(z, None).sum().backward()
        assert z.grad.item() == pytest.approx(torch.tensor(margin).sigmoid().item())
    paper, z = MultiLabelObjective(PaperObjective()), torch.tensor([1.5])
    expected = F.binary_cross_entropy_with_logits(z, torch.ones(1)).item()
    assert paper.forget(z, None).item() == pytest.approx(expected)
    same = torch.tensor([-80.0, -3.0, 0.0, 90.0])
    assert bernoulli_divergence(same, same).abs().max() == 0


def test_untraining_repeats():
    config = wfnet.UntrainConfig.recipe("balanced", K, steps=6, batch_size=8)
    dataset, found = tensors(), []
    for _ in range(2):
        net = network()
        result = wfnet.untrain(net, dataset, dataset, config, progress=False)
        found.append((result.best, torch.cat([p.flatten() for p in net.filter_parameters()])))
    assert found[0][0] == found[1][0]
    assert torch.equal(found[0][1], found[1][1])
    assert 0 < found[0][0].acc_r <= 1


def test_the_mark_of_the_data_has_all_labels():
    """Two sets with the same rarest labels, but one more label at an image."""
    first, second = tensors(), tensors()
    common = int(second.multi_hot.sum(0).argmax())
    image = int((~second.multi_hot[:, common] & (second.multi_hot.sum(1) < K - 1)).nonzero()[0])
    second.multi_hot[image, common] = True
    assert torch.equal(first.labels, second.labels)
    objective, net = BalancedObjective(), network()
    marks = [identity_of(net, data, None, objective) for data in (first, second)]
    assert marks[0]["training data"] != marks[1]["training data"]

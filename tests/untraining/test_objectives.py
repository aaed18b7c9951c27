"""Objectives: values against their formulas, gradients at all margins."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from wfnet import WFNet
from wfnet.services.seeds import generator_for
from wfnet.untraining.expansion import ExpandedBatch, expand
from wfnet.untraining.objectives import (
    BalancedObjective,
    MultiLabelObjective,
    PaperObjective,
    bernoulli_divergence,
    not_label,
)


@pytest.fixture
def net():
    model = nn.Sequential(nn.Conv2d(1, 3, 3), nn.ReLU(), nn.Flatten(), nn.Linear(12, 4))
    return WFNet(model, 4, normalize_gate=False)


@pytest.fixture
def outputs():
    """An expanded batch, and logits of the filtered and the original network."""
    generator = torch.Generator().manual_seed(1)
    labels = torch.randint(4, (6,), generator=generator)
    batch = expand(labels, 4, 2, generator_for(0))
    logits = torch.randn(len(batch), 4, generator=generator, dtype=torch.float64)
    return batch, logits, torch.randn(6, 4, generator=generator, dtype=torch.float64)


@pytest.mark.parametrize("margin", [-100, -20, 0, 1, 10, 20, 60, 100])
def test_the_forget_term_is_exact_and_never_loses_its_gradient(margin):
    logits = torch.zeros(1, 10)
    logits[0, 3] = margin
    logits.requires_grad_()
    loss = not_label(logits, torch.tensor([3]))
    loss.sum().backward()
    p = 1 / (1 + 9 * math.exp(-margin))
    assert loss.item() == pytest.approx(math.log1p(math.exp(margin) / 9), rel=1e-5)
    assert logits.grad[0, 3].item() == pytest.approx(p, rel=1e-5)
    assert logits.grad[0, 0].item() == pytest.approx(-p / 9, rel=1e-5)


@pytest.mark.parametrize("distil", [True, False])
def test_balanced(distil, outputs, net):
    batch, logits, original = outputs
    logits.requires_grad_()
    objective = BalancedObjective(lambda1=0.7, distil=distil)
    assert objective.needs_original is distil
    losses = objective(logits, batch, original if distil else None, net)
    f, r = batch.forget_half, batch.retain_half
    p = logits[f].softmax(1).gather(1, batch.target[f, None])
    if distil:
        teacher = original[batch.source[r]].softmax(1)
        retain = (teacher * (teacher.log() - logits[r].log_softmax(1))).sum(1).mean()
    else:
        retain = F.cross_entropy(logits[r], batch.target[r])
    forget = -(1 - p).log().mean()
    torch.testing.assert_close(losses.total, retain + 0.7 * forget)
    torch.testing.assert_close(losses.terms["forget"], forget.detach())
    torch.testing.assert_close(losses.terms["retain"], retain.detach())
    half = objective(logits.bfloat16(), batch, original.bfloat16() if distil else None, net)
    assert half.total.dtype == torch.float32


def test_compound_samples_count_in_the_same_two_terms(net):
    """As the loss of the single samples, and ``compound`` times that of the compound ones."""
    torch.manual_seed(0)
    labels = torch.arange(8) % 5
    single = expand(labels, 5, 2, generator_for(0), share_images=True)
    batch = expand(labels, 5, 2, generator_for(0), share_images=True, compound=0.5)
    logits, original = torch.randn(len(batch), 5).double(), torch.randn(8, 5).double()
    twos = batch.forget[:, 1] >= 0
    forgotten = int(twos[batch.forget_half].sum())
    pairs = ExpandedBatch(batch.forget[twos], batch.source[twos], batch.target[twos], forgotten)
    objective = BalancedObjective(lambda1=0.7)
    losses = objective(logits, batch, original, net)
    one = objective(logits[~twos], single, original, net)
    two = objective(logits[twos], pairs, original, net)
    torch.testing.assert_close(losses.total, (one.total + 0.5 * two.total) / 1.5)


def test_paper(outputs, net):
    batch, logits, _ = outputs
    losses = PaperObjective(0.5, 2.0, 3.0)(logits, batch, None, net)
    f, r = batch.forget_half, batch.retain_half
    retain = F.cross_entropy(logits[r], batch.target[r])
    forget = F.cross_entropy(logits[f], batch.target[f])
    closed = 1 - torch.sigmoid(torch.tensor(3.0))
    expected = (0.5 * retain) ** 2 + 2 / forget + 3 * closed
    torch.testing.assert_close(losses.total.detach(), expected.double(), rtol=1e-6, atol=0)
    assert set(losses.terms) == {"retain", "forget", "closed"}
    params = net.filter_parameters()
    found = torch.autograd.grad(losses.total, params)
    shares = torch.stack([(1 - gate).mean() for gate in net.gates().values()])
    for mine, other in zip(found, torch.autograd.grad(3 * shares.mean(), params), strict=True):
        torch.testing.assert_close(mine, other)


# -- several labels each --------------------------------------------------------------------------


@pytest.mark.parametrize("distil", [True, False])
def test_several_labels(distil, runs, net):
    k_all = runs.CLASSES
    multi_hot = runs.several_labels(6).multi_hot
    batch = expand(multi_hot, k_all, 2, torch.Generator().manual_seed(1), True)
    generator = torch.Generator().manual_seed(2)
    logits = torch.randn(len(batch), k_all, dtype=torch.float64, generator=generator)
    original = torch.randn(6, k_all, dtype=torch.float64, generator=generator)
    objective = MultiLabelObjective(BalancedObjective(0.4, distil))
    losses = objective(logits, batch, original if distil else None, net)
    half, every = batch.forget_half, torch.arange(len(batch))
    truth, level, kept = (
        multi_hot[batch.source],
        torch.zeros(k_all),
        multi_hot[batch.source].double(),
    )
    own = logits[every, batch.forget]
    if distil:
        of_images = original[batch.source]
        level = of_images.where(~truth, torch.nan).nanmean(0).nan_to_num()
        for label in range(k_all):  # of images without it that went through its row
            through = every[batch.retain_half][batch.forget[batch.retain_half] == label]
            assert not truth[through, label].any()
            level[label] = own[through].mean() if len(through) else level[label]
        kept = of_images.sigmoid()
    forget = -(1 - (own - level[batch.forget])[half].sigmoid()).log() * (6.6 if distil else 1)
    retain = F.binary_cross_entropy(logits.sigmoid(), kept, reduction="none")
    retain -= F.binary_cross_entropy(kept, kept, reduction="none")
    retain[every[half], batch.forget[half]] = 0
    retain = retain.sum(1)
    if distil:
        retain[batch.retain_half] += (
            0.2 * (own - of_images[every, batch.forget])[batch.retain_half] ** 2
        )
    expected = retain.mean() + 0.4 * forget.mean()
    torch.testing.assert_close(losses.total, expected, rtol=1e-6, atol=0)


def test_several_labels_have_a_gradient_where_the_network_is_sure():
    objective = MultiLabelObjective(BalancedObjective())
    for margin in (0.0, 10.0, 100.0):
        z = torch.tensor([margin], requires_grad=True)
        objective.forget(z, None).sum().backward()
        assert z.grad.item() == pytest.approx(torch.tensor(margin).sigmoid().item())
    paper, z = MultiLabelObjective(PaperObjective()), torch.tensor([1.5])
    assert paper.forget(z, None).item() == pytest.approx(math.log1p(math.exp(-1.5)))
    same = torch.tensor([-80.0, -3.0, 0.0, 90.0])
    assert bernoulli_divergence(same, same).abs().max() == 0

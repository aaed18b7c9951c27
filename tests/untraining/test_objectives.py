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
    PaperObjective,
    full_precision,
    not_label,
)


def make_net(normalize_gate=True):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(1, 3, 3), nn.ReLU(), nn.Flatten(), nn.Linear(12, 4))
    return WFNet(model, 4, normalize_gate=normalize_gate)


def make_batch(n=6, classes=4):
    generator = torch.Generator().manual_seed(1)
    labels = torch.randint(classes, (n,), generator=generator)
    batch = expand(labels, classes, 2, generator_for(0))
    logits = torch.randn(len(batch), classes, generator=generator, dtype=torch.float64)
    original = torch.randn(n, classes, generator=generator, dtype=torch.float64)
    return batch, logits, original


@pytest.mark.parametrize("margin", [0, 1, 5, 10, 20, 40, 60, 80, 100])
def test_the_forget_term_never_loses_its_gradient(margin):
    logits = torch.zeros(1, 10)
    logits[0, 3] = margin
    logits.requires_grad_()
    loss = not_label(logits, torch.tensor([3]))
    loss.sum().backward()
    p = 1 / (1 + 9 * math.exp(-margin))
    assert loss.item() == pytest.approx(math.log1p(math.exp(margin) / 9), rel=1e-5)
    assert logits.grad[0, 3].item() == pytest.approx(p, rel=1e-5)
    assert logits.grad[0, 0].item() == pytest.approx(-p / 9, rel=1e-5)


@pytest.mark.parametrize("margin", [-100, -50, -20])
def test_the_forget_term_of_a_forgotten_sample_is_exact(margin):
    logits = torch.zeros(1, 3)
    logits[0, 0] = margin
    expected = math.log1p(math.exp(margin) / 2)
    assert not_label(logits, torch.tensor([0])).item() == pytest.approx(expected, rel=1e-5)


def test_the_forget_term_is_minus_log_of_one_minus_p():
    logits = torch.randn(20, 5, dtype=torch.float64)
    target = torch.randint(5, (20,))
    p = logits.softmax(1).gather(1, target[:, None])[:, 0]
    torch.testing.assert_close(not_label(logits, target), -torch.log1p(-p))
    without = logits.scatter(1, target[:, None], -torch.inf)
    difference = logits.logsumexp(1) - without.logsumexp(1)
    torch.testing.assert_close(not_label(logits, target), difference)


@pytest.mark.parametrize("distil", [True, False])
def test_balanced(distil):
    batch, logits, original = make_batch()
    objective = BalancedObjective(lambda1=0.7, distil=distil)
    assert objective.needs_original is distil
    losses = objective(logits, batch, original if distil else None, make_net())
    f, r = batch.forget_half, batch.retain_half
    p = logits[f].softmax(1).gather(1, batch.target[f, None])
    if distil:
        teacher = original[batch.source[r]].softmax(1)
        retain = (teacher * (teacher.log() - logits[r].log_softmax(1))).sum(1).mean()
    else:
        retain = F.cross_entropy(logits[r], batch.target[r])
    forget = -(1 - p).log().mean()
    torch.testing.assert_close(losses.total, retain + 0.7 * forget)
    torch.testing.assert_close(losses.terms["forget"], forget)
    torch.testing.assert_close(losses.terms["retain"], retain)


def test_compound_samples_count_in_the_same_two_terms():
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
    losses = objective(logits, batch, original, make_net())
    one = objective(logits[~twos], single, original, make_net())
    two = objective(logits[twos], pairs, original, make_net())
    torch.testing.assert_close(losses.total, (one.total + 0.5 * two.total) / 1.5)


def test_paper():
    batch, logits, _ = make_batch()
    net = make_net(normalize_gate=False)
    losses = PaperObjective(0.5, 2.0, 3.0)(logits, batch, None, net)
    f, r = batch.forget_half, batch.retain_half
    retain = F.cross_entropy(logits[r], batch.target[r])
    forget = F.cross_entropy(logits[f], batch.target[f])
    closed = 1 - torch.sigmoid(torch.tensor(3.0))
    expected = (0.5 * retain) ** 2 + 2 / forget + 3 * closed
    torch.testing.assert_close(losses.total, expected.double(), rtol=1e-6, atol=0)
    assert set(losses.terms) == {"retain", "forget", "closed"}


def test_the_regulariser_of_the_paper_has_a_gradient():
    batch, logits, _ = make_batch()
    net = make_net(normalize_gate=False)
    PaperObjective()(logits, batch, None, net).total.backward()
    assert all(p.grad is not None and (p.grad < 0).all() for p in net.filter_parameters())


def test_half_precision_logits_are_lifted():
    assert full_precision(torch.zeros(1, dtype=torch.bfloat16)).dtype == torch.float32
    assert full_precision(torch.zeros(1, dtype=torch.float64)).dtype == torch.float64
    batch, logits, original = make_batch()
    losses = BalancedObjective()(logits.bfloat16(), batch, original.bfloat16(), make_net())
    assert losses.total.dtype == torch.float32


def test_terms_carry_no_graph():
    batch, logits, original = make_batch()
    losses = BalancedObjective()(logits.requires_grad_(), batch, original, make_net())
    assert losses.total.requires_grad
    assert not any(term.requires_grad for term in losses.terms.values())

"""Over-unlearning: what forgetting costs just beside the class.

Ha et al., "Unlearning's Blind Spots: Over-Unlearning and Prototypical Relearning Attack" (2025),
look at images within a small distance of the class's, where damage is greatest and means over test
images do not see it:

- OU@epsilon: test images of the class are moved towards the runner-up of the original
  network, by projected gradient steps of at most epsilon a pixel from a random start; reported is
  the mean Jensen-Shannon divergence, in bits, between the original's softmax *without the class*
  and the model's. ``logit_masked`` has about 0 by definition; a retrained model has not.
- moved images: test images of the other classes are moved towards the class in the same way;
  reported is the accuracy on them. What the original without the class's logit reads stands beside
  it, as ``logit_masked``.

Epsilon is 0.12 standard deviations of the images, which is 0.03 of the range of pixels in CIFAR-10,
in three steps of a third of it.
"""

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from wfnet.evaluation import metrics
from wfnet.head import first_output
from wfnet.services.modes import evaluation_mode
from wfnet.trust.check import Check, Found
from wfnet.trust.subject import BATCH, Subject, predict, share_correct

EPSILON, STEPS = 0.12, 3


def measure(model: nn.Module, subject: Subject) -> Found:
    """Returns the divergence and the accuracy on moved images, the same ones for every model."""
    own, rest, label = subject.test_forget, subject.test_retain, subject.label
    epsilon = EPSILON * subject.train_retain.images.std().item()
    runner_up = _without(subject.logits(subject.original, "test_forget"), label).argmax(1)
    near = _moved(subject, own.images, runner_up, epsilon)
    towards = _moved(subject, rest.images, torch.full_like(rest.labels, label), epsilon)
    wanted = _without(predict(subject.original, near), label)
    values = {
        "ou_eps": metrics.jensen_shannon(wanted, predict(model, near), base=2).mean().item(),
        "acc_moved": share_correct(predict(model, towards), rest.labels),
    }
    return values, {"epsilon": epsilon, "images": {"forget": len(own), "retain": len(rest)}}


def _without(logits: Tensor, label: int) -> Tensor:
    """Returns a copy of ``logits [n, K]`` in which ``label`` has no probability."""
    return logits.index_fill(1, torch.tensor([label]), -math.inf)


def _moved(subject: Subject, images: Tensor, wanted: Tensor, epsilon: float) -> Tensor:
    """Returns images moved by at most ``epsilon`` towards the classes ``wanted [n]``."""
    weight = next(subject.original.parameters())
    generator = torch.Generator().manual_seed(subject.settings.seed)
    start = images + epsilon * (2 * torch.rand(images.shape, generator=generator) - 1)
    parts = []
    with evaluation_mode(subject.original):
        for chunk in zip(*(t.split(BATCH) for t in (images, start, wanted)), strict=True):
            fixed, moved = (t.to(weight.device, weight.dtype) for t in chunk[:2])
            for _ in range(STEPS):
                moved = moved.detach().requires_grad_(True)
                logits = first_output(subject.original(moved))
                loss = F.cross_entropy(logits, chunk[2].to(weight.device))
                step = torch.autograd.grad(loss, moved)[0].sign() * (epsilon / STEPS)
                moved = fixed + (moved - step - fixed).clamp(-epsilon, epsilon)
            parts.append(moved.detach().to("cpu", images.dtype))
    return torch.cat(parts)


CHECK = Check(
    name="over_unlearning",
    title="Over-unlearning beside the class",
    question="What does forgetting cost just beside the class?",
    definition=__doc__,
    measures={
        "ou_eps": "divergence from the original without the class, images beside the class's, bits",
        "acc_moved": "accuracy on images of the other classes moved towards the class",
    },
    headline="ou_eps",
    measure=measure,
    several_labels=False,
)

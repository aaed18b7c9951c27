"""Logits changed so that no class is voted down at the output.

- ``offset``: a constant is added to the logit of the class, so that it is predicted as often as it
  occurs among unlabelled images.
- ``batchnorm_offset``: the same after BatchNorm statistics were estimated anew. Re-estimation
  brings features of the class back, the shift undoes what the head still votes down; each alone may
  leave the class unread.
- ``absence``: the logit of the class is replaced by a constant, and that is shifted: images that
  look like no other class are taken for the class. It needs nothing of the class in the network,
  so it works on a retrained one, too.
- ``standardised``: with mean ``m_k`` and standard deviation ``s_k`` of logit ``k`` over the images,
  ``z_k <- (z_k - m_k) / s_k``: no logit is low for all images alike, nor too small.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from wfnet.head import first_output
from wfnet.trust.attacks.attack import attack
from wfnet.trust.attacks.batchnorm_statistics import batchnorm_all
from wfnet.trust.subject import Subject


class ChangedLogits(nn.Module):
    """A model whose logits ``[n, K]``, as fp64 on the CPU, go through the function ``change``."""

    def __init__(self, model: nn.Module, change: Callable[[Tensor], Tensor]):
        super().__init__()
        self.model, self.change = model, change

    def forward(self, images: Tensor) -> Tensor:
        return self.change(first_output(self.model(images)).double().cpu())


@attack(
    "offset",
    "the class's logit shifted until it is predicted as often as it occurs",
    moves_logits=True,
)
def offset(model: nn.Module, subject: Subject) -> nn.Module:
    seen = subject.logits(model, "unlabelled")
    added = torch.zeros_like(seen[0])
    added[subject.label] = class_offset(seen, subject.label, subject.share)
    return ChangedLogits(model, lambda logits: logits + added)


@attack(
    "batchnorm_offset", "BatchNorm re-estimated, then the class's logit shifted", moves_logits=True
)
def batchnorm_offset(model: nn.Module, subject: Subject) -> nn.Module | None:
    changed = batchnorm_all(model, subject)
    return changed and offset(changed, subject)


@attack(
    "absence",
    "the class's logit replaced by a constant that is predicted as often as it occurs",
    moves_logits=True,
)
def absence(model: nn.Module, subject: Subject) -> nn.Module:
    def without(logits: Tensor) -> Tensor:
        return logits.index_fill(1, torch.tensor(subject.label), 0.0)

    return offset(ChangedLogits(model, without), subject)


@attack("standardised", "logits standardised over unlabelled images", moves_logits=True)
def standardised(model: nn.Module, subject: Subject) -> nn.Module:
    seen = subject.logits(model, "unlabelled")
    mean, deviation = seen.mean(0), seen.std(0).clamp_min(1e-12)
    return ChangedLogits(model, lambda logits: (logits - mean) / deviation)


def class_offset(logits: Tensor, label: int, share: float) -> float:
    """Returns what to add to the logit of ``label`` so that the ``share`` of images get it.

    Args:
        logits: ``[n, K]`` of the images.
        label: the class.
        share: fraction of the images.
    """
    others = logits.clone()
    others[:, label] = -torch.inf
    gap = (others.amax(1) - logits[:, label]).sort().values  # an offset above it predicts the class
    count = min(max(round(share * len(gap)), 1), len(gap))
    following = gap[count] if count < len(gap) else gap[count - 1] + 1
    return ((gap[count - 1] + following) / 2).item()

"""Interclass confusion: does forgetting a class also undo what its wrong labels have done?

Goel et al., "Towards Adversarial Evaluations for Inexact Machine Unlearning" (2022). Training
images of another class are given the label of the class to forget; the network is trained on them,
then it forgets all that has this label, the wrongly labelled images too. Two measures, of
which a model retrained without the label gives the level (0 is best, 1 worst):

- ``memorised``: share of the wrongly labelled images that are not read as what they are;
- ``generalised``: the same of test images of their class.

A network has to be trained for it, so this is no check of `wfnet trust`.
"""

import torch
from torch import Tensor, nn

from wfnet.data import Dataset, labels_of, select
from wfnet.trust.subject import ImageReader, predict, share_correct


def confused(
    train: Dataset, true: int, given: int, count: int, seed: int = 0
) -> tuple[Dataset, Tensor]:
    """Returns a copy of ``train`` in which ``count`` images of class ``true`` have the label
    ``given``, and their positions.

    Raises:
        ValueError: if the class has fewer images.
    """
    positions = (labels_of(train) == true).nonzero().flatten()
    if not 0 < count <= len(positions):
        raise ValueError(f"class {true} has {len(positions)} training images, not {count}")
    generator = torch.Generator().manual_seed(seed)
    chosen = positions[torch.randperm(len(positions), generator=generator)[:count]]
    changed = select(train, torch.arange(len(labels_of(train))))
    changed.labels[chosen] = given
    return changed, chosen


def interclass_confusion(
    model: nn.Module, train: Dataset, positions: Tensor, test: Dataset, true: int
) -> dict[str, float]:
    """Returns ``memorised`` and ``generalised`` of a model that has forgotten the given label.

    Args:
        model: a plain model; not changed.
        train, positions: of :func:`confused`.
        test: images with true labels.
        true: the class of the wrongly labelled images.
    """
    parts = {"memorised": select(train, positions), "generalised": test}
    found = {}
    for name, part in parts.items():
        label = true if part is test else int(labels_of(part)[0])
        logits = predict(model, ImageReader(part, len(labels_of(part))).of(label).images)
        found[name] = 1 - share_correct(logits, torch.tensor(true))
    return found

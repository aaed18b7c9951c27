"""Collateral damage: what forgetting one class does to those that resemble it most.

A mean over all other classes hides it when a few neighbours pay. The nearest classes are found with
the *original* network, in two ways:

- by confusion: the mean probability that it gives to each other class on images of the forgotten
  class (a soft row of the confusion matrix, which ranks classes even where no image is misread);
- by features: the Euclidean distance between mean features at the input of the head, as in nearest
  class mean classification (Mensink et al., TPAMI 2013).

Reported are accuracies on test images of the ``NEAREST`` nearest classes and on all others; the
original's and the retrained models' stand beside them. Damage near the forgotten class is studied
by Ha et al., "Unlearning's Blind Spots: Over-Unlearning and Prototypical Relearning Attack" (2025);
Zhao et al., "What makes unlearning hard and what to do about it" (NeurIPS 2024), relate it to how
entangled features are.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from wfnet.trust.check import Check
from wfnet.trust.probing import HEAD, layer_features
from wfnet.trust.subject import Sample, Subject, predict, share_correct

NEAREST = 3


def measure(model: nn.Module, subject: Subject, others: Sequence[nn.Module]) -> dict[str, Any]:
    """Accuracies on the nearest classes; ``details`` name them, with the accuracy on each."""
    nearest = {
        "confusion": nearest_by_confusion(
            subject.logits(subject.original, "test_forget"), subject.label, among=_present(subject)
        ),
        "features": nearest_by_features(subject),
    }
    values, details = {}, {}
    for how, classes in nearest.items():
        images = _images_of(subject, classes)
        logits = predict(model, images.images)
        values[f"acc_nearest_{how}"] = share_correct(logits, images.labels)
        details[how] = {
            str(k): share_correct(logits[images.labels == k], images.labels[images.labels == k])
            for k in classes
            if (images.labels == k).any()
        }
    values["acc_others"] = share_correct(
        subject.logits(model, "test_retain"), subject.test_retain.labels
    )
    values["acc_worst"] = min(details["confusion"].values())
    return {"values": values, "details": {"accuracy_by_class": details}}


def nearest_by_confusion(
    logits: Tensor, label: int, count: int = NEAREST, among: Sequence[int] | None = None
) -> list[int]:
    """Other classes (of ``among``) with the most mean probability for ``logits [n, K]``."""
    mean = torch.softmax(logits.double(), 1).mean(0)
    others = [k for k in (range(len(mean)) if among is None else among) if k != label]
    order = mean[others].topk(min(count, len(others))).indices.tolist()
    return [others[index] for index in order]


def _present(subject: Subject) -> list[int]:
    """The classes of which there are images: the network may have more."""
    source = subject.test_retain if subject.reader is None else subject.reader
    return source.labels.unique().tolist()


def nearest_by_features(subject: Subject, count: int = NEAREST) -> list[int]:
    """Other classes whose mean features of the original are nearest, nearest first."""
    own, rest = (
        torch.from_numpy(
            layer_features(subject.original, (), part.images, subject.num_classes)[HEAD]
        )
        for part in (subject.train_forget, subject.train_retain)
    )
    labels = subject.train_retain.labels
    classes = labels.unique()
    means = torch.stack([rest[labels == k].mean(0) for k in classes])
    distance = (means - own.mean(0)).norm(dim=1)
    return classes[distance.topk(min(count, len(classes)), largest=False).indices].tolist()


def _images_of(subject: Subject, classes: Sequence[int]) -> Sample:
    if subject.reader is not None:
        return subject.reader.of(*classes)
    return subject.test_retain.only(
        torch.isin(subject.test_retain.labels, torch.tensor(list(classes)))
    )


CHECK = Check(
    name="collateral",
    title="Collateral damage",
    question="Do the classes that resemble the forgotten one pay for it?",
    definition=__doc__,
    needs="a model retrained without the class, for the level to compare with",
    measures={
        "acc_nearest_confusion": "accuracy on the nearest classes by confusion",
        "acc_nearest_features": "accuracy on the nearest classes by feature distance",
        "acc_others": "accuracy on all other classes",
        "acc_worst": "accuracy on the worst of the nearest classes by confusion",
    },
    headline="acc_nearest_confusion",
    measure=measure,
)

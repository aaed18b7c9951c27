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

import torch
from torch import nn

from wfnet.trust.check import Check, Found
from wfnet.trust.prototypes import class_means, head_features
from wfnet.trust.subject import Subject, predict, share_correct

NEAREST = 3


def measure(model: nn.Module, subject: Subject) -> Found:
    """Returns accuracies on the nearest classes; details name them, with the accuracy on each."""
    nearest = {"confusion": nearest_by_confusion(subject), "features": nearest_by_features(subject)}
    values, details = {}, {}
    for how, classes in nearest.items():
        images = subject.test.of(*classes)
        logits = predict(model, images.images)
        values[f"acc_nearest_{how}"] = share_correct(logits, images.labels)
        found = [(k, images.labels == k) for k in classes]
        details[how] = {
            str(k): share_correct(logits[own], images.labels[own]) for k, own in found if own.any()
        }
    values["acc_others"] = subject.accuracy(model, "test_retain")
    values["acc_worst"] = min(details["confusion"].values())
    return values, {"accuracy_by_class": details}


def nearest_by_confusion(subject: Subject) -> list[int]:
    """Returns the classes, among those with test images, to which the original sees most likeness.

    That is the mean probability that it gives them on images of the forgotten class.
    """
    mean = torch.softmax(subject.logits(subject.original, "test_forget"), 1).mean(0)
    others = subject.test.truth.unique()
    others = others[others != subject.label]
    return others[mean[others].topk(min(NEAREST, len(others))).indices].tolist()


def nearest_by_features(subject: Subject) -> list[int]:
    """Returns the classes whose mean features of the original are nearest, nearest first."""
    parts = ("train_forget", "train_retain")
    own, rest = (head_features(subject.original, subject, part) for part in parts)
    labels = subject.train_retain.labels
    distance = (class_means(rest, labels, subject) - own.mean(0)).norm(dim=1)
    return distance.topk(min(NEAREST, len(labels.unique())), largest=False).indices.tolist()


CHECK = Check(
    name="collateral",
    title="Collateral damage",
    question="Do the classes that resemble the forgotten one pay for it?",
    definition=__doc__,
    measures={
        "acc_nearest_confusion": "accuracy on the nearest classes by confusion",
        "acc_nearest_features": "accuracy on the nearest classes by feature distance",
        "acc_others": "accuracy on all other classes",
        "acc_worst": "accuracy on the worst of the nearest classes by confusion",
    },
    headline="acc_nearest_confusion",
    measure=measure,
    several_labels=False,
)

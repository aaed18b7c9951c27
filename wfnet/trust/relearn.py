"""Relearning: how soon does fine-tuning bring the class back?

All weights of a copy are fine-tuned (:func:`wfnet.evaluation.relearning.relearn`: SGD as for the
relearn time, BatchNorm as in ordinary training) for a number of steps on training images that an
attacker may have:

- ``retain_only``: images of the other classes alone. Vision classifiers that were unlearned may
  regain forgotten images without seeing one of them, while retrained ones do not (Siddiqui et al.,
  "From Dormant to Deleted: Tamper-Resistant Unlearning Through Weight-Space Regularization",
  NeurIPS 2025).
- ``from_n``: ``n`` images of the forgotten class among others, after Ha et al., "Unlearning's Blind
  Spots: Over-Unlearning and Prototypical Relearning Attack" (2025). The others are as many as the
  class's natural share asks for (nine times ``n`` among ten equal classes), at most all that the
  attacker has; the details count them.

Reported is the highest accuracy on test images of the class (average precision, where images have
several labels) before any step or after any epoch (an
attacker stops when it is best), and the course in the details. A retrained model learns the class
from images of it, too: how much further the model under test gets is what it still knew.
"""

import math
from functools import partial
from typing import Any

import torch
from torch import nn

from wfnet.evaluation.relearning import RelearnConfig, relearn
from wfnet.trust.check import Check, Found
from wfnet.trust.subject import Sample, Subject, predict, share_correct


def measure(model: nn.Module, subject: Subject) -> Found:
    """Returns the best accuracy on the class of every attack; details have it epoch by epoch."""
    settings, own, rest = subject.settings, subject.train_forget, subject.train_retain
    generator = torch.Generator().manual_seed(settings.seed)
    order, order_of_rest = (torch.randperm(len(s), generator=generator) for s in (own, rest))
    ratio = (1 - subject.share) / subject.share  # of other images to those of the class
    attacks = {"retain_only": (own.only(order[:0]), rest)}
    details: dict[str, Any] = {"steps": settings.relearn_steps}
    for count in settings.relearn_images:
        if count <= len(own):
            few = own.only(order[:count])
            attacks[f"from_{count}"] = few, rest.only(order_of_rest[: round(ratio * count)])
        else:
            details["left_out"] = f"relearning from {count} images, of which {len(own)} are at hand"
    course = {
        name: _attack(model, subject, few.with_others(others))
        for name, (few, others) in attacks.items()
    }
    details |= {
        "course": course,
        "images": {
            name: {"of_the_class": len(few), "others": len(others)}
            for name, (few, others) in attacks.items()
        },
    }
    score = "ap_f" if subject.several_labels else "acc_f"
    return {f"{score}_{name}": max(found) for name, found in course.items()}, details


def _attack(model: nn.Module, subject: Subject, images: Sample) -> list[float]:
    """Returns the accuracy on the class before the first epoch and after each."""
    config = RelearnConfig(seed=subject.settings.seed)
    steps_of_epoch = math.ceil(min(len(images), config.samples) / config.batch_size)
    epochs = math.ceil(subject.settings.relearn_steps / steps_of_epoch)
    config = RelearnConfig(seed=subject.settings.seed, max_epochs=epochs)
    data = images.dataset([str(label) for label in range(subject.num_classes)])
    return relearn(model, data, partial(_score, subject), subject.label, 1.0, config)


def _score(subject: Subject, model: nn.Module) -> float:
    """Returns how well a model that changes knows the class."""
    own = predict(model, subject.test_forget.images)
    if not subject.several_labels:
        return share_correct(own, subject.test_forget.labels)
    return subject.scored(own, predict(model, subject.test_retain.images))["ap_f"]


CHECK = Check(
    name="relearning",
    title="Relearning",
    question="How soon does fine-tuning bring the class back?",
    definition=__doc__,
    measures={
        "acc_f_retain_only": "best accuracy on the class while fine-tuning on other classes alone"
    },
    headline="acc_f_retain_only",
    measure=measure,
    original=False,
    counted={"acc_f_from": "best accuracy on the class while fine-tuning with {} of its images"},
)

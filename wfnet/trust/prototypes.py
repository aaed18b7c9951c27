"""Prototypical relearning: the class's row of the head made from a few of its images, untrained.

Ha et al., "Unlearning's Blind Spots: Over-Unlearning and Prototypical Relearning Attack" (2025).
With the mean ``m`` of the features at the input of the head over ``n`` training images of the
class:

- ``head_n``: the class's logit becomes ``<f(x), m / ||m||> + b``, all others stay. The authors
  blend this row into the old one; here ``b`` is what predicts the class on the attacker's
  unlabelled images as often as it occurs, so that no scale has to be guessed.
- ``mean_n``: every image goes to the nearest class mean (Mensink et al., TPAMI 2013; Snell et al.,
  NeurIPS 2017), the others' from all images of theirs that the attacker has. No head is needed.

Reported are accuracies on test images of the class and of the others; where images have several
labels, average precisions with the first kind of row, which needs no ``b`` for a ranking. A
retrained model gives the level: features tell apart what they never learned, too.
"""

import torch
from torch import Tensor, nn

from wfnet.trust.attacks.changed_logits import class_offset
from wfnet.trust.check import Check, Found
from wfnet.trust.probing import HEAD, layer_features
from wfnet.trust.subject import Subject


def measure(model: nn.Module, subject: Subject) -> Found:
    """Returns accuracies by kind of attack and number of images."""
    own, rest = subject.train_forget, subject.train_retain
    generator = torch.Generator().manual_seed(subject.settings.seed)
    order = torch.randperm(len(own), generator=generator)
    tests = "test_forget", "test_retain"
    seen = {part: head_features(model, subject, part) for part in (*tests, "unlabelled")}
    of_class = head_features(model, subject, "train_forget")
    means = None
    if not subject.several_labels:
        means = class_means(head_features(model, subject, "train_retain"), rest.labels, subject)
    counts = [count for count in subject.settings.relearn_images if count <= len(own)]
    values, details = {}, {}
    for count in subject.settings.relearn_images:
        if count > len(own):
            details["left_out"] = f"a prototype of {count} images, of which {len(own)} are at hand"
    for end, count in {"": len(own), **{f"_{count}": count for count in counts}}.items():
        prototype = of_class[order[:count]].mean(0)
        row = prototype / prototype.norm().clamp_min(1e-12)
        logits = {part: subject.logits(model, part).clone() for part in seen}
        for part, changed in logits.items():
            changed[:, subject.label] = seen[part] @ row
        found = {"head": [logits[part] for part in tests]}
        if means is not None:
            added = class_offset(logits["unlabelled"], subject.label, subject.share)
            means[subject.label] = prototype
            for changed in found["head"]:
                changed[:, subject.label] += added
            found["mean"] = [-torch.cdist(seen[part], means) for part in tests]
        for kind, changed in found.items():
            values |= subject.scored(*changed, f"_{kind}{end}")
    return values, details


def head_features(model: nn.Module, subject: Subject, part: str) -> Tensor:
    """Returns the features ``[n, d]`` fp64 at the input of the head for the images ``part``."""
    images = getattr(subject, part).images
    return torch.from_numpy(layer_features(model, (), images, subject.num_classes)[HEAD])


def class_means(features: Tensor, labels: Tensor, subject: Subject) -> Tensor:
    """Returns the mean of the features of every class ``[K, d]``; far away for one without any."""
    means = torch.full((subject.num_classes, features.shape[1]), 1e30, dtype=features.dtype)
    for label in labels.unique().tolist():
        means[label] = features[labels == label].mean(0)
    return means


_TEXTS = {
    f"acc_{short}_{kind}": f"accuracy on {what}, {how} {{}} of its images"
    for short, what in (("f", "the class"), ("r", "the other classes"))
    for kind, how in (("head", "its row of the head from"), ("mean", "nearest class means with"))
}
CHECK = Check(
    name="prototypes",
    title="Prototypes from few images",
    question="How far do a few images bring the class back without any training?",
    definition=__doc__,
    measures={name: text.format("all") for name, text in _TEXTS.items()},
    headline="acc_f_head",
    measure=measure,
    counted=_TEXTS,
)

"""Class geometry: where images of the forgotten class fall among the others.

A network that never saw the class sends each of its images to a class that looks alike; one that
was made to forget may send them elsewhere, or keep them together. That tells it from a retrained
one, however low the accuracy on the class is (Ebrahimpour-Boroojeny et al., "On the Necessity of
Output Distribution Reweighting for Effective Class Unlearning", 2025, whose MIA-NN reads the
probabilities of neighbouring classes). With features at the input of the head:

- nearest class: total variation distance between the shares of the class's test images whose
  nearest mean of another class is k, and the same shares of a retrained model; the mean over
  retrained models;
- outputs: for every training image of the class, the divergence ``KL(p || q)`` of a model's
  probabilities ``q`` over the other classes from the mean ``p`` of all retrained models but one:
  area under the ROC, this model's divergences against those of the one that is left out, each in
  turn. 0.5: it cannot be told; needs two retrained models;
- compactness: ``b / (a + b)``, mean over test images of the class, with the distances ``a`` to
  the class's own mean in the training part and ``b`` to the nearest mean of another class. Above
  0.5 the class is still a cluster of its own; compare with the retrained models.
"""

import statistics

import torch
from torch import Tensor, nn

from wfnet.trust.check import Check, Found
from wfnet.trust.membership import roc_auc
from wfnet.trust.prototypes import class_means, head_features
from wfnet.trust.subject import Subject


def measure(model: nn.Module, subject: Subject) -> Found:
    """Returns distances to retrained models, and how compact the class is."""
    nearest, own, other = _places(model, subject)
    values = {"compact_forget": (other / (own + other).clamp_min(1e-12)).mean().item()}
    details = {"nearest": {str(k): share for k, share in enumerate(nearest.tolist()) if share}}
    retrained = subject.others(model)
    if retrained:
        theirs = [_places(network, subject)[0] for network in retrained]
        values["tv_nearest"] = statistics.fmean(
            ((nearest - shares).abs().sum() / 2).item() for shares in theirs
        )
    if len(retrained) > 1:
        shadows = torch.stack([_among_others(network, subject) for network in retrained])
        rest = (shadows.sum(0) - shadows) / (len(shadows) - 1)
        tested = _among_others(model, subject).expand_as(shadows)
        areas = (_divergence(rest, q).flatten() for q in (tested, shadows))
        values["auc_geometry"] = roc_auc(*areas)
    return values, details


def _places(model: nn.Module, subject: Subject) -> tuple[Tensor, Tensor, Tensor]:
    """Returns the share of the class's test images nearest to each class ``[K]``, and the distance
    of each to its own mean and to the nearest other one ``[n]``."""
    features = head_features(model, subject, "test_forget")
    rest = head_features(model, subject, "train_retain")
    distances = torch.cdist(features, class_means(rest, subject.train_retain.labels, subject))
    mean = head_features(model, subject, "train_forget").mean(0)
    found = distances.min(1)
    shares = torch.bincount(found.indices, minlength=subject.num_classes).double()
    return shares / len(features), (features - mean).norm(dim=1), found.values


def _among_others(model: nn.Module, subject: Subject) -> Tensor:
    """Returns probabilities ``[n, K - 1]`` of the other classes on the class's images."""
    logits = subject.logits(model, "train_forget")
    kept = torch.arange(logits.shape[1]) != subject.label
    return logits[:, kept].log_softmax(1).clamp_min(-50).exp()


def _divergence(p: Tensor, q: Tensor) -> Tensor:
    return (p * (p.log() - q.log())).sum(-1)


CHECK = Check(
    name="geometry",
    title="Class geometry",
    question="Do images of the class fall among the others as they do where it was never seen?",
    definition=__doc__,
    needs="two models retrained without the class; one, for the nearest classes",
    measures={
        "tv_nearest": "distance between the nearest classes of its images and a retrained model's",
        "auc_geometry": "its images under this model against retrained ones, by what the outputs "
        "give the other classes; 0.5: no difference",
        "compact_forget": "how much nearer to its own mean than to others its images are (0 to 1)",
    },
    headline="tv_nearest",
    measure=measure,
    several_labels=False,
    retrained=2,
)

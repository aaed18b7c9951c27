"""What the trust checks look at: a model that should not know one class, beside its references."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from wfnet.data import Dataset, batches, labels_of, multi_hot_of
from wfnet.head import first_output
from wfnet.services import settings
from wfnet.services.modes import evaluation_mode
from wfnet.services.settings import setting

BATCH = 256


@dataclass(frozen=True)
class TrustSettings:
    """What may change a check's numbers.

    Attributes:
        samples: the most images of each kind (forgotten and other, of training and test part).
        seed: of samples and attacks.
        relearn_steps: steps of each relearning attack, at least.
        relearn_images: images of the forgotten class that each attack with some of them has.
    """

    samples: int = setting(
        1000,
        settings.int_from(2),
        metavar="N",
        help="the most images of each kind: forgotten and other, of training and test part",
    )
    seed: int = setting(0, settings.seed, metavar="N", help="of splits and draws")
    relearn_steps: int = setting(
        50, settings.positive_int, metavar="N", help="steps of each relearning attack"
    )
    relearn_images: tuple[int, ...] = (1, 10)

    def __post_init__(self) -> None:
        settings.check_settings(self)
        if not self.relearn_images or any(
            map(settings.positive_int.violation, self.relearn_images)
        ):
            raise ValueError(
                f"relearn_images must be numbers of images of at least 1; got {self.relearn_images}"
            )


@dataclass(frozen=True)
class Sample:
    """Images held in memory: ``images [n, C, H, W]`` float32, normalised, and ``labels [n]``."""

    images: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)

    def only(self, chosen: Tensor) -> Sample:
        """The images where ``chosen`` ``[n]`` bool is true, or at positions ``chosen`` int64."""
        return Sample(self.images[chosen], self.labels[chosen])

    def with_others(self, others: Sample) -> Sample:
        """These images, then ``others``."""
        return Sample(
            torch.cat((self.images, others.images)), torch.cat((self.labels, others.labels))
        )


@dataclass
class Subject:
    """One class that a plain model is said to have forgotten, and all that a check may need.

    Attributes:
        label: the forgotten class.
        num_classes: outputs of every model.
        forgetful: the plain model under test.
        original: the model that knew the class.
        retrained: models trained in the same way on the same images without those of the class;
            may be empty.
        train_forget, test_forget: images of the class, of the part that the original was trained
            on and of a part that it never saw.
        train_retain, test_retain: the same of all other classes.
        layers: names of the masked layers, in the order in which they run.
        reader: gives test images of other classes by label, at most ``samples`` of them.
        settings: of the checks.
        unlabelled: images of all classes that an attacker holds without their labels, in the
            proportion in which classes occur in the training part; by default all of
            ``train_forget`` and ``train_retain``.
    """

    label: int
    num_classes: int
    forgetful: nn.Module
    original: nn.Module
    retrained: Sequence[nn.Module]
    train_forget: Sample
    train_retain: Sample
    test_forget: Sample
    test_retain: Sample
    layers: Sequence[str]
    reader: ImageReader | None = None
    settings: TrustSettings = field(default_factory=TrustSettings)
    unlabelled: Sample | None = None
    # Of models that are still in use: an id alone would be given to the next one.
    _logits: WeakKeyDictionary[nn.Module, dict[str, Tensor]] = field(
        default_factory=WeakKeyDictionary, repr=False
    )

    def __post_init__(self) -> None:
        if self.unlabelled is None:
            self.unlabelled = self.train_forget.with_others(self.train_retain)

    @property
    def share(self) -> float:
        """The fraction of attackers' images that are of the class."""
        return (self.unlabelled.labels == self.label).double().mean().item()

    def logits(self, model: nn.Module, part: str) -> Tensor:
        """``[n, K]`` fp64 of ``model`` on the images ``part`` (``"test_forget"``, ...), kept."""
        kept = self._logits.setdefault(model, {})
        if part not in kept:
            kept[part] = predict(model, getattr(self, part).images)
        return kept[part]


class ImageReader:
    """Reads bounded random samples of a data set, each drawn by the seed alone.

    Args:
        dataset: images and labels.
        samples: the most images that one sample has.
        seed: of the draws.
        workers: processes that read files.
    """

    def __init__(self, dataset: Dataset, samples: int, seed: int = 0, workers: int = 0):
        if multi_hot_of(dataset) is not None:
            raise ValueError(
                "the data have several labels per image: trust checks are of images with one label "
                "each"
            )
        if samples < 1:
            raise ValueError(f"samples must be at least 1, got {samples}")
        self.dataset, self.samples, self.seed, self.workers = dataset, samples, seed, workers
        self.labels = labels_of(dataset)
        self._everything: Sample | None = None

    def of(self, *classes: int) -> Sample:
        """At most ``samples`` images of ``classes``.

        Raises:
            ValueError: if there are none.
        """
        positions = torch.isin(self.labels, torch.tensor(classes)).nonzero().squeeze(1)
        if not len(positions):
            raise ValueError(f"there is no image of class {', '.join(map(str, classes))}")
        return self._read(positions)

    def mixed(self, label: int) -> Sample:
        """About ``samples`` images of all classes, as many of ``label`` as there are by nature.

        That is its share of the data set, and one image at least.

        Raises:
            ValueError: if there is no image of the class, or none of another.
        """
        own, others = self.of(label), self.without(label)
        count = int((self.labels == label).sum())
        ratio = count / (len(self.labels) - count)
        wanted = max(1, round(ratio * len(others)))
        order = torch.randperm(len(own), generator=torch.Generator().manual_seed(self.seed))
        return own.only(order[:wanted]).with_others(others)

    def without(self, *classes: int) -> Sample:
        """At most ``samples`` images of all classes but ``classes``; the draw is made once.

        Raises:
            ValueError: if the draw has no image of another class.
        """
        if self._everything is None:
            self._everything = self._read(torch.arange(len(self.labels)))
        rest = self._everything.only(~torch.isin(self._everything.labels, torch.tensor(classes)))
        if not len(rest):
            raise ValueError("there is no image of other classes; draw more samples")
        return rest

    def _read(self, positions: Tensor) -> Sample:
        generator = torch.Generator().manual_seed(self.seed)
        order = torch.randperm(len(positions), generator=generator)[: self.samples]
        chosen = positions[order].sort().values
        read = list(batches(self.dataset, chosen.split(BATCH), self.workers))
        if not read:
            raise ValueError("none of the images could be read")
        return Sample(torch.cat([b.images for b in read]), torch.cat([b.labels for b in read]))


def predict(model: nn.Module, images: Tensor, batch_size: int = BATCH) -> Tensor:
    """Logits ``[n, K]`` fp64 on the CPU, in evaluation mode; the model is left as it was.

    Raises:
        FloatingPointError: if a logit is NaN.
    """
    weight = next(model.parameters())
    parts = []
    with evaluation_mode(model), torch.inference_mode():
        for part in images.split(batch_size):
            logits = first_output(model(part.to(weight.device, weight.dtype)))
            parts.append(logits.double().cpu())
    logits = torch.cat(parts).clone()
    if logits.isnan().any():
        raise FloatingPointError("the model gives NaN on the images of the check")
    return logits


def share_correct(logits: Tensor, labels: Tensor) -> float:
    """Fraction of samples whose largest logit ``[n, K]`` is the label ``[n]``."""
    return (logits.argmax(1) == labels).double().mean().item()

"""What the trust checks look at: a model that should not know one class, beside its references."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from wfnet.data import Dataset, MultiLabelTensors, Splits, TensorImages, batches, is_of, truth_of
from wfnet.evaluation.metrics import average_precision
from wfnet.head import first_output
from wfnet.services import settings
from wfnet.services.modes import evaluation_mode
from wfnet.services.settings import setting

BATCH = 256
# Baselines that change nothing but the class's logit: what they withstand costs nothing.
TRIVIAL = ("logit_masked", "bias_shifted")


@dataclass(frozen=True)
class TrustSettings:
    """What may change a check's numbers; ``wfnet trust --help`` has these texts.

    Attributes:
        samples: the most images of each kind: forgotten and other, of training and test part
        seed: of splits, samples and attacks
        relearn_steps: steps of each relearning attack, at least
        relearn_images: images of the forgotten class that each attack with some of them has.
    """

    samples: int = setting(1000, settings.int_from(2))
    seed: int = setting(0, settings.seed)
    relearn_steps: int = setting(50, settings.positive_int)
    relearn_images: tuple[int, ...] = (1, 10)

    def __post_init__(self) -> None:
        settings.check_settings(self)
        if not self.relearn_images or min(self.relearn_images) < 1:
            raise ValueError(
                f"relearn_images must be numbers of images of at least 1; got {self.relearn_images}"
            )


@dataclass(frozen=True)
class Sample:
    """Images held in memory: ``images [n, C, H, W]`` float32, normalised, and their ``labels``,
    ``[n]`` int64 or ``[n, K]`` bool (:func:`wfnet.data.truth_of`)."""

    images: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)

    def only(self, chosen: Tensor) -> "Sample":
        """Returns the images where ``chosen`` bool is true, or at positions ``chosen`` int64."""
        return Sample(self.images[chosen], self.labels[chosen])

    def with_others(self, others: "Sample") -> "Sample":
        """Returns these images, then ``others``."""
        images = torch.cat((self.images, others.images))
        return Sample(images, torch.cat((self.labels, others.labels)))

    def dataset(self, names: Sequence[str]) -> TensorImages:
        """Returns them as a data set with class names."""
        kind = TensorImages if self.labels.dim() == 1 else MultiLabelTensors
        return kind(self.images, self.labels, names)


class ImageReader:
    """Reads bounded random samples of a data set, each drawn by the seed alone.

    Args:
        dataset: images; one with several labels is of each class that is true of it.
        samples: the most images that one sample has.
        seed: of the draws.
        workers: processes that read files.
    """

    def __init__(self, dataset: Dataset, samples: int, seed: int = 0, workers: int = 0):
        self.dataset, self.samples, self.seed, self.workers = dataset, samples, seed, workers
        self.truth = truth_of(dataset)

    def of(self, *classes: int) -> Sample:
        """Returns at most ``samples`` images of ``classes``.

        Raises:
            ValueError: if there are none.
        """
        positions = is_of(self.truth, *classes).nonzero().squeeze(1)
        if not len(positions):
            raise ValueError(f"there is no image of class {', '.join(map(str, classes))}")
        return self._read(positions)

    def without(self, *classes: int) -> Sample:
        """Returns at most ``samples`` images of all classes but ``classes``.

        Raises:
            ValueError: if the draw has no image of another class.
        """
        drawn = self._everything
        rest = drawn.only(~is_of(drawn.labels, *classes))
        if not len(rest):
            raise ValueError("there is no image of other classes; draw more samples")
        return rest

    def mixed(self, label: int) -> Sample:
        """Returns images of ``label`` in its share of the data set (one at least), then others.

        Raises:
            ValueError: if there is no image of the class, or none of another.
        """
        own, others = self.of(label), self.without(label)
        count = int(is_of(self.truth, label).sum())
        wanted = max(1, round(count / (len(self.truth) - count) * len(others)))
        return own.only(self._shuffled(len(own))[:wanted]).with_others(others)

    @cached_property
    def _everything(self) -> Sample:
        return self._read(torch.arange(len(self.truth)))

    def _shuffled(self, count: int) -> Tensor:
        return torch.randperm(count, generator=torch.Generator().manual_seed(self.seed))

    def _read(self, positions: Tensor) -> Sample:
        chosen = positions[self._shuffled(len(positions))[: self.samples]].sort().values
        read = list(batches(self.dataset, chosen.split(BATCH), self.workers))
        if not read:
            raise ValueError("none of the images could be read")
        indices = torch.cat([b.indices for b in read])
        return Sample(torch.cat([b.images for b in read]), self.truth[indices])


def image_readers(data: Splits, settings: TrustSettings, workers: int) -> list[ImageReader]:
    """Returns the readers of the training and the test part."""
    parts = (data.train, data.test)
    return [ImageReader(part, settings.samples, settings.seed, workers) for part in parts]


@dataclass
class Subject:
    """One class that a plain model is said to have forgotten, and all that a check may need.

    Attributes:
        label: the forgotten class.
        num_classes: outputs of every model.
        train, test: readers of the part that the original was trained on, and of one that it never
            saw.
        layers: names of the masked layers, in the order in which they run.
        settings: of the checks.
        forgetful, original: the plain model under test, and the one that knew the class.
        retrained: models trained in the same way on the same images without those of the class.
        trivial: models of ``TRIVIAL`` by name, made of the original and the drawn training images,
            and ``also_masked``, the model under test with its logit masked.
        forgotten: classes that were forgotten together with it: no test of what was kept.
        train_forget, test_forget: samples of the class in both parts.
        train_retain, test_retain: samples of the classes that were not forgotten.
        unlabelled: images of all classes that an attacker holds without their labels, in the
            proportion in which classes occur in the training part.
    """

    label: int
    num_classes: int
    train: ImageReader
    test: ImageReader
    layers: Sequence[str]
    settings: TrustSettings
    forgetful: nn.Module
    original: nn.Module
    retrained: Sequence[nn.Module] = ()
    forgotten: Sequence[int] = ()

    def __post_init__(self) -> None:
        forgotten = (self.label, *self.forgotten)
        self.train_forget, self.test_forget = self.train.of(self.label), self.test.of(self.label)
        self.train_retain = self.train.without(*forgotten)
        self.test_retain = self.test.without(*forgotten)
        self.unlabelled = self.train.mixed(self.label)
        self.several_labels = self.train.truth.dim() == 2
        self.trivial: dict[str, nn.Module] = {}
        # Of models that are still in use: an id alone would be given to the next one.
        self._logits: WeakKeyDictionary[nn.Module, dict[str, Tensor]] = WeakKeyDictionary()

    @property
    def share(self) -> float:
        """The fraction of attackers' images that are of the class."""
        return self.is_own(self.unlabelled).double().mean().item()

    def is_own(self, sample: Sample) -> Tensor:
        """Returns whether each image is of the class ``[n]`` bool."""
        return is_of(sample.labels, self.label)

    def others(self, model: nn.Module) -> list[nn.Module]:
        """Returns the retrained models that ``model`` is not one of."""
        return [other for other in self.retrained if other is not model]

    def logits(self, model: nn.Module, part: str) -> Tensor:
        """Returns ``[n, K]`` fp64 of ``model`` on the images ``part`` ("test_forget", ...)."""
        kept = self._logits.setdefault(model, {})
        if part not in kept:
            kept[part] = predict(model, getattr(self, part).images)
        return kept[part]

    def distributions(self, logits: Tensor) -> Tensor:
        """Returns logits whose softmax over the last dimension is what outputs stand for.

        Those of one label ``[n, K]``; of several ``[n, K, 2]``, each label against none.
        """
        return torch.stack((logits, -logits), -1) / 2 if self.several_labels else logits

    def accuracy(self, model: nn.Module, part: str) -> float:
        """Returns the fraction of the images ``part`` that ``model`` classifies correctly."""
        return share_correct(self.logits(model, part), getattr(self, part).labels)

    def scores(self, model: nn.Module, ending: str = "") -> dict[str, float]:
        """Returns :meth:`scored` of a model's outputs."""
        return self.scored(*(self.logits(model, f"test_{p}") for p in ("forget", "retain")), ending)

    def scored(self, forget: Tensor, retain: Tensor, ending: str = "") -> dict[str, float]:
        """Returns how well the class and the others are known, by measure: what attacks change.

        Accuracies on test images of the class (``acc_f``) and of the others (``acc_r``). Where
        images have several labels, the average precision of the label (``ap_f``) and the mean one
        of those that were not forgotten (``ap_r``), over both samples weighed as in the test part.

        Args:
            forget, retain: logits ``[n, K]`` and ``[m, K]`` of both samples.
            ending: of the names.
        """
        own, rest = self.test_forget.labels, self.test_retain.labels
        if not self.several_labels:
            f, r = share_correct(forget, own), share_correct(retain, rest)
            return {f"acc_f{ending}": f, f"acc_r{ending}": r}
        forgotten, whole = [self.label, *self.forgotten], self.test.truth
        natural = is_of(whole, self.label).sum(), (~is_of(whole, *forgotten)).sum()
        parts = zip(natural, (own, rest), strict=True)
        weights = torch.cat([(total / len(p)).double().expand(len(p)) for total, p in parts])
        logits, truth = torch.cat((forget, retain)), torch.cat((own, rest))
        precision = average_precision(logits, truth, weights)
        kept = precision.index_fill(0, torch.tensor(forgotten), torch.nan).nanmean()
        return {f"ap_f{ending}": precision[self.label].item(), f"ap_r{ending}": kept.item()}


def predict(model: nn.Module, images: Tensor) -> Tensor:
    """Returns logits ``[n, K]`` fp64 on the CPU, in evaluation mode.

    Raises:
        FloatingPointError: if a logit is NaN.
    """
    weight = next(model.parameters())
    with evaluation_mode(model), torch.inference_mode():
        parts = [
            first_output(model(part.to(weight.device, weight.dtype))).double().cpu()
            for part in images.split(BATCH)
        ]
    logits = torch.cat(parts).clone()
    if logits.isnan().any():
        raise FloatingPointError("the model gives NaN on the images of the check")
    return logits


def share_correct(logits: Tensor, labels: Tensor) -> float:
    """Returns the fraction of samples whose largest logit ``[n, K]`` is the label ``[n]``."""
    return (logits.argmax(1) == labels).double().mean().item()

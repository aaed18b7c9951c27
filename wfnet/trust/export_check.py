"""Checks of an exported file itself: accuracies, and what brings the class back.

The file is loaded as any user would load it, into a plain model; nothing of the filters is at hand.
The attacks are those of :mod:`wfnet.trust.removal`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from wfnet.data import Splits
from wfnet.trust import removal
from wfnet.trust.attacks import ATTACKS
from wfnet.trust.subject import ImageReader, Subject, TrustSettings, share_correct


@dataclass(frozen=True)
class ExportCheck:
    """What was found for one class that an export has forgotten.

    Attributes:
        label, name: the class.
        values: measures of :mod:`wfnet.trust.removal` for the export; ``acc_f`` and ``acc_r`` are
            its accuracies as it is.
        original_acc_f, original_acc_r: of the original network, on the same images.
        details: of :mod:`wfnet.trust.removal`: the attackers' images, rows against the base.
        images: test images of the class and of classes that were not forgotten.
    """

    label: int
    name: str
    values: dict[str, float]
    original_acc_f: float
    original_acc_r: float
    details: dict[str, Any]
    images: dict[str, int]

    def __str__(self) -> str:
        v, drawn = self.values, self.details["attackers_images"]
        lines = [
            f"class {self.name}: accuracy on it {self.original_acc_f:.1%} -> {v['acc_f']:.1%}, on "
            f"the others {self.original_acc_r:.1%} -> {v['acc_r']:.1%} ({self.images['forget']} "
            f"and {self.images['retain']} test images)",
            "  brought back by who holds the file and no label, with images in the natural mix of "
            f"classes ({drawn['of_the_class']} of {drawn['unlabelled']} of the class):",
        ]
        for name, attack in ATTACKS.items():
            if f"acc_f_{name}" in v:
                base = " (holds the base as well)" if attack.needs_base else ""
                lines.append(f"  {v[f'acc_f_{name}']:7.1%}  {attack.text}{base}")
        return "\n".join(lines)


def check_export(
    plain: nn.Module,
    original: nn.Module,
    data: Splits,
    layers: Sequence[str],
    forget: Sequence[int],
    settings: TrustSettings | None = None,
    workers: int = 0,
) -> list[ExportCheck]:
    """Accuracies and removability of a plain model, for each class that it has forgotten.

    Args:
        plain: the loaded export; not changed.
        original: the model that knows all classes.
        data: unlabelled images are taken from the training part, accuracies from the test part.
        layers: names of the layers that were masked.
        forget: the classes.
        settings: samples and seed.
        workers: processes that read images.
    """
    settings = settings or TrustSettings()
    train, test = (
        ImageReader(part, settings.samples, settings.seed, workers)
        for part in (data.train, data.test)
    )
    checks = []
    for label in forget:
        subject = Subject(
            label=label,
            num_classes=data.num_classes,
            forgetful=plain,
            original=original,
            retrained=(),
            train_forget=train.of(label),
            train_retain=train.without(*forget),
            unlabelled=train.mixed(label),
            test_forget=test.of(label),
            test_retain=test.without(*forget),
            layers=layers,
            settings=settings,
        )
        found = removal.measure(plain, subject, [])
        before = [_accuracy(subject, original, f"test_{k}") for k in ("forget", "retain")]
        checks.append(
            ExportCheck(
                label=label,
                name=data.classes[label],
                values=found["values"],
                original_acc_f=before[0],
                original_acc_r=before[1],
                details=found["details"],
                images={"forget": len(subject.test_forget), "retain": len(subject.test_retain)},
            )
        )
    return checks


def _accuracy(subject: Subject, model: nn.Module, part: str) -> float:
    return share_correct(subject.logits(model, part), getattr(subject, part).labels)

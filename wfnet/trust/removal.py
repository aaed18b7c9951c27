"""Removability of a baked export: can its holder bring the class back without a labelled image?

The attacks of :mod:`wfnet.trust.attacks` need no training and no labels; each is tried on a copy.
Each reports the accuracy on the class (low is good) and on the others (an attack that destroys the
rest is no attack), or average precisions where images have several labels. Beside them stands the
area under the ROC of the class's logit, images of the class against others: what the outputs tell
whatever offset is chosen.

Attackers' images are a sample of the training part in which the class has its natural share (the
details count them): statistics and shifts depend on the mix.

In an export whose class was cut from its head (``cut_output``), only attacks on the logits and the
base's row of the head reach its logit. The same attacks on a retrained model, which has nothing to
bring back, give the level to compare with.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

from wfnet.data import Splits
from wfnet.services.extras import Lazy
from wfnet.trust.attacks import ATTACKS
from wfnet.trust.check import Check, Found
from wfnet.trust.membership import roc_auc
from wfnet.trust.subject import Subject, TrustSettings, image_readers

# An attack that destroys the rest is no attack: what it may cost the other classes.
TOLERATED = 0.1


def measure(model: nn.Module, subject: Subject) -> Found:
    """Returns scores before and after every attack that applies to ``model``."""
    attacked = {"": model}
    attacked |= {f"_{name}": attack(model, subject) for name, attack in ATTACKS.items()}
    found = {end: subject.scores(m, end) for end, m in attacked.items() if m is not None}
    own, rest = found[""]  # acc_f and acc_r, or average precisions
    values = {name + end: s[name + end] for name in (own, rest) for end, s in found.items()}
    base = {f"_{name}" for name, attack in ATTACKS.items() if attack.needs_base}
    least = values[rest] - TOLERATED
    recovered = [end for end in found if end not in base and values[rest + end] >= least]
    values[f"{own}_recovered"] = max(values[own + end] for end in recovered)
    logits = (subject.logits(model, part) for part in ("test_forget", "test_retain"))
    values["auc_logit"] = roc_auc(*(found[:, subject.label] for found in logits))
    of_class = int(subject.is_own(subject.unlabelled).sum())
    images = {"unlabelled": len(subject.unlabelled), "of_the_class": of_class}
    return values, {"attackers_images": images}


def check_export(
    plain: nn.Module,
    original: nn.Module,
    data: Splits,
    layers: Sequence[str],
    forget: Sequence[int],
    settings: TrustSettings,
    workers: int = 0,
) -> list[dict[str, Any]]:
    """Measures scores and removability of an exported model, for each class it has forgotten.

    Args:
        plain: the export, loaded as any user would load it; not changed.
        original: the model that knows all classes.
        data: unlabelled images are taken from the training part, accuracies from the test part.
        layers: names of the layers that were masked.
        forget: the classes.
        settings: samples and seed.
        workers: processes that read images.

    Returns:
        For each class: label and name, the values and details of this check, original_acc_f and
        original_acc_r (of several labels: ap) of the original on the same images, and how many
        images there were of the class (forget) and of those that were not forgotten (retain).
    """
    readers = image_readers(data, settings, workers)
    same = (data.num_classes, *readers, layers, settings, plain, original)
    found = []
    for label in forget:
        subject = Subject(label, *same, forgotten=forget)
        values, details = measure(plain, subject)
        found.append(
            {
                "label": label,
                "name": data.classes[label],
                "values": values,
                **{f"original_{name}": v for name, v in subject.scores(original).items()},
                "details": details,
                "images": {"forget": len(subject.test_forget), "retain": len(subject.test_retain)},
            }
        )
    return found


def describe_export(found: Mapping[str, Any]) -> str:
    """Returns what :func:`check_export` found for one class, as lines for the terminal."""
    values, images, drawn = found["values"], found["images"], found["details"]["attackers_images"]
    kind, score = ("ap", "average precision of") if "ap_f" in values else ("acc", "accuracy on")
    own, rest = (
        f"{found[f'original_{kind}_{part}']:.1%} -> {values[f'{kind}_{part}']:.1%}" for part in "fr"
    )
    lines = [
        f"class {found['name']}: {score} it {own}, {score.split()[-1]} the others {rest} "
        f"({images['forget']} and {images['retain']} test images)",
        "  brought back by who holds the file and no label, with images in the natural mix of "
        f"classes ({drawn['of_the_class']} of {drawn['unlabelled']} of the class):",
    ]
    for name, attack in ATTACKS.items():
        if f"{kind}_f_{name}" in values:
            base = " (holds the base as well)" if attack.needs_base else ""
            lines.append(f"  {values[f'{kind}_f_{name}']:7.1%}  {attack.text}{base}")
    return "\n".join(lines)


def _measures() -> dict[str, str]:
    texts = {"": "as it is", **{f"_{name}": attack.text for name, attack in ATTACKS.items()}}
    return {
        **{f"acc_f{k}": f"accuracy on the forgotten class, {text}" for k, text in texts.items()},
        **{f"acc_r{k}": f"accuracy on the other classes, {text}" for k, text in texts.items()},
        "acc_f_recovered": "highest accuracy on the class by an attack without the base that costs "
        "the others at most 10 points",
        "auc_logit": "area under the ROC of the class's logit, its images against others",
    }


CHECK = Check(
    name="removal",
    title="Removability of the export",
    question="Can the holder of the baked file bring the class back without labelled images?",
    definition=__doc__,
    measures=Lazy(_measures),
    headline="acc_f_batchnorm_all",
    measure=measure,
)

"""Removability of a baked export: can its holder bring the class back without a labelled image?

Attacks that need no training, each on a copy:

- ``batchnorm``: statistics of all BatchNorm layers estimated anew on unlabelled images, as in Li et
  al., "Revisiting Batch Normalization For Practical Domain Adaptation" (2016). A gate that is not
  exactly 0 before a BatchNorm is a scale that estimated statistics divide out again. Once with
  images of all classes (``_all``), once without those of the forgotten one (``_retain``).
- ``equalised``: rows of every masked layer scaled to the median norm of the layer's rows: undoes
  gates without knowing the base.
- ``base_norms``: for holders of the public base weights: every row scaled by ``||base row|| /
  ||row||``. If rows are multiples of the base's, this restores the base exactly, except where gates
  are 0. That such rows exist also shows which model an export was made from (``details``: the share
  of rows that are multiples, with the gates read off them). It says how much the file alone leaks:
  who has the base has the class anyway.
- ``offset``: a constant added to the logit of the class so that it is predicted as often as it
  occurs among unlabelled images; ``standardised``: every logit brought to mean 0 and variance 1
  over them. Both undo a class that is merely voted down at the output.

Each reports the accuracy on the class (``acc_f_*``, low is good) and on the others (``acc_r_*``: an
attack that destroys the rest is no attack). ``auc_logit`` is the area under the ROC of the class's
logit, images of the class against others: what the outputs tell whatever offset is chosen.
In an export whose class was cut from its head (``cut_output``), only the last two reach its logit.
The same attacks on a retrained model, which has nothing to bring back, give the level to compare
with.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from wfnet.trust.membership import roc_auc
from wfnet.trust.subject import BATCH, Subject, predict, share_correct

TITLE = "Removability of the export"
QUESTION = "Can the holder of the baked file bring the class back without labelled images?"
NEEDS = "a model retrained without the class, for the level to compare with"
REFERENCES = ("original", "retrained")
RETRAINED = 1
_ATTACKS = {
    "": "as it is",
    "_batchnorm_all": "BatchNorm re-estimated on unlabelled images of all classes",
    "_batchnorm_retain": "BatchNorm re-estimated on images of the other classes",
    "_equalised": "rows scaled to the median norm of their layer",
    "_base_norms": "rows scaled to the norms of the public base",
    "_offset": "class's logit shifted until it is predicted as often as it occurs",
    "_standardised": "logits standardised over unlabelled images",
}
MEASURES = {
    **{f"acc_f{k}": f"accuracy on the forgotten class, {text}" for k, text in _ATTACKS.items()},
    **{f"acc_r{k}": f"accuracy on the other classes, {text}" for k, text in _ATTACKS.items()},
    "acc_f_recovered": "highest accuracy on the class by an attack without the base that costs the "
    "others at most 10 points",
    "auc_logit": "area under the ROC of the class's logit, its images against others",
}
HEADLINE = "acc_f_batchnorm_all"
# An attack that destroys the rest is no attack: what it may cost the other classes.
TOLERATED = 0.1


def measure(model: nn.Module, subject: Subject, others: Sequence[nn.Module]) -> dict[str, Any]:
    """Accuracies before and after every attack that applies to ``model``."""
    forget, retain = (subject.logits(model, f"test_{part}") for part in ("forget", "retain"))
    unlabelled = torch.cat((subject.train_forget.images, subject.train_retain.images))
    attacked: dict[str, tuple[Tensor, Tensor]] = {"": (forget, retain)}

    def attack(name: str, changed: nn.Module | None) -> None:
        if changed is not None:
            attacked[name] = tuple(
                predict(changed, getattr(subject, f"test_{part}").images)
                for part in ("forget", "retain")
            )

    seed = subject.settings.seed
    attack("_batchnorm_all", reestimated(model, unlabelled, seed))
    attack(
        "_batchnorm_retain", reestimated(model, subject.train_retain.images, subject.settings.seed)
    )
    attack("_equalised", equalised(model, subject.layers))
    details: dict[str, Any] = {}
    if model is subject.forgetful:
        details["rows"] = rows_against_base(model, subject.original, subject.layers)
        attack("_base_norms", with_base_norms(model, subject.original, subject.layers))
    seen = torch.cat((subject.logits(model, "train_forget"), subject.logits(model, "train_retain")))
    share = len(subject.train_forget) / len(seen)
    offset = class_offset(seen, subject.label, share)
    mean, deviation = seen.mean(0), seen.std(0).clamp_min(1e-12)
    attacked["_offset"] = tuple(_shifted(z, subject.label, offset) for z in (forget, retain))
    attacked["_standardised"] = tuple((z - mean) / deviation for z in (forget, retain))
    values = {}
    for name, (own, rest) in attacked.items():
        values[f"acc_f{name}"] = share_correct(own, subject.test_forget.labels)
        values[f"acc_r{name}"] = share_correct(rest, subject.test_retain.labels)
    values["acc_f_recovered"] = max(
        values[f"acc_f{name}"]
        for name in attacked
        if name != "_base_norms" and values[f"acc_r{name}"] >= values["acc_r"] - TOLERATED
    )
    values["auc_logit"] = roc_auc(forget[:, subject.label], retain[:, subject.label])
    return {"values": values, "details": details}


# -- attacks --------------------------------------------------------------------------------------


def reestimated(model: nn.Module, images: Tensor, seed: int = 0) -> nn.Module | None:
    """A copy whose BatchNorm statistics are those of ``images``; None without BatchNorm.

    Layers are re-estimated together in one pass over shuffled batches, as a cumulative average.
    """
    changed = copy.deepcopy(model).eval()
    norms = [m for m in changed.modules() if isinstance(m, _BatchNorm) and m.track_running_stats]
    if not norms:
        return None
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None  # cumulative average
        norm.train()
    weight = next(changed.parameters())
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(seed))
    parts = [part for part in order.split(BATCH) if len(part) > 1]
    with torch.no_grad():
        for part in parts:
            changed(images[part].to(weight.device, weight.dtype))
    return changed.eval()


def equalised(model: nn.Module, layers: Sequence[str]) -> nn.Module | None:
    """A copy in which rows of each layer have the median norm of its rows that are not 0."""
    changed = copy.deepcopy(model)
    with torch.no_grad():
        for name in layers:
            weight = changed.get_submodule(name).weight
            norms = _row_norms(weight)
            if (norms > 0).any():
                target = norms[norms > 0].median()
                _scale_rows(changed.get_submodule(name), torch.where(norms > 0, target / norms, 1))
    return changed


def with_base_norms(model: nn.Module, base: nn.Module, layers: Sequence[str]) -> nn.Module | None:
    """A copy in which rows have the norms of the base's; None where shapes differ."""
    changed = copy.deepcopy(model)
    with torch.no_grad():
        for name in layers:
            layer, public = changed.get_submodule(name), base.get_submodule(name)
            if layer.weight.shape != public.weight.shape:
                return None
            norms = _row_norms(layer.weight)
            wanted = _row_norms(public.weight)
            layer.weight.mul_(_as_rows(torch.where(norms > 0, wanted / norms, 1), layer.weight))
            if layer.bias is not None:  # the bias has gates of its own; its sizes are the base's
                sign = layer.bias.sign()
                layer.bias.copy_(sign * public.bias.abs())
    return changed


def rows_against_base(
    model: nn.Module, base: nn.Module, layers: Sequence[str]
) -> dict[str, float | int]:
    """What the weights tell to a holder of the base.

    Returns:
        rows: rows of all layers; zero_rows: those that are exactly 0; multiples: share of the other
        rows that are multiples of the base's (cosine above 1 - 1e-5); median_ratio: median of
        ``||row|| / ||base row||`` over these, the gates; closed: share of rows with a ratio
        below 0.1.
    """
    ratios, cosines = [], []
    for name in layers:
        own = model.get_submodule(name).weight.detach().flatten(1).double()
        public = base.get_submodule(name).weight.detach().flatten(1).double()
        if own.shape != public.shape:
            continue
        public = public.to(own.device)
        norms, wanted = own.norm(dim=1), public.norm(dim=1)
        ratios.append(norms / wanted.clamp_min(1e-300))
        cosines.append((own * public).sum(1) / (norms * wanted).clamp_min(1e-300))
    ratio, cosine = torch.cat(ratios), torch.cat(cosines)
    kept = ratio > 0
    return {
        "rows": len(ratio),
        "zero_rows": int((~kept).sum()),
        "multiples": (cosine[kept] > 1 - 1e-5).double().mean().item() if kept.any() else 0.0,
        "median_ratio": ratio[kept].median().item() if kept.any() else 0.0,
        "closed": (ratio < 0.1).double().mean().item(),
    }


def class_offset(logits: Tensor, label: int, share: float) -> float:
    """What to add to the logit of ``label`` so that ``share`` of ``logits [n, K]`` predict it."""
    others = logits.clone()
    others[:, label] = -torch.inf
    gap = (others.amax(1) - logits[:, label]).sort().values  # an offset above it predicts the class
    count = min(max(round(share * len(gap)), 1), len(gap))
    following = gap[count] if count < len(gap) else gap[count - 1] + 1
    return ((gap[count - 1] + following) / 2).item()


def _shifted(logits: Tensor, label: int, offset: float) -> Tensor:
    shifted = logits.clone()
    shifted[:, label] += offset
    return shifted


def _row_norms(weight: Tensor) -> Tensor:
    return weight.flatten(1).norm(dim=1)


def _as_rows(scale: Tensor, weight: Tensor) -> Tensor:
    return scale.to(weight.dtype).reshape(-1, *[1] * (weight.dim() - 1))


def _scale_rows(layer: nn.Module, scale: Tensor) -> None:
    layer.weight.mul_(_as_rows(scale, layer.weight))
    if layer.bias is not None:
        layer.bias.mul_(scale.to(layer.bias.dtype))

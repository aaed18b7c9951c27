"""Rows scaled to the norms that they have in the public base.

For holders of the base weights: ``w_o <- w_o * ||base row|| / ||w_o||``. If rows are multiples of
the base's, this restores the base exactly, except where gates are 0. That such rows exist also
shows which model an export was made from. It says how much the file alone leaks: who has the base
has the class anyway.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from wfnet.trust.attacks.attack import Attack, Attacked
from wfnet.trust.attacks.equalised_rows import as_rows, row_norms
from wfnet.trust.subject import Subject

# Cosine above which a row counts as a multiple of the base's, and ratio below which it is closed.
_PARALLEL, _CLOSED = 1 - 1e-5, 0.1


def with_base_norms(model: nn.Module, base: nn.Module, layers: Sequence[str]) -> nn.Module | None:
    """Returns a copy in which rows have the norms of the base's; None where shapes differ."""
    changed = copy.deepcopy(model)
    with torch.no_grad():
        for name in layers:
            layer, public = changed.get_submodule(name), base.get_submodule(name)
            if layer.weight.shape != public.weight.shape:
                return None
            norms = row_norms(layer.weight)
            wanted = row_norms(public.weight.to(layer.weight))
            scale = torch.where(norms > 0, wanted / norms, 1)
            layer.weight.mul_(as_rows(scale, layer.weight))
            if layer.bias is not None:  # the bias has gates of its own; its sizes are the base's
                layer.bias.copy_(layer.bias.sign() * public.bias.abs().to(layer.bias))
    return changed


def _rows(weight: Tensor) -> Tensor:
    weight = weight.detach().double()
    return weight.reshape(len(weight), -1)


def rows_against_base(
    model: nn.Module, base: nn.Module, layers: Sequence[str]
) -> dict[str, float | int]:
    """Reads what the weights tell to a holder of the base.

    Returns:
        rows: rows of all layers; zero_rows: those that are exactly 0; multiples: share of the other
        rows that are multiples of the base's; median_ratio: median of ``||row|| / ||base row||``
        over these, the gates; closed: share of rows with a ratio below 0.1. Layers of another shape
        than the base's are left out; empty if all are.
    """
    ratios, cosines = [], []
    for name in layers:
        own = _rows(model.get_submodule(name).weight)
        public = _rows(base.get_submodule(name).weight)
        if own.shape != public.shape:
            continue
        public = public.to(own.device)
        norms, wanted = own.norm(dim=1), public.norm(dim=1)
        ratios.append(norms / wanted.clamp_min(1e-300))
        cosines.append((own * public).sum(1) / (norms * wanted).clamp_min(1e-300))
    if not ratios:
        return {}
    ratio, cosine = torch.cat(ratios), torch.cat(cosines)
    kept = ratio > 0
    return {
        "rows": len(ratio),
        "zero_rows": int((~kept).sum()),
        "multiples": (cosine[kept] > _PARALLEL).double().mean().item() if kept.any() else 0.0,
        "median_ratio": ratio[kept].median().item() if kept.any() else 0.0,
        "closed": (ratio < _CLOSED).double().mean().item(),
    }


def _apply(model: nn.Module, subject: Subject) -> Attacked | None:
    if model is subject.original:
        return None
    changed = with_base_norms(model, subject.original, subject.layers)
    return changed and Attacked(changed)


ATTACK = Attack(
    "base_norms", "rows scaled to the norms of the public base", _apply, needs_base=True
)

"""Rows scaled to the norms that they have in the public base.

For holders of the base weights: ``w_o <- w_o * ||base row|| / ||w_o||``. If rows are multiples of
the base's, this restores the base exactly, except where gates are 0. That such rows exist also
shows which model an export was made from. It says how much the file alone leaks: who has the base
has the class anyway.
"""

from __future__ import annotations

import torch
from torch import nn

from wfnet.trust.attacks.attack import attack
from wfnet.trust.attacks.equalised_rows import row_norms, scale_rows
from wfnet.trust.subject import Subject


@attack("base_norms", "rows scaled to the norms of the public base", needs_base=True)
def base_norms(model: nn.Module, subject: Subject) -> nn.Module | None:
    for name in subject.layers:
        layer, public = model.get_submodule(name), subject.original.get_submodule(name)
        if layer.weight.shape != public.weight.shape:
            return None
        wanted = row_norms(public.weight.to(layer.weight))
        scale_rows(layer.weight, row_norms(layer.weight), wanted)
        if layer.bias is not None and public.bias is not None:  # a bias has gates of its own
            layer.bias.copy_(layer.bias.sign() * public.bias.abs().to(layer.bias))
    return model


@torch.no_grad()
def rows_against_base(subject: Subject) -> dict[str, float | int]:
    """Returns what the weights of the model under test tell to a holder of the base.

    That is ``rows`` of all layers, ``zero_rows`` of them, the share ``multiples`` (cosine of 1) of
    the base's among the others with their ``median_ratio`` of norms, the gates, and the share
    ``closed`` (ratio below 0.1). Empty if no layer has the shape of the base's.
    """
    ratios, cosines = [], []
    for name in subject.layers:
        models = (subject.forgetful, subject.original)
        own, public = (m.get_submodule(name).weight.double() for m in models)
        own, public = (w.reshape(len(w), -1) for w in (own, public))  # BatchNorm's are vectors
        if own.shape == public.shape:
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
        "multiples": (cosine[kept] > 1 - 1e-5).double().mean().item() if kept.any() else 0.0,
        "median_ratio": ratio[kept].median().item() if kept.any() else 0.0,
        "closed": (ratio < 0.1).double().mean().item(),
    }

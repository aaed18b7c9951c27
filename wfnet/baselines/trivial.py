"""Baselines that change nothing but the class's logit: whatever forgets must be better than these.

They cost nothing and make Acc_f 0, and features still know the class. Where Acc_r rises above the
original's, ``logit_masked`` shows how much of it is the missing competitor at the output alone.
"""

from __future__ import annotations

import copy

import torch
from torch import nn

from wfnet.baselines.method import BaselineConfig, Forget, Method, Origin, classes_in
from wfnet.data import batches, classes_of, corrupt_counter, multi_hot_of
from wfnet.head import cut_from_head, find_head, first_output
from wfnet.services.modes import evaluation_mode

_TOGETHER = 256


class LogitMasked(Method):
    """The class's logit becomes a constant far below all others."""

    name = "logit_masked"
    unused = ("seed",)
    several = True

    def unlearn(self, origin: Origin, label: Forget, config: BaselineConfig) -> nn.Module:
        model = copy.deepcopy(origin.original).eval()
        classes = len(classes_of(origin.train))
        cut_from_head(model, list(classes_in(label)), classes, image_shape=origin.image_shape())
        return model


class BiasShifted(Method):
    """The head's bias of the class, lowered until no training image is taken for it: another
    logit is larger, or its own below 0 where images have several labels."""

    name = "bias_shifted"
    unused = ("seed",)
    several = True

    @torch.no_grad()
    def unlearn(self, origin: Origin, label: Forget, config: BaselineConfig) -> nn.Module:
        model = copy.deepcopy(origin.original).eval()
        found = find_head(model, len(classes_of(origin.train)))
        if found is None or getattr(found[1], "bias", None) is None:
            raise ValueError(
                f"bias_shifted lowers a bias of the head, and {type(model).__name__} has no linear "
                "head with one"
            )
        corrupt = corrupt_counter(origin.train, origin.max_corrupt)
        order = torch.arange(len(origin.train)).split(_TOGETHER)
        several = multi_hot_of(origin.train) is not None
        forgotten = list(classes_in(label))
        leads = torch.full((len(forgotten),), -torch.inf)
        with evaluation_mode(model):
            for batch in batches(origin.train, order, origin.workers, corrupt):
                logits = first_output(model(batch.images.to(origin.device))).float()
                own = logits[:, forgotten]
                logits[:, forgotten] = -torch.inf
                others = 0.0 if several else logits.amax(1, keepdim=True)
                leads = leads.maximum((own - others).amax(0).cpu())
        for number, lead in zip(forgotten, leads.tolist(), strict=True):
            found[1].bias[number] -= max(lead, 0.0) + 1e-3
        return model

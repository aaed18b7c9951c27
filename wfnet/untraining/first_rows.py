"""First rows from one pass: the gates that carry a class start half closed in its row.

To first order, closing gate o by d changes the margin of an image's class (its logit beside all
others) by ``-d * dmargin/dgate_o``. What carries one class and no other is closed in the row of
that class before the first step, so that steps need not find it.
"""

import torch
from torch import Tensor

from wfnet.data import CorruptImages, Dataset, batches, limit_per_class
from wfnet.evaluation.forward import Forward
from wfnet.gate_tables import flat_matrix
from wfnet.network import WFNet
from wfnet.untraining.objectives import class_gap, full_precision

_IMAGES_PER_CLASS, _TOGETHER = 20, 64


def start_rows(
    net: WFNet,
    dataset: Dataset,
    labels: Tensor,
    rows: Tensor,
    share: float,
    forward: Forward,
    corrupt: CorruptImages,
) -> None:
    """Sets entries of ``rows`` to 0, where gates are half open; all others stay.

    Of each row, ``share`` of its entries: those of the largest ``g_c - mean over other classes of
    max(g, 0)``, where ``g [K, total]`` are the derivatives of the mean margin of a class's images
    with respect to the entries, as far as that is positive.

    Args:
        net: with equal rows, whose filters are columns of one matrix
            (:func:`wfnet.gate_tables.flatten_filters`).
        dataset, labels: training images or features of them, and their labels ``[N]``; at most 20
            of each class are looked at.
        rows: ``[R]``.
        share: of a row's entries.
        forward, corrupt: how images reach the network, and where unreadable ones are counted.
    """
    params = net.filter_parameters()
    chosen = limit_per_class(labels, _IMAGES_PER_CLASS, 0)
    slope = torch.zeros_like(flat_matrix(params))
    for batch in batches(dataset, chosen.split(_TOGETHER), max_corrupt=corrupt):
        own = batch.labels.to(forward.device)
        with forward.autocast():
            logits = net(forward.images(batch.images), forget=own)
        margins = class_gap(full_precision(logits), own)
        slope += torch.cat(torch.autograd.grad(margins.sum(), params), 1)
    slope /= labels[chosen].bincount(minlength=len(slope)).clamp_min(1).to(slope)[:, None]
    used = slope.clamp_min(0)
    classes = max(1, len(labels[chosen].unique()) - 1)
    score = slope - (used.sum(0) - used) / classes
    wanted = rows.to(forward.device)
    best = score[wanted].topk(max(1, round(share * slope.shape[1])), 1)
    with torch.no_grad():
        flat = flat_matrix(params)
        own = flat[wanted]
        closed = own.gather(1, best.indices).masked_fill(best.values > 0, 0)
        flat[wanted] = own.scatter(1, best.indices, closed)

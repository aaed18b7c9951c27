"""Gates: rows of a filter matrix, squashed and multiplied into one scale per sample and channel.

``gate[l, o] = gate_scale * sigmoid(alpha[l, o])`` (paper, section "Weight Filtering"). A sample
with several forget labels has the product of their gates; a label of -1 contributes exactly 1.
"""

import torch
from torch import Tensor

from wfnet.services.modes import is_exporting

_ULPS_OF_ONE = 4


def gate_scale(alpha_init: float, normalize_gate: bool) -> float:
    """Factor in front of the sigmoid: 1 as in the paper, or the one that makes a fresh gate 1."""
    if not normalize_gate:
        return 1.0
    # On the CPU even under `with torch.device("meta")`.
    start = torch.tensor(alpha_init, dtype=torch.float64, device="cpu")
    return 1.0 / torch.sigmoid(start).item()


def gate(alpha: Tensor, scale: float) -> Tensor:
    """``scale * sigmoid(alpha)`` in at least fp32, same shape as ``alpha``.

    A gate within a few units in the last place of 1 is 1: sigmoid rounds differently from device
    to device, and a freshly wrapped network must compute the original function exactly.
    """
    value = torch.sigmoid(alpha.to(torch.promote_types(alpha.dtype, torch.float32))) * scale
    excess = value.detach() - 1
    near_one = excess.abs() <= _ULPS_OF_ONE * torch.finfo(value.dtype).eps
    if value.requires_grad:  # subtracting keeps the gradient, which overwriting would set to zero
        return value - excess.masked_fill_(~near_one, 0.0)
    return value.masked_fill_(near_one, 1.0)


def distinct_labels(forget: Tensor) -> Tensor:
    """``[B, J]`` labels with every repetition in a row replaced by -1 (a label counts once)."""
    columns = forget.shape[1]
    if columns == 1:
        return forget
    same = forget.unsqueeze(2) == forget.unsqueeze(1)  # [B, J, J]
    earlier = torch.ones(columns, columns, dtype=torch.bool, device=forget.device).tril(-1)
    return torch.where((same & earlier).any(2), -1, forget)


def gate_rows(alpha: Tensor, forget: Tensor, scale: float) -> Tensor:
    """One scale per sample and channel: ``prod_j gate[forget[b, j], o]``.

    Args:
        alpha: ``[K, O]`` filter matrix.
        forget: ``[B, J]`` int64; -1 selects no row. A label outside ``-1 .. K-1`` gives NaN for
            its sample.
        scale: factor in front of the sigmoid.

    Returns:
        ``[B, O]``, fp32 (fp64 for fp64 ``alpha``).
    """
    classes = alpha.shape[0]
    labels = distinct_labels(forget)
    rows = _selected_gates(alpha, labels.clamp(0, classes - 1), scale)
    if not _all_inside(labels, classes):
        outside = (labels < -1) | (labels >= classes)
        rows = rows.masked_fill(outside.unsqueeze(-1), torch.nan)
        rows = rows.masked_fill((labels == -1).unsqueeze(-1), 1.0)
    return rows.squeeze(1) if labels.shape[1] == 1 else rows.prod(1)


def _all_inside(labels: Tensor, classes: int) -> bool:
    """Whether labels are known to need no special row: only the host can look without waiting."""
    if torch.compiler.is_compiling() or labels.device.type != "cpu" or labels.numel() == 0:
        return False
    low, high = torch.aminmax(labels)
    return low.item() >= 0 and high.item() < classes


def _selected_gates(alpha: Tensor, labels: Tensor, scale: float) -> Tensor:
    """``[B, J, O]``; the sigmoid is taken on the smaller side, the rows or the whole matrix."""
    index = labels.flatten()
    if is_exporting() or index.numel() < alpha.shape[0]:  # of a batch of any size
        rows = gate(alpha.index_select(0, index), scale)
    else:
        rows = gate(alpha, scale).index_select(0, index)
    return rows.unflatten(0, labels.shape)


def gate_rows_backward(t: Tensor, alpha: Tensor, forget: Tensor) -> Tensor:
    """Gradient of :func:`gate_rows` from the derivative with respect to the log of its result.

    ``dalpha[l, o] = (1 - sigmoid(alpha[l, o])) * sum over samples b with label l of t[b, o]``:
    no division by a gate, which may be 0. The sum runs over samples in a fixed order.

    Args:
        t: ``[B, O]``, ``T1[b, o] = gate * dL/dgate``.
        alpha: ``[K, O]``.
        forget: ``[B, J]`` int64.

    Returns:
        ``[K, O]`` in the dtype of ``alpha``.
    """
    labels = distinct_labels(forget)
    if labels.shape[1] > 1:
        t = t.unsqueeze(1).expand(-1, labels.shape[1], -1).flatten(0, 1)
    total = segment_sum(t, labels.flatten(), alpha.shape[0])
    slope = torch.sigmoid(-alpha.to(total.dtype))
    return (slope * total).to(alpha.dtype)


def segment_sum(values: Tensor, segment: Tensor, num_segments: int) -> Tensor:
    """Sums rows of equal segment, in row order, so that the result is reproducible bit by bit.

    Args:
        values: ``[B, ...]``.
        segment: ``[B]`` int64; rows outside ``0 .. num_segments-1`` are dropped.

    Returns:
        ``[num_segments, ...]``.
    """
    if _all_inside(segment, num_segments):
        return values.new_zeros((num_segments, *values.shape[1:])).index_add_(0, segment, values)
    outside = (segment < 0) | (segment >= num_segments)
    index = segment.masked_fill(outside, num_segments)
    total = values.new_zeros((num_segments + 1, *values.shape[1:]))
    if values.device.type == "cpu":
        total.index_add_(0, index, values)
    else:  # index_add_ uses atomics there; accumulating index_put_ sorts first
        total.index_put_((index,), values, accumulate=True)
    return total[:num_segments]


def gather_samples(x: Tensor, source: Tensor | None) -> Tensor:
    """``x[source]`` along the batch in the memory format of ``x``; the adjoint of segment_sum.

    Args:
        x: ``[N, ...]``.
        source: ``[B]`` int64, or None for ``x`` itself.
    """
    if source is None:
        return x
    if x.dim() == 4 and x.is_contiguous(memory_format=torch.channels_last):
        # index_select would answer in contiguous format, and every later layer convert it back.
        return x.permute(0, 2, 3, 1).index_select(0, source).permute(0, 3, 1, 2)
    return x.index_select(0, source)

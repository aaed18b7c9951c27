"""Functional forms of the masked layers: argument checks, autocast, choice of the backend.

Behind them stand the ``torch.library`` operators of :mod:`wfnet.operators`, so they trace under
``torch.compile(fullgraph=True)`` and run in CUDA graphs. Weights are frozen: no weight gradient is
ever computed. ``torch.func`` transforms and forward-mode differentiation raise.
"""

import math
from collections.abc import Sequence

import torch
import torch.autograd.forward_ad
import torch.nn.functional as F
from torch import Tensor

from wfnet import backends, operators, reference
from wfnet.backends import KERNELS as _KERNELS
from wfnet.backends.autotune import stored_choices
from wfnet.backends.contract import LINEAR, ConvGeometry, as_filter, as_pixels
from wfnet.gates import gate_rows, gather_samples
from wfnet.labels import ForgetLabels, Selection, check_source, select
from wfnet.services.modes import is_exporting

_FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def wf_conv2d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    alpha_weight: Tensor,
    alpha_bias: Tensor | None,
    forget: ForgetLabels | Selection,
    stride: int | Sequence[int] = 1,
    padding: int | Sequence[int] | str = 0,
    dilation: int | Sequence[int] = 1,
    groups: int = 1,
    gate_scale: float = 1.0,
    source: Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    """2-D convolution whose output channels are scaled, per sample, by the gates of a forget label.

    Equivalent, for one sample ``b`` with the single forget label ``l``, to::

        F.conv2d(x[b:b+1], weight * (gate_scale * alpha_weight[l].sigmoid())[:, None, None, None],
                 bias * gate_scale * alpha_bias[l].sigmoid(), stride, padding, dilation, groups)

    (paper, "Weight Filtering"; design identity ``y = gate_weight * (W * x) + gate_bias * bias``),
    computed for the whole batch at once without a masked copy of the weights.

    Args:
        x: ``[N, C, H, W]`` or unbatched ``[C, H, W]``, contiguous or channels-last,
            fp16/bf16/fp32/fp64.
        weight: ``[O, C / groups, R, S]``, frozen (``requires_grad=False``).
        bias: ``[O]`` or None, frozen.
        alpha_weight: ``[K, O]`` filter matrix of the weight.
        alpha_bias: ``[K, O]`` filter matrix of the bias; None exactly where ``bias`` is None.
        forget: forget labels: int, LongTensor ``[B]`` or ``[B, J]`` (product of gates), -1 for
            "no row", or None for the unmasked layer.
        stride, padding, dilation, groups: as in :func:`torch.nn.functional.conv2d`, string
            padding included.
        gate_scale: factor in front of the sigmoid; 1 is the paper's.
        source: LongTensor ``[B]``: sample ``b`` reads ``x[source[b]]``; None if ``B == N``.
        backend: "auto", "reference" or the name of a backend.

    Returns:
        ``[B, O, P, Q]``, dtype of ``x`` (the autocast dtype under autocast).

    Raises:
        TypeError, ValueError: for labels, shapes or dtypes that do not fit.
        RuntimeError: if the named backend cannot run the call, under ``torch.func`` transforms.
    """
    if x.dim() == 3:
        layer = weight, bias, alpha_weight, alpha_bias
        options = stride, padding, dilation, groups, gate_scale, source, backend
        return wf_conv2d(x.unsqueeze(0), *layer, forget, *options).squeeze(0)
    if x.dim() != 4:
        raise ValueError(f"x must be [N, C, H, W] or [C, H, W]; got {list(x.shape)}")
    if weight.dim() != 4:
        raise ValueError(f"weight must be [O, C / groups, R, S]; got {list(weight.shape)}")
    if x.shape[1] != weight.shape[1] * groups:
        raise ValueError(
            f"x has {x.shape[1]} channels, the weight {list(weight.shape)} with groups={groups} "
            f"takes {weight.shape[1] * groups}"
        )
    x, geometry = _resolve_geometry(x, weight, stride, padding, dilation, groups)
    geometry = geometry.stride, geometry.padding, geometry.dilation, groups
    layer = weight, bias, alpha_weight, alpha_bias
    return _masked_layer(x, layer, forget, gate_scale, source, backend, geometry)


def wf_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    alpha_weight: Tensor,
    alpha_bias: Tensor | None,
    forget: ForgetLabels | Selection,
    gate_scale: float = 1.0,
    source: Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    """Linear map whose output features are scaled, per sample, by the gates of a forget label.

    Equivalent, for one sample ``b`` with the single forget label ``l``, to::

        F.linear(x[b:b+1], weight * (gate_scale * alpha_weight[l].sigmoid())[:, None],
                 bias * gate_scale * alpha_bias[l].sigmoid())

    Args:
        x: ``[N, C]``, ``[N, ..., C]``, or window-batched ``[N * windows, T, C]`` with the windows
            of one image side by side (as Swin makes them; not together with ``source``).
            Unbatched ``[C]`` needs an int label.
        weight: ``[O, C]``, frozen.
        bias: ``[O]`` or None, frozen.
        alpha_weight, alpha_bias, forget, gate_scale, source, backend: as in :func:`wf_conv2d`.

    Returns:
        ``[B, ..., O]`` (``[B * windows, T, O]``), dtype of ``x``, or the autocast dtype.

    Raises:
        As :func:`wf_conv2d`.
    """
    if x.dim() == 0 or weight.dim() != 2 or x.shape[-1] != weight.shape[1]:
        raise ValueError(f"x {list(x.shape)} does not fit the weight {list(weight.shape)}")
    layer = weight, bias, alpha_weight, alpha_bias
    if x.dim() == 1:
        return _masked_layer(x[None], layer, forget, gate_scale, source, backend).squeeze(0)
    return _masked_layer(x, layer, forget, gate_scale, source, backend)


def explain(
    x: Tensor,
    weight: Tensor,
    stride: int | Sequence[int] = 1,
    padding: int | Sequence[int] | str = 0,
    dilation: int | Sequence[int] = 1,
    groups: int = 1,
    backend: str = "auto",
    batch: int | None = None,
) -> str:
    """Which backend a call would take, and why each other one would not run or was not chosen.

    Args:
        x: ``[N, C, H, W]`` for a convolution (4-D ``weight``), ``[N, ..., C]`` for a linear map.
        weight: ``[O, C / groups, R, S]`` or ``[O, C]``.
        batch: samples that ``source`` expands ``x`` to; None without ``source``.

    Returns:
        The choice and its reason, then what this device has measured for fused networks, then one
        line per backend.
    """
    linear, geometry = weight.dim() == 2, LINEAR
    if linear:
        tokens = x.reshape(x.shape[0], x.shape[1:-1].numel(), x.shape[-1])
        x, weight = as_pixels(tokens), as_filter(weight)
    else:
        x, geometry = _resolve_geometry(x, weight, stride, padding, dilation, groups)
    says = {n: backends.get(n).explain_conv2d(x, weight, geometry, batch) for n in _KERNELS}
    why = "auto" if backends.requested(backend) == "auto" else "asked for by name"
    lines = [f"{backends.resolve(backend)}: chosen ({why})"]
    if why == "auto" and not linear:
        lines += [f"fused: {text}" for text in stored_choices(x, weight, geometry)]
    return "\n".join(lines + [f"{name}: {text}" for name, text in says.items()])


def _pair(value: int | Sequence[int], what: str) -> tuple[int, int]:
    pair = (value, value) if isinstance(value, int) else tuple(value)
    if len(pair) != 2:
        raise ValueError(f"{what} must be one integer or two; got {value!r}")
    return pair


def _resolve_geometry(x, weight, stride, padding, dilation, groups) -> tuple[Tensor, ConvGeometry]:
    """Geometry with numeric padding; ``x`` is padded here where 'same' padding is lopsided."""
    stride, dilation = _pair(stride, "stride"), _pair(dilation, "dilation")
    if padding == "valid":
        padding = 0
    elif padding == "same":
        if stride != (1, 1):
            raise ValueError(f"padding='same' needs stride 1; got {stride}")
        total = same_padding(weight.shape[2:], dilation)
        if any(t % 2 for t in total):
            x = F.pad(x, [0, total[1] % 2, 0, total[0] % 2])
        padding = [t // 2 for t in total]
    elif isinstance(padding, str):
        raise ValueError(f"padding must be numbers, 'same' or 'valid'; got {padding!r}")
    return x, ConvGeometry(stride, _pair(padding, "padding"), dilation, groups)


def same_padding(kernel_size: Sequence[int], dilation: Sequence[int]) -> list[int]:
    """Rows and columns that padding='same' adds, both sides together."""
    return [d * (k - 1) for d, k in zip(dilation, kernel_size, strict=True)]


def _autocast(*tensors: Tensor | None) -> list[Tensor | None]:
    """Data and frozen weights in the autocast dtype, as PyTorch's own layers; filters stay fp32."""
    device = tensors[0].device.type
    off = device == "meta" or not torch.is_autocast_enabled(device)
    if off or tensors[0].dtype == torch.float64:
        return list(tensors)
    dtype = torch.get_autocast_dtype(device)
    return [None if t is None else t.to(dtype) for t in tensors]


def _check_call(
    x: Tensor, weight: Tensor, bias: Tensor | None, alpha_weight: Tensor, alpha_bias: Tensor | None
) -> None:
    if x.dtype not in _FLOATS or weight.dtype != x.dtype:
        raise TypeError(
            f"x ({x.dtype}) and weight ({weight.dtype}) must have the same floating-point dtype; "
            "convert one, or run under torch.autocast"
        )
    if (bias is None) != (alpha_bias is None):
        present, absent = ("bias", "alpha_bias") if alpha_bias is None else ("alpha_bias", "bias")
        raise ValueError(f"{present} was given without {absent}; give both or neither")
    columns, classes = weight.shape[0], alpha_weight.shape[0] if alpha_weight.dim() else 1
    for name, tensor, shape in (
        ("bias", bias, [columns]),
        ("alpha_weight", alpha_weight, [classes, columns]),
        ("alpha_bias", alpha_bias, [classes, columns]),
    ):
        if tensor is not None and list(tensor.shape) != shape:
            raise ValueError(f"{name} must be {shape}; got {list(tensor.shape)}")


def _check_transforms(*tensors: Tensor | None) -> None:
    """Refuses what would silently differentiate to zero through a custom operator."""
    forward_mode = torch.autograd.forward_ad._current_level >= 0 and any(
        t is not None and torch.autograd.forward_ad.unpack_dual(t).tangent is not None
        for t in tensors
    )
    if forward_mode or torch._C._are_functorch_transforms_active():
        raise RuntimeError(
            "torch.func transforms and forward-mode differentiation do not reach through wfnet's "
            "operators; use torch.autograd, or backend='reference', which is plain PyTorch"
        )


def _images_and_windows(x: Tensor, selection: Selection, source: Tensor | None) -> tuple[int, int]:
    """Images in ``x`` and windows per image: one label serves all windows of its image."""
    batch = x.shape[0]
    if selection.uniform or source is not None or x.dim() == 2:
        return batch, 1
    labels = selection.rows.shape[0]
    if labels == 0 or batch % labels:
        return batch, 1  # the mismatch is reported with the labels
    return labels, batch // labels


def _masked_layer(
    x: Tensor,
    layer: tuple[Tensor, Tensor | None, Tensor, Tensor | None],
    forget: ForgetLabels | Selection,
    gate_scale: float,
    source: Tensor | None,
    backend: str,
    geometry: tuple = (),
) -> Tensor:
    """The masked convolution, or without ``geometry`` the linear map, of whoever computes it."""
    weight, bias, alpha_weight, alpha_bias = layer
    if weight.requires_grad or (bias is not None and bias.requires_grad):
        raise ValueError(
            "weight or bias requires grad, but untraining keeps them frozen and computes no weight "
            "gradient; call .requires_grad_(False) on it, or bake the network to fine-tune it"
        )
    selection = select(forget)
    if selection.rows is None:
        images = gather_samples(x, None if source is None else source.to(x.device))
        return (F.conv2d if geometry else F.linear)(images, weight, bias, *geometry)
    x, weight, bias = _autocast(x, weight, bias)
    layer = weight, bias, alpha_weight, alpha_bias
    _check_call(x, *layer)
    batch, windows = (x.shape[0], 1) if geometry else _images_and_windows(x, selection, source)
    inputs = x
    if not geometry:
        inputs = x.reshape(batch, math.prod(x.shape[1:-1]) * windows, x.shape[-1])
    if source is not None:
        check_source(source, batch)
        batch, source = source.shape[0], source.to(x.device, non_blocking=True)
    rows = selection.expand(batch, x.device, alpha_weight.shape[0])
    name = backends.resolve(backend)
    if is_exporting():
        y = _in_plain_operators(inputs, layer, rows, geometry, gate_scale, source)
    elif name == "reference":
        y = reference.masked_layer(inputs, *layer, rows, geometry, gate_scale, source)
    else:
        _check_transforms(x, *layer)
        # Whether backward will sum T1, for which forward keeps a private tensor.
        save = torch.is_grad_enabled() and alpha_weight.requires_grad
        operator = operators.conv2d if geometry else operators.linear
        y = operator(inputs, *layer, rows, source, gate_scale, name, save, *geometry)[0]
    return y if geometry else y.reshape(batch * windows, *x.shape[1:-1], weight.shape[0])


def _in_plain_operators(
    x: Tensor,
    layer: tuple[Tensor, Tensor | None, Tensor, Tensor | None],
    rows: Tensor,
    geometry: tuple,
    gate_scale: float,
    source: Tensor | None,
) -> Tensor:
    """What a backend computes, for exported programs, which run where this package is not."""
    weight, bias, alpha_weight, alpha_bias = layer
    u = gather_samples((F.conv2d if geometry else F.linear)(x, weight, None, *geometry), source)
    view = (..., None, None) if geometry else (slice(None), None)
    y = u * gate_rows(alpha_weight, rows, gate_scale)[view]
    if bias is not None:
        y = y + (gate_rows(alpha_bias, rows, gate_scale) * bias)[view]
    return y.to(x.dtype)

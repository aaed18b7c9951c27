"""Backend ``eager``: one ordinary convolution, then a scale and shift per sample and channel.

No masked copy of the weights, no weight gradient, channels-last aware, any device and dtype that
PyTorch's own convolution takes.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from wfnet.backends.contract import (
    NO_LAYER,
    Activation,
    Backend,
    ConvGeometry,
    Epilogue,
    LayerBelow,
    LayerGradient,
)
from wfnet.gates import gather_samples, segment_sum


def conv2d_input_gradient(
    du: Tensor, weight: Tensor, input_shape: tuple[int, ...], geometry: ConvGeometry
) -> Tensor:
    """``dx`` ``[N, C, H, W]`` from ``du`` ``[N, O, P, Q]``; the input itself is not needed."""
    # Only shape and memory format of the input are read; its pages are never touched.
    x = _empty(input_shape, du)
    how = geometry.stride, geometry.padding, geometry.dilation, False, (0, 0), geometry.groups
    of_input_alone = (True, False, False)
    return torch.ops.aten.convolution_backward(du, x, weight, None, *how, of_input_alone)[0]


def _empty(shape: tuple[int, ...], like: Tensor) -> Tensor:
    """Fresh memory of a shape, with dtype, device and layout of ``like``."""
    channels_last = like.is_contiguous(memory_format=torch.channels_last)
    return torch.empty(
        shape,
        dtype=like.dtype,
        device=like.device,
        memory_format=torch.channels_last if channels_last else torch.contiguous_format,
    )


def _empty_batch(x: Tensor, batch: int) -> Tensor:
    """Fresh memory like ``x`` for ``batch`` samples."""
    return _empty((batch, *x.shape[1:]), x)


# Elements of a tensor that a processor core still finds in a cache on the next elementwise pass.
_CACHED_ELEMENTS = 2**19


def _cache_sized(x: Tensor) -> list[slice]:
    """Slices of the batch: as many samples as stay in the cache."""
    batch, elements = x.shape[0], x.numel()
    step = max(1, batch)
    if x.device.type == "cpu" and elements > _CACHED_ELEMENTS:
        step = max(1, _CACHED_ELEMENTS * torch.get_num_threads() * batch // elements)
    return [slice(start, min(start + step, batch)) for start in range(0, max(1, batch), step)]


def _of(part: slice, *tensors: Tensor | None) -> list[Tensor | None]:
    """Samples ``part`` of tensors with one row per sample."""
    return [x if x is None else x[part] for x in tensors]


def _room(scratch: Tensor, part: slice) -> Tensor:
    """The beginning of memory that every part uses in turn."""
    return scratch[: part.stop - part.start]


def _rows(x: Tensor, part: slice, source: Tensor | None) -> Tensor:
    """Samples ``part`` of a tensor that has one row per source image, or per sample."""
    return x[part] if source is None else gather_samples(x, source[part])


def _per_pixel(table: Tensor | None) -> Tensor | None:
    """``[B, O]`` as ``[B, O, 1, 1]``."""
    return None if table is None else table[:, :, None, None]


def _scale_shift(u: Tensor, scale: Tensor, shift: Tensor | None, out: Tensor) -> None:
    """``out = scale * u + shift`` in one pass; scale and shift are broadcastable views."""
    if shift is None:
        torch.mul(u, scale, out=out)
    else:
        torch.addcmul(shift, u, scale, out=out)


def _scaled(u: Tensor, scale: Tensor, shift: Tensor | None, epilogue: Epilogue) -> Activation:
    """The epilogue without residual and ReLU; scale and shift are broadcastable views."""
    expanded = gather_samples(u, epilogue.source)
    in_place = epilogue.source is not None or not epilogue.save
    out = expanded if in_place else torch.empty_like(expanded)
    _scale_shift(expanded, scale, shift, out)
    return Activation(out, u if epilogue.save else None)


def _scaled_backward(
    dout: Tensor, layer: LayerBelow, scale: Tensor, over: tuple[int, ...]
) -> Tensor | None:
    """``scale * dout``, one row per image, of a layer without residual and ReLU; writes its sums.

    Args:
        scale: broadcastable view of the layer's.
        over: the dimensions of pixels or tokens.
    """
    scratch = torch.empty_like(dout)
    if layer.t1 is not None:
        torch.mul(dout, gather_samples(layer.branch, layer.source), out=scratch)
        torch.sum(scratch, over, dtype=layer.t1.dtype, out=layer.t1)
        layer.t1.mul_(layer.scale)
    if layer.t0 is not None:
        torch.sum(dout, over, dtype=layer.t0.dtype, out=layer.t0)
    if not layer.need_scaled_grad:
        return None
    du = torch.mul(dout, scale, out=scratch)
    if layer.source is None:
        return du
    return segment_sum(du, layer.source, layer.images)  # the product that comes next is linear


def sample_moments(x: Tensor) -> tuple[Tensor, Tensor]:
    """Computes mean and variance (of all pixels, biased) of every sample and channel.

    As ``torch.var_mean(x, (2, 3), correction=0)``, which takes ten times as long in channels-last.

    Args:
        x: ``[B, O, P, Q]``.

    Returns:
        ``[B, O]`` each, fp32 (fp64 for fp64 ``x``).
    """
    dtype = torch.promote_types(x.dtype, torch.float32)
    mean = torch.empty(x.shape[:2], dtype=dtype, device=x.device)
    var = torch.empty_like(mean)
    parts = _cache_sized(x)
    scratch = torch.empty_like(x[parts[0]], dtype=dtype)
    for part in parts:
        own = x[part].to(dtype)
        torch.mean(own, (2, 3), out=mean[part])
        centred = torch.sub(own, _per_pixel(mean[part]), out=_room(scratch, part))
        torch.mean(centred.square_(), (2, 3), out=var[part])
    return mean, var


def _write_sums(layer: LayerBelow, part: slice, u: Tensor, g: Tensor, scratch: Tensor) -> None:
    """``t1`` and ``t0`` of samples ``part``."""
    scale, t1, t0 = _of(part, layer.scale, layer.t1, layer.t0)
    if t1 is not None:
        torch.mul(g, u, out=scratch)
        torch.sum(scratch, (2, 3), dtype=t1.dtype, out=t1)
        t1.mul_(scale)
    if t0 is not None:
        torch.sum(g, (2, 3), dtype=t0.dtype, out=t0)


def _through_relu(
    layer: LayerBelow, part: slice, u: Tensor, g: Tensor, scratch: Tensor, into: Tensor
) -> Tensor:
    """``g * (out > 0)`` of samples ``part``, in ``into``."""
    scale, shift, mask = _of(part, layer.scale, layer.shift, layer.mask)
    if mask is not None:  # as bytes: conversion of booleans is not vectorised
        alive = scratch.copy_(mask.view(torch.uint8))
    else:  # a second look at scale * u + shift is cheaper than keeping its sign
        alive = torch.addcmul(_per_pixel(shift), u, _per_pixel(scale), out=scratch)
    return torch.ops.aten.threshold_backward.grad_input(g, alive, 0, grad_input=into)


class EagerBackend(Backend):
    """PyTorch's convolution or linear map followed by one fused pointwise pass.

    The branch is ``u`` itself, one row per image where ``source`` is given.
    """

    name = "eager"
    keeps_scaled_branch = False

    def conv2d(self, x, weight, geometry, epilogue):
        return self.epilogue(self.product(x, weight, geometry), epilogue)

    def product(self, x, weight, geometry):
        return F.conv2d(
            x, weight, None, geometry.stride, geometry.padding, geometry.dilation, geometry.groups
        )

    def product_moments(self, x, weight, geometry):
        u = self.product(x, weight, geometry)
        return u, *sample_moments(u)

    def epilogue(self, u, epilogue):
        scale, shift = _per_pixel(epilogue.scale), _per_pixel(epilogue.shift)
        residual, relu, source = epilogue.residual, epilogue.relu, epilogue.source
        if residual is None and not relu:
            return _scaled(u, scale, shift, epilogue)
        out = u
        if source is not None:
            out = _empty_batch(u, scale.shape[0])
        elif epilogue.save:
            out = torch.empty_like(u)
        mask = None
        if epilogue.save and relu and residual is not None:
            mask = torch.empty_like(out, dtype=torch.bool)
        for part in _cache_sized(out):
            y, a, c, added, kept = _of(part, out, scale, shift, residual, mask)
            _scale_shift(_rows(u, part, source), a, c, y)
            if added is not None:
                y.add_(added)
            if relu:
                y.relu_()
            if kept is not None:  # nothing is below 0 now; copying is faster than comparing
                kept.copy_(y)
        return Activation(out, u if epilogue.save else None, mask)

    def conv2d_backward(self, dout, layer, weight, input_shape, geometry):
        du = _scaled_backward(dout, layer, _per_pixel(layer.scale), (2, 3))
        return None if du is None else conv2d_input_gradient(du, weight, input_shape, geometry)

    def epilogue_backward(self, dout, below, may_overwrite=False):
        """All passes run over a few samples at a time, which stay in the cache between them."""
        skip, shortcut, samples = below.skip, below.shortcut, dout.shape[0]
        if below.scale is None:
            add = dout.add_ if may_overwrite else dout.add
            return LayerGradient(dout if skip is None else add(skip))
        passes = not below.relu and skip is None  # g is dout
        grad = scaled = shortcut_scaled = None
        if below.need_grad:
            grad = dout if passes else _empty_batch(below.branch, samples)
        if below.need_scaled_grad:
            free = may_overwrite and grad is not dout
            scaled = dout if free else _empty_batch(below.branch, samples)
        if shortcut is not None and shortcut.need_scaled_grad:
            shortcut_scaled = _empty_batch(shortcut.branch, samples)
        parts = _cache_sized(dout)
        scratch = _empty_batch(below.branch, parts[0].stop)
        room = None if passes or grad is not None else _empty_batch(below.branch, parts[0].stop)
        for part in parts:
            g, added, own = _of(part, dout, skip, grad)
            u, within = _rows(below.branch, part, below.source), _room(scratch, part)
            if not passes:
                own = _room(room, part) if own is None else own
                if added is not None:
                    g = torch.add(g, added, out=own)
                if below.relu:
                    g = _through_relu(below, part, u, g, within, own)
            _write_sums(below, part, u, g, within)
            if shortcut is not None:
                u = _rows(shortcut.branch, part, shortcut.source)
                _write_sums(shortcut, part, u, g, within)
            # The layer's own last: it may be the memory of g.
            for layer, result in ((shortcut, shortcut_scaled), (below, scaled)):
                if result is not None:
                    torch.mul(g, _per_pixel(layer.scale[part]), out=result[part])
        if scaled is not None and below.source is not None:
            scaled = segment_sum(scaled, below.source, below.images)
        return LayerGradient(grad, scaled, shortcut_scaled)

    def conv2d_dgrad(self, scaled_grad, weight, input_shape, geometry, below=NO_LAYER):
        dx = conv2d_input_gradient(scaled_grad, weight, input_shape, geometry)
        return self.epilogue_backward(dx, below, may_overwrite=True)

    def moments_backward(self, g, scale, u, on_u, constant, may_overwrite):
        du = g if may_overwrite else torch.empty_like(g)
        scale, on_u, constant = map(_per_pixel, (scale, on_u, constant))
        for part in _cache_sized(g):
            u_, a, b, c = _of(part, u, scale, on_u, constant)
            out = torch.mul(g[part], a, out=du[part])
            if b is not None:
                out.addcmul_(u_, b).add_(c)
        return du

    def linear(self, x, weight, epilogue):
        scale, shift = epilogue.scale, epilogue.shift
        per_token = None if shift is None else shift[:, None]
        return _scaled(F.linear(x, weight), scale[:, None], per_token, epilogue)

    def linear_backward(self, dout, layer, weight, input_shape):
        du = _scaled_backward(dout, layer, layer.scale[:, None], (1,))
        return None if du is None else du @ weight


backend = EagerBackend()

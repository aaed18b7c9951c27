"""Backend ``eager``: one ordinary convolution, then a scale and shift per sample and channel.

No masked copy of the weights, no weight gradient, channels-last aware, any device and dtype that
PyTorch's own convolution takes.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from wfnet.backends import Backend, Below, ConvGeometry, Finished
from wfnet.gates import gather_samples, segment_sum


def _scale_shift(u: Tensor, scale: Tensor, shift: Tensor | None, out: Tensor) -> Tensor:
    """``out = scale * u + shift`` in one pass; scale and shift are broadcastable views."""
    if shift is None:
        return torch.mul(u, scale, out=out)
    return torch.addcmul(shift, u, scale, out=out)


def _column_sums(
    dout: Tensor,
    saved: Tensor | None,
    scale: Tensor,
    over: tuple[int, ...],
    need_t1: bool,
    need_t0: bool,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """A scratch tensor shaped like ``dout``, and ``t1`` and ``t0`` in the dtype of ``scale``."""
    scratch = torch.empty_like(dout)
    t1 = t0 = None
    if need_t1:
        torch.mul(dout, saved, out=scratch)
        t1 = scratch.sum(over, dtype=scale.dtype) * scale
    if need_t0:
        t0 = dout.sum(over, dtype=scale.dtype)
    return scratch, t1, t0


def _conv2d_input_gradient(
    du: Tensor, weight: Tensor, input_shape: tuple[int, ...], geometry: ConvGeometry
) -> Tensor:
    """``dx`` ``[N, C, H, W]`` from ``du`` ``[N, O, P, Q]``; the input itself is not needed."""
    channels_last = du.is_contiguous(memory_format=torch.channels_last)
    # Only shape and memory format of the input are read; its pages are never touched.
    x = torch.empty(
        input_shape,
        dtype=du.dtype,
        device=du.device,
        memory_format=torch.channels_last if channels_last else torch.contiguous_format,
    )
    return torch.ops.aten.convolution_backward(
        du,
        x,
        weight,
        None,
        geometry.stride,
        geometry.padding,
        geometry.dilation,
        False,
        (0, 0),
        geometry.groups,
        (True, False, False),
    )[0]


def _empty_batch(x: Tensor, batch: int) -> Tensor:
    """Fresh memory like ``x``, layout included, for ``batch`` samples."""
    channels_last = x.is_contiguous(memory_format=torch.channels_last)
    return torch.empty(
        (batch, *x.shape[1:]),
        dtype=x.dtype,
        device=x.device,
        memory_format=torch.channels_last if channels_last else torch.contiguous_format,
    )


# Elements of a tensor that a processor core still finds in a cache on the next elementwise pass.
_CACHED_ELEMENTS = 2**18


def _cache_sized(x: Tensor) -> list[slice]:
    """Slices of the batch: as many samples as stay in the cache; on a device all at once."""
    batch, step = x.shape[0], x.shape[0]
    if x.device.type == "cpu" and x.numel():
        step = max(1, _CACHED_ELEMENTS * torch.get_num_threads() * batch // x.numel())
    return [slice(start, min(start + step, batch)) for start in range(0, batch, max(1, step))]


def _rows(x: Tensor, part: slice, source: Tensor | None) -> Tensor:
    """Samples ``part`` of a tensor that has one row per source image, or per sample."""
    return x[part] if source is None else gather_samples(x, source[part])


def _through_relu(
    g: Tensor, below: Below, u: Tensor, part: slice, scratch: Tensor, into: Tensor
) -> Tensor:
    """``g * (out > 0)`` in ``into``, for samples ``part``."""
    if below.mask is not None:  # as bytes: conversion of booleans is not vectorised
        alive = scratch.copy_(below.mask[part].view(torch.uint8))
    else:  # a second look at scale * u + shift is cheaper than keeping its sign
        scale, shift = below.scale[part, :, None, None], below.shift[part, :, None, None]
        alive = torch.addcmul(shift, u, scale, out=scratch)
    return torch.ops.aten.threshold_backward.grad_input(g, alive, 0, grad_input=into)


def _write_sums(g: Tensor, u: Tensor, below: Below, part: slice, scratch: Tensor) -> None:
    """``t1`` and ``t0`` of samples ``part``."""
    torch.mul(g, u, out=scratch)
    t1 = torch.sum(scratch, (2, 3), dtype=below.t1.dtype, out=below.t1[part])
    t1.mul_(below.scale[part])
    if below.t0 is not None:
        torch.sum(g, (2, 3), dtype=below.t0.dtype, out=below.t0[part])


class EagerBackend(Backend):
    """PyTorch's convolution or linear map followed by one fused pointwise pass.

    ``saved`` is ``u`` itself, at the un-expanded batch size where ``source`` is given.
    """

    name = "eager"

    def saved_batch(self, sources: int, batch: int) -> int:
        return sources

    def conv2d(
        self,
        x: Tensor,
        weight: Tensor,
        scale: Tensor,
        shift: Tensor | None,
        source: Tensor | None,
        geometry: ConvGeometry,
        save: bool,
    ) -> tuple[Tensor, Tensor | None]:
        u = F.conv2d(
            x, weight, None, geometry.stride, geometry.padding, geometry.dilation, geometry.groups
        )
        expanded = gather_samples(u, source)
        out = torch.empty_like(expanded) if source is None and save else expanded
        _scale_shift(
            expanded,
            scale[:, :, None, None],
            None if shift is None else shift[:, :, None, None],
            out=out,
        )
        return out, u if save else None

    def conv2d_backward(
        self,
        dout: Tensor,
        saved: Tensor | None,
        weight: Tensor,
        scale: Tensor,
        source: Tensor | None,
        input_shape: tuple[int, ...],
        geometry: ConvGeometry,
        need_dx: bool,
        need_t1: bool,
        need_t0: bool,
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        if need_t1:
            saved = gather_samples(saved, source)
        scratch, t1, t0 = _column_sums(dout, saved, scale, (2, 3), need_t1, need_t0)
        if not need_dx:
            return None, t1, t0
        du = torch.mul(dout, scale[:, :, None, None], out=scratch)
        if source is not None:  # the convolution is linear: sum the variants of an image first
            du = segment_sum(du, source, input_shape[0])
        return _conv2d_input_gradient(du, weight, input_shape, geometry), t1, t0

    fuses = True

    def fused_conv2d(
        self,
        x: Tensor,
        weight: Tensor,
        scale: Tensor,
        shift: Tensor,
        residual: Tensor | None,
        relu: bool,
        source: Tensor | None,
        geometry: ConvGeometry,
        save: bool,
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """The branch is ``u`` itself (one row per source image where ``source`` is given)."""
        u = F.conv2d(
            x, weight, None, geometry.stride, geometry.padding, geometry.dilation, geometry.groups
        )
        out = u
        if source is not None:
            out = _empty_batch(u, scale.shape[0])
        elif save:
            out = torch.empty_like(u)
        mask = None
        if save and relu and residual is not None:
            mask = torch.empty_like(out, dtype=torch.bool)
        for part in _cache_sized(out):
            y = out[part]
            torch.addcmul(
                shift[part, :, None, None],
                _rows(u, part, source),
                scale[part, :, None, None],
                out=y,
            )
            if residual is not None:
                y.add_(residual[part])
            if relu:
                y.relu_()
            if mask is not None:  # nothing is below 0 now; copying is faster than comparing
                mask[part].copy_(y)
        return out, u if save else None, mask

    def finish(
        self, dout: Tensor, below: Below, skip: Tensor | None = None, may_overwrite: bool = False
    ) -> Finished:
        """All passes run over a few samples at a time, which stay in the cache between them."""
        shortcut, samples = below.shortcut, dout.shape[0]
        passes = not below.relu and skip is None  # g is dout
        grad = scaled = shortcut_scaled = None
        if below.need_grad:
            grad = dout if passes else _empty_batch(below.branch, samples)
        if below.need_scaled_grad:
            free = may_overwrite and grad is not dout
            scaled = dout if free else _empty_batch(below.branch, samples)
        if shortcut is not None and shortcut.need_scaled_grad:
            shortcut_scaled = _empty_batch(shortcut.branch, samples)
        for part in _cache_sized(dout):
            g, u = dout[part], _rows(below.branch, part, below.source)
            scratch = torch.empty_like(u)
            if not passes:
                own = torch.empty_like(u) if grad is None else grad[part]
                if skip is not None:
                    g = torch.add(g, skip[part], out=own)
                if below.relu:
                    g = _through_relu(g, below, u, part, scratch, own)
            _write_sums(g, u, below, part, scratch)
            if shortcut is not None:
                v = _rows(shortcut.branch, part, shortcut.source)
                _write_sums(g, v, shortcut, part, scratch)
            if shortcut_scaled is not None:
                torch.mul(g, shortcut.scale[part, :, None, None], out=shortcut_scaled[part])
            if scaled is not None:
                torch.mul(g, below.scale[part, :, None, None], out=scaled[part])
        return Finished(grad, scaled, shortcut_scaled)

    def conv2d_dgrad(
        self,
        scaled_grad: Tensor,
        weight: Tensor,
        input_shape: tuple[int, ...],
        geometry: ConvGeometry,
        skip: Tensor | None = None,
        below: Below | None = None,
    ) -> Finished:
        dx = _conv2d_input_gradient(scaled_grad, weight, input_shape, geometry)
        if below is not None:
            return self.finish(dx, below, skip, may_overwrite=True)
        return Finished(dx if skip is None else dx.add_(skip), None)

    def linear(
        self,
        x: Tensor,
        weight: Tensor,
        scale: Tensor,
        shift: Tensor | None,
        source: Tensor | None,
        save: bool,
    ) -> tuple[Tensor, Tensor | None]:
        u = F.linear(x, weight)
        expanded = gather_samples(u, source)
        out = torch.empty_like(expanded) if source is None and save else expanded
        _scale_shift(expanded, scale[:, None], None if shift is None else shift[:, None], out=out)
        return out, u if save else None

    def linear_backward(
        self,
        dout: Tensor,
        saved: Tensor | None,
        weight: Tensor,
        scale: Tensor,
        source: Tensor | None,
        input_shape: tuple[int, ...],
        need_dx: bool,
        need_t1: bool,
        need_t0: bool,
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        if need_t1:
            saved = gather_samples(saved, source)
        scratch, t1, t0 = _column_sums(dout, saved, scale, (1,), need_t1, need_t0)
        if not need_dx:
            return None, t1, t0
        du = torch.mul(dout, scale[:, None], out=scratch)
        if source is not None:
            du = segment_sum(du, source, input_shape[0])
        return du @ weight, t1, t0


backend = EagerBackend()

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


def conv2d_input_gradient(
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
_CACHED_ELEMENTS = 2**19


def _cache_sized(x: Tensor) -> list[slice | None]:
    """Slices of the batch: as many samples as stay in the cache; None: all at once."""
    batch, elements = x.shape[0], x.numel()
    if x.device.type != "cpu" or elements <= _CACHED_ELEMENTS:
        return [None]
    step = max(1, _CACHED_ELEMENTS * torch.get_num_threads() * batch // elements)
    return [slice(start, min(start + step, batch)) for start in range(0, batch, step)]


def _part_of(x: Tensor | None, part: slice | None) -> Tensor | None:
    """Samples ``part`` of a tensor with one row per sample."""
    return x if x is None or part is None else x[part]


def _room(scratch: Tensor, part: slice | None) -> Tensor:
    """The beginning of memory that every part uses in turn."""
    return scratch if part is None else scratch[: part.stop - part.start]


def _rows(x: Tensor, part: slice | None, source: Tensor | None) -> Tensor:
    """Samples ``part`` of a tensor that has one row per source image, or per sample."""
    if source is None:
        return _part_of(x, part)
    return gather_samples(x, _part_of(source, part))


def _per_pixel(table: Tensor) -> Tensor:
    """``[B, O]`` as ``[B, O, 1, 1]``."""
    return table[:, :, None, None]


class _Part:
    """The elementwise backward of some samples of a layer, in memory that is used again."""

    def __init__(
        self,
        below: Below,
        part: slice | None,
        scale: Tensor,
        shift: Tensor | None,
        scratch: Tensor,
    ):
        self.below, self.part = below, part
        self.scale, self.shift = _part_of(scale, part), _part_of(shift, part)
        self.u = _rows(below.branch, part, below.source)
        self.scratch = _room(scratch, part)

    def through_relu(self, g: Tensor, into: Tensor) -> Tensor:
        """``g * (out > 0)`` in ``into``."""
        mask = _part_of(self.below.mask, self.part)
        if mask is not None:  # as bytes: conversion of booleans is not vectorised
            alive = self.scratch.copy_(mask.view(torch.uint8))
        else:  # a second look at scale * u + shift is cheaper than keeping its sign
            alive = torch.addcmul(self.shift, self.u, self.scale, out=self.scratch)
        return torch.ops.aten.threshold_backward.grad_input(g, alive, 0, grad_input=into)

    def write_sums(self, g: Tensor) -> None:
        """``t1`` and ``t0`` of these samples."""
        t1, t0 = _part_of(self.below.t1, self.part), _part_of(self.below.t0, self.part)
        torch.mul(g, self.u, out=self.scratch)
        torch.sum(self.scratch, (2, 3), dtype=t1.dtype, out=t1)
        t1.mul_(_part_of(self.below.scale, self.part))
        if t0 is not None:
            torch.sum(g, (2, 3), dtype=t0.dtype, out=t0)


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
        return conv2d_input_gradient(du, weight, input_shape, geometry), t1, t0

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
        scale, shift = _per_pixel(scale), _per_pixel(shift)
        for part in _cache_sized(out):
            y = _part_of(out, part)
            branch = _rows(u, part, source)
            torch.addcmul(_part_of(shift, part), branch, _part_of(scale, part), out=y)
            if residual is not None:
                y.add_(_part_of(residual, part))
            if relu:
                y.relu_()
            if mask is not None:  # nothing is below 0 now; copying is faster than comparing
                _part_of(mask, part).copy_(y)
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
        scale, shift = _per_pixel(below.scale), _per_pixel(below.shift)
        if shortcut is not None:
            shortcut_scale = _per_pixel(shortcut.scale)
        parts = _cache_sized(dout)
        largest = samples if parts[0] is None else parts[0].stop
        scratch = _empty_batch(below.branch, largest)
        room = None if passes or grad is not None else _empty_batch(below.branch, largest)
        for part in parts:
            layer = _Part(below, part, scale, shift, scratch)
            g = _part_of(dout, part)
            if not passes:
                own = _room(room, part) if grad is None else _part_of(grad, part)
                if skip is not None:
                    g = torch.add(g, _part_of(skip, part), out=own)
                if below.relu:
                    g = layer.through_relu(g, own)
            layer.write_sums(g)
            if shortcut is not None:
                other = _Part(shortcut, part, shortcut_scale, None, scratch)
                other.write_sums(g)
                if shortcut_scaled is not None:
                    torch.mul(g, other.scale, out=_part_of(shortcut_scaled, part))
            if scaled is not None:
                torch.mul(g, layer.scale, out=_part_of(scaled, part))
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
        dx = conv2d_input_gradient(scaled_grad, weight, input_shape, geometry)
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

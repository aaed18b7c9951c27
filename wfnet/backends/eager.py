"""Backend ``eager``: one ordinary convolution, then a scale and shift per sample and channel.

No masked copy of the weights, no weight gradient, channels-last aware, any device and dtype that
PyTorch's own convolution takes.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from wfnet.backends import Backend, ConvGeometry
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
        u = F.conv2d(
            x, weight, None, geometry.stride, geometry.padding, geometry.dilation, geometry.groups
        )
        expanded = gather_samples(u, source)
        out = torch.empty_like(expanded) if source is None and save else expanded
        torch.addcmul(shift[:, :, None, None], expanded, scale[:, :, None, None], out=out)
        if residual is not None:
            out.add_(residual)
        if relu:
            out.relu_()
        if not save:
            return out, None, None
        return out, u, out if relu and residual is not None else None

    def fused_conv2d_backward(
        self,
        dout: Tensor,
        branch: Tensor,
        kept: Tensor | None,
        weight: Tensor,
        scale: Tensor,
        shift: Tensor,
        source: Tensor | None,
        input_shape: tuple[int, ...],
        relu: bool,
        geometry: ConvGeometry,
        need_dx: bool,
        need_t0: bool,
        may_overwrite: bool,
    ) -> tuple[Tensor | None, Tensor, Tensor, Tensor | None]:
        u = gather_samples(branch, source)
        scale4 = scale[:, :, None, None]
        scratch = torch.empty_like(u)
        g = dout
        if relu:
            if kept is None:  # a second look at scale * u + shift is cheaper than keeping it
                kept = torch.addcmul(shift[:, :, None, None], u, scale4, out=scratch)
            g = dout if may_overwrite else torch.empty_like(dout)
            torch.ops.aten.threshold_backward.grad_input(dout, kept, 0, grad_input=g)
        t1 = torch.mul(g, u, out=scratch).sum((2, 3), dtype=scale.dtype) * scale
        t0 = g.sum((2, 3), dtype=scale.dtype) if need_t0 else None
        dx = None
        if need_dx:
            du = torch.mul(g, scale4, out=scratch)
            dx = _conv2d_input_gradient(du, weight, input_shape, geometry)
        return dx, g, t1, t0

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

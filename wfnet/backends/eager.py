"""Backend ``eager``: one ordinary convolution, then a scale and shift per sample and channel.

No masked copy of the weights, no weight gradient, channels-last aware, any device and dtype that
PyTorch's own convolution takes.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from wfnet.backends import Backend, ConvGeometry
from wfnet.gates import segment_sum


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
        expanded = u if source is None else u.index_select(0, source)
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
        if need_t1 and source is not None:
            saved = saved.index_select(0, source)
        scratch, t1, t0 = _column_sums(dout, saved, scale, (2, 3), need_t1, need_t0)
        if not need_dx:
            return None, t1, t0
        du = torch.mul(dout, scale[:, :, None, None], out=scratch)
        if source is not None:  # the convolution is linear: sum the variants of an image first
            du = segment_sum(du, source, input_shape[0])
        channels_last = du.is_contiguous(memory_format=torch.channels_last)
        dx, _, _ = torch.ops.aten.convolution_backward(
            du,
            # Only shape and memory format of the input are read; its pages are never touched.
            torch.empty(
                input_shape,
                dtype=du.dtype,
                device=du.device,
                memory_format=torch.channels_last if channels_last else torch.contiguous_format,
            ),
            weight,
            None,
            geometry.stride,
            geometry.padding,
            geometry.dilation,
            False,
            (0, 0),
            geometry.groups,
            (True, False, False),
        )
        return dx, t1, t0

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
        expanded = u if source is None else u.index_select(0, source)
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
        if need_t1 and source is not None:
            saved = saved.index_select(0, source)
        scratch, t1, t0 = _column_sums(dout, saved, scale, (1,), need_t1, need_t0)
        if not need_dx:
            return None, t1, t0
        du = torch.mul(dout, scale[:, None], out=scratch)
        if source is not None:
            du = segment_sum(du, source, input_shape[0])
        return du @ weight, t1, t0


backend = EagerBackend()

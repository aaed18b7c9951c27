"""Backend ``triton``: one kernel launch per layer and direction; the masks live in GEMM epilogues.

Forward is one GEMM that writes ``out`` and, where backward needs it, the branch ``v = scale * u``.
Backward is one elementwise pass (``dout``, ``v`` to ``scale * dout`` and both column sums) and one
input-gradient GEMM. Kernels: :mod:`wfnet.kernels`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from wfnet import gates
from wfnet.backends.contract import (
    Activation,
    Backend,
    ConvGeometry,
    Epilogue,
    LayerBelow,
    LayerGradient,
    PoolGeometry,
)
from wfnet.gate_tables import GatedLayer, GateTables, StepTables

try:
    import triton
except ImportError:  # no wheels for this platform; every call is refused with that reason
    triton = None
else:
    from wfnet.kernels import conv_dgrad, conv_fprop, epilogue_bwd, gate, linear, max_pool
    from wfnet.kernels.config import ConvShape, LinearShape
    from wfnet.kernels.launch import interpreted

_DTYPES = (torch.float16, torch.bfloat16, torch.float32)
_INTERPRETED = triton is not None and interpreted(gate.gate_rows_kernel)
_MOST_LABELS = 16
_MOST_ROWS = 2**31


def _refuse_tensor(x: Tensor) -> str | None:
    """What both operations refuse; device, dtype and platform only, so that it can be traced."""
    if triton is None:
        return "the package 'triton' is not installed"
    if x.dtype not in _DTYPES:
        return f"the Triton kernels take float16, bfloat16 and float32, not {x.dtype}"
    if _INTERPRETED:
        if x.dtype == torch.bfloat16:
            return "Triton's interpreter (TRITON_INTERPRET=1) multiplies bfloat16 wrongly"
        return None
    if x.device.type != "cuda":
        return f"the Triton kernels need a CUDA tensor, and x is on {x.device}"
    if torch.version.hip is not None:
        return "the Triton kernels are written and checked for NVIDIA devices only"
    if torch.cuda.get_device_properties(x.device).major < 8:
        return "the Triton kernels need compute capability 8.0 or later"
    return None


class TritonBackend(Backend):
    """Implicit GEMM with the per-sample scale and shift in its epilogue.

    ``saved`` is the branch ``v = scale * u`` of the expanded batch, in the dtype of ``x``.
    """

    name = "triton"

    def refuse_conv2d(self, x: Tensor, weight: Tensor, geometry: ConvGeometry) -> str | None:
        reason = _refuse_tensor(x)
        if reason is not None:
            return reason
        if geometry.groups != 1:
            return f"the Triton kernels have no grouped convolution (groups={geometry.groups})"
        height, width = geometry.output_size(x.shape[2], x.shape[3], tuple(weight.shape[2:]))
        if height < 1 or width < 1:
            return f"the filter {list(weight.shape)} does not fit into {list(x.shape)}"
        if x.shape[0] * max(height * width, x.shape[2] * x.shape[3]) >= _MOST_ROWS:
            return f"{list(x.shape)} has more than 2**31 pixels"
        return None

    def refuse_linear(self, x: Tensor, weight: Tensor) -> str | None:
        reason = _refuse_tensor(x)
        if reason is None and x.shape[0] * x.shape[1] >= _MOST_ROWS:
            reason = f"{list(x.shape)} has more than 2**31 tokens"
        return reason

    def explain_conv2d(
        self, x: Tensor, weight: Tensor, geometry: ConvGeometry, batch: int | None = None
    ) -> str:
        """Configs of forward and input gradient and the reasons for them, or the refusal."""
        refusal = self.refuse_conv2d(x, weight, geometry)
        if refusal is not None:
            return f"refused: {refusal}"
        images, filters = _channels_last(x), _channels_last(weight)
        gathers = batch is not None
        batch = batch if gathers else x.shape[0]
        shape = _conv_shape(images, filters, batch, geometry)
        gradient_shape = _conv_shape(images, filters, x.shape[0], geometry)
        ag = images.new_empty((x.shape[0], shape.out_height, shape.out_width, shape.out_channels))
        if shape.pointwise and not gathers:
            pixels = _pixels(shape)
            forward = linear.config_linear_fprop(images, filters, pixels, op="conv")
        else:
            forward = conv_fprop.config_conv_fprop(images, filters, shape, gathers)
        if shape.pointwise:
            backward = linear.config_linear_dgrad(ag, filters, _pixels(gradient_shape), op="conv")
        else:
            backward = conv_dgrad.config_conv_dgrad(ag, filters, gradient_shape)
        return _explained(forward, backward)

    def explain_linear(self, x: Tensor, weight: Tensor, batch: int | None = None) -> str:
        """Configs of forward and input gradient and the reasons for them, or the refusal."""
        refusal = self.refuse_linear(x, weight)
        if refusal is not None:
            return f"refused: {refusal}"
        x, weight = x.contiguous(), weight.contiguous()
        gathers = batch is not None
        batch = batch if gathers else x.shape[0]
        shape = LinearShape(batch, x.shape[1], x.shape[2], weight.shape[0])
        own = LinearShape(x.shape[0], x.shape[1], x.shape[2], weight.shape[0])
        ag = x.new_empty((x.shape[0], x.shape[1], weight.shape[0]))
        if not gathers:
            forward = linear.config_linear_fprop(x, weight, shape)
        else:
            pixels = ConvShape(
                batch, x.shape[1], 1, x.shape[2], weight.shape[0], (1, 1), (1, 1), (0, 0), (1, 1)
            )
            forward = conv_fprop.config_conv_fprop(x, weight, pixels, True, op="linear")
        return _explained(forward, linear.config_linear_dgrad(ag, weight, own))

    def conv2d(
        self, x: Tensor, weight: Tensor, geometry: ConvGeometry, epilogue: Epilogue
    ) -> Activation:
        images, filters = _channels_last(x), _channels_last(weight)
        scale, shift = _tables(epilogue)
        residual = None if epilogue.residual is None else _channels_last(epilogue.residual)
        shape = _conv_shape(images, filters, scale.shape[0], geometry)
        if shape.pointwise and epilogue.source is None:
            out, branch = linear.linear_fprop(
                images.flatten(1, 2),
                filters.flatten(1),
                scale,
                shift,
                residual=None if residual is None else residual.flatten(1, 2),
                relu=epilogue.relu,
                save_branch=epilogue.save,
                op="conv",
            )
        else:
            out, branch = conv_fprop.conv_fprop(
                images,
                filters,
                scale,
                shift,
                stride=geometry.stride,
                padding=geometry.padding,
                dilation=geometry.dilation,
                source=epilogue.source,
                residual=residual,
                relu=epilogue.relu,
                save_branch=epilogue.save,
            )
        size = (shape.out_height, shape.out_width)
        out, branch = _pixels_of(out, size), _pixels_of(branch, size)
        masked = epilogue.save and epilogue.relu and residual is not None
        return Activation(out, branch, out if masked else None)

    def linear(self, x: Tensor, weight: Tensor, epilogue: Epilogue) -> Activation:
        out, branch = linear.linear_fprop(
            x.contiguous(),
            weight.contiguous(),
            *_tables(epilogue),
            source=epilogue.source,
            save_branch=epilogue.save,
        )
        return Activation(out, branch)

    def epilogue_backward(
        self,
        dout: Tensor,
        below: LayerBelow,
        skip: Tensor | None = None,
        may_overwrite: bool = False,
    ) -> LayerGradient:
        """One pass over ``dout``."""
        layer, want, sums = _layer_below(below, skip)
        if not want:
            return LayerGradient()
        tokens = _channels_last(dout).flatten(1, 2)
        gradient = epilogue_bwd.epilogue_bwd(
            tokens, layer.as_tokens(), want=want, sums=sums, **_grouping(below)
        )
        return _finished(gradient, below, tuple(dout.shape[2:]))

    def conv2d_dgrad(
        self,
        scaled_grad: Tensor,
        weight: Tensor,
        input_shape: tuple[int, ...],
        geometry: ConvGeometry,
        skip: Tensor | None = None,
        below: LayerBelow | None = None,
    ) -> LayerGradient:
        """One GEMM; its epilogue is the elementwise backward of the layer below."""
        ag, filters = _channels_last(scaled_grad), _channels_last(weight)
        layer, want, sums = _layer_or_none(below, skip)
        size = tuple(input_shape[2:])
        if _is_linear(weight, geometry):
            gradient = linear.linear_dgrad(
                ag.flatten(1, 2),
                filters.flatten(1),
                layer.as_tokens(),
                want=want,
                sums=sums,
                op="conv",
            )
        else:
            gradient = conv_dgrad.conv_dgrad(
                ag,
                filters,
                size,
                layer,
                want=want,
                sums=sums,
                stride=geometry.stride,
                padding=geometry.padding,
                dilation=geometry.dilation,
            )
        return _finished(gradient, below, size)

    def linear_backward(
        self, dout: Tensor, layer: LayerBelow, weight: Tensor, input_shape: tuple[int, ...]
    ) -> Tensor | None:
        pixels = replace(layer, branch=None if layer.branch is None else _as_pixels(layer.branch))
        scaled = self.epilogue_backward(_as_pixels(dout), pixels).scaled_grad
        if scaled is None:
            return None
        return linear.linear_dgrad(_channels_last(scaled).squeeze(2), weight.contiguous()).grad

    pools_with_epilogue = True

    def max_pool2d(
        self, x: Tensor, window: PoolGeometry, save: bool
    ) -> tuple[Tensor, Tensor | None]:
        """One pass; positions take a byte."""
        if x.dtype not in _DTYPES or not window.takes_bytes:
            return super().max_pool2d(x, window, save)
        size, own = window.output_size(*x.shape[2:]), max_pool.Window(*window[:3])
        out, positions = max_pool.max_pool(_channels_last(x), size, own, save)
        return _channels_first(out), None if positions is None else _channels_first(positions)

    def max_pool2d_backward(
        self,
        dout: Tensor,
        positions: Tensor,
        like: Tensor,
        window: PoolGeometry,
        skip: Tensor | None = None,
        below: LayerBelow | None = None,
    ) -> LayerGradient:
        """One pass, the elementwise backward of the layer below included."""
        if positions.dtype != torch.uint8:  # another one's
            return super().max_pool2d_backward(dout, positions, like, window, skip, below)
        layer, want, sums = _layer_or_none(below, skip)
        size = tuple(like.shape[2:])
        gradient = max_pool.max_pool_bwd(
            _channels_last(dout), _channels_last(positions), size, max_pool.Window(*window[:3]),
            layer, want=want, sums=sums,
        )  # fmt: skip
        return _finished(gradient, below, size)

    def gate_tables(self, layers: Sequence[GatedLayer]) -> GateTables:
        """One launch each way where all filters and constants are fp32."""
        tensors = [t for layer in layers for t in vars(layer).values() if isinstance(t, Tensor)]
        if all(t.dtype == torch.float32 for t in tensors):
            return _Tables(layers)
        return super().gate_tables(layers)

    def gate_rows(self, alpha: Tensor, forget: Tensor, gate_scale: float) -> Tensor:
        if alpha.dtype == torch.float64 or forget.shape[1] not in range(1, _MOST_LABELS + 1):
            return gates.gate_rows(alpha, forget, gate_scale)
        return gate.gate_rows(alpha, forget, gate_scale)

    def gate_rows_backward(self, t: Tensor, alpha: Tensor, forget: Tensor) -> Tensor:
        if alpha.dtype == torch.float64 or forget.shape[1] not in range(1, _MOST_LABELS + 1):
            return gates.gate_rows_backward(t, alpha, forget)
        return gate.gate_rows_bwd(t, alpha, forget)


def _channels_last(x: Tensor) -> Tensor:
    """``[N, C, H, W]`` as contiguous ``[N, H, W, C]``: a view of channels-last memory."""
    return x.permute(0, 2, 3, 1).contiguous()


def _channels_first(x: Tensor) -> Tensor:
    """``[N, H, W, C]`` as a ``[N, C, H, W]`` view, channels-last in memory."""
    return x.permute(0, 3, 1, 2)


def _conv_shape(images: Tensor, filters: Tensor, batch: int, geometry: ConvGeometry) -> ConvShape:
    return ConvShape(
        batch,
        *images.shape[1:],
        filters.shape[0],
        tuple(filters.shape[1:3]),
        geometry.stride,
        geometry.padding,
        geometry.dilation,
    )


def _pixels(shape: ConvShape) -> LinearShape:
    return LinearShape(
        shape.batch, shape.height * shape.width, shape.in_channels, shape.out_channels
    )


def _explained(forward, backward) -> str:
    return (
        f"forward {forward.config} ({forward.reason}); "
        f"input gradient {backward.config} ({backward.reason})"
    )


def _is_linear(weight: Tensor, geometry: ConvGeometry) -> bool:
    """Whether a convolution is a linear map of every pixel."""
    return (
        tuple(weight.shape[2:]) == (1, 1)
        and geometry.stride == (1, 1)
        and geometry.padding == (0, 0)
    )


def _tables(epilogue: Epilogue) -> tuple[Tensor, Tensor | None]:
    """Scale and shift as rows of one stride."""
    shift = epilogue.shift
    return epilogue.scale.contiguous(), None if shift is None else shift.contiguous()


def _as_pixels(tokens: Tensor) -> Tensor:
    """``[B, T, C]`` as ``[B, C, T, 1]``, channels-last in memory."""
    return tokens.unsqueeze(2).permute(0, 3, 1, 2)


def _grouping(below: LayerBelow) -> dict[str, object]:
    """Options of ``epilogue_bwd`` for samples that share images."""
    if below.source is None or not below.need_scaled_grad:
        return {}
    return {"source": below.source, "sources": below.images}


def _layer_below(
    below: LayerBelow, skip: Tensor | None
) -> tuple[epilogue_bwd.LayerBelow, tuple[str, ...], epilogue_bwd.Sums]:
    """The layer as the kernels take it, what they are to write, and where the sums go."""
    shortcut = below.shortcut
    layer = epilogue_bwd.LayerBelow(
        branch=None if below.branch is None else _channels_last(below.branch),
        scale=below.scale.contiguous(),
        shift=None if below.shift is None else below.shift.contiguous(),
        activation=None if below.mask is None else _channels_last(below.mask),
        skip=None if skip is None else _channels_last(skip),
        shortcut_branch=None if shortcut is None else _channels_last(shortcut.branch),
        shortcut_scale=None if shortcut is None else shortcut.scale.contiguous(),
        relu=below.relu,
    )
    wanted = (
        ("grad", below.need_grad),
        ("scaled_grad", below.need_scaled_grad),
        ("t0", below.t0 is not None or (shortcut is not None and shortcut.t0 is not None)),
        ("t1", below.t1 is not None),
        ("shortcut_scaled_grad", shortcut is not None and shortcut.need_scaled_grad),
        ("shortcut_t1", shortcut is not None),
    )
    # Sums of tables that are columns of wider ones are copied there by _finished.
    places = (below.t0, below.t1, None if shortcut is None else shortcut.t1)
    sums = tuple(t if t is not None and t.is_contiguous() else None for t in places)
    return layer, tuple(name for name, needed in wanted if needed), sums


def _layer_or_none(
    below: LayerBelow | None, skip: Tensor | None
) -> tuple[epilogue_bwd.LayerBelow, tuple[str, ...], epilogue_bwd.Sums]:
    """As :func:`_layer_below`; without a layer the gradient itself is all that is wanted."""
    if below is not None:
        return _layer_below(below, skip)
    layer = epilogue_bwd.LayerBelow(skip=None if skip is None else _channels_last(skip))
    return layer, ("grad",), epilogue_bwd.NO_SUMS


def _pixels_of(tensor: Tensor | None, size: tuple[int, int]) -> Tensor | None:
    """``[B, C, H, W]`` from ``[B, H, W, C]`` or ``[B, H*W, C]``."""
    if tensor is None:
        return None
    return _channels_first(tensor if tensor.dim() == 4 else tensor.unflatten(1, size))


def _finished(
    gradient: epilogue_bwd.Gradient, below: LayerBelow | None, size: tuple[int, int]
) -> LayerGradient:
    if below is None:
        return LayerGradient(_pixels_of(gradient.grad, size))
    shortcut = below.shortcut
    places = [(gradient.t0, below.t0), (gradient.t1, below.t1)]
    if shortcut is not None:  # both receive the same g, so that their T0 are the same
        places += [(gradient.t0, shortcut.t0), (gradient.shortcut_t1, shortcut.t1)]
    for sums, place in places:
        if place is not None and sums is not place:
            place.copy_(sums)
    return LayerGradient(
        _pixels_of(gradient.grad, size),
        _pixels_of(gradient.scaled_grad, size),
        _pixels_of(gradient.shortcut_scaled_grad, size),
    )


class _Tables(GateTables):
    """All layers in one launch each way (:class:`wfnet.kernels.gate.GateTables`)."""

    def __init__(self, layers: Sequence[GatedLayer]):
        self.kernels = gate.GateTables([replace(layer, **_detached(layer)) for layer in layers])

    def __call__(self, forget: Tensor, save: bool = False) -> StepTables:
        if forget.shape[1] > _MOST_LABELS:
            return GateTables(self.kernels.layers)(forget, save)
        return _StepTables(self.kernels, forget, save)


def _detached(layer: GatedLayer) -> dict[str, Tensor]:
    return {n: t.detach() for n, t in vars(layer).items() if isinstance(t, Tensor)}


class _StepTables(StepTables):
    def __init__(self, kernels: gate.GateTables, forget: Tensor, save: bool):
        self.kernels, self.forget = kernels, forget
        tables = kernels.scale_and_shift(forget)
        self.scales, self.shifts = [list(part) for part in zip(*tables, strict=True)]
        self.t1, self.t0 = [], []
        if save:
            self.sums1 = kernels.empty(forget.shape[0]).zero_()
            self.sums0 = torch.zeros_like(self.sums1)
            self.t1 = kernels.views(self.sums1, forget.shape[0])
            sums = kernels.views(self.sums0, forget.shape[0])
            self.t0 = [
                None if layer.alpha_bias is None else part
                for layer, part in zip(kernels.layers, sums, strict=True)
            ]

    def gradients(self, into: Tensor | None = None) -> list[Tensor]:
        return self.kernels.backward(self.forget, self.sums1, self.sums0, into)


backend = TritonBackend()

"""Backend ``triton``: one kernel launch per layer and direction; the masks live in GEMM epilogues.

Forward is one GEMM that writes ``out`` and, where backward needs it, the branch ``v = scale * u``.
Backward is one elementwise pass (``dout``, ``v`` to ``scale * dout`` and both column sums) and one
input-gradient GEMM. Kernels: :mod:`wfnet.kernels`.
"""

from __future__ import annotations

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
    as_pixels,
    as_tokens,
)

try:
    import triton
except ImportError:  # no wheels for this platform; every call is refused with that reason
    triton = None
else:
    from wfnet.kernels import conv_dgrad, conv_fprop, epilogue_bwd, gate, linear, max_pool
    from wfnet.kernels.config import ConvShape, LinearShape
    from wfnet.kernels.epilogue_arguments import channels_last
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
    pools_with_epilogue = True

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
        return self._explained(x, weight, geometry, batch, "conv")

    def explain_linear(self, x: Tensor, weight: Tensor, batch: int | None = None) -> str:
        """Configs of forward and input gradient and the reasons for them, or the refusal."""
        refusal = self.refuse_linear(x, weight)
        if refusal is not None:
            return f"refused: {refusal}"
        filters = weight[:, :, None, None]
        return self._explained(as_pixels(x), filters, ConvGeometry(), batch, "linear")

    @staticmethod
    def _explained(
        x: Tensor, weight: Tensor, geometry: ConvGeometry, batch: int | None, op: str
    ) -> str:
        images, filters = channels_last(x), channels_last(weight)
        size, samples = tuple(x.shape[2:]), x.shape[0] if batch is None else batch
        shape = ConvShape.of(samples, size, weight, geometry)
        own = ConvShape.of(x.shape[0], size, weight, geometry)
        ag = images.new_empty((x.shape[0], shape.out_height, shape.out_width, shape.out_channels))
        pixels = LinearShape(x.shape[0], size[0] * size[1], own.in_channels, own.out_channels)
        if shape.pointwise and batch is None:
            forward = linear.config_linear_fprop(images, filters, pixels, op=op)
        else:
            forward = conv_fprop.config_conv_fprop(images, filters, shape, batch is not None, op=op)
        if shape.pointwise:
            backward = linear.config_linear_dgrad(ag, filters, pixels, op=op)
        else:
            backward = conv_dgrad.config_conv_dgrad(ag, filters, own)
        return (
            f"forward {forward.config} ({forward.reason}); "
            f"input gradient {backward.config} ({backward.reason})"
        )

    def conv2d(
        self, x: Tensor, weight: Tensor, geometry: ConvGeometry, epilogue: Epilogue
    ) -> Activation:
        if epilogue.source is None and _is_linear(weight, geometry):
            return linear.linear_fprop(x, weight.flatten(1), epilogue, op="conv")
        return conv_fprop.conv_fprop(x, weight, geometry, epilogue)

    def linear(self, x: Tensor, weight: Tensor, epilogue: Epilogue) -> Activation:
        pixels, weight = as_pixels(x), weight.contiguous()
        if epilogue.source is None:
            found = linear.linear_fprop(pixels, weight, epilogue)
        else:  # whose tiles follow the indices
            filters = weight[:, :, None, None]
            found = conv_fprop.conv_fprop(pixels, filters, ConvGeometry(), epilogue, op="linear")
        return Activation(as_tokens(found.out), as_tokens(found.branch))

    def epilogue_backward(
        self,
        dout: Tensor,
        below: LayerBelow,
        skip: Tensor | None = None,
        may_overwrite: bool = False,
    ) -> LayerGradient:
        """One pass over ``dout``."""
        return epilogue_bwd.epilogue_bwd(dout, below, skip)

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
        if _is_linear(weight, geometry):
            return linear.linear_dgrad(scaled_grad, weight.flatten(1), skip, below, op="conv")
        return conv_dgrad.conv_dgrad(scaled_grad, weight, input_shape, geometry, skip, below)

    def linear_backward(
        self, dout: Tensor, layer: LayerBelow, weight: Tensor, input_shape: tuple[int, ...]
    ) -> Tensor | None:
        pixels = replace(layer, branch=as_pixels(layer.branch))
        scaled = self.epilogue_backward(as_pixels(dout), pixels).scaled_grad
        if scaled is None:
            return None
        return as_tokens(linear.linear_dgrad(scaled, weight.contiguous()).grad)

    def max_pool2d(
        self, x: Tensor, window: PoolGeometry, save: bool
    ) -> tuple[Tensor, Tensor | None]:
        """One pass; positions take a byte."""
        if x.dtype not in _DTYPES or not window.takes_bytes:
            return super().max_pool2d(x, window, save)
        return max_pool.max_pool(x, window, save)

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
        if positions.dtype != torch.uint8:  # PyTorch's, of a window that the kernels refuse
            return super().max_pool2d_backward(dout, positions, like, window, skip, below)
        return max_pool.max_pool_bwd(dout, positions, tuple(like.shape[2:]), window, skip, below)

    def gate_rows(self, alpha: Tensor, forget: Tensor, gate_scale: float | Tensor) -> Tensor:
        if isinstance(gate_scale, Tensor) or not _takes_gates(alpha, forget):
            return gates.gate_rows(alpha, forget, gate_scale)
        return gate.gate_rows(alpha, forget, gate_scale)

    def gate_rows_backward(self, t: Tensor, alpha: Tensor, forget: Tensor) -> Tensor:
        if not _takes_gates(alpha, forget):
            return gates.gate_rows_backward(t, alpha, forget)
        return gate.gate_rows_bwd(t, alpha, forget)


def _takes_gates(alpha: Tensor, forget: Tensor) -> bool:
    return alpha.dtype != torch.float64 and forget.shape[1] in range(1, _MOST_LABELS + 1)


def _is_linear(weight: Tensor, geometry: ConvGeometry) -> bool:
    """Whether a convolution is a linear map of every pixel."""
    return (
        tuple(weight.shape[2:]) == (1, 1)
        and geometry.stride == (1, 1)
        and geometry.padding == (0, 0)
    )


backend = TritonBackend()

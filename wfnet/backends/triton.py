"""Backend ``triton``: one kernel launch per layer and direction; the masks live in GEMM epilogues.

Forward is one GEMM that writes ``out`` and, where backward needs it, the branch ``v = scale * u``.
Backward is one elementwise pass (``dout``, ``v`` to ``scale * dout`` and both column sums) and one
input-gradient GEMM. Kernels: :mod:`wfnet.kernels`.
"""

from dataclasses import replace

import torch
from torch import Tensor

from wfnet import gates
from wfnet.backends.contract import NO_LAYER, Activation, Backend

try:
    import triton
except ImportError:  # no wheels for this platform; every call is refused with that reason
    triton = None
else:
    from wfnet.kernels import conv_dgrad, conv_fprop, epilogue_bwd, gate, max_pool, moments
    from wfnet.kernels.config import ConvShape
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

    The branch is ``v = scale * u`` of the expanded batch, in the dtype of ``x``. A linear map is a
    convolution of tokens as pixels.
    """

    name = "triton"
    pools_with_epilogue = True

    def refuse_conv2d(self, x, weight, geometry):
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

    def describe(self, x, weight, geometry, batch):
        """Says which tiles forward and input gradient take, and why."""
        images, filters, expanded = channels_last(x), channels_last(weight), batch is not None
        shape = ConvShape.of(
            batch if expanded else x.shape[0], tuple(x.shape[2:]), weight, geometry
        )
        forward = conv_fprop.fprop_choice(images, filters, shape, expanded)
        shape = replace(shape, batch=x.shape[0])
        ag = images.new_empty((shape.batch, *shape.out_size, shape.out_channels))
        backward = conv_dgrad.dgrad_choice(ag, filters, shape)
        return (
            f"forward {forward.config} ({forward.reason}); "
            f"input gradient {backward.config} ({backward.reason})"
        )

    def conv2d(self, x, weight, geometry, epilogue):
        return conv_fprop.conv_fprop(x, weight, geometry, epilogue)

    def product_moments(self, x, weight, geometry):
        """Tiles take their moments in the product's epilogue."""
        return conv_fprop.conv_moments(x, weight, geometry)

    def epilogue(self, u, epilogue):
        """One pass; one more where images are expanded to samples."""
        u, tables = gates.gather_samples(u, epilogue.source), (epilogue.scale, epilogue.shift)
        residual, relu, save = epilogue.residual, epilogue.relu, epilogue.save
        out = moments.combine(u, *tables, residual, relu=relu, may_overwrite=not save)
        masked = save and relu and residual is not None
        return Activation(out, u if save else None, out if masked else None)

    def moments_backward(self, g, scale, u, on_u, constant, may_overwrite):
        """One pass."""
        u = None if on_u is None else u
        return moments.combine(g, scale, constant, u, on_u, may_overwrite=may_overwrite)

    def epilogue_backward(self, dout, below, may_overwrite=False):
        """One pass over ``dout``."""
        return epilogue_bwd.epilogue_bwd(dout, below)

    def conv2d_dgrad(self, scaled_grad, weight, input_shape, geometry, below=NO_LAYER):
        """One GEMM; its epilogue is the elementwise backward of the layer below."""
        return conv_dgrad.conv_dgrad(scaled_grad, weight, input_shape, geometry, below)

    def max_pool2d(self, x, window, save):
        """One pass; positions take a byte."""
        if x.dtype not in _DTYPES or not window.takes_bytes:
            return super().max_pool2d(x, window, save)
        return max_pool.max_pool(x, window, save)

    def max_pool2d_backward(self, dout, positions, like, window, below=NO_LAYER):
        """One pass, the elementwise backward of the layer below included."""
        if positions.dtype != torch.uint8:  # PyTorch's, of a window that the kernels refuse
            return super().max_pool2d_backward(dout, positions, like, window, below)
        return max_pool.max_pool_bwd(dout, positions, tuple(like.shape[2:]), window, below)

    def gate_rows(self, alpha, forget, gate_scale):
        if not _takes_gates(alpha, forget):
            return gates.gate_rows(alpha, forget, gate_scale)
        return gate.gate_rows(alpha, forget, gate_scale)

    def gate_rows_backward(self, t, alpha, forget):
        if not _takes_gates(alpha, forget):
            return gates.gate_rows_backward(t, alpha, forget)
        return gate.gate_rows_bwd(t, alpha, forget)


def _takes_gates(alpha: Tensor, forget: Tensor) -> bool:
    return alpha.dtype != torch.float64 and forget.shape[1] in range(1, _MOST_LABELS + 1)


backend = TritonBackend()

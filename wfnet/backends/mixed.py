"""PyTorch's convolutions in the form of the kernels, so that both can serve one network.

The backend ``eager`` keeps ``u``, the kernels keep ``v = scale * u`` of every sample, and the
backward of a layer reads what its forward kept. The backends here multiply by PyTorch (cuDNN on a
CUDA device) and keep ``v``. They are candidates of :mod:`wfnet.backends.autotune`, not choices by
name.
"""

from dataclasses import replace

import torch
import torch.nn.functional as F

from wfnet import backends
from wfnet.backends.contract import NO_LAYER, LayerBelow, LayerGradient, as_pixels, as_tokens
from wfnet.backends.eager import EagerBackend
from wfnet.gates import gather_samples


class MixedEager(EagerBackend):
    """PyTorch's operations alone: the truth that other candidates are compared with."""

    keeps_scaled_branch = True
    pools_with_epilogue = True

    def product(self, x, weight, geometry):
        if not geometry.linear:
            return super().product(x, weight, geometry)
        return as_pixels(F.linear(as_tokens(x), weight[:, :, 0, 0]))

    def conv2d(self, x, weight, geometry, epilogue):
        v = gather_samples(self.product(x, weight, geometry), epilogue.source)
        torch.mul(v, epilogue.scale[:, :, None, None], out=v)
        ones = torch.ones_like(epilogue.scale)
        return self.epilogue(v, replace(epilogue, scale=ones, source=None))

    def epilogue(self, u, epilogue):
        u = gather_samples(u, epilogue.source)
        found = super().epilogue(u, replace(epilogue, source=None))
        return found._replace(mask=None if found.mask is None else found.out)

    def epilogue_backward(self, dout, below, may_overwrite=False):
        if below.scale is None:
            return super().epilogue_backward(dout, below, may_overwrite)
        g = super().epilogue_backward(dout, _of_branch(below), may_overwrite).grad
        scaled = [
            torch.mul(g, layer.scale[:, :, None, None], out=torch.empty_like(g))
            if layer is not None and layer.need_scaled_grad
            else None
            for layer in (below, below.shortcut)
        ]
        return LayerGradient(g if below.need_grad else None, *scaled)

    def conv2d_dgrad(self, scaled_grad, weight, input_shape, geometry, below=NO_LAYER):
        if not geometry.linear:
            return super().conv2d_dgrad(scaled_grad, weight, input_shape, geometry, below)
        dx = as_pixels(as_tokens(scaled_grad) @ weight[:, :, 0, 0])
        return self.epilogue_backward(dx, below, may_overwrite=True)

    def max_pool2d_backward(self, dout, positions, like, window, below=NO_LAYER):
        if positions.dtype != torch.uint8:
            return super().max_pool2d_backward(dout, positions, like, window, below)
        # Only the kernels read the bytes of theirs.
        dx = backends.get("triton").max_pool2d_backward(dout, positions, like, window).grad
        return self.epilogue_backward(dx, below, may_overwrite=True)


def _of_branch(layer: LayerBelow) -> LayerBelow:
    """A layer whose branch is what its scale is of: 1 for ``v``; ``g`` and sums are wanted."""
    return replace(
        layer,
        scale=layer.scale if layer.unscaled else torch.ones_like(layer.scale),
        mask=None if layer.mask is None else layer.mask > 0,
        need_grad=True,
        need_scaled_grad=False,
        source=None,
        shortcut=None if layer.shortcut is None else _of_branch(layer.shortcut),
    )


class EagerProducts(MixedEager):
    """PyTorch's convolutions; the elementwise backward behind them is one pass of Triton's."""

    def epilogue_backward(self, dout, below, may_overwrite=False):
        return backends.get("triton").epilogue_backward(dout, below)

"""Backend ``cuda``: compiled Hopper kernels for convolutions and linear maps, else Triton's.

The kernels of csrc/ (TMA, wgmma) need compute capability 9.0. The masks live in their epilogues;
an input gradient runs the elementwise backward of the layer below it. What moves memory alone
(gates, poolings, an elementwise backward of its own) and the shapes that they refuse (a stem's few
channels, label expansion, large strides) take the launchers of :mod:`wfnet.kernels`; ``explain_*``
says which. Launchers of the compiled kernels: :mod:`wfnet.backends.cuda_launch`.
"""

from dataclasses import replace

import torch
from torch import Tensor

from wfnet.backends import cuda_launch
from wfnet.backends.contract import NO_LAYER, ConvGeometry, LayerGradient
from wfnet.backends.triton import TritonBackend

_KERNEL = "persistent implicit GEMM (TMA, wgmma, clusters of two blocks, tiles of 128 x {})"


def _refuse_tensor(x: Tensor) -> str | None:
    """What all operations refuse; device, dtype and platform only, so that it can be traced."""
    library = cuda_launch.library()
    if library.missing is not None:
        return library.missing
    if x.dtype not in cuda_launch.DTYPES:
        return cuda_launch.REFUSED_DTYPE.format(x.dtype)
    if library.module.emulated:  # on the host; Triton's part refuses it, unless it is interpreted
        return None
    if x.device.type != "cuda":
        return f"the CUDA kernels need a CUDA tensor, and x is on {x.device}"
    if torch.version.hip is not None:
        return "the CUDA kernels are written for NVIDIA devices"
    major, minor = torch.cuda.get_device_capability(x.device)
    if (major, minor) != (9, 0):
        return (
            "the CUDA kernels need compute capability 9.0 (Hopper), and the device has "
            f"{major}.{minor}; take the backend 'triton'"
        )
    return None


class CudaBackend(TritonBackend):
    """Compiled kernels where they take the shapes, else Triton's."""

    name = "cuda"

    def refuse_conv2d(self, x, weight, geometry):
        return _refuse_tensor(x) or super().refuse_conv2d(x, weight, geometry)

    def describe(self, x, weight, geometry, batch):
        """Says whose kernels run forward and input gradient, and why."""
        named = []
        for backward, expands in ((False, batch is not None), (True, False)):
            shape = tuple(x.shape)
            reason = _refuse_hopper(backward, shape, weight, geometry, expands)
            if reason is not None:
                named.append(f"Triton's kernel ({reason})")
                continue
            product = backward, shape, tuple(weight.shape), geometry
            named.append(_KERNEL.format(cuda_launch.tile_columns(*product, x.device)))
        return f"forward: {named[0]}; input gradient: {named[1]}"

    def conv2d(self, x, weight, geometry, epilogue):
        expands = epilogue.source is not None
        if _refuse_hopper(False, tuple(x.shape), weight, geometry, expands) is not None:
            return super().conv2d(x, weight, geometry, epilogue)
        return cuda_launch.conv2d(x, weight, geometry, epilogue)

    def conv2d_dgrad(self, scaled_grad, weight, input_shape, geometry, below=NO_LAYER):
        """One GEMM; a projection shortcut takes a second pass over ``g``."""
        arguments = (scaled_grad, weight, input_shape, geometry)
        if below.unscaled or _refuse_hopper(True, input_shape, weight, geometry) is not None:
            return super().conv2d_dgrad(*arguments, below)
        shortcut = below.shortcut
        if shortcut is None:
            return cuda_launch.conv2d_dgrad(*arguments, below)
        found = cuda_launch.conv2d_dgrad(*arguments, replace(below, shortcut=None, need_grad=True))
        scaled = self.epilogue_backward(found.grad, shortcut).scaled_grad
        return LayerGradient(found.grad if below.need_grad else None, found.scaled_grad, scaled)


def _refuse_hopper(
    backward: bool,
    input_shape: tuple[int, ...],
    weight: Tensor,
    geometry: ConvGeometry,
    expands: bool = False,
) -> str | None:
    """Why a convolution takes Triton's kernel; None if it takes a Hopper kernel."""
    if expands:
        return "label expansion"
    return cuda_launch.refuse(backward, input_shape, tuple(weight.shape), geometry)


backend = CudaBackend()

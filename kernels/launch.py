"""A kernel launch as a value: run it on a device, or compile it ahead of time without one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import triton
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

# Kernels are not specialised on numbers of samples, images, pixels and tokens
# (`do_not_specialize`) where no address gains from what is known of these: every batch of another
# size, the last of an epoch for one, would be compiled anew.
#
# Descriptors are built on the host and passed as kernel parameters: no device-side workspace (so no
# `triton.set_allocator`), nothing to fence in the kernel, and a captured CUDA graph keeps them.


@dataclass(frozen=True)
class Launch:
    """``kernel[grid](**arguments)`` with its warps and pipeline stages."""

    kernel: Any
    grid: tuple[int, ...]
    arguments: dict[str, Any]
    warps: int
    stages: int

    def run(self) -> None:
        """Launches on the current stream of the tensors' device."""
        device = _device_of(self.arguments)
        if device.type == "cuda":
            with torch.cuda.device(device):
                self._launch()
        else:
            self._launch()

    def _launch(self) -> None:
        self.kernel[self.grid](
            **self.arguments,
            num_warps=self.warps,
            num_stages=self.stages,
            enable_fp_fusion=True,  # Triton's default until 3.9
        )


def _device_of(arguments: dict[str, Any]) -> torch.device:
    for value in arguments.values():
        if isinstance(value, Tensor):
            return value.device
        if isinstance(value, TensorDescriptor):
            return value.base.device
    raise ValueError("a kernel launch needs at least one tensor")


def interpreted(kernel: Any) -> bool:
    """Whether the kernel was decorated under TRITON_INTERPRET=1: it then runs on CPU tensors."""
    return not isinstance(kernel, triton.JITFunction)


# Later than Triton 3.6: fp32 operands are rounded to TF32 as they are read, not truncated.
_CAN_ROUND = "round_f32_to_tf32" in TensorDescriptor.__dataclass_fields__


def operand(base: Tensor, shape: Sequence[int], block: Sequence[int]) -> TensorDescriptor:
    """A :func:`descriptor` whose boxes are multiplied: fp32 is rounded to TF32 where possible.

    Only for products that run in TF32: full precision takes a plain descriptor.
    """
    view = descriptor(base, shape, block)
    if base.dtype == torch.float32 and _CAN_ROUND:
        view.round_f32_to_tf32 = True
    return view


def descriptor(base: Tensor, shape: Sequence[int], block: Sequence[int]) -> TensorDescriptor:
    """A tiled view of a contiguous tensor: ``shape`` in row-major order, read in boxes ``block``.

    Reads out of bounds give 0, writes out of bounds are dropped. Strides come from ``shape``, not
    from the tensor: PyTorch gives dimensions of size 1 arbitrary strides.
    """
    strides = [1]
    for size in reversed(shape[1:]):
        strides.insert(0, strides[0] * size)
    return TensorDescriptor(base, list(shape), strides, list(block))


def describable(tensor: Tensor, row: int) -> bool:
    """Whether rows of ``row`` elements satisfy the 16-byte rules of tensor descriptors."""
    return tensor.data_ptr() % 16 == 0 and row * tensor.element_size() % 16 == 0

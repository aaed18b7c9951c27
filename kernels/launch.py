"""A kernel launch as a value: run it on a device, or keep it and compile it without one."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import triton
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor
from wfnet.kernels import config

# Kernels are not specialised on numbers of samples, images, pixels and tokens
# (`do_not_specialize`) where no address gains from what is known of these: every batch of another
# size, the last of an epoch for one, would be compiled anew.
#
# Descriptors are built on the host and passed as kernel parameters: no device-side workspace (so no
# `triton.set_allocator`), nothing to fence in the kernel, and a captured CUDA graph keeps them.

_kept: list[Launch] | None = None


@dataclass(frozen=True)
class Launch:
    """``kernel[grid](...)`` with its warps and pipeline stages.

    Attributes:
        arguments: by name; those that the kernel does not have are left out.
    """

    kernel: Any
    grid: tuple[int, ...]
    arguments: dict[str, Any]
    warps: int = 4
    stages: int = 2

    @property
    def name(self) -> str:
        """Of the kernel."""
        return self.kernel.fn.__name__

    def run(self) -> None:
        """Launches on the current stream of the tensors' device."""
        if _kept is not None:
            _kept.append(self)
            return
        arguments = {name: self.arguments[name] for name in self.kernel.arg_names}
        seen = (getattr(value, "base", value) for value in arguments.values())
        device = next(value.device for value in seen if isinstance(value, Tensor))
        current = torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()
        with current:
            self.kernel[self.grid](
                **arguments,
                num_warps=self.warps,
                num_stages=self.stages,
                enable_fp_fusion=True,  # Triton's default until 3.9
            )


def gemm_launch(
    kernel: Any, tiles: int, columns: int, arguments: dict[str, Any], gemm: config.GemmConfig
) -> Launch:
    """The launch of a product with ``tiles`` of rows."""
    grid = (tiles * triton.cdiv(columns, gemm.block_n),)
    return Launch(kernel, grid, arguments, gemm.warps, gemm.stages)


def tile_of(tokens: int, columns: int) -> tuple[int, int]:
    """Rows and columns of an elementwise tile: 16-byte rows of channels, about 4096 elements."""
    block_n = min(128, max(16, triton.next_power_of_2(columns)))
    return min(4096 // block_n, max(1, triton.next_power_of_2(tokens))), block_n


def elementwise_launch(
    kernel: Any, pixels: tuple[int, int, int], arguments: dict[str, Any]
) -> Launch:
    """The launch of a pass over samples, tokens and columns of ``pixels``."""
    batch, tokens, columns = pixels
    block_m, block_n = tile_of(tokens, columns)
    arguments = arguments | {"T": tokens, "C": columns, "BM": block_m, "BN": block_n}
    grid = (batch * triton.cdiv(tokens, block_m) * triton.cdiv(columns, block_n),)
    return Launch(kernel, grid, arguments)


@contextlib.contextmanager
def keep_launches(device: config.Device) -> Iterator[list[Launch]]:
    """Yields a list that launches for ``device`` go to; their tensors may be on ``meta``."""
    global _kept
    _kept, before, config.assumed = [], config.assumed, device
    try:
        yield _kept
    finally:
        _kept, config.assumed = None, before


def interpreted(kernel: Any) -> bool:
    """Whether the kernel was decorated under TRITON_INTERPRET=1: it then runs on CPU tensors."""
    return not isinstance(kernel, triton.JITFunction)


# Later than Triton 3.6: fp32 operands are rounded to TF32 as they are read, not truncated.
_CAN_ROUND = "round_f32_to_tf32" in TensorDescriptor.__dataclass_fields__


def descriptor(
    base: Tensor, shape: Sequence[int], block: Sequence[int], rounded: bool = False
) -> TensorDescriptor:
    """A tiled view of a contiguous tensor: ``shape`` in row-major order, read in boxes ``block``.

    Reads out of bounds give 0, writes out of bounds are dropped. Strides come from ``shape``, not
    from the tensor: PyTorch gives dimensions of size 1 arbitrary strides. ``rounded``: boxes are
    multiplied in TF32, and fp32 is rounded to it where possible.
    """
    strides = [1]
    for size in reversed(shape[1:]):
        strides.insert(0, strides[0] * size)
    view = TensorDescriptor(base, list(shape), strides, list(block))
    if rounded and base.dtype == torch.float32 and _CAN_ROUND:
        view.round_f32_to_tf32 = True
    return view


def describable(tensor: Tensor, row: int) -> bool:
    """Whether rows of ``row`` elements satisfy the 16-byte rules of tensor descriptors."""
    return tensor.data_ptr() % 16 == 0 and row * tensor.element_size() % 16 == 0

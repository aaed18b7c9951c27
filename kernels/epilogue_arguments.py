"""Host side of ``epilogue.py``: what an epilogue reads and writes, bundled once for all kernels.

Triton kernels take their arguments one by one. A launcher builds one of the two objects here from
the backend contract (:mod:`wfnet.backends.contract`), and passes ``**arguments.bound(view)`` to its
kernel. Pixel tensors are ``[B, H, W, C]`` contiguous here, channels-first views in the contract.

Column sums never use atomics. Every tile writes its sums to its own slot, and
``column_sums_kernel`` adds the slots of a sample in order: equal bits on every run.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
import triton
import triton.language as tl
from torch import Tensor
from wfnet.kernels.config import span
from wfnet.kernels.launch import Launch

from wfnet.backends.contract import Activation, Epilogue, LayerBelow, LayerGradient

Sums = tuple[Tensor | None, Tensor | None, Tensor | None]  # T0, T1, T1 of the shortcut
View = Callable[[Tensor | None], object]  # a pixel tensor as a kernel takes it


def channels_last(x: Tensor | None) -> Tensor | None:
    """Returns ``[N, C, H, W]`` as contiguous ``[N, H, W, C]``: a view of channels-last memory."""
    return None if x is None else x.permute(0, 2, 3, 1).contiguous()


def channels_first(x: Tensor | None) -> Tensor | None:
    """Returns ``[N, H, W, C]`` as a ``[N, C, H, W]`` view, channels-last in memory."""
    return None if x is None else x.permute(0, 3, 1, 2)


def _plain(x: Tensor | None) -> Tensor | None:
    """A pixel tensor as kernels take it that read by pointers."""
    return x


def _aligned_tables(
    shape: tuple[int, int], *tables: Tensor | None
) -> tuple[list[Tensor | None], int]:
    """Tables ``[B, C]`` with rows of one stride, copied only if they have not, and that stride.

    Raises:
        ValueError: for another shape or dtype, or one past 32-bit indexing.
    """
    given = [table for table in tables if table is not None]
    for table in given:
        if tuple(table.shape) != shape or table.dtype != torch.float32:
            raise ValueError(
                f"tables must be float32 {shape}, not {table.dtype} {tuple(table.shape)}"
            )
    if any(table.stride() != (given[0].stride(0), 1) for table in given):
        tables = [None if table is None else table.contiguous() for table in tables]
        given = [table for table in tables if table is not None]
    stride = given[0].stride(0) if given else 0
    if shape[0] * stride >= 2**31:
        raise ValueError(f"{shape[0]} table rows of {stride} entries are past 32-bit indexing")
    return list(tables), stride


@dataclass(frozen=True)
class ForwardArguments:
    """Arguments of ``forward_epilogue``: pixel tensors ``[B, P, Q, O]``, tables ``[B, O]`` fp32."""

    scale: Tensor
    shift: Tensor | None
    residual: Tensor | None
    branch: Tensor | None
    out: Tensor
    table_stride: int
    relu: bool

    @classmethod
    def of(cls, epilogue: Epilogue, like: Tensor, shape: tuple[int, ...]) -> ForwardArguments:
        """Makes room for an output ``shape`` ``[B, P, Q, O]`` in the dtype of ``like``.

        Raises:
            ValueError: for tables or a residual that do not fit.
        """
        tables = epilogue.scale, epilogue.shift
        (scale, shift), stride = _aligned_tables((shape[0], shape[3]), *tables)
        out = like.new_empty(shape)
        branch = torch.empty_like(out) if epilogue.save else None
        residual = channels_last(epilogue.residual)
        _check_pixels("residual", residual, out)
        return cls(scale, shift, residual, branch, out, stride, epilogue.relu)

    def bound(self, view: View = _plain) -> dict[str, object]:
        """Returns the arguments by name; ``view`` of pixel tensors."""
        return {
            "scale": self.scale,
            "shift": self.shift,
            "residual": view(self.residual),
            "branch": view(self.branch),
            "out": view(self.out),
            "LD": self.table_stride,
            "RELU": self.relu,
        }

    def activation(self) -> Activation:
        """Returns the results in the contract's form."""
        out = channels_first(self.out)
        masked = self.branch is not None and self.relu and self.residual is not None
        return Activation(out, channels_first(self.branch), out if masked else None)


@dataclass(frozen=True)
class BackwardArguments:
    """Arguments of ``backward_epilogue``: pixel tensors ``[B, H, W, C]``, tables ``[B, C]`` fp32.

    Attributes:
        sums: where column sums go, ``[B, C]`` fp32, rows of any stride.
        partials: ``[slots, C]`` fp32 contiguous, what tiles write; see :meth:`with_slots`.
    """

    skip: Tensor | None = None
    branch: Tensor | None = None
    activation: Tensor | None = None
    scale: Tensor | None = None
    shift: Tensor | None = None
    grad: Tensor | None = None
    scaled_grad: Tensor | None = None
    shortcut_branch: Tensor | None = None
    shortcut_scale: Tensor | None = None
    shortcut_grad: Tensor | None = None
    sums: Sums = (None, None, None)
    partials: Sums = (None, None, None)
    table_stride: int = 0
    relu: bool = False

    @classmethod
    def of(
        cls, below: LayerBelow | None, skip: Tensor | None, like: Tensor, shape: tuple[int, ...]
    ) -> BackwardArguments:
        """Makes room for what ``below`` wants of a gradient that reaches its output.

        Args:
            below: None: the gradient itself is all that is wanted.
            skip: ``[B, C, H, W]`` or None.
            like: results have its dtype.
            shape: of that output, ``[B, H, W, C]``.

        Raises:
            ValueError: for tensors that do not fit, or a result without what it is made from.
        """
        grad = like.new_empty(shape)
        skip = channels_last(skip)
        _check_pixels("skip", skip, grad)
        if below is None:
            return cls(skip=skip, grad=grad)
        shortcut = below.shortcut
        if below.t1 is not None and below.branch is None:
            raise ValueError("t1 is summed from the branch, and the layer has none")
        if below.relu and below.branch is None and below.mask is None:
            raise ValueError("a ReLU mask is read from mask or branch, and the layer has neither")
        branch, activation = channels_last(below.branch), channels_last(below.mask)
        shortcut_branch = None if shortcut is None else channels_last(shortcut.branch)
        for name, tensor in (
            ("branch", branch),
            ("mask", activation),
            ("the shortcut's branch", shortcut_branch),
        ):
            _check_pixels(name, tensor, grad)
        columns = shape[0], shape[3]
        tables = below.scale, below.shift, None if shortcut is None else shortcut.scale
        (scale, shift, shortcut_scale), stride = _aligned_tables(columns, *tables)
        t0 = below.t0
        if shortcut is not None and t0 is None:
            t0 = shortcut.t0
        sums = t0, below.t1, None if shortcut is None else shortcut.t1
        for total in sums:
            if total is not None and (tuple(total.shape) != columns or total.stride(1) != 1):
                raise ValueError(f"column sums must be rows {columns}, not {tuple(total.shape)}")
        wants_shortcut = shortcut is not None and shortcut.need_scaled_grad
        return cls(
            skip=skip,
            branch=branch,
            activation=activation,
            scale=scale,
            shift=shift,
            grad=grad if below.need_grad else None,
            scaled_grad=torch.empty_like(grad) if below.need_scaled_grad else None,
            shortcut_branch=shortcut_branch,
            shortcut_scale=shortcut_scale,
            shortcut_grad=torch.empty_like(grad) if wants_shortcut else None,
            sums=sums,
            table_stride=stride,
            relu=below.relu,
        )

    @property
    def summing(self) -> bool:
        """Whether any column sums are wanted."""
        return any(total is not None for total in self.sums)

    @property
    def pixels(self) -> tuple[Tensor | None, ...]:
        """The pixel tensors that are read."""
        return self.skip, self.branch, self.activation, self.shortcut_branch

    def with_slots(self, slots: int, grouped: bool) -> BackwardArguments:
        """Returns the same with workspaces of so many slots.

        Where samples have one slot each (of ``grouped`` tiles), its sums are the sums: no workspace
        is needed if their rows lie dense.
        """

        def partial(total: Tensor | None) -> Tensor | None:
            if total is None:
                return None
            if grouped and total.shape[0] == slots and total.is_contiguous():
                return total
            return torch.empty((slots, total.shape[1]), dtype=torch.float32, device=total.device)

        return replace(self, partials=tuple(partial(total) for total in self.sums))

    def bound(self, view: View = _plain) -> dict[str, object]:
        """Returns the arguments by name; ``view`` of pixel tensors."""
        return {
            "skip": view(self.skip),
            "branch": view(self.branch),
            "activation": view(self.activation),
            "scale": self.scale,
            "shift": self.shift,
            "grad": view(self.grad),
            "scaled_grad": view(self.scaled_grad),
            "partial0": self.partials[0],
            "partial1": self.partials[1],
            "partial2": self.partials[2],
            "shortcut_branch": view(self.shortcut_branch),
            "shortcut_scale": self.shortcut_scale,
            "shortcut_grad": view(self.shortcut_grad),
            "LD": self.table_stride,
            "RELU": self.relu,
        }

    def zero_sums(self) -> None:
        """Writes the sums over nothing."""
        for total in self.sums:
            if total is not None:
                total.zero_()

    def add_column_sums(self, tokens: int, *, slots: int = 0, block_m: int = 0) -> None:
        """Adds what the tiles wrote to ``partials`` into ``sums``, in tile order.

        Args:
            tokens: pixels or tokens of a sample.
            slots: tiles that hold rows of one sample (grouped tiles); ``batch`` apart.
            block_m: rows of a flat tile, if the tiles were flat.
        """
        touched = span(block_m, tokens) if block_m else 0
        for partial, total in zip(self.partials, self.sums, strict=True):
            if total is not None and partial is not total:
                plan_column_sums(partial, total, tokens, slots, block_m, touched).run()

    def gradient(self, below: LayerBelow | None) -> LayerGradient:
        """Returns the results in the contract's form."""
        shortcut = None if below is None else below.shortcut
        if shortcut is not None and shortcut.t0 is not None and shortcut.t0 is not self.sums[0]:
            shortcut.t0.copy_(self.sums[0])  # both receive the same g
        return LayerGradient(
            channels_first(self.grad),
            channels_first(self.scaled_grad),
            channels_first(self.shortcut_grad),
        )


def _check_pixels(name: str, tensor: Tensor | None, like: Tensor) -> None:
    if tensor is not None and (tensor.shape != like.shape or tensor.dtype != like.dtype):
        raise ValueError(
            f"{name} must be {like.dtype} {tuple(like.shape)} (channels last), not {tensor.dtype} "
            f"{tuple(tensor.shape)}"
        )


@triton.jit(do_not_specialize=["B", "T", "SLOTS"])
def column_sums_kernel(
    partial,  # [slots, C] fp32
    total,  # [B, C] fp32, rows LD apart
    B,
    T,
    C,
    LD,
    SLOTS,  # slots of a sample, B apart; 0: flat tiles of BM rows, SPAN slots each
    SPAN: tl.constexpr,
    BM: tl.constexpr,
    BS: tl.constexpr,
    BN: tl.constexpr,
):
    sample = tl.program_id(0)
    cols = tl.program_id(1) * BN + tl.arange(0, BN)
    col_ok = cols < C
    lane = tl.arange(0, BS)
    sums = tl.zeros((BS, BN), dtype=tl.float32)
    if SPAN == 0:
        first = 0
        count = SLOTS
    else:
        first = (sample.to(tl.int64) * T // BM).to(tl.int32)
        count = (((sample + 1).to(tl.int64) * T - 1) // BM).to(tl.int32) - first + 1
    for start in range(0, count, BS):
        tile = first + start + lane
        if SPAN == 0:
            slot = tile.to(tl.int64) * B + sample
        else:
            slot = tile.to(tl.int64) * SPAN + sample - tile.to(tl.int64) * BM // T
        ok = (start + lane < count)[:, None] & col_ok[None, :]
        sums += tl.load(partial + (slot[:, None] * C + cols[None, :]), mask=ok, other=0.0)
    tl.store(total + sample.to(tl.int64) * LD + cols, tl.sum(sums, axis=0), mask=col_ok)


def plan_column_sums(
    partial: Tensor, total: Tensor, tokens: int, slots: int, block_m: int, touched: int
) -> Launch:
    """The launch of ``column_sums_kernel``: ``slots`` per sample, or flat tiles of ``block_m``."""
    batch, columns = total.shape
    arguments = {
        "partial": partial,
        "total": total,
        "B": batch,
        "T": tokens,
        "C": columns,
        "LD": total.stride(0),
        "SLOTS": slots,
        "SPAN": touched,
        "BM": block_m,
        "BS": 8,
        "BN": 128,
    }
    return Launch(column_sums_kernel, (batch, triton.cdiv(columns, 128)), arguments, 4, 2)

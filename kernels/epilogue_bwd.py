"""The elementwise backward of a masked layer in one pass, where no GEMM epilogue covers it.

    g = (dout + skip) * act'(out)       ag = A * g       T0 = sum_p g       T1 = sum_p g * v

``epilogue_bwd_kernel`` reads ``dout`` and the branch ``v`` once and writes ``ag``, the input of the
layer's own input-gradient GEMM. Where several samples share a source image, their ``ag`` are summed
before that GEMM (it is linear), in a fixed order: the GEMM then runs over images, not over samples.

Column sums never use atomics. Every tile writes its sums to its own slot, and
``column_sums_kernel`` adds the slots of a sample in order: equal bits on every run.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
import triton
import triton.language as tl
from torch import Tensor
from wfnet.kernels.config import span
from wfnet.kernels.epilogue import backward_epilogue, load_tile, store_tile
from wfnet.kernels.launch import Launch, check_tables_and_layout

RESULTS = ("grad", "scaled_grad", "t0", "t1", "shortcut_scaled_grad", "shortcut_t1")
Sums = tuple[Tensor | None, Tensor | None, Tensor | None]  # T0, T1, T1 of the shortcut
NO_SUMS: Sums = (None, None, None)
_PIXELS = ("branch", "activation", "skip", "shortcut_branch")


@dataclass(frozen=True)
class LayerBelow:
    """The layer whose output receives a gradient: what its elementwise backward reads.

    Pixel tensors have the layout of that output (``[B, H, W, C]`` or ``[M, C]``), contiguous.
    """

    branch: Tensor | None = None  # v = A * u, stored by the forward pass
    scale: Tensor | None = None  # [B, C] fp32, A
    shift: Tensor | None = None  # [B, C] fp32, C
    activation: Tensor | None = None  # the output itself, where a residual made it
    skip: Tensor | None = None  # gradient that reaches the output another way
    shortcut_branch: Tensor | None = None  # v of a projection shortcut that made the residual
    shortcut_scale: Tensor | None = None  # [B, C] fp32, its A
    relu: bool = False

    @property
    def row_stride(self) -> int:
        """Elements from one row of the tables to the next (they are slices of wider tables)."""
        table = self.shift if self.scale is None else self.scale
        return 0 if table is None else table.stride(0)

    def as_tokens(self) -> LayerBelow:
        """The same layer with pixel tensors ``[B, H * W, C]``."""
        pixels = {name: getattr(self, name) for name in _PIXELS}
        return replace(
            self, **{n: None if t is None else t.flatten(1, 2) for n, t in pixels.items()}
        )

    def check(self, want: tuple[str, ...]) -> None:
        """Raises ValueError if a wanted result lacks the tensor that it is made from."""
        if set(want) - set(RESULTS) or not want:
            raise ValueError(f"want={want} must name some of {', '.join(map(repr, RESULTS))}")
        if "t1" in want and self.branch is None:
            raise ValueError("t1 is summed from the branch; pass branch=")
        if "scaled_grad" in want and self.scale is None:
            raise ValueError("scaled_grad needs the layer's table; pass scale=")
        if self.relu and self.branch is None and self.activation is None:
            raise ValueError("a ReLU mask is read from the activation or the branch; pass one")
        if {"shortcut_scaled_grad", "shortcut_t1"} & set(want) and (
            self.shortcut_branch is None or self.shortcut_scale is None
        ):
            raise ValueError(
                "a shortcut's results need its branch and table; pass shortcut_branch= and "
                "shortcut_scale="
            )
        for name in _PIXELS:
            tensor = getattr(self, name)
            if tensor is not None and not tensor.is_contiguous():
                raise ValueError(f"{name} {tuple(tensor.shape)} must be contiguous (channels last)")


@dataclass(frozen=True)
class Gradient:
    """What a backward launch writes; None for what was not asked for."""

    grad: Tensor | None  # g
    scaled_grad: Tensor | None  # ag = A * g
    t0: Tensor | None  # [B, C] fp32
    t1: Tensor | None  # [B, C] fp32
    size: int = 0
    shortcut_scaled_grad: Tensor | None = None
    shortcut_t1: Tensor | None = None

    @property
    def sums(self) -> Sums:
        """T0, T1 and the shortcut's T1."""
        return self.t0, self.t1, self.shortcut_t1

    def over_pixels(self, size: tuple[int, int]) -> Gradient:
        """The same with pixel tensors ``[B, H, W, C]`` instead of ``[B, H * W, C]``."""
        names = ("grad", "scaled_grad", "shortcut_scaled_grad")
        pixels = {name: getattr(self, name) for name in names}
        return replace(
            self, **{n: None if t is None else t.unflatten(1, size) for n, t in pixels.items()}
        )

    @classmethod
    def empty(
        cls,
        like: Tensor,
        shape: tuple[int, ...],
        want: tuple[str, ...],
        sums: Sums = NO_SUMS,
    ) -> Gradient:
        """Results for an output of ``shape`` ``[B, ..., C]`` in the dtype of ``like``.

        ``sums``: where column sums go, ``[B, C]`` fp32 contiguous; fresh memory where None.
        """

        def pixels(name: str) -> Tensor | None:
            return like.new_empty(shape) if name in want else None

        size = 1
        for length in shape:
            size *= length

        def column_sums(name: str, given: Tensor | None) -> Tensor | None:
            if name not in want:
                return None
            expected = (shape[0], shape[-1])
            if given is None:
                make = torch.empty if size else torch.zeros
                return make(expected, dtype=torch.float32, device=like.device)
            fits = tuple(given.shape) == expected and given.dtype == torch.float32
            if not (fits and given.is_contiguous()):
                raise ValueError(
                    f"{name} must be contiguous float32 {expected}, not {given.dtype} "
                    f"{tuple(given.shape)}"
                )
            return given if size else given.zero_()

        t0, t1, shortcut_t1 = (
            column_sums(name, given)
            for name, given in zip(("t0", "t1", "shortcut_t1"), sums, strict=True)
        )
        return cls(
            pixels("grad"), pixels("scaled_grad"), t0, t1, size, pixels("shortcut_scaled_grad"),
            shortcut_t1,
        )  # fmt: skip

    def partials(self, slots: int, like: Tensor) -> Sums:
        """Workspaces ``[slots, C]`` for the column sums that were asked for."""
        return tuple(
            None
            if total is None
            else torch.empty((slots, total.shape[1]), dtype=torch.float32, device=like.device)
            for total in self.sums
        )


@triton.jit(do_not_specialize=["B", "T"])
def epilogue_bwd_kernel(
    dout,  # [B, T, C]
    skip,  # [B, T, C] or None
    branch,  # [B, T, C] or None
    activation,  # [B, T, C] or None
    scale,  # [B, C] fp32 or None
    shift,  # [B, C] fp32 or None
    order,  # [B] int64: samples sorted by source, or None
    first_of,  # [N + 1] int64: where each source starts in order, or None
    grad,  # [B, T, C] or None
    scaled_grad,  # [B, T, C], summed over equal sources [N, T, C], or None
    partial0,  # [tiles, B, C] fp32 or None
    partial1,
    partial2,
    shortcut_branch,
    shortcut_scale,
    shortcut_grad,
    B,
    T,
    C,
    LD,  # stride between rows of the tables
    RELU: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
):
    tile = tl.program_id(0)
    tiles_n = tl.cdiv(C, BN)
    tiles_t = tl.cdiv(T, BM)
    cols = tile % tiles_n * BN + tl.arange(0, BN)
    tile = tile // tiles_n
    tile_t = tile % tiles_t
    target = tile // tiles_t  # sample, or source image
    rows = tile_t * BM + tl.arange(0, BM)
    row_ok = rows < T
    col_ok = cols < C
    if order is None:
        at = ((target.to(tl.int64) * T + tile_t * BM) * C, tl.arange(0, BM) * C, cols)
        acc = load_tile(dout, at, row_ok, col_ok, False, BM, BN).to(tl.float32)
        backward_epilogue(
            acc,
            skip,
            branch,
            activation,
            scale,
            shift,
            grad,
            scaled_grad,
            partial0,
            partial1,
            partial2,
            shortcut_branch,
            shortcut_scale,
            shortcut_grad,
            at,
            tile_t * B + target,
            target,
            rows,
            cols,
            row_ok,
            B,
            C,
            LD,
            RELU,
            False,
            1,
            True,
            BM,
            BN,
        )
    else:
        total = tl.zeros((BM, BN), dtype=tl.float32)
        for position in range(tl.load(first_of + target), tl.load(first_of + target + 1)):
            sample = tl.load(order + position).to(tl.int32)
            at = ((sample.to(tl.int64) * T + tile_t * BM) * C, tl.arange(0, BM) * C, cols)
            acc = load_tile(dout, at, row_ok, col_ok, False, BM, BN).to(tl.float32)
            acc = backward_epilogue(
                acc,
                skip,
                branch,
                activation,
                scale,
                shift,
                grad,
                None,
                partial0,
                partial1,
                partial2,
                shortcut_branch,
                shortcut_scale,
                shortcut_grad,
                at,
                tile_t * B + sample,
                sample,
                rows,
                cols,
                row_ok,
                B,
                C,
                LD,
                RELU,
                False,
                1,
                True,
                BM,
                BN,
            )
            if scaled_grad is not None:
                factor = tl.load(scale + (sample * LD + cols), mask=col_ok, other=0.0)
                total += acc * factor[None, :]
        if scaled_grad is not None:
            at = ((target.to(tl.int64) * T + tile_t * BM) * C, tl.arange(0, BM) * C, cols)
            store_tile(scaled_grad, at, total, row_ok, col_ok, False)


@triton.jit(do_not_specialize=["B", "T", "SLOTS"])
def column_sums_kernel(
    partial,  # [slots, C] fp32
    total,  # [B, C] fp32
    B,
    T,
    C,
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
    tl.store(total + sample.to(tl.int64) * C + cols, tl.sum(sums, axis=0), mask=col_ok)


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
        "SLOTS": slots,
        "SPAN": touched,
        "BM": block_m,
        "BS": 8,
        "BN": 128,
    }
    return Launch(column_sums_kernel, (batch, triton.cdiv(columns, 128)), arguments, 4, 2)


def add_column_sums(
    partials: Sums,
    into: Gradient,
    batch: int,
    tokens: int,
    *,
    slots: int = 0,
    block_m: int = 0,
) -> None:
    """Adds what the tiles wrote to ``partials`` into ``into.t0`` and ``into.t1``, in tile order.

    Args:
        tokens: pixels or tokens of a sample.
        slots: tiles that hold rows of one sample (grouped tiles); their slots are ``batch`` apart.
        block_m: rows of a flat tile, if the tiles were flat.
    """
    touched = span(block_m, tokens) if block_m else 0
    for partial, total in zip(partials, into.sums, strict=True):
        if total is not None and partial is not total:
            plan_column_sums(partial, total, tokens, slots, block_m, touched).run()


def by_source(source: Tensor, sources: int) -> tuple[Tensor, Tensor]:
    """Samples grouped by source: ``order`` ``[B]`` and ``first_of`` ``[sources + 1]``, int64.

    ``order[first_of[n]:first_of[n + 1]]`` are the samples of image n, in ascending order. No
    synchronisation, so it may be captured in a CUDA graph.
    """
    sorted_source, order = torch.sort(source, stable=True)
    bounds = torch.arange(sources + 1, device=source.device, dtype=source.dtype)
    return order, torch.searchsorted(sorted_source, bounds)


def plan_epilogue_bwd(
    dout: Tensor,
    below: LayerBelow,
    into: Gradient,
    partials: Sums,
    grouping: tuple[Tensor, Tensor] | None,
    targets: int,
) -> Launch:
    """The launch of ``epilogue_bwd``; ``grouping`` comes from ``by_source``."""
    batch, tokens, columns = dout.shape
    block_m, block_n = tile_of(tokens, columns)
    order, first_of = grouping or (None, None)
    arguments = {
        "dout": dout,
        "skip": below.skip,
        "branch": below.branch,
        "activation": below.activation,
        "scale": below.scale,
        "shift": below.shift,
        "order": order,
        "first_of": first_of,
        "grad": into.grad,
        "scaled_grad": into.scaled_grad,
        "shortcut_branch": below.shortcut_branch,
        "shortcut_scale": below.shortcut_scale,
        "shortcut_grad": into.shortcut_scaled_grad,
        "partial0": partials[0],
        "partial1": partials[1],
        "partial2": partials[2],
        "B": batch,
        "T": tokens,
        "C": columns,
        "LD": below.row_stride,
        "RELU": below.relu,
        "BM": block_m,
        "BN": block_n,
    }
    grid = (targets * triton.cdiv(tokens, block_m) * triton.cdiv(columns, block_n),)
    return Launch(epilogue_bwd_kernel, grid, arguments, 4, 2)


def tile_of(tokens: int, columns: int) -> tuple[int, int]:
    """Rows and columns of an elementwise tile: 16-byte rows of channels, about 4096 elements."""
    block_n = min(128, max(16, triton.next_power_of_2(columns)))
    return min(4096 // block_n, max(1, triton.next_power_of_2(tokens))), block_n


def epilogue_bwd(
    dout: Tensor,
    below: LayerBelow,
    *,
    want: tuple[str, ...] = ("scaled_grad", "t1"),
    sums: Sums = NO_SUMS,
    source: Tensor | None = None,
    sources: int | None = None,
) -> Gradient:
    """One pass from ``dout`` to ``g``, ``A * g`` and the column sums T0 and T1.

    Equivalent to::

        g  = (dout + skip) * act'
        t0 = g.sum(1);  t1 = (g * branch).sum(1);  scaled_grad = scale[:, None] * g
        scaled_grad = zeros[sources].index_add(0, source, scaled_grad)      # where source is given

    Args:
        dout: ``[B, T, C]`` contiguous; fp16, bf16 or fp32.
        below: branch, tables, mask and skip gradient of the layer.
        want: any of ``RESULTS``.
        sums: ``[B, C]`` fp32 to write the column sums to; fresh memory where None.
        source: ``[B]`` int64: sums ``scaled_grad`` over samples of the same image, in fp32.
        sources: number of images, with ``source``.

    Raises:
        ValueError: if a result lacks the tensor it is made from, or a layout does not fit.
    """
    below.check(want)
    check_tables_and_layout(dout, dout, below.scale, below.shift)
    into = Gradient.empty(dout, tuple(dout.shape), want, sums)
    batch, tokens, columns = dout.shape
    grouping = None
    if source is not None:
        grouping = by_source(source, sources)
        if into.scaled_grad is not None:
            scaled = dout.new_empty((sources, tokens, columns))
            into = replace(into, scaled_grad=scaled)
    if into.size == 0:
        if into.scaled_grad is not None:
            into.scaled_grad.zero_()
        return into
    slots = triton.cdiv(tokens, tile_of(tokens, columns)[0])
    partials = into.sums if slots == 1 else into.partials(slots * batch, dout)
    targets = batch if source is None else sources
    plan_epilogue_bwd(dout, below, into, partials, grouping, targets).run()
    add_column_sums(partials, into, batch, tokens, slots=slots)
    return into

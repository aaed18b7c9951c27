"""Host side of ``epilogue.py``: what an epilogue reads and writes, bundled once for all kernels.

Triton kernels take their arguments one by one. A launcher builds one of the two objects here from
the backend contract (:mod:`wfnet.backends.contract`), and merges its arguments into those of its
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

# How a kernel takes a pixel tensor (by default by its address), and what gives the arguments so.
View = Callable[[Tensor], object]
Binding = Callable[..., dict[str, object]]


def channels_last(x: Tensor | None) -> Tensor | None:
    """Returns ``[N, C, H, W]`` as contiguous ``[N, H, W, C]``: a view of channels-last memory."""
    return None if x is None else x.permute(0, 2, 3, 1).contiguous()


def channels_first(x: Tensor | None) -> Tensor | None:
    """Returns ``[N, H, W, C]`` as a ``[N, C, H, W]`` view, channels-last in memory."""
    return None if x is None else x.permute(0, 3, 1, 2)


def _seen(pixels: dict[str, Tensor | None], view: View | None) -> dict[str, object]:
    """``pixels`` as a kernel takes them."""
    return {n: t if t is None or view is None else view(t) for n, t in pixels.items()}


def _aligned_tables(shape: tuple[int, int], **tables: Tensor | None) -> dict[str, object]:
    """Tables ``[B, C]`` with rows of one stride ``LD``, copied only if they have not.

    Raises:
        ValueError: for another shape or dtype, or one past 32-bit indexing.
    """
    given = [table for table in tables.values() if table is not None]
    for table in given:
        if tuple(table.shape) != shape or table.dtype != torch.float32:
            raise ValueError(
                f"tables must be float32 {shape}, not {table.dtype} {tuple(table.shape)}"
            )
    if any(table.stride() != (given[0].stride(0), 1) for table in given):
        dense = {n: None if table is None else table.contiguous() for n, table in tables.items()}
        return _aligned_tables(shape, **dense)
    stride = given[0].stride(0) if given else 0
    if shape[0] * stride >= 2**31:
        raise ValueError(f"{shape[0]} table rows of {stride} entries are past 32-bit indexing")
    return {**tables, "LD": stride}


def _check_pixels(
    name: str, tensor: Tensor | None, shape: tuple[int, ...], dtype: torch.dtype
) -> None:
    if tensor is not None and (tuple(tensor.shape) != shape or tensor.dtype != dtype):
        raise ValueError(
            f"{name} must be {dtype} {shape} (channels last), not {tensor.dtype} "
            f"{tuple(tensor.shape)}"
        )


_NO_MOMENTS = dict.fromkeys(("sums", "squares", "counts"))


@dataclass(frozen=True)
class ForwardArguments:
    """Arguments of ``forward_epilogue`` by name: pixel tensors ``[B, P, Q, O]``, and the others."""

    pixels: dict[str, Tensor | None]
    others: dict[str, object]

    @classmethod
    def of(cls, epilogue: Epilogue, like: Tensor, shape: tuple[int, ...]) -> ForwardArguments:
        """Makes room for an output ``shape`` ``[B, P, Q, O]`` in the dtype of ``like``.

        Raises:
            ValueError: for tables or a residual that do not fit.
        """
        columns = shape[0], shape[3]
        tables = _aligned_tables(columns, scale=epilogue.scale, shift=epilogue.shift)
        residual = channels_last(epilogue.residual)
        _check_pixels("residual", residual, shape, like.dtype)
        out = like.new_empty(shape)
        branch = torch.empty_like(out) if epilogue.save else None
        pixels = {"residual": residual, "branch": branch, "out": out}
        return cls(pixels, tables | _NO_MOMENTS | {"RELU": epilogue.relu})

    @classmethod
    def of_product(cls, out: Tensor, moments: dict[str, Tensor]) -> ForwardArguments:
        """Returns what stores the product ``out`` ``[B, P, Q, O]`` itself, and its moments."""
        pixels = {"residual": None, "branch": None, "out": out}
        tables = {"scale": None, "shift": None, "LD": 0}
        return cls(pixels, tables | _NO_MOMENTS | moments | {"RELU": False})

    def __call__(self, view: View | None = None) -> dict[str, object]:
        """Returns the arguments by name."""
        return _seen(self.pixels, view) | self.others

    def activation(self) -> Activation:
        """Returns the results in the contract's form."""
        out, branch = channels_first(self.pixels["out"]), channels_first(self.pixels["branch"])
        masked = branch is not None and self.others["RELU"] and self.pixels["residual"] is not None
        return Activation(out, branch, out if masked else None)


@dataclass(frozen=True)
class BackwardArguments:
    """Arguments of ``backward_epilogue`` by name; what is None is not read, or not wanted.

    Attributes:
        shape: of the layer's output, ``[B, H, W, C]``, as of ``reads`` and ``writes``.
        others: tables ``[B, C]`` and numbers.
        sums: where T0, T1 and T1 of the shortcut go, ``[B, C]`` fp32, rows of any stride.
        copied_t0: the shortcut's own T0, which equals T0.
    """

    shape: tuple[int, ...]
    reads: dict[str, Tensor | None]
    writes: dict[str, Tensor | None]
    others: dict[str, object]
    sums: tuple[Tensor | None, Tensor | None, Tensor | None] = (None, None, None)
    copied_t0: Tensor | None = None

    @classmethod
    def of(cls, below: LayerBelow, like: Tensor, shape: tuple[int, ...]) -> BackwardArguments:
        """Makes room for what ``below`` wants of a gradient that reaches its output.

        Args:
            like: results have its dtype.
            shape: of that output, ``[B, H, W, C]``.

        Raises:
            ValueError: for tensors that do not fit, or a result without what it is made from.
        """
        other = below.shortcut or LayerBelow(scale=None, need_scaled_grad=False)
        if below.t1 is not None and below.branch is None:
            raise ValueError("t1 is summed from the branch, and the layer has none")
        if below.relu and below.branch is None and below.mask is None:
            raise ValueError("a ReLU mask is read from mask or branch, and the layer has neither")
        columns = shape[0], shape[3]
        reads = {
            "skip": channels_last(below.skip),
            "branch": channels_last(below.branch),
            "activation": channels_last(below.mask),
            "shortcut_branch": channels_last(other.branch),
        }
        for name, tensor in reads.items():
            _check_pixels(name, tensor, shape, like.dtype)
        wanted = {
            "grad": below.need_grad,
            "scaled_grad": below.need_scaled_grad,
            "shortcut_grad": other.need_scaled_grad,
        }
        writes = {n: like.new_empty(shape) if want else None for n, want in wanted.items()}
        tables = {"scale": below.scale, "shift": below.shift, "shortcut_scale": other.scale}
        others = _aligned_tables(columns, **tables)
        others |= {"RELU": below.relu, "UNSCALED": below.unscaled}
        sums = (other.t0 if below.t0 is None else below.t0), below.t1, other.t1
        for total in sums:
            if total is not None and (tuple(total.shape) != columns or total.stride(1) != 1):
                raise ValueError(f"column sums must be rows {columns}, not {tuple(total.shape)}")
        return cls(shape, reads, writes, others, sums, None if below.t0 is None else other.t0)

    @property
    def summing(self) -> bool:
        """Whether any column sums are wanted."""
        return any(total is not None for total in self.sums)

    def with_scaled_grad(self, scaled_grad: Tensor) -> BackwardArguments:
        """Returns the same with another tensor for the scaled gradient."""
        return replace(self, writes=self.writes | {"scaled_grad": scaled_grad})

    def run(
        self, plan: Callable[[Binding], Launch], *, grouped: int = 0, block_m: int = 0
    ) -> LayerGradient:
        """Runs a kernel that ends in ``backward_epilogue``, and adds its column sums.

        Where a sample has one tile of its own, the tile's sums are the sample's: no workspace is
        needed if their rows lie dense.

        Args:
            plan: makes the launch from what gives the epilogue's arguments.
            grouped: tiles that hold rows of one sample, of kernels whose tiles keep samples apart.
            block_m: rows of a tile, of kernels whose tiles do not.
        """
        if 0 in self.shape:
            return self.of_nothing()
        batch, height, width, columns = self.shape
        tokens = height * width
        touched = span(block_m, tokens) if block_m else 0
        slots = touched * triton.cdiv(batch * tokens, block_m) if block_m else grouped * batch

        def partial(total: Tensor | None) -> Tensor | None:
            if total is None or (slots == batch and grouped and total.is_contiguous()):
                return total
            return total.new_empty((slots, columns))

        partials = [partial(total) for total in self.sums]
        named = {f"partial{i}": tensor for i, tensor in enumerate(partials)}
        plan(lambda view=None: self._bound(view) | named).run()
        for sums, total in zip(partials, self.sums, strict=True):
            if sums is not total:
                _column_sums(sums, total, tokens, grouped, block_m, touched).run()
        return self._gradient()

    def of_nothing(self) -> LayerGradient:
        """Returns the results where there is no pixel: no launch, and sums are 0."""
        for empty in (*self.sums, self.writes["scaled_grad"]):
            if empty is not None:
                empty.zero_()
        return self._gradient()

    def _bound(self, view: View | None) -> dict[str, object]:
        return _seen(self.reads | self.writes, view) | self.others

    def _gradient(self) -> LayerGradient:
        if self.copied_t0 is not None:
            self.copied_t0.copy_(self.sums[0])  # both receive the same g
        return LayerGradient(*map(channels_first, self.writes.values()))


@triton.jit
def tiles_of_sample(sample, T, SLOTS, SPAN: tl.constexpr, BM: tl.constexpr):
    """The first tile with rows of a sample, and how many there are; see column_sums_kernel."""
    if SPAN == 0:
        first = 0
        count = SLOTS
    else:
        first = (sample.to(tl.int64) * T // BM).to(tl.int32)
        count = (((sample + 1).to(tl.int64) * T - 1) // BM).to(tl.int32) - first + 1
    return first, count


@triton.jit
def slot_of_tile(sample, tile, B, T, SPAN: tl.constexpr, BM: tl.constexpr):
    """Where a tile's sums of a sample lie."""
    if SPAN == 0:
        slot = tile.to(tl.int64) * B + sample
    else:
        slot = tile.to(tl.int64) * SPAN + sample - tile.to(tl.int64) * BM // T
    return slot


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
    first, count = tiles_of_sample(sample, T, SLOTS, SPAN, BM)
    for start in range(0, count, BS):
        slot = slot_of_tile(sample, first + start + lane, B, T, SPAN, BM)
        ok = (start + lane < count)[:, None] & col_ok[None, :]
        sums += tl.load(partial + (slot[:, None] * C + cols[None, :]), mask=ok, other=0.0)
    tl.store(total + sample.to(tl.int64) * LD + cols, tl.sum(sums, axis=0), mask=col_ok)


def _column_sums(
    partial: Tensor, total: Tensor, tokens: int, slots: int, block_m: int, touched: int
) -> Launch:
    """``slots`` per sample, or flat tiles of ``block_m`` that touch so many samples."""
    batch, columns = total.shape
    arguments = {"partial": partial, "total": total, "B": batch, "T": tokens, "C": columns}
    arguments |= {"LD": total.stride(0), "SLOTS": slots}
    arguments |= {"SPAN": touched, "BM": block_m, "BS": 8, "BN": 128}
    return Launch(column_sums_kernel, (batch, triton.cdiv(columns, 128)), arguments)

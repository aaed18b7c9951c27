"""Masked linear map (qkv projections) and 1x1 convolution of stride 1, forward and input gradient.

    u[b, t, o] = sum_c x[b, t, c] * w[o, c],   out = act(A[b, o] * u + C[b, o] + residual)
    dx[b, t, c] = sum_o ag[b, t, o] * w[o, c],  then the layer below's elementwise backward

Rows (b, t) are flat, so that 197 tokens or 7 x 7 pixels waste no row of a tile; a tile meets
at most a few samples, whose table rows are selected per row (``epilogue.row_factors``).

Both kernels are persistent and all-descriptor: depth is short (192 to 2048), and the next tile's
operands are fetched while this tile's epilogue runs. Where descriptors cannot be used, the gather
kernels of ``conv_fprop`` and ``conv_dgrad`` run the same problem as a 1x1 convolution.
"""

# ruff: noqa: E741 (O is the number of output channels here, as in every equation)

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from wfnet.kernels import autotune
from wfnet.kernels.config import (
    Choice,
    ConvShape,
    Device,
    GemmConfig,
    LinearShape,
    device_of,
    full_precision,
    linear_choice,
    span,
)
from wfnet.kernels.conv_dgrad import plan_conv_dgrad
from wfnet.kernels.conv_fprop import conv_fprop, plan_conv_fprop
from wfnet.kernels.epilogue import backward_epilogue, forward_epilogue
from wfnet.kernels.epilogue_bwd import (
    NO_SUMS,
    Gradient,
    LayerBelow,
    Sums,
    add_column_sums,
    epilogue_bwd,
)
from wfnet.kernels.launch import Launch, check_tables_and_layout, describable, descriptor, operand


@triton.jit(do_not_specialize=["M", "B", "T"])
def linear_fprop_kernel(
    x,  # [M, K] in boxes [BM, BK]
    w,  # [O, K] in boxes [BN, BK]
    scale,  # [B, O] fp32
    shift,  # [B, O] fp32 or None
    residual,  # [M, O] in boxes or None
    branch,  # [M, O] in boxes or None
    out,  # [M, O] in boxes
    M,
    B,
    T,
    O,
    LD,  # stride between rows of the tables
    K: tl.constexpr,
    RELU: tl.constexpr,
    PRECISION: tl.constexpr,
    FLATTEN: tl.constexpr,
    SPAN: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
):
    tiles_n = tl.cdiv(O, BN)
    tiles = tl.cdiv(M, BM) * tiles_n
    for tile in tl.range(tl.program_id(0), tiles, tl.num_programs(0), flatten=FLATTEN):
        m0 = tile // tiles_n * BM
        n0 = tile % tiles_n * BN
        acc = tl.zeros((BM, BN), dtype=tl.float32)
        for k0 in range(0, K, BK):
            acc = tl.dot(x.load([m0, k0]), w.load([n0, k0]).T, acc, input_precision=PRECISION)
        rows = m0 + tl.arange(0, BM)
        forward_epilogue(
            acc,
            scale,
            shift,
            residual,
            branch,
            out,
            (m0, n0),
            m0 // T,
            rows // T,
            n0 + tl.arange(0, BN),
            rows < M,
            B,
            O,
            LD,
            RELU,
            True,
            SPAN,
            False,
            BM,
            BN,
        )


@triton.jit(do_not_specialize=["M", "B", "T"])
def linear_dgrad_kernel(
    ag,  # [M, O] in boxes [BM, BK]
    w,  # [O, C] in boxes [BK, BN]
    skip,  # [M, C] in boxes or None, like the four below
    branch,
    activation,
    scale,  # [B, C] fp32 or None: tables of the layer below
    shift,  # [B, C] fp32 or None
    grad,
    scaled_grad,
    partial0,  # [tiles, SPAN, C] fp32 or None
    partial1,
    partial2,
    shortcut_branch,
    shortcut_scale,
    shortcut_grad,
    M,
    B,
    T,
    C,
    LD,  # stride between rows of the tables
    K: tl.constexpr,
    RELU: tl.constexpr,
    PRECISION: tl.constexpr,
    FLATTEN: tl.constexpr,
    SPAN: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
):
    tiles_n = tl.cdiv(C, BN)
    tiles = tl.cdiv(M, BM) * tiles_n
    for tile in tl.range(tl.program_id(0), tiles, tl.num_programs(0), flatten=FLATTEN):
        tile_m = tile // tiles_n
        m0 = tile_m * BM
        n0 = tile % tiles_n * BN
        acc = tl.zeros((BM, BN), dtype=tl.float32)
        for k0 in range(0, K, BK):
            acc = tl.dot(ag.load([m0, k0]), w.load([k0, n0]), acc, input_precision=PRECISION)
        rows = m0 + tl.arange(0, BM)
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
            (m0, n0),
            tile_m * SPAN,
            m0 // T,
            rows // T,
            n0 + tl.arange(0, BN),
            rows < M,
            B,
            C,
            LD,
            RELU,
            True,
            SPAN,
            False,
            BM,
            BN,
        )


def _programs(rows: int, columns: int, config: GemmConfig, device: Device) -> tuple[int, bool]:
    """Thread blocks of a persistent launch, and whether each has several tiles to run through."""
    tiles = triton.cdiv(rows, config.block_m) * triton.cdiv(columns, config.block_n)
    return min(tiles, device.processors), tiles > device.processors


def _as_pixels(shape: LinearShape) -> ConvShape:
    return ConvShape(
        shape.batch,
        shape.tokens,
        1,
        shape.in_features,
        shape.out_features,
        (1, 1),
        (1, 1),
        (0, 0),
        (1, 1),
    )


def plan_linear_fprop(
    x: Tensor,
    weight: Tensor,
    scale: Tensor,
    shift: Tensor | None,
    residual: Tensor | None,
    branch: Tensor | None,
    out: Tensor,
    shape: LinearShape,
    relu: bool,
    config: GemmConfig,
    device: Device,
    op: str = "linear",
) -> Launch:
    """The launch of ``linear_fprop`` for a config; arguments as there, all contiguous."""
    if config.path == "gather":
        return plan_conv_fprop(
            x,
            weight,
            scale,
            shift,
            None,
            residual,
            branch,
            out,
            _as_pixels(shape),
            relu,
            config,
            op,
        )
    rows, depth, columns = shape.batch * shape.tokens, shape.in_features, shape.out_features
    programs, several = _programs(rows, columns, config, device)
    precision = "ieee" if full_precision(x.dtype, op) else "tf32"
    tiled = operand if precision == "tf32" else descriptor

    def tile(tensor: Tensor | None):
        if tensor is None:
            return None
        return descriptor(tensor, (rows, columns), (config.block_m, config.block_n))

    arguments = {
        "x": tiled(x, (rows, depth), (config.block_m, config.block_k)),
        "w": tiled(weight, (columns, depth), (config.block_n, config.block_k)),
        "scale": scale,
        "shift": shift,
        "residual": tile(residual),
        "branch": tile(branch),
        "out": tile(out),
        "M": rows,
        "B": shape.batch,
        "T": shape.tokens,
        "O": columns,
        "LD": scale.stride(0),
        "K": depth,
        "RELU": relu,
        "PRECISION": precision,
        "FLATTEN": several,
        "SPAN": span(config.block_m, shape.tokens),
        "BM": config.block_m,
        "BN": config.block_n,
        "BK": config.block_k,
    }
    return Launch(linear_fprop_kernel, (programs,), arguments, config.warps, config.stages)


def plan_linear_dgrad(
    ag: Tensor,
    weight: Tensor,
    below: LayerBelow,
    into: Gradient,
    partials: Sums,
    shape: LinearShape,
    config: GemmConfig,
    device: Device,
    op: str = "linear",
) -> Launch:
    """The launch of ``linear_dgrad`` for a config."""
    if config.path == "gather":
        return plan_conv_dgrad(ag, weight, below, into, partials, _as_pixels(shape), config, op)
    rows, depth, columns = shape.batch * shape.tokens, shape.out_features, shape.in_features
    programs, several = _programs(rows, columns, config, device)
    precision = "ieee" if full_precision(ag.dtype, op) else "tf32"
    tiled = operand if precision == "tf32" else descriptor

    def tile(tensor: Tensor | None):
        if tensor is None:
            return None
        return descriptor(tensor, (rows, columns), (config.block_m, config.block_n))

    arguments = {
        "ag": tiled(ag, (rows, depth), (config.block_m, config.block_k)),
        "w": tiled(weight, (depth, columns), (config.block_k, config.block_n)),
        "skip": tile(below.skip),
        "branch": tile(below.branch),
        "activation": tile(below.activation),
        "scale": below.scale,
        "shift": below.shift,
        "grad": tile(into.grad),
        "scaled_grad": tile(into.scaled_grad),
        "shortcut_branch": tile(below.shortcut_branch),
        "shortcut_scale": below.shortcut_scale,
        "shortcut_grad": tile(into.shortcut_scaled_grad),
        "partial0": partials[0],
        "partial1": partials[1],
        "partial2": partials[2],
        "M": rows,
        "B": shape.batch,
        "T": shape.tokens,
        "C": columns,
        "LD": below.row_stride,
        "K": depth,
        "RELU": below.relu,
        "PRECISION": precision,
        "FLATTEN": several,
        "SPAN": span(config.block_m, shape.tokens),
        "BM": config.block_m,
        "BN": config.block_n,
        "BK": config.block_k,
    }
    return Launch(linear_dgrad_kernel, (programs,), arguments, config.warps, config.stages)


def config_linear_fprop(x, weight, shape, residual=None, op="linear", plan=None) -> Choice:
    """Default or stored config for these tensors; ``plan`` allows a search where asked for."""
    depth, columns = shape.in_features, shape.out_features
    aligned = describable(x, depth) and describable(weight, depth)
    aligned = aligned and columns * x.element_size() % 16 == 0
    aligned = aligned and (residual is None or describable(residual, columns))
    device = device_of(x)
    default = linear_choice(shape, x.dtype, device, columns=columns, describable=aligned, op=op)
    return autotune.choose(f"{op}_rows_fprop", shape.key(), x.dtype, device, default, plan)


def config_linear_dgrad(
    ag, weight, shape, tensors=(), column_sums=False, op="linear", plan=None
) -> Choice:
    """Default or stored config for these tensors; ``plan`` allows a search where asked for."""
    depth, columns = shape.out_features, shape.in_features
    aligned = describable(ag, depth) and describable(weight, columns)
    aligned = aligned and all(describable(t, columns) for t in tensors if t is not None)
    device = device_of(ag)
    default = linear_choice(
        shape,
        ag.dtype,
        device,
        columns=columns,
        describable=aligned,
        column_sums=column_sums,
        op=op,
    )
    key = shape.key() + ("_sums" if column_sums else "")
    return autotune.choose(f"{op}_rows_dgrad", key, ag.dtype, device, default, plan)


def linear_fprop(
    x: Tensor,
    weight: Tensor,
    scale: Tensor,
    shift: Tensor | None = None,
    *,
    source: Tensor | None = None,
    residual: Tensor | None = None,
    relu: bool = False,
    save_branch: bool = False,
    config: GemmConfig | None = None,
    op: str = "linear",
) -> tuple[Tensor, Tensor | None]:
    """Linear map with scale, shift, residual and activation in its epilogue, one launch.

    Equivalent to::

        v = scale[:, None] * F.linear(x[source], weight)
        out = act(v + shift[:, None] + residual)

    Args:
        x: ``[N, T, C]`` contiguous; fp16, bf16 or fp32.
        weight: ``[O, C]`` contiguous, dtype of ``x``.
        scale: ``[B, O]`` fp32.
        shift: ``[B, O]`` fp32 or None.
        source: ``[B]`` int64 positions in ``x``, or None; runs ``conv_fprop`` with 1x1 filters,
            whose tiles follow the indices.
        residual: ``[B, T, O]`` dtype of ``x``, or None.
        save_branch: also write ``v``.
        config: tile sizes; None takes the default or a stored search result.
        op: whose TF32 setting holds for fp32, ``linear`` or ``conv``.

    Returns:
        ``out`` ``[B, T, O]`` and ``v`` of the same shape, or None.

    Raises:
        ValueError: for shapes, dtypes or layouts that do not fit.
    """
    batch, columns = scale.shape
    tokens, depth = x.shape[1], x.shape[2]
    if weight.shape != (columns, depth) or weight.dtype != x.dtype:
        raise ValueError(
            f"weight {tuple(weight.shape)} {weight.dtype} does not fit x {tuple(x.shape)} {x.dtype}"
        )
    if source is not None:
        out, branch = conv_fprop(
            x.unsqueeze(2),
            weight[:, None, None],
            scale,
            shift,
            source=source,
            residual=None if residual is None else residual.unsqueeze(2),
            relu=relu,
            save_branch=save_branch,
            config=config,
            op=op,
        )
        return out.squeeze(2), None if branch is None else branch.squeeze(2)
    if batch != x.shape[0]:
        raise ValueError(f"scale has {batch} rows for {x.shape[0]} samples without source")
    if shift is not None and shift.shape != scale.shape:
        raise ValueError(f"shift {tuple(shift.shape)} must have the shape {tuple(scale.shape)}")
    check_tables_and_layout(x, weight, scale, shift)
    out = x.new_empty((batch, tokens, columns))
    branch = torch.empty_like(out) if save_branch else None
    if residual is not None and (residual.shape != out.shape or not residual.is_contiguous()):
        raise ValueError(
            f"residual must be contiguous {tuple(out.shape)}, not {tuple(residual.shape)}"
        )
    if out.numel() == 0:
        return out, branch
    shape = LinearShape(batch, tokens, depth, columns)
    device = device_of(x)

    def plan(candidate: GemmConfig) -> Launch:
        return plan_linear_fprop(
            x, weight, scale, shift, residual, branch, out, shape, relu, candidate, device, op
        )

    if config is None:
        config = config_linear_fprop(x, weight, shape, residual, op, plan).config
    plan(config).run()
    return out, branch


def linear_dgrad(
    ag: Tensor,
    weight: Tensor,
    below: LayerBelow | None = None,
    *,
    want: tuple[str, ...] = ("grad",),
    sums: Sums = NO_SUMS,
    config: GemmConfig | None = None,
    op: str = "linear",
) -> Gradient:
    """Input gradient of a linear map, and the elementwise backward of the layer below it.

    Equivalent to::

        g  = ag @ weight + skip
        g  = g * (activation > 0), or g * (branch + shift > 0), if below.relu
        t0 = g.sum(1);  t1 = (g * branch).sum(1);  scaled_grad = scale[:, None] * g

    Args:
        ag: ``[B, T, O]`` contiguous, ``A * g`` of this layer.
        weight: ``[O, C]`` contiguous.
        below: what the epilogue needs to know of the layer below; None: the plain gradient.
        want: any of ``epilogue_bwd.RESULTS``.
        sums: ``[B, C]`` fp32 to write the column sums to; fresh memory where None.

    Raises:
        ValueError: for shapes that do not fit, or a result without the tensor it is made from.
    """
    below = below or LayerBelow()
    below.check(want)
    if ag.shape[2] != weight.shape[0] or ag.dtype != weight.dtype:
        raise ValueError(
            f"weight {tuple(weight.shape)} {weight.dtype} does not fit ag "
            f"{tuple(ag.shape)} {ag.dtype}"
        )
    check_tables_and_layout(ag, weight, below.scale, below.shift)
    batch, tokens, _ = ag.shape
    shape = LinearShape(batch, tokens, weight.shape[1], weight.shape[0])
    into = Gradient.empty(ag, (batch, tokens, shape.in_features), want, sums)
    if into.size == 0:
        return into
    device = device_of(ag)
    summing = any(total is not None for total in into.sums)

    def partials_of(candidate: GemmConfig) -> Sums:
        touched = span(candidate.block_m, tokens)
        return into.partials(triton.cdiv(batch * tokens, candidate.block_m) * touched, ag)

    def plan(candidate: GemmConfig) -> Launch:
        partials = partials_of(candidate)
        return plan_linear_dgrad(ag, weight, below, into, partials, shape, candidate, device, op)

    if config is None:
        tensors = (below.skip, below.branch, below.activation, below.shortcut_branch)
        config = config_linear_dgrad(ag, weight, shape, tensors, summing, op, plan).config
    if summing and span(config.block_m, tokens) == 0:
        # Tiles that meet many samples cannot sum their columns: leave it to the elementwise pass.
        plain = linear_dgrad(ag, weight, config=config, op=op)
        return epilogue_bwd(plain.grad, below, want=want, sums=sums)
    partials = partials_of(config)
    plan_linear_dgrad(ag, weight, below, into, partials, shape, config, device, op).run()
    add_column_sums(partials, into, batch, tokens, block_m=config.block_m)
    return into

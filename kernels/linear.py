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

import triton
import triton.language as tl
from torch import Tensor
from wfnet.kernels.config import (
    Choice,
    Device,
    GemmConfig,
    LinearShape,
    device_of,
    full_precision,
    linear_choice,
    span,
)
from wfnet.kernels.conv_dgrad import plan_conv_dgrad
from wfnet.kernels.conv_fprop import plan_conv_fprop
from wfnet.kernels.epilogue import backward_epilogue, forward_epilogue
from wfnet.kernels.epilogue_arguments import BackwardArguments, ForwardArguments, channels_last
from wfnet.kernels.epilogue_bwd import epilogue_bwd
from wfnet.kernels.launch import Launch, describable, descriptor, operand

from wfnet.backends.contract import Activation, Epilogue, LayerBelow, LayerGradient


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


def _plan(
    kernel: object,
    operands: tuple[Tensor, Tensor, bool],
    epilogue: ForwardArguments | BackwardArguments,
    shape: LinearShape,
    config: GemmConfig,
    op: str,
    device: Device,
) -> Launch:
    """The launch of a persistent kernel.

    Args:
        operands: rows ``[M, K]``, the weight ``[O, C]``, and whether it is read transposed.
    """
    rows, weight, transposed = operands
    count, depth = shape.batch * shape.tokens, rows.shape[-1]
    columns = weight.shape[0] if transposed else weight.shape[1]
    programs, several = _programs(count, columns, config, device)
    exact = full_precision(rows.dtype, op)
    tiled = descriptor if exact else operand

    def tile(tensor: Tensor | None):
        if tensor is None:
            return None
        return descriptor(tensor, (count, columns), (config.block_m, config.block_n))

    block = (config.block_n, config.block_k) if transposed else (config.block_k, config.block_n)
    arguments = {
        "x" if transposed else "ag": tiled(rows, (count, depth), (config.block_m, config.block_k)),
        "w": tiled(weight, tuple(weight.shape[:2]), block),
        **epilogue.bound(tile),
        "M": count,
        "B": shape.batch,
        "T": shape.tokens,
        "O" if transposed else "C": columns,
        "K": depth,
        "PRECISION": "ieee" if exact else "tf32",
        "FLATTEN": several,
        "SPAN": span(config.block_m, shape.tokens),
        "BM": config.block_m,
        "BN": config.block_n,
        "BK": config.block_k,
    }
    return Launch(kernel, (programs,), arguments, config.warps, config.stages)


def plan_linear_fprop(
    x: Tensor,
    weight: Tensor,
    forward: ForwardArguments,
    shape: LinearShape,
    config: GemmConfig,
    op: str,
    device: Device,
) -> Launch:
    """The launch of ``linear_fprop``: ``x`` ``[B, H, W, C]``, ``weight`` ``[O, C]``."""
    if config.path == "gather":
        return plan_conv_fprop(x, weight, forward, None, shape.as_pixels, config, op)
    return _plan(linear_fprop_kernel, (x, weight, True), forward, shape, config, op, device)


def plan_linear_dgrad(
    ag: Tensor,
    weight: Tensor,
    backward: BackwardArguments,
    shape: LinearShape,
    config: GemmConfig,
    op: str,
    device: Device,
) -> Launch:
    """The launch of ``linear_dgrad``: ``ag`` ``[B, H, W, O]``, ``weight`` ``[O, C]``."""
    if config.path == "gather":
        return plan_conv_dgrad(ag, weight, backward, shape.as_pixels, config, op)
    return _plan(linear_dgrad_kernel, (ag, weight, False), backward, shape, config, op, device)


def config_linear_fprop(
    x: Tensor,
    weight: Tensor,
    shape: LinearShape,
    residual: Tensor | None = None,
    op: str = "linear",
) -> Choice:
    """Returns the config for these tensors."""
    depth, columns = shape.in_features, shape.out_features
    aligned = describable(x, depth) and describable(weight, depth)
    aligned = aligned and columns * x.element_size() % 16 == 0
    aligned = aligned and (residual is None or describable(residual, columns))
    options = {"columns": columns, "describable": aligned, "op": op}
    return linear_choice(shape, x.dtype, device_of(x), **options)


def config_linear_dgrad(
    ag: Tensor,
    weight: Tensor,
    shape: LinearShape,
    backward: BackwardArguments | None = None,
    op: str = "linear",
) -> Choice:
    """Returns the config for these tensors."""
    backward = backward or BackwardArguments()
    depth, columns = shape.out_features, shape.in_features
    aligned = describable(ag, depth) and describable(weight, columns)
    aligned = aligned and all(describable(t, columns) for t in backward.pixels if t is not None)
    options = {"columns": columns, "describable": aligned, "column_sums": backward.summing}
    return linear_choice(shape, ag.dtype, device_of(ag), **options, op=op)


def linear_fprop(
    x: Tensor,
    weight: Tensor,
    epilogue: Epilogue,
    *,
    config: GemmConfig | None = None,
    op: str = "linear",
) -> Activation:
    """Computes a linear map of pixels with its epilogue in one launch.

    Equivalent to::

        v = scale[:, :, None, None] * F.conv2d(x, weight[:, :, None, None])
        out = act(v + shift[:, :, None, None] + residual)

    Args:
        x: ``[B, C, H, W]``; fp16, bf16 or fp32; copied unless channels-last. Tokens ``[B, T, C]``
            are the pixels ``[B, C, T, 1]``.
        weight: ``[O, C]`` contiguous, dtype of ``x``.
        epilogue: without ``source``.
        config: tile sizes; None takes the default.
        op: whose TF32 setting holds for fp32, ``linear`` or ``conv``.

    Raises:
        ValueError: for shapes or dtypes that do not fit.
    """
    batch, depth, height, width = x.shape
    columns = weight.shape[0]
    if weight.shape[1] != depth or weight.dtype != x.dtype:
        raise ValueError(
            f"weight {tuple(weight.shape)} {weight.dtype} does not fit x {tuple(x.shape)} {x.dtype}"
        )
    pixels = channels_last(x)
    forward = ForwardArguments.of(epilogue, pixels, (batch, height, width, columns))
    shape = LinearShape(batch, height * width, depth, columns)

    if forward.out.numel():
        if config is None:
            config = config_linear_fprop(pixels, weight, shape, forward.residual, op).config
        plan_linear_fprop(pixels, weight, forward, shape, config, op, device_of(x)).run()
    return forward.activation()


def linear_dgrad(
    scaled_grad: Tensor,
    weight: Tensor,
    skip: Tensor | None = None,
    below: LayerBelow | None = None,
    *,
    config: GemmConfig | None = None,
    op: str = "linear",
) -> LayerGradient:
    """Computes the input gradient of a linear map of pixels and the layer below's backward.

    Equivalent to::

        g  = conv_transpose2d(scaled_grad, weight[:, :, None, None]) + skip
        g  = g * (mask > 0), or g * (branch + shift > 0), if below.relu
        t0 = g.sum((2, 3));  t1 = (g * branch).sum((2, 3));  scaled_grad = scale * g

    Args:
        scaled_grad: ``[B, O, H, W]``, ``A * g`` of this layer.
        weight: ``[O, C]`` contiguous.
        skip, below: as in :meth:`wfnet.backends.contract.Backend.conv2d_dgrad`.
        config, op: as in :func:`linear_fprop`.

    Raises:
        ValueError: for shapes that do not fit, or a result without the tensor it is made from.
    """
    batch, depth, height, width = scaled_grad.shape
    if weight.shape[0] != depth or weight.dtype != scaled_grad.dtype:
        raise ValueError(
            f"weight {tuple(weight.shape)} {weight.dtype} does not fit the gradient "
            f"{tuple(scaled_grad.shape)} {scaled_grad.dtype}"
        )
    columns, tokens = weight.shape[1], height * width
    ag = channels_last(scaled_grad)
    shape = LinearShape(batch, tokens, columns, depth)
    backward = BackwardArguments.of(below, skip, ag, (batch, height, width, columns))
    if batch * tokens * columns == 0:
        backward.zero_sums()
        return backward.gradient(below)

    if config is None:
        config = config_linear_dgrad(ag, weight, shape, backward, op).config
    if backward.summing and span(config.block_m, tokens) == 0:
        # Tiles that meet many samples cannot sum their columns: leave it to the elementwise pass.
        plain = linear_dgrad(scaled_grad, weight, config=config, op=op).grad
        return epilogue_bwd(plain, below, skip)
    tiles = triton.cdiv(batch * tokens, config.block_m)
    backward = backward.with_slots(tiles * span(config.block_m, tokens), grouped=False)
    plan_linear_dgrad(ag, weight, backward, shape, config, op, device_of(ag)).run()
    backward.add_column_sums(tokens, block_m=config.block_m)
    return backward.gradient(below)

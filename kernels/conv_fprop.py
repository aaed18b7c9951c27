"""Masked convolution, forward: one implicit GEMM whose epilogue is the whole rest of the layer.

    u[b, o, p] = sum_{r, s, c} x[source[b], p * stride + (r, s) * dilation - pad, c] * w[o, r, s, c]
    out        = act(A[b, o] * u + C[b, o] + residual),   branch v = A * u   (design: section 2)

The GEMM has rows (b, p), columns o and depth (r, s, c). Activations are channels-last, so that a
filter tap is a shifted box of the input whose rows of channels are contiguous.

- ``conv_fprop_kernel`` reads the shifted boxes by tensor descriptor; out of bounds, which is the
  zero padding, reads as 0 for free. Stride 2 views the input as [N, H/2, 2, W/2, 2*C]: a tap lies
  in one parity class and is again a dense box. No addresses, no masks in the main loop. Its
  product is transposed, filter times pixels: Hopper's asynchronous products read both operands
  from shared memory, but Triton loads a left operand that is a reshaped box into registers, which
  the next round of the loop overwrites while products may still read them.
- ``conv_fprop_gather_kernel`` computes addresses: 3-channel stems, odd channel counts, other
  strides, devices without a tensor memory accelerator. Its tiles are flat in (b, p).

Weights stay in L2 (at most a few MB), so tiles run column-first: the thread blocks that share an
input tile run together.
"""

# ruff: noqa: E741 (O is the number of output channels here, as in every equation)

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor
from wfnet.kernels.config import (
    Choice,
    ConvShape,
    GemmConfig,
    choose,
    device_of,
    full_precision,
    span,
)
from wfnet.kernels.epilogue import forward_epilogue
from wfnet.kernels.epilogue_arguments import ForwardArguments, channels_first, channels_last
from wfnet.kernels.launch import Launch, describable, descriptor, gemm_launch
from wfnet.kernels.linear import flat_launch, linear_fprop_kernel
from wfnet.kernels.moments import take_moments

from wfnet.backends.contract import Activation, ConvGeometry, Epilogue


@triton.jit(do_not_specialize=["B", "P", "Q"])
def conv_fprop_kernel(
    x,  # [N, H, W, C] in boxes; with STEP 2 [N, H/2, 2, W/2, 2*C]
    w,  # [O, R*S*C] in boxes [BN, BK]
    source,  # [B] int64 or None
    scale,  # [B, O] fp32
    shift,  # [B, O] fp32 or None
    residual,  # [B, P, Q, O] in boxes or None
    branch,  # [B, P, Q, O] in boxes or None
    out,  # [B, P, Q, O] in boxes
    sums,  # [tiles of a sample, B, O] fp32 or None, as squares and counts: see forward_epilogue
    squares,
    counts,
    B,
    P,
    Q,
    O,
    LD,  # stride between rows of the tables
    R: tl.constexpr,
    S: tl.constexpr,
    STEP: tl.constexpr,
    PAD_H: tl.constexpr,
    PAD_W: tl.constexpr,
    DIL_H: tl.constexpr,
    DIL_W: tl.constexpr,
    C: tl.constexpr,
    RELU: tl.constexpr,
    PRECISION: tl.constexpr,
    BS: tl.constexpr,
    BP: tl.constexpr,
    BQ: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
):
    BM: tl.constexpr = BS * BP * BQ
    CHANNEL_STEPS: tl.constexpr = (C + BK - 1) // BK
    tile = tl.program_id(0)
    tiles_n = tl.cdiv(O, BN)
    tiles_q = tl.cdiv(Q, BQ)
    tiles_p = tl.cdiv(P, BP)
    n0 = tile % tiles_n * BN
    tile = tile // tiles_n
    tile_in_sample = tile % (tiles_p * tiles_q)
    q0 = tile_in_sample % tiles_q * BQ
    p0 = tile_in_sample // tiles_q * BP
    b0 = tile // (tiles_p * tiles_q) * BS
    image = b0
    if source is not None:
        image = tl.load(source + b0).to(tl.int32)

    acc = tl.zeros((BN, BM), dtype=tl.float32)
    for k in range(0, R * S * CHANNEL_STEPS):
        tap = k // CHANNEL_STEPS
        c0 = k % CHANNEL_STEPS * BK
        dh = tap // S * DIL_H - PAD_H
        dw = tap % S * DIL_W - PAD_W
        if STEP == 1:
            a = x.load([image, p0 + dh, q0 + dw, c0])
        else:
            # floor division and modulus of a number that may be negative: shift it up first
            h = p0 + (dh + PAD_H * STEP) // STEP - PAD_H
            v = q0 + (dw + PAD_W * STEP) // STEP - PAD_W
            odd_h = (dh + PAD_H * STEP) % STEP
            odd_w = (dw + PAD_W * STEP) % STEP
            a = x.load([image, h, odd_h, v, odd_w * C + c0])
        # Past the channels of a tap these are the next tap's, and meet zeros of x.
        weights = w.load([n0, tap * C + c0])  # [BN, BK]
        acc = tl.dot(weights, a.reshape(BM, BK).T, acc, input_precision=PRECISION)

    cols = n0 + tl.arange(0, BN)
    row = tl.arange(0, BM)
    row_sample = b0 + row // (BP * BQ)
    row_ok = row_sample < B
    if sums is not None:  # what is stored stays within its tensor by itself
        row_ok = row_ok & (p0 + row // BQ % BP < P) & (q0 + row % BQ < Q)
    rows = (b0, row_sample, row_ok)
    layer = (scale, shift, residual, branch, out)
    moments = (sums, squares, counts)
    sizes = (B, O, LD)
    at = (b0, p0, q0, n0)
    slot = tile_in_sample * B + b0
    forward_epilogue(acc.T, layer, moments, at, slot, rows, cols, sizes, RELU, True, BS, True)


@triton.jit(do_not_specialize=["N", "B", "H", "W", "P", "Q"])
def conv_fprop_gather_kernel(
    x,  # [N, H, W, C]
    w,  # [O, R, S, C]
    source,  # [B] int64 or None
    scale,  # [B, O] fp32
    shift,  # [B, O] fp32 or None
    residual,  # [B, P, Q, O] or None
    branch,  # [B, P, Q, O] or None
    out,  # [B, P, Q, O]
    sums,  # [tiles * SPAN, O] fp32 or None, as squares and counts
    squares,
    counts,
    N,
    B,
    H,
    W,
    P,
    Q,
    O,
    LD,  # stride between rows of the tables
    R: tl.constexpr,
    S: tl.constexpr,
    STRIDE_H: tl.constexpr,
    STRIDE_W: tl.constexpr,
    PAD_H: tl.constexpr,
    PAD_W: tl.constexpr,
    DIL_H: tl.constexpr,
    DIL_W: tl.constexpr,
    C: tl.constexpr,
    RELU: tl.constexpr,
    PRECISION: tl.constexpr,
    SPAN: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
):
    tile = tl.program_id(0)
    tiles_n = tl.cdiv(O, BN)
    cols = tile % tiles_n * BN + tl.arange(0, BN)
    tile_m = tile // tiles_n
    m0 = tile_m * BM
    rows = m0 + tl.arange(0, BM)
    pixels = P * Q
    row_ok = rows < B * pixels
    row_sample = rows // pixels
    pixel = rows % pixels
    read_ok = row_ok
    h0 = pixel // Q * STRIDE_H - PAD_H
    w0 = pixel % Q * STRIDE_W - PAD_W
    image = row_sample.to(tl.int64)
    if source is not None:
        image = tl.load(source + row_sample, mask=row_ok, other=0)
        read_ok = row_ok & (image >= 0) & (image < N)
    corner = x + (image * H * W + (h0 * W + w0)) * C  # [BM] pointers; may lie in the padding
    lane = tl.arange(0, BK)
    filters = w + cols * (R * S * C)
    col_ok = cols < O

    acc = tl.zeros((BM, BN), dtype=tl.float32)
    if C % BK == 0:
        CHANNEL_STEPS: tl.constexpr = C // BK
        for k in range(0, R * S * CHANNEL_STEPS):
            tap = k // CHANNEL_STEPS
            dh = tap // S * DIL_H
            dw = tap % S * DIL_W
            inside = (h0 + dh >= 0) & (h0 + dh < H) & (w0 + dw >= 0) & (w0 + dw < W) & read_ok
            offset = (dh * W + dw) * C + k % CHANNEL_STEPS * BK
            a = tl.load(corner[:, None] + (offset + lane)[None, :], mask=inside[:, None], other=0.0)
            weights = tl.load(
                filters[None, :] + (k * BK + lane)[:, None], mask=col_ok[None, :], other=0.0
            )
            acc = tl.dot(a, weights, acc, input_precision=PRECISION)
    else:
        DEPTH: tl.constexpr = R * S * C
        for k0 in range(0, DEPTH, BK):
            k = k0 + lane  # [BK] flat (r, s, c)
            dh = k // (S * C) * DIL_H
            dw = k // C % S * DIL_W
            offset = (dh * W + dw) * C + k % C
            hh = h0[:, None] + dh[None, :]
            ww = w0[:, None] + dw[None, :]
            inside = (hh >= 0) & (hh < H) & (ww >= 0) & (ww < W)
            inside = inside & read_ok[:, None] & (k < DEPTH)[None, :]
            a = tl.load(corner[:, None] + offset[None, :], mask=inside, other=0.0)
            weights = tl.load(
                filters[None, :] + k[:, None],
                mask=col_ok[None, :] & (k < DEPTH)[:, None],
                other=0.0,
            )
            acc = tl.dot(a, weights, acc, input_precision=PRECISION)

    layer = (scale, shift, residual, branch, out)
    at = (m0.to(tl.int64) * O, tl.arange(0, BM) * O, cols)
    rows = (m0 // pixels, row_sample, row_ok)
    moments = (sums, squares, counts)
    slot = tile_m * SPAN
    sizes = (B, O, LD)
    forward_epilogue(acc, layer, moments, at, slot, rows, cols, sizes, RELU, False, SPAN, False)


def conv_fprop(
    x: Tensor,
    weight: Tensor,
    geometry: ConvGeometry,
    epilogue: Epilogue,
    *,
    config: GemmConfig | None = None,
) -> Activation:
    """Computes a convolution with its epilogue in one launch; a linear map is one of 1x1 filters.

    Equivalent to::

        v = scale[:, :, None, None] * F.conv2d(x[source], weight, None, stride, padding, dilation)
        out = act(v + shift[:, :, None, None] + residual)

    Args:
        x: ``[N, C, H, W]``; fp16, bf16 or fp32; copied unless channels-last. Tokens ``[B, T, C]``
            are the pixels ``[B, C, T, 1]``.
        weight: ``[O, C, R, S]``, dtype of ``x``.
        config: tile sizes; None takes the default.

    Raises:
        ValueError: for shapes or dtypes that do not fit.
    """
    source, scale = epilogue.source, epilogue.scale
    shape = ConvShape.of(scale.shape[0], tuple(x.shape[2:]), weight, geometry)
    _check_operands(x, weight)
    samples = x.shape[0] if source is None else source.numel()
    if samples != shape.batch:
        raise ValueError(f"scale has {shape.batch} rows for {samples} samples")
    x, weight = channels_last(x), channels_last(weight)
    arguments = ForwardArguments.of(epilogue, x, (shape.batch, *shape.out_size, weight.shape[0]))
    if arguments.pixels["out"].numel():
        if config is None:
            config = fprop_choice(x, weight, shape, source is not None, epilogue.residual).config
        _launch(x, weight, source, arguments, shape, config).run()
    return arguments.activation()


def conv_moments(
    x: Tensor, weight: Tensor, geometry: ConvGeometry, *, config: GemmConfig | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Computes ``u = conv(x, weight)``, and mean and variance of every sample and column of it.

    Equivalent to::

        u = F.conv2d(x, weight, None, stride, padding, dilation)
        var, mean = torch.var_mean(u.float(), (2, 3), correction=0)

    Tiles sum ``u``, then its squared distances from the tile's own mean; those of a sample are
    merged in a fixed order (Chan, Golub and LeVeque 1979). All is fp32: the relative error of the
    variance is a few ``2**-24 * (1 + |mean| / deviation)``; from sums of squares it would be the
    square of that ratio.

    Args:
        x: as of :func:`conv_fprop`, as are ``weight`` and ``config``.

    Returns:
        ``[B, O, P, Q]`` in the dtype of ``x``, and ``[B, O]`` fp32 twice.

    Raises:
        ValueError: for shapes or dtypes that do not fit.
    """
    shape = ConvShape.of(x.shape[0], tuple(x.shape[2:]), weight, geometry)
    _check_operands(x, weight)
    x, weight = channels_last(x), channels_last(weight)
    out = x.new_empty((shape.batch, *shape.out_size, weight.shape[0]))
    if config is None:
        config = fprop_choice(x, weight, shape, False, moments=True).config
    tiling = {"block_m": config.block_m}
    if config.path == "box":
        tiles = _tiles_of(shape, config)
        tiling = {"grouped": tiles[0] * tiles[1]}

    def product(**moments: Tensor) -> Launch:
        arguments = ForwardArguments.of_product(out, moments)
        return _launch(x, weight, None, arguments, shape, config)

    return channels_first(out), *take_moments(out, product, **tiling)


def _check_operands(x: Tensor, weight: Tensor) -> None:
    if weight.shape[1] != x.shape[1] or weight.dtype != x.dtype:
        raise ValueError(
            f"weight {tuple(weight.shape)} {weight.dtype} does not fit x {tuple(x.shape)} {x.dtype}"
        )


def fprop_choice(
    x: Tensor,
    weight: Tensor,
    shape: ConvShape,
    expanded: bool,
    residual: Tensor | None = None,
    moments: bool = False,
) -> Choice:
    """The config for ``x`` ``[N, H, W, C]`` and ``weight`` ``[O, R, S, C]``."""
    aligned = describable(x, shape.in_channels) and describable(weight, shape.in_channels)
    aligned = aligned and describable(x if residual is None else residual, shape.out_channels)
    options = {"describable": aligned, "expanded": expanded, "column_sums": moments}
    return choose("fprop", shape, x.dtype, device_of(x), **options)


def _launch(
    x: Tensor,
    weight: Tensor,
    source: Tensor | None,
    forward: ForwardArguments,
    shape: ConvShape,
    config: GemmConfig,
) -> Launch:
    """``x`` ``[N, H, W, C]``, ``weight`` ``[O, R, S, C]``."""
    exact = full_precision(x.dtype, shape.geometry.linear)
    if config.path == "flat":
        return flat_launch(linear_fprop_kernel, x, weight, forward, shape, config, exact)
    (p, q), (height, width) = shape.out_size, shape.size
    images, channels, columns = x.shape[0], shape.in_channels, shape.out_channels
    arguments = shape.numbers | config.constants(exact) | {"source": source, "N": images}
    if config.path == "gather":
        arguments |= forward() | {"x": x, "w": weight, "SPAN": span(config.block_m, p * q)}
        tiles = triton.cdiv(shape.batch * p * q, config.block_m)
        return gemm_launch(conv_fprop_gather_kernel, tiles, columns, arguments, config)
    (samples, rows, cols), step = config.box, shape.geometry.stride[0]
    size, box = (images, height, width, channels), (samples, rows, cols, config.block_k)
    if step == 2:
        size = (images, height // 2, 2, width // 2, 2 * channels)
        box = (samples, rows, 1, cols, config.block_k)

    def tile(tensor: Tensor):
        return descriptor(tensor, (shape.batch, p, q, columns), (*config.box, config.block_n))

    filters = columns, weight[0].numel()
    arguments |= forward(tile) | {
        "x": descriptor(x, size, box, not exact),
        "w": descriptor(weight, filters, (config.block_n, config.block_k), not exact),
        **{"STEP": step, "BS": samples, "BP": rows, "BQ": cols},
    }
    tiles = _tiles_of(shape, config)
    tiles = triton.cdiv(shape.batch, samples) * tiles[0] * tiles[1]
    return gemm_launch(conv_fprop_kernel, tiles, columns, arguments, config)


def _tiles_of(shape: ConvShape, config: GemmConfig) -> tuple[int, int]:
    """Boxes over height and width of the output."""
    return tuple(triton.cdiv(n, b) for n, b in zip(shape.out_size, config.box[1:], strict=True))

"""Masked convolution, input gradient: one GEMM, then the layer below's elementwise backward.

    dx[b, h, w, c] = sum_{r, s, o} ag[b, p, q, o] * weight[o, r, s, c]
    where p * stride = h + pad - r * dilation, and likewise q

``ag = A * g`` already carries this layer's masks. Because weights are frozen, dx is not the end but
the gradient that reaches the layer below: the epilogue adds a skip gradient, applies that layer's
ReLU mask, takes its column sums T0 and T1 and writes its ``ag`` (and ``g``, where a skip needs it).

- ``conv_dgrad_kernel``: descriptor boxes. With stride 2 the pixels of one parity class (h % 2,
  w % 2) see a fixed subset of the taps: each class is a dense stride-1 convolution of ``ag`` with a
  sub-filter, written through a view [B, H/2, 2, W/2, 2*C] of the output. The four classes are
  neighbours in the grid, so that they share ``ag`` in L2; classes without taps write zeros.
- ``conv_dgrad_gather_kernel``: addresses. Every pixel visits every tap and masks those that do not
  divide by the stride (stride 2: three quarters of the products are with zeros).

The weight is read as [O, R*S*C] in boxes [BK, BN]: no flipped or transposed copy of it exists. As
in ``conv_fprop`` the product of boxes is transposed, filter times gradient.
"""

# ruff: noqa: E741 (O is the number of output channels here, as in every equation)

from __future__ import annotations

import functools

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
from wfnet.kernels.epilogue import backward_epilogue
from wfnet.kernels.epilogue_arguments import BackwardArguments, Binding, channels_last
from wfnet.kernels.epilogue_bwd import epilogue_bwd
from wfnet.kernels.launch import Launch, describable, descriptor, gemm_launch
from wfnet.kernels.linear import flat_launch, linear_dgrad_kernel

from wfnet.backends.contract import NO_LAYER, ConvGeometry, LayerBelow, LayerGradient


@triton.jit(do_not_specialize=["B", "H", "W"])
def conv_dgrad_kernel(
    ag,  # [B, P, Q, O] in boxes
    w,  # [O, R*S*C] in boxes [BK, BN]
    skip,  # [B, H, W, C] in boxes or None; with STEP 2 all of these are [B, H/2, 2, W/2, 2*C]
    branch,
    activation,
    scale,  # [B, C] fp32 or None: tables of the layer below
    shift,  # [B, C] fp32 or None
    grad,
    scaled_grad,
    partial0,  # [tiles per sample, B, C] fp32 or None
    partial1,
    partial2,
    shortcut_branch,
    shortcut_scale,
    shortcut_grad,
    B,
    H,  # of one parity class: H / STEP
    W,
    C,
    LD,  # stride between rows of the tables
    R: tl.constexpr,
    S: tl.constexpr,
    STEP: tl.constexpr,
    PAD_H: tl.constexpr,
    PAD_W: tl.constexpr,
    DIL_H: tl.constexpr,
    DIL_W: tl.constexpr,
    O: tl.constexpr,
    RELU: tl.constexpr,
    UNSCALED: tl.constexpr,
    PRECISION: tl.constexpr,
    BS: tl.constexpr,
    BH: tl.constexpr,
    BW: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
):
    BM: tl.constexpr = BS * BH * BW
    CHANNEL_STEPS: tl.constexpr = (O + BK - 1) // BK
    PHASES: tl.constexpr = STEP * STEP
    tile = tl.program_id(0)
    tiles_n = tl.cdiv(C, BN)
    tiles_w = tl.cdiv(W, BW)
    tiles_h = tl.cdiv(H, BH)
    n0 = tile % tiles_n * BN
    tile = tile // tiles_n
    tiles_per_sample = tiles_h * tiles_w * PHASES
    tile_in_sample = tile % tiles_per_sample
    b0 = tile // tiles_per_sample * BS
    phase = tile_in_sample % PHASES
    w0 = tile_in_sample // PHASES % tiles_w * BW
    h0 = tile_in_sample // PHASES // tiles_w * BH
    odd_h = phase // STEP
    odd_w = phase % STEP

    # Taps of this class: r = first_r + i * STEP, and p = h + (odd_h + pad) // STEP - i * dilation.
    if STEP == 1:
        first_r = 0
        first_s = 0
        count_r = R
        count_s = S
        p0 = h0 + PAD_H
        q0 = w0 + PAD_W
    else:
        first_r = (odd_h + PAD_H) % STEP
        first_s = (odd_w + PAD_W) % STEP
        count_r = (R - first_r + STEP - 1) // STEP
        count_s = (S - first_s + STEP - 1) // STEP
        p0 = h0 + (odd_h + PAD_H) // STEP
        q0 = w0 + (odd_w + PAD_W) // STEP
    acc = tl.zeros((BN, BM), dtype=tl.float32)
    for k in range(0, count_r * count_s * CHANNEL_STEPS):
        tap = k // CHANNEL_STEPS
        o0 = k % CHANNEL_STEPS * BK
        if STEP == 1:
            i = tap // S
            j = tap % S
        else:
            i = tap // tl.maximum(count_s, 1)
            j = tap % tl.maximum(count_s, 1)
        a = ag.load([b0, p0 - i * DIL_H, q0 - j * DIL_W, o0]).reshape(BM, BK)
        tap_in_filter = (first_r + i * STEP) * S + first_s + j * STEP
        # Columns past C are the next tap's: their results are not stored.
        weights = w.load([o0, tap_in_filter * C + n0])  # [BK, BN]
        acc = tl.dot(weights.T, a.T, acc, input_precision=PRECISION)

    if STEP == 1:  # noqa: SIM108 (the tuples differ in length)
        at = (b0, h0, w0, n0)
    else:
        at = (b0, h0, odd_h, w0, odd_w * C + n0)
    row = tl.arange(0, BM)
    row_sample = b0 + row // (BH * BW)
    inside = (h0 + row // BW % BH < H) & (w0 + row % BW < W)
    layer = (skip, branch, activation, scale, shift, grad, scaled_grad)
    sums = (partial0, partial1, partial2)
    shortcut = (shortcut_branch, shortcut_scale, shortcut_grad)
    slot = tile_in_sample * B + b0
    rows = (b0, row_sample, inside & (row_sample < B))
    cols = n0 + tl.arange(0, BN)
    acc = acc.T
    sizes = (B, C, LD)
    backward_epilogue(
        acc, layer, sums, shortcut, at, slot, rows, cols, sizes, RELU, UNSCALED, True, BS, True
    )


@triton.jit(do_not_specialize=["B", "H", "W", "P", "Q"])
def conv_dgrad_gather_kernel(
    ag,  # [B, P, Q, O]
    w,  # [O, R, S, C]
    skip,  # [B, H, W, C] or None, like the four below
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
    B,
    H,
    W,
    P,
    Q,
    C,
    LD,  # stride between rows of the tables
    R: tl.constexpr,
    S: tl.constexpr,
    STRIDE_H: tl.constexpr,
    STRIDE_W: tl.constexpr,
    PAD_H: tl.constexpr,
    PAD_W: tl.constexpr,
    DIL_H: tl.constexpr,
    DIL_W: tl.constexpr,
    O: tl.constexpr,
    RELU: tl.constexpr,
    UNSCALED: tl.constexpr,
    PRECISION: tl.constexpr,
    SPAN: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
):
    CHANNEL_STEPS: tl.constexpr = (O + BK - 1) // BK
    tile = tl.program_id(0)
    tiles_n = tl.cdiv(C, BN)
    cols = tile % tiles_n * BN + tl.arange(0, BN)
    tile_m = tile // tiles_n
    m0 = tile_m * BM
    rows = m0 + tl.arange(0, BM)
    pixels = H * W
    row_ok = rows < B * pixels
    row_sample = rows // pixels
    pixel = rows % pixels
    h0 = pixel // W + PAD_H
    w0 = pixel % W + PAD_W
    image = ag + row_sample.to(tl.int64) * (P * Q * O)  # [BM] pointers
    lane = tl.arange(0, BK)
    col_ok = cols < C

    acc = tl.zeros((BM, BN), dtype=tl.float32)
    for k in range(0, R * S * CHANNEL_STEPS):
        tap = k // CHANNEL_STEPS
        o = k % CHANNEL_STEPS * BK + lane
        hh = h0 - tap // S * DIL_H
        ww = w0 - tap % S * DIL_W
        p = hh // STRIDE_H
        q = ww // STRIDE_W
        inside = (hh >= 0) & (hh % STRIDE_H == 0) & (p < P) & (ww >= 0) & (ww % STRIDE_W == 0)
        inside = inside & (q < Q) & row_ok
        offset = (p * Q + q) * O
        a_ok = inside[:, None]
        w_ok = col_ok[None, :]
        if O % BK != 0:
            a_ok = a_ok & (o < O)[None, :]
            w_ok = w_ok & (o < O)[:, None]
        a = tl.load(image[:, None] + (offset[:, None] + o[None, :]), mask=a_ok, other=0.0)
        filters = w + (o * (R * S * C) + tap * C)[:, None]
        weights = tl.load(filters + cols[None, :], mask=w_ok, other=0.0)
        acc = tl.dot(a, weights, acc, input_precision=PRECISION)

    layer = (skip, branch, activation, scale, shift, grad, scaled_grad)
    sums = (partial0, partial1, partial2)
    shortcut = (shortcut_branch, shortcut_scale, shortcut_grad)
    at = (m0.to(tl.int64) * C, tl.arange(0, BM) * C, cols)
    slot = tile_m * SPAN
    rows = (m0 // pixels, row_sample, row_ok)
    sizes = (B, C, LD)
    backward_epilogue(
        acc, layer, sums, shortcut, at, slot, rows, cols, sizes, RELU, UNSCALED, False, SPAN, False
    )


def conv_dgrad(
    scaled_grad: Tensor,
    weight: Tensor,
    input_shape: tuple[int, ...],
    geometry: ConvGeometry,
    below: LayerBelow = NO_LAYER,
    *,
    config: GemmConfig | None = None,
) -> LayerGradient:
    """Computes a layer's input gradient and the elementwise backward of the layer below it.

    Equivalent to::

        g  = torch.nn.grad.conv2d_input(input_shape, weight, scaled_grad, ...) + skip
        g  = g * (mask > 0), or g * (branch + shift > 0), if below.relu
        t0 = g.sum((2, 3));  t1 = (g * branch).sum((2, 3));  scaled_grad = scale * g

    Args:
        scaled_grad: ``[B, O, P, Q]``, ``A * g`` of this layer.
        weight: ``[O, C, R, S]``.
        below: as in :meth:`wfnet.backends.contract.Backend.conv2d_dgrad`.
        config: as in :func:`wfnet.kernels.conv_fprop.conv_fprop`.

    Raises:
        ValueError: for shapes that do not fit, or a result without the tensor it is made from.
    """
    batch, channels, *size = input_shape
    shape = ConvShape.of(batch, tuple(size), weight, geometry)
    expected = (batch, shape.out_channels, *shape.out_size)
    if tuple(scaled_grad.shape) != expected or scaled_grad.dtype != weight.dtype:
        raise ValueError(
            f"the gradient is {tuple(scaled_grad.shape)} {scaled_grad.dtype}, but the output is "
            f"{expected} {weight.dtype}"
        )
    ag, filters = channels_last(scaled_grad), channels_last(weight)
    backward = BackwardArguments.of(below, ag, (batch, *size, channels))
    if 0 in input_shape:
        return backward.of_nothing()
    if config is None:
        config = dgrad_choice(ag, filters, shape, backward).config
    plan = functools.partial(_launch, ag, filters, shape, config)
    if config.path == "box":
        return backward.run(plan, grouped=_tiles_per_sample(shape, config))
    if backward.summing and span(config.block_m, size[0] * size[1]) == 0:
        # Tiles that meet many samples cannot sum their columns: leave it to the elementwise pass.
        plain = conv_dgrad(scaled_grad, weight, input_shape, geometry, config=config).grad
        return epilogue_bwd(plain, below)
    return backward.run(plan, block_m=config.block_m)


def dgrad_choice(
    ag: Tensor, weight: Tensor, shape: ConvShape, backward: BackwardArguments | None = None
) -> Choice:
    """The config for ``ag`` ``[B, P, Q, O]`` and ``weight`` ``[O, R, S, C]``."""
    read = [weight, *(backward.reads.values() if backward else ())]
    aligned = describable(ag, shape.out_channels)
    aligned = aligned and all(describable(t, shape.in_channels) for t in read if t is not None)
    sums = backward is not None and backward.summing
    options = {"describable": aligned, "column_sums": sums}
    return choose("dgrad", shape, ag.dtype, device_of(ag), **options)


def _launch(
    ag: Tensor, weight: Tensor, shape: ConvShape, config: GemmConfig, backward: Binding
) -> Launch:
    """``ag`` ``[B, P, Q, O]``, ``weight`` ``[O, R, S, C]``."""
    exact = full_precision(ag.dtype, shape.geometry.linear)
    if config.path == "flat":
        return flat_launch(linear_dgrad_kernel, ag, weight, backward, shape, config, exact)
    batch, (height, width), channels = shape.batch, shape.size, shape.in_channels
    arguments = shape.numbers | config.constants(exact)
    if config.path == "gather":
        tokens = height * width
        arguments |= backward() | {"ag": ag, "w": weight, "SPAN": span(config.block_m, tokens)}
        tiles = triton.cdiv(batch * tokens, config.block_m)
        return gemm_launch(conv_dgrad_gather_kernel, tiles, channels, arguments, config)
    (samples, rows, cols), step = config.box, shape.geometry.stride[0]

    def tile(tensor: Tensor):
        if step == 1:
            box = (samples, rows, cols, config.block_n)
            return descriptor(tensor, (batch, height, width, channels), box)
        size = (batch, height // 2, 2, width // 2, 2 * channels)
        return descriptor(tensor, size, (samples, rows, 1, cols, config.block_n))

    size, block = (batch, *shape.out_size, shape.out_channels), (*config.box, config.block_k)
    filters = shape.out_channels, weight[0].numel()
    arguments |= backward(tile) | {
        "ag": descriptor(ag, size, block, not exact),
        "w": descriptor(weight, filters, (config.block_k, config.block_n), not exact),
        **{"H": height // step, "W": width // step, "STEP": step},
        **{"BS": samples, "BH": rows, "BW": cols},
    }
    tiles = triton.cdiv(batch, samples) * _tiles_per_sample(shape, config)
    return gemm_launch(conv_dgrad_kernel, tiles, channels, arguments, config)


def _tiles_per_sample(shape: ConvShape, config: GemmConfig) -> int:
    """Tiles (over pixels and parity classes) that hold pixels of one sample; ``box`` only."""
    step = shape.geometry.stride[0]
    tiles = [triton.cdiv(n // step, b) for n, b in zip(shape.size, config.box[1:], strict=True)]
    return tiles[0] * tiles[1] * step**2

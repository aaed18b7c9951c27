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
    conv_choice,
    device_of,
    full_precision,
    span,
)
from wfnet.kernels.epilogue import forward_epilogue
from wfnet.kernels.epilogue_arguments import ForwardArguments, channels_last
from wfnet.kernels.launch import Launch, describable, descriptor, operand

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
    q0 = tile % tiles_q * BQ
    tile = tile // tiles_q
    p0 = tile % tiles_p * BP
    b0 = tile // tiles_p * BS
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
    row_sample = b0 + tl.arange(0, BM) // (BP * BQ)
    forward_epilogue(
        acc.T,
        scale,
        shift,
        residual,
        branch,
        out,
        (b0, p0, q0, n0),
        b0,
        row_sample,
        cols,
        row_sample < B,
        B,
        O,
        LD,
        RELU,
        True,
        BS,
        True,
        BM,
        BN,
    )


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
    m0 = tile // tiles_n * BM
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

    forward_epilogue(
        acc,
        scale,
        shift,
        residual,
        branch,
        out,
        (m0.to(tl.int64) * O, tl.arange(0, BM) * O, cols),
        m0 // pixels,
        row_sample,
        cols,
        row_ok,
        B,
        O,
        LD,
        RELU,
        False,
        SPAN,
        False,
        BM,
        BN,
    )


def plan_conv_fprop(
    x: Tensor,
    weight: Tensor,
    forward: ForwardArguments,
    source: Tensor | None,
    shape: ConvShape,
    config: GemmConfig,
    op: str = "conv",
) -> Launch:
    """The launch of ``conv_fprop``: ``x`` ``[N, H, W, C]``, ``weight`` ``[O, R, S, C]``."""
    batch, p, q, columns = shape.batch, shape.out_height, shape.out_width, shape.out_channels
    exact = full_precision(x.dtype, op)
    shared = {
        "source": source,
        "B": batch,
        "P": p,
        "Q": q,
        "O": columns,
        "C": shape.in_channels,
        **shape.taps,
        "PRECISION": "ieee" if exact else "tf32",
        "BN": config.block_n,
        "BK": config.block_k,
    }
    tiles_n = triton.cdiv(columns, config.block_n)
    if config.path == "gather":
        arguments = {
            "x": x,
            "w": weight,
            **forward.bound(),
            **shared,
            "N": x.shape[0],
            "H": shape.height,
            "W": shape.width,
            "STRIDE_H": shape.stride[0],
            "STRIDE_W": shape.stride[1],
            "SPAN": span(config.block_m, p * q),
            "BM": config.block_m,
        }
        grid = (triton.cdiv(batch * p * q, config.block_m) * tiles_n,)
        return Launch(conv_fprop_gather_kernel, grid, arguments, config.warps, config.stages)
    tiled = descriptor if exact else operand
    samples, rows, cols = config.box
    if source is not None and samples > 1:
        raise ValueError(
            f"tiles of {samples} samples cannot follow source indices; use box (1, ...)"
        )
    step = shape.stride[0]
    images, height, width, channels = x.shape[0], shape.height, shape.width, shape.in_channels
    if step == 1:
        view = tiled(x, (images, height, width, channels), (samples, rows, cols, config.block_k))
    else:
        if channels % config.block_k:
            raise ValueError(
                f"stride 2 needs block_k={config.block_k} to divide {channels} input channels"
            )
        view = tiled(
            x,
            (images, height // 2, 2, width // 2, 2 * channels),
            (samples, rows, 1, cols, config.block_k),
        )

    def boxes(tensor: Tensor | None):
        tile = (samples, rows, cols, config.block_n)
        return None if tensor is None else descriptor(tensor, (batch, p, q, columns), tile)

    taps = shape.kernel[0] * shape.kernel[1]
    arguments = {
        "x": view,
        "w": tiled(weight, (columns, taps * channels), (config.block_n, config.block_k)),
        **forward.bound(boxes),
        **shared,
        "STEP": step,
        "BS": samples,
        "BP": rows,
        "BQ": cols,
    }
    pixels = triton.cdiv(batch, samples) * triton.cdiv(p, rows) * triton.cdiv(q, cols)
    return Launch(conv_fprop_kernel, (pixels * tiles_n,), arguments, config.warps, config.stages)


def conv_fprop(
    x: Tensor,
    weight: Tensor,
    geometry: ConvGeometry,
    epilogue: Epilogue,
    *,
    config: GemmConfig | None = None,
    op: str = "conv",
) -> Activation:
    """Computes a convolution with its epilogue in one launch.

    Equivalent to::

        v = scale[:, :, None, None] * F.conv2d(x[source], weight, None, stride, padding, dilation)
        out = act(v + shift[:, :, None, None] + residual)

    Args:
        x: ``[N, C, H, W]``; fp16, bf16 or fp32; copied unless channels-last.
        weight: ``[O, C, R, S]``, dtype of ``x``.
        config: tile sizes; None takes the default.
        op: whose TF32 setting holds for fp32, ``conv`` or ``linear``.

    Raises:
        ValueError: for shapes or dtypes that do not fit.
    """
    source, scale = epilogue.source, epilogue.scale
    shape = ConvShape.of(scale.shape[0], tuple(x.shape[2:]), weight, geometry)
    if weight.shape[1] != x.shape[1] or weight.dtype != x.dtype:
        raise ValueError(
            f"weight {tuple(weight.shape)} {weight.dtype} does not fit x {tuple(x.shape)} {x.dtype}"
        )
    if source is None and scale.shape[0] != x.shape[0]:
        raise ValueError(f"scale has {scale.shape[0]} rows for {x.shape[0]} samples without source")
    if source is not None and source.shape != scale.shape[:1]:
        raise ValueError(f"source {tuple(source.shape)} must have {scale.shape[0]} entries")
    if shape.out_height < 1 or shape.out_width < 1:
        raise ValueError(
            f"a {shape.kernel} filter does not fit into {shape.height}x{shape.width} pixels"
        )
    images, filters = channels_last(x), channels_last(weight)
    size = (shape.batch, shape.out_height, shape.out_width, shape.out_channels)
    forward = ForwardArguments.of(epilogue, images, size)

    if forward.out.numel():
        if config is None:
            expanded, residual = source is not None, forward.residual
            config = config_conv_fprop(images, filters, shape, expanded, residual, op).config
        plan_conv_fprop(images, filters, forward, source, shape, config, op).run()
    return forward.activation()


def config_conv_fprop(
    x: Tensor,
    weight: Tensor,
    shape: ConvShape,
    expanded: bool,
    residual: Tensor | None = None,
    op: str = "conv",
) -> Choice:
    """Returns the config for these tensors.

    ``expanded`` where ``source`` indices are given: a tile then holds pixels of one sample.
    """
    aligned = describable(x, shape.in_channels) and describable(weight, shape.in_channels)
    aligned = aligned and shape.out_channels * x.element_size() % 16 == 0
    aligned = aligned and (residual is None or describable(residual, shape.out_channels))
    options = {"describable": aligned, "single_sample": expanded, "op": op}
    return conv_choice("fprop", shape, x.dtype, device_of(x), **options)

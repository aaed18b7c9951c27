"""Tile configs: one frozen dataclass, defaults that are good unsearched, and why each was taken.

The defaults follow from counting, not from a search (no measurement is behind them):

- Hopper, 16-bit: 128 x 128 x 64 tiles, 8 warps, 3 stages. The accumulator takes 64 registers a
  thread and the forward kernels stay below 128, so that two thread blocks share a multiprocessor
  (2 x 96 KB of shared memory): one block's epilogue, which moves up to four tiles, runs under the
  other's matrix multiplication. Narrow outputs take 128 x 64.
- Linear maps have few steps of K (192 / 64 = 3), so their fill and drain dominate: the kernel is
  persistent and prefetches the next tile's operands during the epilogue.
- Ampere has no tensor memory accelerator: pointer tiles, cp.async, 32-wide K steps.
- fp32 with TF32 off multiplies in full precision on the ordinary units: small tiles.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch

from wfnet.backends.contract import ConvGeometry


@dataclass(frozen=True)
class Device:
    """What the choice of a config depends on."""

    name: str
    arch: int  # compute capability: 80, 90, 100, ...
    shared_memory: int  # bytes that one thread block can have
    processors: int

    @property
    def has_tma(self) -> bool:
        """Whether tensor descriptors are worth using (Hopper, data-center Blackwell)."""
        return 90 <= self.arch < 120


# Limits of compute capabilities, for compiling without a device.
TARGETS = {
    80: Device("sm_80", 80, 163 * 1024, 108),
    90: Device("sm_90", 90, 227 * 1024, 132),
    100: Device("sm_100", 100, 227 * 1024, 148),
}


# What tensors on no device are configured for: interpreted, or compiled ahead of time.
assumed = TARGETS[90]


@functools.cache
def _cuda_device(index: int) -> Device:
    properties = torch.cuda.get_device_properties(index)
    arch = properties.major * 10 + properties.minor
    shared = getattr(properties, "shared_memory_per_block_optin", 0) or 99 * 1024
    return Device(properties.name, arch, shared, properties.multi_processor_count)


def device_of(tensor: torch.Tensor) -> Device:
    """The device that a launch on ``tensor`` is configured for."""
    if tensor.is_cuda:
        index = tensor.device.index
        return _cuda_device(torch.cuda.current_device() if index is None else index)
    return assumed


@dataclass(frozen=True)
class GemmConfig:
    """Tile sizes of one GEMM-like kernel.

    ``path``: ``box`` (descriptor boxes of pixels), ``flat`` (descriptor rows, persistent) or
    ``gather`` (pointers). ``box``: (samples, rows, columns) of pixels in a tile; their product is
    ``block_m``.
    """

    path: str
    block_m: int
    block_n: int
    block_k: int
    warps: int
    stages: int
    box: tuple[int, int, int] | None = None

    def constants(self, exact: bool) -> dict[str, object]:
        """Constants of every kernel; ``exact``: fp32 is multiplied in full precision."""
        tile = {"BM": self.block_m, "BN": self.block_n, "BK": self.block_k}
        return tile | {"PRECISION": "ieee" if exact else "tf32"}

    def __str__(self) -> str:
        where = f" {'x'.join(map(str, self.box))}" if self.box else ""
        return (
            f"{self.path}{where} {self.block_m}x{self.block_n}x{self.block_k}, "
            f"{self.warps} warps, {self.stages} stages"
        )


@dataclass(frozen=True)
class ConvShape:
    """What the config of a convolution depends on; a linear map is one of ``tokens`` x 1 pixels."""

    batch: int  # samples of the output (expanded)
    size: tuple[int, int]
    in_channels: int
    out_channels: int
    kernel: tuple[int, int] = (1, 1)
    geometry: ConvGeometry = ConvGeometry()  # noqa: RUF009 (frozen)

    @classmethod
    def of(
        cls, batch: int, size: tuple[int, int], weight: torch.Tensor, geometry: ConvGeometry
    ) -> ConvShape:
        """Returns the shape of a convolution of ``batch`` samples of ``size`` = (H, W).

        Args:
            weight: ``[O, C, R, S]``.
        """
        columns, channels, *kernel = weight.shape
        return cls(batch, size, channels, columns, tuple(kernel), geometry)

    @property
    def numbers(self) -> dict[str, int]:
        """Sizes, filter and geometry by the names that kernels have for them."""
        (h, w), (p, q), (r, s), geometry = self.size, self.out_size, self.kernel, self.geometry
        numbers = {"B": self.batch, "H": h, "W": w, "P": p, "Q": q, "R": r, "S": s}
        numbers |= {"C": self.in_channels, "O": self.out_channels}
        pairs = {"STRIDE": geometry.stride, "PAD": geometry.padding, "DIL": geometry.dilation}
        for name, pair in pairs.items():
            numbers |= {f"{name}_H": pair[0], f"{name}_W": pair[1]}
        return numbers

    @property
    def out_size(self) -> tuple[int, int]:
        """Height and width of the output."""
        return self.geometry.output_size(*self.size, self.kernel)

    @property
    def pointwise(self) -> bool:
        """1x1, stride 1, no padding: a linear map over pixels."""
        geometry = self.geometry
        return self.kernel == geometry.stride == (1, 1) and geometry.padding == (0, 0)


@dataclass(frozen=True)
class Choice:
    """A config and the reason for it, in words for ``explain``."""

    config: GemmConfig
    reason: str


def full_precision(dtype: torch.dtype, linear: bool) -> bool:
    """Whether PyTorch's settings ask for fp32 products: what eager would do, kernels do.

    Of convolutions (``torch.backends.cudnn.conv``), or of linear maps
    (``torch.backends.cuda.matmul``). Read as ``fp32_precision``, which says the same however it was
    set: reading ``allow_tf32`` raises once somebody has used the newer setting.
    """
    if dtype != torch.float32:
        return False
    settings = torch.backends.cuda.matmul if linear else torch.backends.cudnn.conv
    return settings.fp32_precision != "tf32"


def span(block_m: int, tokens: int) -> int:
    """How many samples a flat tile of ``block_m`` rows can touch; 0: too many for vectors."""
    if tokens % block_m == 0:
        return 1
    most = block_m // tokens if block_m % tokens == 0 else -(-(block_m - 1) // tokens) + 1
    return most if most <= 4 else 0


def _powers(limit: int) -> Iterator[int]:
    size = 1
    while size <= limit:
        yield size
        size *= 2


def best_box(
    samples: int, rows: int, cols: int, pixels: int, most_samples: int, least_pixels: int
) -> tuple[tuple[int, int, int], float]:
    """The box of ``pixels`` that wastes least on a ``samples x rows x cols`` grid, and its cover.

    28 x 28 is covered to 77% by (1, 8, 16) and fully by (8, 4, 4): which box a tile has changes
    nothing about its shared-memory traffic, so cover decides. Several samples may share a tile up
    to ``most_samples``, while each keeps ``least_pixels`` (column sums cost 8 bytes per channel
    and sample of a tile). Ties go to fewer samples, then to the squarest (its halo stays in L2).
    """
    best = None
    for depth in _powers(min(most_samples, pixels)):
        if depth > 1 and (pixels // depth < least_pixels or depth > samples):
            continue
        for height in _powers(pixels // depth):
            width = pixels // depth // height
            tiles = -(-samples // depth) * -(-rows // height) * -(-cols // width)
            cover = samples * rows * cols / (tiles * pixels)
            rank = (round(cover, 6), -depth, -max(height, width))
            if best is None or rank > best[0]:
                best = (rank, (depth, height, width), cover)
    return best[1], best[2]


def _obstacle(direction: str, shape: ConvShape, device: Device, describable: bool) -> str | None:
    """Why tensor descriptors cannot be used."""
    stride = shape.geometry.stride
    if not device.has_tma:
        return f"{device.name} has no tensor memory accelerator"
    if not describable:
        return "rows of channels or bases are not multiples of 16 bytes"
    if stride not in ((1, 1), (2, 2)):
        return f"stride {stride} is neither 1 nor 2"
    if stride == (1, 1):
        return None
    height, width = shape.size
    if height % 2 or width % 2:
        return f"stride 2 over an odd {height}x{width} input has uneven phases"
    if shape.in_channels % 16:
        return f"stride 2 needs input channels in multiples of 16, not {shape.in_channels}"
    if direction == "dgrad" and shape.geometry.dilation != (1, 1):
        return "the input gradient of a strided, dilated convolution has no phases"
    return None


def choose(
    direction: str,
    shape: ConvShape,
    dtype: torch.dtype,
    device: Device,
    *,
    describable: bool,
    expanded: bool = False,
    column_sums: bool = False,
) -> Choice:
    """The default config of a product.

    Args:
        direction: ``fprop`` or ``dgrad``.
        describable: whether bases and rows of all tensors are aligned to 16 bytes.
        expanded: ``source`` indices scatter the samples: a tile holds pixels of one.
        column_sums: the epilogue takes T0 or T1; of ``fprop``, the moments of the product.
    """
    obstacle = _obstacle(direction, shape, device, describable)
    columns = shape.out_channels if direction == "fprop" else shape.in_channels
    block_n = 128 if columns > 64 else 64
    exact = full_precision(dtype, shape.geometry.linear)
    if obstacle is None:
        block_k = 32 if dtype == torch.float32 else 64
        config = GemmConfig("flat", 128, block_n, block_k, 8, 3)
    else:
        block_k = 32 if dtype == torch.float32 or device.arch < 90 else 64
        config = GemmConfig("gather", 128, block_n, block_k, 8, 4 if device.arch < 90 else 3)
    if shape.pointwise and not expanded:
        moments = direction == "fprop" and column_sums
        return _flat_choice(config, shape, device, columns, column_sums, exact, obstacle, moments)
    if obstacle is None:
        return _box_choice(direction, config, shape, device, expanded, column_sums, exact)

    depth = shape.in_channels if direction == "fprop" else shape.out_channels
    grid = shape.out_size if direction == "fprop" else shape.size
    if column_sums:
        # Addresses and two column sums leave room for 32 accumulators a thread.
        config = replace(config, block_n=64)
        if depth % config.block_k:
            config = replace(config, block_m=64)
    if depth < block_k:
        # Too few channels for one K step per filter tap: taps and channels share K steps.
        config = replace(config, block_k=32)
    if exact:
        config = replace(config, block_m=64, block_n=64, block_k=16, warps=4, stages=2)
    while config.block_m > 16 and span(config.block_m, grid[0] * grid[1]) == 0:
        config = replace(config, block_m=config.block_m // 2, warps=4)
    return Choice(config, f"pointer path: {obstacle}")


def _box_choice(
    direction: str,
    config: GemmConfig,
    shape: ConvShape,
    device: Device,
    expanded: bool,
    column_sums: bool,
    exact: bool,
) -> Choice:
    """Boxes of pixels; with stride 2 of one parity class."""
    forward, step = direction == "fprop", shape.geometry.stride[0]
    columns = shape.out_channels if forward else shape.in_channels
    grid = shape.out_size if forward else shape.size
    block_n, block_k = config.block_n, config.block_k
    if step == 2:
        # A descriptor of one parity class cannot stop at the end of its channels.
        while forward and shape.in_channels % block_k:
            block_k //= 2
        while not forward and shape.in_channels % block_n:
            block_n //= 2
        if not forward:
            grid = (grid[0] // 2, grid[1] // 2)
    block_m, warps, stages = 128, 8, 3
    if exact:
        block_m, block_n, block_k, warps, stages = 64, min(64, block_n), 16, 4, 2
    most, least = 1 if expanded else 8, 32 if column_sums else 16
    while True:
        box, cover = best_box(shape.batch, *grid, block_m, most, least)
        tiles = -(-shape.batch // box[0]) * -(-grid[0] // box[1]) * -(-grid[1] // box[2])
        tiles *= -(-columns // block_n) * (1 if forward else step * step)
        if tiles >= device.processors or block_m <= 64:
            break
        block_m, warps = block_m // 2, 4
    config = GemmConfig("box", block_m, block_n, block_k, warps, stages, box)
    phases = "" if step == 1 else ", one phase per parity" if not forward else ", parity views"
    return Choice(config, f"descriptor boxes cover {cover:.0%} of {grid[0]}x{grid[1]}{phases}")


def _flat_choice(
    config: GemmConfig,
    shape: ConvShape,
    device: Device,
    columns: int,
    column_sums: bool,
    exact: bool,
    obstacle: str | None,
    moments: bool,
) -> Choice:
    """Rows of pixels or tokens, whatever sample they are of."""
    tokens = shape.size[0] * shape.size[1]
    tiles = -(-shape.batch * tokens // 128) * -(-columns // config.block_n)
    touched = span(config.block_m, tokens)
    if exact:
        config = replace(config, block_m=64, block_n=64, block_k=16, warps=4, stages=2)
    elif obstacle is not None:
        config = replace(config, block_k=32, block_n=64 if column_sums else config.block_n)
        if moments and touched > 2:
            config = replace(config, block_m=64, warps=4)
    elif tiles < device.processors:
        config = replace(config, block_m=64, warps=4)
    elif touched > 2 or (column_sums and touched == 2):
        # Table rows and column sums per sample of a tile need registers.
        config = replace(config, block_n=64)
        if column_sums and touched > 2:
            config = replace(config, block_m=64, warps=4)
    touched = span(config.block_m, tokens)
    if touched == 0:
        # One gathered table row per tile row needs registers: smaller tiles.
        config = replace(config, block_m=64, block_n=64, warps=4)
        touched = span(64, tokens)
    reason = "descriptor rows, persistent" if obstacle is None else f"pointer path: {obstacle}"
    rows = "gathered table rows" if touched == 0 else f"at most {touched} samples a tile"
    return Choice(config, f"{reason}; {rows}")

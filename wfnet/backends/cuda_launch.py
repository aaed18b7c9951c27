"""Launchers of the compiled kernels (``wfnet._C``, sources in csrc/): tensors in, tensors out.

Pixel tensors are channels-last here, ``[B, H, W, C]`` contiguous, bf16 or fp16; tables are
``[B, C]`` fp32. All memory comes from PyTorch's allocator, workspaces included; kernels run on the
current stream and may be captured in a CUDA graph.

``WFNET_CUDA_EMULATE=PATH`` takes the kernels from the emulated module at PATH (built from the same
sources by ``csrc/build.py --emulated``), which runs them on CPU tensors, thread by thread, and
checks every access. It is for tests: slow, and refused for CUDA tensors.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import operator
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

VECTOR = 8  # channels of one 16-byte access
HOPPER_DEPTH = 64  # channels that the Hopper kernels multiply at a time
DTYPES = {torch.bfloat16: "bfloat16", torch.float16: "float16"}
REFUSED_DTYPE = "the CUDA kernels take float16 and bfloat16, not {} (use autocast)"
_EMULATE = "WFNET_CUDA_EMULATE"
_HOPPER = "WFNET_CUDA_HOPPER"


class Library(NamedTuple):
    """The loaded kernels, or why there are none."""

    module: ModuleType | None
    missing: str | None

    @property
    def emulated(self) -> bool:
        """Whether kernels run on the host."""
        return self.module is not None and self.module.emulated


@functools.cache
def library() -> Library:
    """Loads ``wfnet._C``, or the emulated module that WFNET_CUDA_EMULATE names, once."""
    path = os.environ.get(_EMULATE)
    if path:
        spec = importlib.util.spec_from_file_location(os.path.basename(path).split(".")[0], path)
        if spec is None or not os.path.exists(path):
            return Library(None, f"{_EMULATE}={path} is not an emulated module")
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return Library(module, None)
    try:
        module = importlib.import_module("wfnet._C")
        return Library(module, None) if _is_current(module) else Library(None, _STALE)
    except ImportError as error:
        return Library(
            None,
            f"wfnet._C is not built ({error}); run `python csrc/build.py` in a checkout, or "
            "`WFNET_BUILD_CUDA=1 pip install .`, with nvcc 13.0 or newer",
        )


_STALE = "wfnet._C was built from other sources than csrc/ has now; run `python csrc/build.py`"


def _is_current(module: ModuleType, csrc: Path = Path(__file__).parents[2] / "csrc") -> bool:
    """In a checkout, whether the extension is of its sources; an installed package has none."""
    script = csrc / "build.py"
    if not script.exists():
        return True
    spec = importlib.util.spec_from_file_location("wfnet_csrc_build", script)
    build = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(build)
    return getattr(module, "sources", None) == build.sources_digest()


class Axis(NamedTuple):
    """One dimension of a convolution."""

    input: int
    output: int
    kernel: int
    stride: int = 1
    padding: int = 0
    dilation: int = 1


@dataclass(frozen=True)
class Layer:
    """The layer whose output a gradient reaches: what its elementwise backward reads.

    Pixel tensors have the layout of that output, contiguous.
    """

    branch: Tensor | None = None  # v = A * u, stored by the forward pass
    scale: Tensor | None = None  # [B, C] fp32, A
    shift: Tensor | None = None  # [B, C] fp32, C
    activation: Tensor | None = None  # the output itself, where a residual made it
    skip: Tensor | None = None  # gradient that reaches the output another way
    relu: bool = False

    def check(self, shape: tuple[int, ...], dtype: torch.dtype, want: Want) -> None:
        """Raises ValueError for tensors that do not fit an output ``[B, H, W, C]``, or missing."""
        table = (shape[0], shape[3])
        reads = (self.branch, self.activation, self.scale, self.shift)
        if shape[3] % VECTOR and (self.relu or any(t is not None for t in reads)):
            raise ValueError(
                f"the CUDA kernels finish layers of a multiple of {VECTOR} channels, not {shape[3]}"
            )
        for name in ("branch", "activation", "skip"):
            _check(name, getattr(self, name), shape, dtype)
        for name, tensor in (
            ("scale", self.scale),
            ("shift", self.shift),
            ("t0", want.t0),
            ("t1", want.t1),
        ):
            _check(name, tensor, table, torch.float32)
        if want.t1 is not None and self.branch is None:
            raise ValueError("t1 is summed from the branch; pass branch=")
        if want.scaled_grad and self.scale is None:
            raise ValueError("scaled_grad needs the layer's table; pass scale=")
        if self.relu and self.branch is None and self.activation is None:
            raise ValueError("a ReLU mask is read from the activation or the branch; pass one")


@dataclass(frozen=True)
class Want:
    """What an elementwise backward writes: fresh tensors where True, ``[B, C]`` sums into place."""

    grad: bool = False
    scaled_grad: bool = False
    t0: Tensor | None = None
    t1: Tensor | None = None


class Gradient(NamedTuple):
    """``g`` and ``A * g``; None for what was not asked for."""

    grad: Tensor | None
    scaled_grad: Tensor | None


def _address(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


def _type_of(tensor: Tensor) -> str:
    if tensor.dtype not in DTYPES:
        raise ValueError(REFUSED_DTYPE.format(tensor.dtype))
    return DTYPES[tensor.dtype]


def _check(name: str, tensor: Tensor | None, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    """A kernel trusts what it is told: shapes and types are settled here."""
    if tensor is not None and (tuple(tensor.shape) != shape or tensor.dtype != dtype):
        raise ValueError(
            f"{name} must be {list(shape)} {dtype}, not {list(tensor.shape)} {tensor.dtype}"
        )


def _launch(
    function: str, reads: dict[str, Tensor | None], writes: dict[str, Tensor | None], **numbers
) -> None:
    """Calls ``function`` with the addresses of ``reads`` and ``writes``, on the current stream."""
    module = library().module
    kernel = operator.attrgetter(function)(module)
    device = next(t.device for t in writes.values() if t is not None)
    for name, tensor in (*reads.items(), *writes.items()):
        if tensor is not None and tensor.device != device:
            raise ValueError(f"{name} is on {tensor.device}, the results are on {device}")
    if module.emulated:
        _register(module, reads, False)
        _register(module, writes, True)
        try:
            kernel(
                **{name: _address(t) for name, t in {**reads, **writes}.items()},
                **numbers,
                device=0,
                stream=0,
            )
        finally:
            module.clear_memory()
        return
    kernel(
        **{name: _address(t) for name, t in {**reads, **writes}.items()},
        **numbers,
        device=device.index,
        stream=torch.cuda.current_stream(device).cuda_stream,
    )


def _register(module: ModuleType, tensors: dict[str, Tensor | None], writable: bool) -> None:
    for name, tensor in tensors.items():
        if tensor is not None and tensor.numel():
            spread = sum((n - 1) * s for n, s in zip(tensor.shape, tensor.stride(), strict=True))
            size = (spread + 1) * tensor.element_size()
            module.register_memory(tensor.data_ptr(), size, writable, name)


def dense(tensor: Tensor | None) -> Tensor | None:
    """``tensor`` contiguous and on 16 bytes, copied only if it is not."""
    if tensor is None:
        return None
    tensor = tensor.contiguous()
    return tensor if tensor.data_ptr() % 16 == 0 else tensor.clone()


def tables(scale: Tensor | None, shift: Tensor | None) -> tuple[Tensor | None, Tensor | None, int]:
    """Both tables with 16-byte aligned rows of one stride, copied only if need be, and the stride.

    Columns of a wider table are taken where they lie.
    """
    given = [t for t in (scale, shift) if t is not None]
    if not given:
        return None, None, 0
    fits = all(
        t.dtype == torch.float32
        and t.stride(1) == 1
        and t.stride(0) == given[0].stride(0)
        and t.stride(0) >= t.shape[1]
        and t.stride(0) % 4 == 0
        and t.data_ptr() % 16 == 0
        for t in given
    )
    if not fits:
        scale, shift = (
            None if t is None else dense(t.float().contiguous()) for t in (scale, shift)
        )
        return scale, shift, given[0].shape[1]
    return scale, shift, given[0].stride(0)


def narrow_tiles(columns: int) -> bool:
    """Whether the kernels take tiles of 64 columns (csrc/conv.h)."""
    return library().module.narrow_tiles(columns)


def hopper_processors(device: torch.device) -> int:
    """Multiprocessors of a device that runs the Hopper kernels (csrc/sm90_gemm.h); 0 for others.

    ``WFNET_CUDA_HOPPER=0`` takes the portable kernels there too, to compare the two.
    """
    if library().emulated or "9.0a" not in library().module.archs.split():
        return 0
    if os.environ.get(_HOPPER) == "0":
        return 0
    return _hopper_processors(device.index)


@functools.cache
def _hopper_processors(index: int) -> int:
    properties = torch.cuda.get_device_properties(index)
    return properties.multi_processor_count if (properties.major, properties.minor) == (9, 0) else 0


def hopper_refuses(backward: bool, processors: int, sizes: dict[str, object]) -> str | None:
    """Why these sizes take the portable kernels on a device with ``processors``; None: they do not.

    Args:
        backward: the input gradient, else the forward convolution.
        processors: as :func:`hopper_processors` tells.
        sizes: ``batch``, ``in_channels``, ``out_channels``, ``height`` and ``width``.
    """
    if not processors:
        return "not compute capability 9.0, or built without 9.0a"
    depth = sizes["out_channels" if backward else "in_channels"]
    if 2 * depth < -(-depth // HOPPER_DEPTH) * HOPPER_DEPTH:
        return f"{depth} channels would fill less than half of a {HOPPER_DEPTH}-deep slice"
    hopper = library().module.sm90
    return (hopper.refuse_dgrad if backward else hopper.refuse_fprop)(**sizes)


def by_source(source: Tensor, images: int) -> tuple[Tensor, Tensor]:
    """Samples grouped by image: ``order`` ``[B]`` and ``first_of`` ``[images + 1]``, int64.

    ``order[first_of[n]:first_of[n + 1]]`` are the samples of image n, in ascending order. No
    synchronisation, so it may be captured in a CUDA graph.
    """
    ordered, order = torch.sort(source, stable=True)
    bounds = torch.arange(images + 1, device=source.device, dtype=source.dtype)
    return order, torch.searchsorted(ordered, bounds)


def pad_channels(tensor: Tensor) -> Tensor:
    """``[..., C]`` with zeros up to a multiple of 8 channels."""
    missing = -tensor.shape[-1] % VECTOR
    return F.pad(tensor, (0, missing)) if missing else tensor


def conv_fprop(
    x: Tensor,
    weight: Tensor,
    height: Axis,
    width: Axis,
    scale: Tensor,
    shift: Tensor | None = None,
    *,
    residual: Tensor | None = None,
    relu: bool = False,
    source: Tensor | None = None,
    save_branch: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """``out = act(scale * u + shift + residual)`` and, if asked for, the branch ``scale * u``.

    ``u = conv(x[source], weight)``: an image is convolved once, whatever the number of its samples.
    Equivalent (NCHW for brevity): ``F.conv2d(x, weight)[source] * scale[:, :, None, None] + ...``.

    Args:
        x: ``[N, H, W, C]`` contiguous.
        weight: ``[O, R, S, C]`` contiguous, ``O`` a multiple of 8.
        scale, shift: ``[B, O]`` fp32.
        residual: ``[B, P, Q, O]`` contiguous.
        source: ``[B]`` int64; a position outside of ``x`` gives NaN for its sample.

    Returns:
        ``out`` and the branch ``[B, P, Q, O]``, or None.
    """
    images, columns = x.shape[0], weight.shape[0]
    samples = scale.shape[0] if source is not None else images
    _check("weight", weight, (columns, height.kernel, width.kernel, x.shape[3]), x.dtype)
    _check("x", x, (images, height.input, width.input, x.shape[3]), x.dtype)
    _check("source", source, (samples,), torch.int64)
    for name, table in (("scale", scale), ("shift", shift)):
        _check(name, table, (samples, columns), torch.float32)
    _check("residual", residual, (samples, height.output, width.output, columns), x.dtype)
    x, weight = dense(pad_channels(x)), dense(pad_channels(weight))
    out = x.new_empty((samples, height.output, width.output, columns))
    branch = torch.empty_like(out) if save_branch else None
    if out.numel() == 0:
        return out, branch
    order = first_of = None
    if source is not None:
        inside = (source >= 0) & (source < images)
        scale = torch.where(inside[:, None], scale, torch.nan)
        source = source.clamp(0, images - 1)
        if images > samples:  # most images are not used at all
            x, images = x.index_select(0, source), samples
        else:
            order, first_of = by_source(source, images)
    scale, shift, stride = tables(scale, shift)
    reads = {"x": x, "weight": weight, "scale": scale, "shift": shift, "residual": dense(residual)}
    numbers = {"table_stride": stride, "relu": relu, "dtype": _type_of(x)}
    sizes = {"batch": images, "in_channels": x.shape[3], "out_channels": columns,
             "height": height, "width": width}  # fmt: skip
    processors = hopper_processors(x.device) if order is None else 0
    if hopper_refuses(False, processors, sizes) is None:
        _launch("sm90.fprop", reads, {"branch": branch, "out": out}, processors=processors,
                **sizes, **numbers)  # fmt: skip
    else:
        _launch("conv_fprop", {**reads, "order": order, "first_of": first_of},
                {"branch": branch, "out": out}, samples=samples, **sizes, **numbers)  # fmt: skip
    return out, branch


class _Sums:
    """Where the two column sums of a launch go, with their workspaces.

    Sums that are not rows of one stride go to fresh memory and are copied at the end.
    """

    def __init__(self, want: Want, slots: Callable[[], int]):
        self.wanted = (want.t0, want.t1)
        given = [t for t in self.wanted if t is not None]
        direct = all(t.stride(1) == 1 and t.stride(0) == given[0].stride(0) for t in given)
        self.totals = tuple(
            t if t is None or direct else torch.empty(t.shape, dtype=torch.float32, device=t.device)
            for t in self.wanted
        )
        self.stride = 0 if not given else next(t for t in self.totals if t is not None).stride(0)
        self.partials: tuple[Tensor | None, ...] = (None, None)
        if given:
            shape = (slots(), given[0].shape[1])
            self.partials = tuple(
                None if t is None else torch.empty(shape, dtype=torch.float32, device=t.device)
                for t in self.wanted
            )

    def writes(self) -> dict[str, Tensor | None]:
        names = ("partial0", "partial1", "t0", "t1")
        return dict(zip(names, (*self.partials, *self.totals), strict=True))

    def copy(self) -> None:
        for place, total in zip(self.wanted, self.totals, strict=True):
            if place is not total:
                place.copy_(total)


def _zero_sums(want: Want) -> None:
    for total in (want.t0, want.t1):
        if total is not None:
            total.zero_()


def _reads_of(layer: Layer) -> tuple[dict[str, Tensor | None], int]:
    scale, shift, stride = tables(layer.scale, layer.shift)
    pixels = {name: dense(getattr(layer, name)) for name in ("skip", "branch", "activation")}
    return {**pixels, "scale": scale, "shift": shift}, stride


def conv_dgrad(
    ag: Tensor, weight: Tensor, height: Axis, width: Axis, below: Layer, want: Want
) -> Gradient:
    """Input gradient of a convolution, and the elementwise backward of the layer below it.

    Equivalent (NCHW for brevity)::

        g  = torch.nn.grad.conv2d_input(x.shape, weight, ag, stride, padding, dilation) + skip
        g  = g * (activation > 0), or g * (branch + shift > 0), if below.relu
        t0 = g.sum((2, 3));  t1 = (g * branch).sum((2, 3));  scaled_grad = scale * g

    Args:
        ag: ``[B, P, Q, O]`` contiguous, ``A * g`` of this layer, ``O`` a multiple of 8.
        weight: ``[O, R, S, C]`` contiguous.
        below: the layer below; its channels ``C`` are a multiple of 8. Without tables, masks and
            sums, ``C`` may be any number.
        want: what to write; sums are ``[B, C]`` fp32.
    """
    batch, channels = ag.shape[0], weight.shape[3]
    _check("ag", ag, (batch, height.output, width.output, weight.shape[0]), weight.dtype)
    _check("weight", weight, (ag.shape[3], height.kernel, width.kernel, channels), ag.dtype)
    below.check((batch, height.input, width.input, channels), ag.dtype, want)
    ag, weight = dense(ag), dense(pad_channels(weight))
    columns = weight.shape[3]
    shape = (batch, height.input, width.input, columns)
    grad = ag.new_empty(shape) if want.grad else None
    scaled = ag.new_empty(shape) if want.scaled_grad else None
    if batch == 0 or channels == 0:
        _zero_sums(want)
        return Gradient(grad, scaled)
    if columns != channels and below.skip is not None:
        below = Layer(skip=pad_channels(below.skip))
    sizes = {"batch": batch, "in_channels": columns, "out_channels": weight.shape[0],
             "height": height, "width": width}  # fmt: skip
    processors = hopper_processors(ag.device)
    on_hopper = hopper_refuses(True, processors, sizes) is None

    def slots() -> int:
        module = library().module
        if on_hopper:
            return module.sm90.dgrad_slots(**sizes)
        return module.conv_dgrad_slots(batch=batch, in_channels=columns, height=height, width=width)

    sums = _Sums(want, slots)
    reads, stride = _reads_of(below)
    _launch(
        "sm90.dgrad" if on_hopper else "conv_dgrad",
        {"ag": ag, "weight": weight, **reads},
        {"grad": grad, "scaled_grad": scaled, **sums.writes()},
        table_stride=stride, relu=below.relu, total_stride=sums.stride, dtype=_type_of(ag),
        **sizes, **({"processors": processors} if on_hopper else {}),
    )  # fmt: skip
    sums.copy()
    if columns != channels:
        grad = grad[..., :channels].contiguous()
    return Gradient(grad, scaled)


def _pixel_strides(dout: Tensor) -> tuple[int, int] | None:
    """Strides of samples and pixels of ``[B, H, W, C]``; None if pixels are not evenly apart."""
    batch, height, width, _ = dout.shape
    sample, row, pixel, channel = dout.stride()
    if channel != 1 or dout.data_ptr() % 16:
        return None
    if width == 1:
        pixel = row
    elif height > 1 and row != width * pixel:
        return None
    if height * width == 1:
        pixel = 0
    if batch == 1:
        sample = 0
    return (sample, pixel) if sample % VECTOR == 0 and pixel % VECTOR == 0 else None


class Pooling(NamedTuple):
    """A maximum pooling that the output of a layer went through."""

    positions: Tensor  # [B, P, Q, C] uint8, of :func:`max_pool`
    height: Axis
    width: Axis


def max_pool(
    x: Tensor, height: Axis, width: Axis, save_positions: bool = True
) -> tuple[Tensor, Tensor | None]:
    """``F.max_pool2d`` and, if asked for, which tap of its window each maximum was.

    Args:
        x: ``[B, H, W, C]`` contiguous, ``C`` a multiple of 8.
        height, width: without dilation; windows of at most 255 taps.

    Returns:
        ``[B, P, Q, C]``, and uint8 of the same shape or None: the first of equal values, taps row
        by row.
    """
    batch, columns = x.shape[0], x.shape[3]
    _check("x", x, (batch, height.input, width.input, columns), x.dtype)
    out = x.new_empty((batch, height.output, width.output, columns))
    positions = torch.empty_like(out, dtype=torch.uint8) if save_positions else None
    if out.numel():
        _launch(
            "max_pool", {"x": dense(x)}, {"out": out, "positions": positions}, batch=batch,
            columns=columns, height=height, width=width, dtype=_type_of(x),
        )  # fmt: skip
    return out, positions


def epilogue_bwd(
    dout: Tensor, layer: Layer, want: Want, pooling: Pooling | None = None
) -> Gradient:
    """One pass from ``dout`` to ``g``, ``A * g`` and the column sums; see :func:`conv_dgrad`.

    Args:
        dout: ``[B, H, W, C]``; pixels may be broadcast (a mean's gradient is read as it lies).
        layer: the layer whose output ``dout`` reaches.
        want: what to write.
        pooling: what lies between the layer and ``dout``, which then is ``[B, P, Q, C]``.
    """
    batch, *size, columns = dout.shape
    if pooling is not None:
        size = [pooling.height.input, pooling.width.input]
        _check("dout", dout, tuple(pooling.positions.shape), dout.dtype)
        _check("positions", pooling.positions, tuple(dout.shape), torch.uint8)
    shape = (batch, *size, columns)
    layer.check(shape, dout.dtype, want)
    strides = _pixel_strides(dout) if pooling is None else None
    if strides is None:
        dout = dense(dout)
        strides = _pixel_strides(dout)
    pixels = size[0] * size[1]
    grad = dout.new_empty(shape) if want.grad else None
    scaled = dout.new_empty(shape) if want.scaled_grad else None
    if dout.numel() == 0:
        _zero_sums(want)
        return Gradient(grad, scaled)
    sums = _Sums(want, lambda: library().module.epilogue_bwd_slots(batch=batch, pixels=pixels))
    reads, stride = _reads_of(layer)
    positions, height, width = (None, None, None) if pooling is None else pooling
    _launch(
        "epilogue_bwd",
        {"dout": dout, "positions": dense(positions), **reads},
        {"grad": grad, "scaled_grad": scaled, **sums.writes()},
        sample_stride=strides[0], pixel_stride=strides[1], batch=batch, pixels=pixels,
        columns=columns, height=height, width=width, table_stride=stride, relu=layer.relu,
        total_stride=sums.stride, dtype=_type_of(dout),
    )  # fmt: skip
    sums.copy()
    return Gradient(grad, scaled)


def sum_by_source(dout: Tensor, scale: Tensor, source: Tensor, images: int) -> Tensor:
    """``zeros[images].index_add(0, source, scale * dout)`` in fp32, samples in ascending order.

    Args:
        dout: ``[B, H, W, C]`` contiguous.
        scale: ``[B, C]`` fp32.
        source: ``[B]`` int64; samples of no image are dropped.
    """
    batch, height, width, columns = dout.shape
    _check("scale", scale, (batch, columns), torch.float32)
    _check("source", source, (batch,), torch.int64)
    scaled = dout.new_empty((images, height, width, columns))
    if scaled.numel() == 0 or dout.numel() == 0:
        return scaled.zero_()
    order, first_of = by_source(source, images)
    scale, _, stride = tables(scale, None)
    _launch(
        "sum_by_source",
        {"dout": dense(dout), "scale": scale, "order": order, "first_of": first_of},
        {"scaled": scaled},
        table_stride=stride, images=images, pixels=height * width, columns=columns,
        dtype=_type_of(dout),
    )  # fmt: skip
    return scaled


def _rows(matrix: Tensor) -> Tensor:
    """A matrix with 16-byte aligned rows; columns of a wider one are taken where they lie."""
    fits = matrix.stride(1) == 1 and matrix.stride(0) % 4 == 0 and matrix.data_ptr() % 16 == 0
    return matrix if fits and matrix.stride(0) >= matrix.shape[1] else dense(matrix)


def _check_gates(alpha: Tensor, forget: Tensor) -> None:
    _check("alpha", alpha, tuple(alpha.shape[:2]), torch.float32)
    _check("forget", forget, tuple(forget.shape[:2]), torch.int64)


def gate_rows(
    alpha: Tensor, forget: Tensor, gate_scale: float | Tensor, factor: Tensor | None = None
) -> Tensor:
    """``factor * wfnet.gates.gate_rows(alpha, forget, gate_scale)`` ``[B, O]`` fp32.

    Args:
        alpha: ``[K, O]`` fp32, ``O`` a multiple of 4.
        forget: ``[B, J]`` int64, ``J`` from 1 to 16; -1 selects no row, out of range gives NaN.
        gate_scale: one for all columns, or ``[O]`` fp32.
        factor: ``[O]`` fp32, or None for 1.
    """
    _check_gates(alpha, forget)
    for name, row in (("gate_scale", gate_scale), ("factor", factor)):
        if isinstance(row, Tensor):
            _check(name, row, (alpha.shape[1],), torch.float32)
    alpha, forget = _rows(alpha), dense(forget)
    rows = torch.empty((forget.shape[0], alpha.shape[1]), dtype=torch.float32, device=alpha.device)
    if rows.numel() == 0:
        return rows
    scales = dense(gate_scale) if isinstance(gate_scale, Tensor) else None
    _launch(
        "gate_rows",
        {"alpha": alpha, "forget": forget, "scales": scales, "factor": dense(factor)},
        {"rows": rows},
        gate_scale=1.0 if scales is not None else float(gate_scale),
        batch=forget.shape[0], labels=forget.shape[1], classes=alpha.shape[0],
        columns=alpha.shape[1], alpha_stride=alpha.stride(0), row_stride=rows.stride(0),
    )  # fmt: skip
    return rows


def gate_rows_bwd(
    t: Tensor,
    alpha: Tensor,
    forget: Tensor,
    products: Tensor | None = None,
    chosen: Tensor | None = None,
    into: Tensor | None = None,
) -> Tensor:
    """``wfnet.gates.gate_rows_backward(t, alpha, forget)`` ``[K, O]``, bitwise reproducible.

    Args:
        t: ``[B, O]`` fp32.
        alpha: ``[K, O]`` fp32, ``O`` a multiple of 4.
        forget: ``[B, J]`` int64, ``J`` from 1 to 16.
        products, chosen: ``[B, O]`` and ``[O]``: where ``chosen`` is not 0, ``t * products`` is
            summed instead of ``t``.
        into: ``[K, O]`` fp32 to write to, rows of a multiple of 4 elements; None: fresh memory.
    """
    _check_gates(alpha, forget)
    for name, sums in (("t", t), ("products", products)):
        _check(name, sums, (forget.shape[0], alpha.shape[1]), torch.float32)
    _check("chosen", chosen, (alpha.shape[1],), torch.float32)
    _check("into", into, tuple(alpha.shape), torch.float32)
    alpha, forget, t = _rows(alpha), dense(forget), _rows(t)
    if products is not None and products.stride() != t.stride():
        products, t = dense(products), dense(t)
    dalpha = (
        torch.empty(alpha.shape, dtype=torch.float32, device=alpha.device) if into is None else into
    )
    if dalpha.numel() == 0 or t.shape[0] == 0:
        return dalpha.zero_()
    direct = _rows(dalpha)
    _launch(
        "gate_rows_bwd",
        {"t": t, "products": products, "chosen": chosen, "alpha": alpha, "forget": forget},
        {"dalpha": direct},
        batch=t.shape[0], labels=forget.shape[1], classes=alpha.shape[0], columns=alpha.shape[1],
        alpha_stride=alpha.stride(0), row_stride=t.stride(0), gradient_stride=direct.stride(0),
    )  # fmt: skip
    return dalpha if direct is dalpha else dalpha.copy_(direct)

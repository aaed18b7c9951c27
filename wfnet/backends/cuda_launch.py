"""Launchers of the compiled kernels (``wfnet._C``, sources in csrc/): tensors in, tensors out.

Tensors are ``[B, C, H, W]`` here, bf16 or fp16, and copied to channels-last memory where they are
not in it; tables are ``[B, C]`` fp32. All memory comes from PyTorch's allocator, workspaces
included; kernels run on the current stream and may be captured in a CUDA graph.

Tests put an emulated module in the place of :func:`library`'s. It is built from the same sources,
runs the kernels on CPU tensors, thread by thread, and checks every access.
"""

import functools
import importlib
import importlib.util
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

import torch
from torch import Tensor

from wfnet.backends.contract import (
    NO_LAYER,
    Activation,
    ConvGeometry,
    Epilogue,
    LayerBelow,
    LayerGradient,
)

DTYPES = (torch.bfloat16, torch.float16)
REFUSED_DTYPE = "the CUDA kernels take float16 and bfloat16, not {} (use autocast)"
_DEPTH = 64  # channels that the kernels multiply at a time (csrc/geometry.h)
_EMULATED_PROCESSORS = 6  # three clusters


class Library(NamedTuple):
    """The loaded kernels, or why there are none."""

    module: ModuleType | None
    missing: str | None


@functools.cache
def library() -> Library:
    """Loads ``wfnet._C``, once."""
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
    """Returns whether the extension is of this checkout's sources; True without a checkout."""
    script = csrc / "build.py"
    if not script.exists():
        return True
    spec = importlib.util.spec_from_file_location("wfnet_csrc_build", script)
    build = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(build)
    return getattr(module, "sources", None) == build.sources_digest()


def refuse(
    backward: bool,
    input_shape: tuple[int, ...],
    weight_shape: tuple[int, ...],
    geometry: ConvGeometry,
) -> str | None:
    """Returns why the kernels do not take a convolution, in words; None if they do.

    Args:
        backward: the input gradient, else the forward convolution.
        input_shape: ``(N, C, H, W)`` of the input.
        weight_shape: ``(O, C, R, S)``.
    """
    depth = weight_shape[0 if backward else 1]
    if 2 * depth < -(-depth // _DEPTH) * _DEPTH:
        return f"{depth} channels would fill less than half of a {_DEPTH}-deep slice"
    module = library().module
    function = module.refuse_dgrad if backward else module.refuse_fprop
    return function(**_sizes(input_shape, weight_shape, geometry))


def tile_columns(
    backward: bool,
    input_shape: tuple[int, ...],
    weight_shape: tuple[int, ...],
    geometry: ConvGeometry,
    device: torch.device,
) -> int:
    """Returns the columns of a tile on ``device``; the other arguments are :func:`refuse`'s."""
    sizes = _sizes(input_shape, weight_shape, geometry)
    return library().module.tile_columns(backward, _processors(device), **sizes)


def _processors(device: torch.device) -> int:
    """Multiprocessors: the kernels' persistent grid has a thread block for each."""
    if library().module.emulated:
        return _EMULATED_PROCESSORS
    return torch.cuda.get_device_properties(device).multi_processor_count


def _sizes(
    input_shape: tuple[int, ...], weight_shape: tuple[int, ...], geometry: ConvGeometry
) -> dict[str, object]:
    """A convolution as the kernels take it; an axis: sizes, filter, stride, padding, dilation."""
    size, kernel = tuple(input_shape[2:]), tuple(weight_shape[2:])
    output = geometry.output_size(*size, kernel)
    how = geometry.stride, geometry.padding, geometry.dilation
    height, width = zip(size, output, kernel, *how, strict=True)
    return {
        "batch": max(input_shape[0], 1),
        "in_channels": weight_shape[1],
        "out_channels": weight_shape[0],
        "height": height,
        "width": width,
    }


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
    kernel = getattr(module, function)
    device = next(t.device for t in writes.values() if t is not None)
    tensors = {**reads, **writes}
    for name, tensor in tensors.items():
        if tensor is not None and tensor.device != device:
            raise ValueError(f"{name} is on {tensor.device}, the results are on {device}")
    addresses = {name: 0 if t is None else t.data_ptr() for name, t in tensors.items()}
    numbers["processors"] = _processors(device)
    if not module.emulated:
        stream = torch.cuda.current_stream(device).cuda_stream
        kernel(**addresses, **numbers, device=device.index, stream=stream)
        return
    _register(module, reads, False)
    _register(module, writes, True)
    try:
        kernel(**addresses, **numbers, device=0, stream=0)
    finally:
        module.clear_memory()


def _register(module: ModuleType, tensors: dict[str, Tensor | None], writable: bool) -> None:
    for name, tensor in tensors.items():
        if tensor is not None and tensor.numel():
            spread = sum((n - 1) * s for n, s in zip(tensor.shape, tensor.stride(), strict=True))
            size = (spread + 1) * tensor.element_size()
            module.register_memory(tensor.data_ptr(), size, writable, name)


def _dense(tensor: Tensor) -> Tensor:
    """``tensor`` contiguous and on 16 bytes, copied only if it is not."""
    tensor = tensor.contiguous()
    return tensor if tensor.data_ptr() % 16 == 0 else tensor.clone()


def _pixels(tensor: Tensor | None) -> Tensor | None:
    """``[B, C, H, W]`` as dense ``[B, H, W, C]``: a view of channels-last memory."""
    return None if tensor is None else _dense(tensor.permute(0, 2, 3, 1))


def _channels_first(tensor: Tensor | None) -> Tensor | None:
    """``[B, H, W, C]`` as a ``[B, C, H, W]`` view, channels-last in memory."""
    return None if tensor is None else tensor.permute(0, 3, 1, 2)


def _tables(*tables: Tensor | None) -> tuple[list[Tensor | None], int]:
    """Tables with 16-byte aligned rows of one stride, copied only if need be, and the stride.

    Columns of a wider table are taken where they lie.
    """
    given = [t for t in tables if t is not None]
    stride = given[0].stride(0) if given else 0
    fits = stride % 4 == 0 and all(
        t.stride() == (stride, 1) and t.data_ptr() % 16 == 0 and stride >= t.shape[1] for t in given
    )
    if fits:
        return list(tables), stride
    return [None if t is None else _dense(t) for t in tables], given[0].shape[1]


def conv2d(x: Tensor, weight: Tensor, geometry: ConvGeometry, epilogue: Epilogue) -> Activation:
    """Computes ``out = act(scale * u + shift + residual)`` with ``u = conv(x, weight)``.

    Equivalent to ``F.conv2d(x, weight) * scale[:, :, None, None] + ...`` in the kernels' precision.

    Args:
        x: ``[N, C, H, W]``.
        weight: ``[O, C, R, S]``.
        epilogue: without ``source``.

    Raises:
        ValueError: for tensors that do not fit each other, and for what :func:`refuse` names.
    """
    scale, shift, residual = epilogue.scale, epilogue.shift, epilogue.residual
    sizes = _sizes(x.shape, weight.shape, geometry)
    out_shape = (x.shape[0], weight.shape[0], sizes["height"][1], sizes["width"][1])
    _check("weight", weight, (weight.shape[0], x.shape[1], *weight.shape[2:]), x.dtype)
    _check("scale", scale, out_shape[:2], torch.float32)
    _check("shift", shift, out_shape[:2], torch.float32)
    _check("residual", residual, out_shape, x.dtype)
    pixels = (out_shape[0], *out_shape[2:], out_shape[1])
    out = x.new_empty(pixels)
    branch = torch.empty_like(out) if epilogue.save else None
    if out.numel():
        (scale, shift), stride = _tables(scale, shift)
        reads = {
            "x": _pixels(x),
            "weight": _pixels(weight),
            "scale": scale,
            "shift": shift,
            "residual": _pixels(residual),
        }
        _launch(
            "fprop",
            reads,
            {"branch": branch, "out": out},
            **sizes,
            table_stride=stride,
            relu=epilogue.relu,
            bf16=x.dtype == torch.bfloat16,
        )
    out = _channels_first(out)
    masked = epilogue.save and epilogue.relu and residual is not None
    return Activation(out, _channels_first(branch), out if masked else None)


def conv2d_dgrad(
    scaled_grad: Tensor,
    weight: Tensor,
    input_shape: tuple[int, ...],
    geometry: ConvGeometry,
    below: LayerBelow = NO_LAYER,
) -> LayerGradient:
    """Computes an input gradient and the elementwise backward of the layer below it.

    Equivalent to :meth:`wfnet.backends.contract.Backend.conv2d_dgrad`.

    Args:
        scaled_grad: ``[B, O, P, Q]``.
        weight: ``[O, C, R, S]``.
        below: without a shortcut.

    Raises:
        ValueError: for tensors that do not fit each other, and for what :func:`refuse` names.
    """
    dtype, table = scaled_grad.dtype, tuple(input_shape[:2])
    skip = None if below.skip is None else below.skip.to(dtype)
    _check("weight", weight, (scaled_grad.shape[1], table[1], *weight.shape[2:]), dtype)
    for name, tensor in (("branch", below.branch), ("mask", below.mask), ("skip", skip)):
        _check(name, tensor, tuple(input_shape), dtype)
    for name in ("scale", "shift", "t0", "t1"):
        _check(name, getattr(below, name), table, torch.float32)
    if below.branch is None and (below.t1 is not None or (below.relu and below.mask is None)):
        raise ValueError("t1 and a ReLU without its output need the branch")
    sizes = _sizes(input_shape, weight.shape, geometry)
    shape = (input_shape[0], *input_shape[2:], input_shape[1])
    grad = scaled_grad.new_empty(shape) if below.need_grad else None
    scaled = scaled_grad.new_empty(shape) if below.need_scaled_grad else None
    if input_shape[0]:
        (scale, shift), stride = _tables(below.scale, below.shift)
        reads = {
            "ag": _pixels(scaled_grad),
            "weight": _pixels(weight),
            "skip": _pixels(skip),
            "branch": _pixels(below.branch),
            "activation": _pixels(below.mask),
            "scale": scale,
            "shift": shift,
        }
        sums = {"t0": below.t0, "t1": below.t1}
        given = [t for t in sums.values() if t is not None]
        if any(t.stride() != (given[0].stride(0), 1) for t in given):
            raise ValueError(f"t0 and t1 must be rows of one stride: {[t.stride() for t in given]}")
        rows = library().module.dgrad_slots(**sizes) if given else 0
        partials = {
            name: None if total is None else total.new_empty((rows, table[1]))
            for name, total in zip(("partial0", "partial1"), sums.values(), strict=True)
        }
        _launch(
            "dgrad",
            reads,
            {"grad": grad, "scaled_grad": scaled, **partials, **sums},
            **sizes,
            table_stride=stride,
            relu=below.relu,
            total_stride=given[0].stride(0) if given else 0,
            bf16=dtype == torch.bfloat16,
        )
    return LayerGradient(_channels_first(grad), _channels_first(scaled))
